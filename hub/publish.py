"""Publishing a converted folder on the Hub: changes are shown, uploaded if asked for, and fetched back to compare."""

import difflib
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from arm_zoo.files import WEIGHTS, CheckpointError, read_config, sha256_of
from arm_zoo.images.locate import HUB_ID
from arm_zoo.weights.download import explain, explained
from hub.card import write_card
from hub.catalog import FROZEN, RESULTS
from hub.check import check_folder
from hub.folders import CARD, FILES, UsageError, check_complete, read_header, set_license

MOST_DIFF_LINES = 60


@dataclass(frozen=True)
class Remote:
    """A repository on the Hub, at its newest commit."""

    unasked: str = ""  # why the Hub could not be asked
    commit: str | None = None  # None: there is no such repository
    files: dict[str, RepoSibling] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)  # tag -> commit
    card: Path | None = None  # a copy of the card


def publish(
    folder: Path,
    repo: str,
    yes: bool = False,
    tag: str | None = None,
    private: bool = False,
    license: str | None = None,
    results: Path = RESULTS,
    frozen: Path = FROZEN,
) -> Iterator[str]:
    """Show what would be uploaded, and with `yes` upload it, tag it and fetch it back; gives lines for people.

    The card is written anew for this repository. Without `yes` nothing changes anywhere. That works without a network
    too, but then nothing is compared with the repository. Weights without a licence in their header are uploaded only
    with `license`: a file does not say whose weights they are, so whoever publishes them has to state their licence.
    """
    if not HUB_ID.fullmatch(repo):
        raise UsageError(f"--repo must be ORG/NAME, got {repo!r}")
    if yes and HF_HUB_OFFLINE:
        raise UsageError("offline mode is on (HF_HUB_OFFLINE); publish where there is a network, with it unset")
    if not re.fullmatch(r"\w[\w.-]*", tag or "v1"):
        raise UsageError(f"--tag must be letters, digits, '.', '_' and '-', got {tag!r}")
    check_complete(folder)
    yield f"{folder}: {check_folder(folder)}"
    api = HfApi(library_name="arm-zoo")
    with tempfile.TemporaryDirectory() as name:
        staged, cache = Path(name) / "staged", Path(name) / "cache"
        staged.mkdir()
        for file in FILES:
            shutil.copyfile(folder / file, staged / file)
        if license:
            set_license(staged, license)
        if yes and read_header(staged / WEIGHTS).get("license", "unknown") == "unknown":
            said = f"no licence is stated for the weights in {folder}; state yours with --license ID"
            raise UsageError(f"{said}, or ask their authors what they allow and state that")
        with explained(f"read {repo}", repo):
            remote = _ask(api, repo, cache, needed=yes)
        if tag in remote.tags:
            there = ", ".join(remote.tags)
            raise UsageError(f"{repo} has a revision {tag} already ({there}); name another with --tag")
        write_card(staged, old=remote.card or folder / CARD, repo=repo, results=results, frozen=frozen)
        changes = {file: _change(staged / file, remote) for file in FILES}
        uploads = [file for file, change in changes.items() if change != "same"]
        current = [name for name, commit in remote.tags.items() if commit == remote.commit]
        next_tag = next(f"v{n}" for n in range(1, len(remote.tags) + 2) if f"v{n}" not in remote.tags)
        yield from _plan(staged, repo, remote, changes, tag or next_tag)
        if not uploads and current and tag is None:
            yield f"nothing to upload: all files are there already, tagged {', '.join(current)}"
        elif remote.unasked:
            yield f"dry run, not compared with what is there: {remote.unasked}"
        elif not yes:
            yield "dry run, nothing was uploaded; --yes uploads"
        else:
            tag = tag or next_tag
            with explained(f"publish {repo}", repo, right="write"):
                commit = _upload(api, staged, cache, repo, remote, uploads, tag, private)
            yield f"uploaded as {commit}, tagged {tag}, fetched back and compared"
            row = f'Weights("hosted", "{sha256_of(staged / WEIGHTS)}", "{tag}", "{repo}")'
            yield f'for arm_zoo/weights/hosted.py: "{read_config(staged)["architecture"]}.TAG": {row}'


def _ask(api: HfApi, repo: str, cache: Path, needed: bool) -> Remote:
    """Ask the Hub what it has; without a network the answer is empty, or an error if `needed`."""
    try:
        info = api.model_info(repo, files_metadata=True)
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}
    except RepositoryNotFoundError:
        return Remote()
    except HfHubHTTPError:  # the Hub has answered, so this is not for want of a network
        raise
    except Exception as error:  # the errors of the network have no common class
        if needed:
            raise
        return Remote("offline mode is on (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else explain(error, repo))
    files = {file.rfilename: file for file in info.siblings or []}
    card = hf_hub_download(repo, CARD, revision=info.sha, cache_dir=cache) if CARD in files else None
    return Remote("", info.sha, files, tags, Path(card) if card else None)


def _change(file: Path, remote: Remote) -> str:
    """How a file differs from the Hub's, which knows large files by their sha256, and others by Git's hash."""
    there = remote.files.get(file.name)
    if there is None:
        return "not compared" if remote.unasked else "new"
    same = git_hash(file.read_bytes()) == there.blob_id if there.lfs is None else sha256_of(file) == there.lfs.sha256
    return "same" if same else "changed"


def _plan(staged: Path, repo: str, remote: Remote, changes: dict[str, str], tag: str) -> Iterator[str]:
    state = "could not be reached" if remote.unasked else "exists" if remote.commit else "would be created"
    yield f"{repo} ({state}), tag {'the next of v1, v2, ...' if remote.unasked else tag}"
    for file, change in changes.items():
        yield f"  {file:20} {(staged / file).stat().st_size:>15,} bytes  {change}"
    for name in sorted(set(remote.files) - set(FILES)):
        yield f"  {name!r} is there and stays"
    if remote.card:
        old, new = (file.read_text(encoding="utf-8").splitlines() for file in (remote.card, staged / CARD))
        difference = list(difflib.unified_diff(old, new, "there", "new", lineterm=""))
        yield from (f"  {line}" for line in difference[:MOST_DIFF_LINES])
        if len(difference) > MOST_DIFF_LINES:
            yield f"  ... {len(difference) - MOST_DIFF_LINES} lines more"
    if read_header(staged / WEIGHTS).get("license", "unknown") == "unknown":
        yield "licence of the weights: unknown; ask their authors before redistributing (--license ID states one)"


def _upload(
    api: HfApi, staged: Path, cache: Path, repo: str, remote: Remote, uploads: list[str], tag: str, private: bool
) -> str:
    """Make a commit on top of the one that was compared, if needed, tag it, and compare what can be fetched."""
    commit = remote.commit
    if commit is None:
        api.create_repo(repo, private=private)
    if uploads or commit is None:
        operations = [CommitOperationAdd(name, staged / name) for name in uploads]
        message = f"Publish {tag} with arm-zoo"
        commit = api.create_commit(repo, operations, commit_message=message, parent_commit=commit).oid
    api.create_tag(repo, tag=tag, revision=commit)
    for name in FILES:
        if sha256_of(hf_hub_download(repo, name, revision=tag, cache_dir=cache)) != sha256_of(staged / name):
            where = f"{repo} at {tag} (commit {commit})"
            raise CheckpointError(f"{name} of {where} is not what was sent; publish it again")
    return commit
