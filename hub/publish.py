"""A converted folder -> a repository on the Hub: shown first, uploaded on request, verified by fetching it back."""

import difflib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from arm_zoo.download import explain
from arm_zoo.files import WEIGHTS, CheckpointError, read_config, sha256_of

from .card import write_card
from .catalog import RESULTS
from .check import check_folder
from .folders import CARD, FILES, UsageError, check_complete, read_header

MOST_DIFF_LINES = 60
_TAG = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Plan:
    """What publishing would do.

    Attributes:
        repo: ORG/NAME.
        exists: whether the repository is there; None if the Hub could not be asked.
        parent: its commit that the plan was made for.
        changes: state of each of our files: 'new', 'changed', 'same' or 'not compared'.
        sizes: bytes of each of our files.
        others: files that are there and stay.
        tag: revision that the upload would get.
        tags: revisions that are there.
        card_diff: lines by which the card changes.
    """

    repo: str
    exists: bool | None
    parent: str | None
    changes: dict[str, str]
    sizes: dict[str, int]
    others: list[str]
    tag: str
    tags: list[str]
    card_diff: list[str]

    @property
    def uploads(self) -> list[str]:
        return [name for name, change in self.changes.items() if change != "same"]

    def lines(self) -> list[str]:
        """For people."""
        state = {True: "exists", False: "would be created", None: "could not be asked for"}[self.exists]
        head = f"{self.repo} ({state}), tag {self.tag}"
        rows = [f"  {name:20} {self.sizes[name]:>15,} bytes  {change}" for name, change in self.changes.items()]
        rows += [f"  {name!r} is there and stays" for name in self.others]
        cut = self.card_diff[:MOST_DIFF_LINES]
        more = [f"  ... {len(self.card_diff) - len(cut)} lines more"] if len(cut) < len(self.card_diff) else []
        return [head, *rows, *(f"  {line}" for line in cut), *more]


def publish(
    folder: Path, repo: str, yes: bool = False, tag: str | None = None, private: bool = False, results: Path = RESULTS
) -> Iterator[str]:
    """Show what would be uploaded, and with `yes` upload it, tag it and fetch it back; gives lines for people.

    Args:
        folder: written by `python -m hub convert`; its card is written anew for this repository.
        repo: ORG/NAME.
        yes: upload. Without, nothing changes anywhere, and no network is needed: what is there is then not compared.
        tag: revision to name the upload; by default the next of v1, v2, ...
        private: of a repository that is created.
        results: the evaluator's CSV, for the card's measured figures.

    Raises:
        CheckpointError: if the folder is not whole, the Hub refuses, or what comes back is not what was sent.
        UsageError: if the repository's name is none, or the tag is taken.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"--repo must be ORG/NAME, got {repo!r}")
    if yes and HF_HUB_OFFLINE:
        raise UsageError("offline mode is on (HF_HUB_OFFLINE); publish where there is a network, with it unset")
    if not _TAG.fullmatch(tag or "v1"):
        raise UsageError(f"--tag must be letters, digits, '.', '_' and '-', got {tag!r}")
    check_complete(folder)
    yield f"{folder}: {check_folder(folder)}"
    api = HfApi(library_name="arm-zoo")
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name)
        for file in FILES:
            shutil.copyfile(folder / file, staged / file)
        there, unasked = None, ""
        with _explained(f"read {repo}", repo):
            try:
                there = _ask(api, repo)
            except HfHubHTTPError:  # an answer
                raise
            except Exception as error:  # the network's errors have no common parent
                if yes:
                    raise
                unasked = "offline mode is on (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else explain(error, repo)
            plan = _plan(there, staged, folder, repo, tag, results)
        yield from plan.lines()
        if read_header(staged / WEIGHTS).get("license", "unknown") == "unknown":
            yield "licence of the weights: unknown; ask their authors before redistributing (convert --license ID)"
        if not plan.uploads and plan.tags and tag is None:
            yield f"nothing to upload: all files are there already, tagged {', '.join(plan.tags)}"
        elif unasked:
            yield f"dry run, not compared with what is there: {unasked}"
        elif not yes:
            yield "dry run, nothing was uploaded; --yes uploads"
        else:
            with _explained(f"publish {repo}", repo, right="write"):
                commit = _upload(api, staged, plan, private)
                _verify(staged, plan, commit)
            yield f"uploaded as {commit}, tagged {plan.tag}, fetched back and compared"
            yield _table_line(staged, plan)


def _table_line(staged: Path, plan: Plan) -> str:
    row = f'Weights("hosted", "{sha256_of(staged / WEIGHTS)}", "{plan.tag}", "{plan.repo}")'
    return f'for arm_zoo/table.py: "{read_config(staged)["architecture"]}.TAG": {row}'


@contextmanager
def _explained(doing: str, repo: str, right: str = "read") -> Iterator[None]:
    try:
        yield
    except (CheckpointError, UsageError):
        raise
    except Exception as error:  # the client's, the network's and the file system's errors have no common parent
        raise CheckpointError(f"cannot {doing}: {explain(error, repo, right=right)}") from error


@dataclass(frozen=True)
class Repository:
    """What the Hub says of a repository: None if there is none, and its tags' commits."""

    info: ModelInfo | None
    tagged: dict[str, str]


def _ask(api: HfApi, repo: str) -> Repository:
    try:
        info = api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        return Repository(None, {})
    return Repository(info, {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags})


def _plan(
    repository: Repository | None, staged: Path, folder: Path, repo: str, tag: str | None, results: Path
) -> Plan:
    """Compare with what is there; the staged card gets the hand-written parts of the one that is there."""
    info = repository.info if repository else None
    there = {file.rfilename: file for file in (info.siblings or [] if info else [])}
    old = folder / CARD
    if info is not None and CARD in there:
        with tempfile.TemporaryDirectory() as cache:
            fetched = hf_hub_download(repo, CARD, revision=info.sha, cache_dir=cache)
            old = staged / f"old-{CARD}"
            shutil.copyfile(fetched, old)
    write_card(staged, old=old, repo=repo, results=results)
    tagged = repository.tagged if repository else {}
    tags = list(tagged)
    if tag in tags:
        raise UsageError(f"{repo} has a revision {tag} already ({', '.join(tags)}); name another with --tag")
    before = old.read_text(encoding="utf-8").splitlines() if info is not None and CARD in there else []
    diff = difflib.unified_diff(
        before, (staged / CARD).read_text(encoding="utf-8").splitlines(), "there", "new", lineterm=""
    )
    return Plan(
        repo=repo,
        exists=info is not None if repository else None,
        parent=info.sha if info else None,
        changes={name: _change(staged / name, there.get(name)) if repository else "not compared" for name in FILES},
        sizes={name: (staged / name).stat().st_size for name in FILES},
        others=sorted(set(there) - set(FILES)),
        tag=tag or (_next_tag(tags) if repository else "the next of v1, v2, ..."),
        tags=[name for name in tags if tagged[name] == info.sha] if info else [],
        card_diff=list(diff) if before else [],
    )


def _next_tag(tags: list[str]) -> str:
    return next(f"v{n}" for n in range(1, len(tags) + 2) if f"v{n}" not in tags)


def _change(file: Path, there: object) -> str:
    """The Hub names large files by their sha256, others as Git does."""
    if there is None:
        return "new"
    lfs, blob = getattr(there, "lfs", None), getattr(there, "blob_id", None)
    if lfs is not None:
        return "same" if lfs.sha256 == sha256_of(file) else "changed"
    contents = file.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False).hexdigest()
    return "same" if blob == git else "changed"


def _upload(api: HfApi, staged: Path, plan: Plan, private: bool) -> str:
    """One commit on top of the one that the plan was made for, and its tag, which may be all that is missing."""
    if not plan.exists:
        api.create_repo(plan.repo, private=private)
    commit = plan.parent
    if plan.uploads or commit is None:
        operations = [CommitOperationAdd(name, staged / name) for name in plan.uploads]
        message = f"Publish {plan.tag} with arm-zoo"
        commit = api.create_commit(plan.repo, operations, commit_message=message, parent_commit=plan.parent).oid
    api.create_tag(plan.repo, tag=plan.tag, revision=commit)
    return commit


def _verify(staged: Path, plan: Plan, commit: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        for name in FILES:
            fetched = hf_hub_download(plan.repo, name, revision=plan.tag, cache_dir=cache)
            if sha256_of(fetched) != sha256_of(staged / name):
                raise CheckpointError(
                    f"{name} of {plan.repo} at {plan.tag} (commit {commit}) is not what was sent; publish it again"
                )
