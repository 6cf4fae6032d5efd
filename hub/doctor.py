"""Diagnosis of loading an entry's weights, step by step."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_token

from arm_zoo.files import CheckpointError
from arm_zoo.loading import entries, entry_of, unknown_model
from arm_zoo.weights.download import explained
from arm_zoo.weights.find import find_weights, hub_repository, organisation
from arm_zoo.weights.hosted import ORGANISATION, TABLE, Weights, upstream_is_on, ways_on
from arm_zoo.weights.reading import Contents
from arm_zoo.weights.releases import endpoint, without_login
from arm_zoo.weights.upstream import cache_folder, cached, choose, fetch_upstream, list_files, read_record, tell


def doctor(entry: str, fetch: bool = False) -> Iterator[str]:
    """Repeat the steps of `pretrained=True` up to the download, or with `fetch` all of them; gives lines for people.

    Raises CheckpointError after the line of the first step that fails.
    """
    if entry not in entries():
        raise unknown_model(entry, entries())
    diagnosis = _Diagnosis(entry_of(entry))
    weights = diagnosis.weights
    for title, expected, step in diagnosis.steps(fetch):
        try:
            with explained(title, str(weights.repository), authors=weights.host):
                got = step()
        except CheckpointError as error:
            yield f"FAILED  {title}: {error}\n        expected {expected}"
            raise CheckpointError(f"{diagnosis.entry}: the step '{title}' failed") from error
        yield f"ok      {title}: {got}\n        expected {expected}"


@dataclass
class _Diagnosis:
    """What the steps have found so far."""

    entry: str
    contents: Contents = field(init=False)

    @property
    def weights(self) -> Weights:
        return TABLE.get(self.entry, Weights())

    def steps(self, fetch: bool) -> Iterator[tuple[str, str, Callable[[], str]]]:
        """The title of each step, what it expects, and the step itself."""
        weights = self.weights
        yield "read the table", "a row whose weights are bundled, hosted or upstream", self.read_the_table
        if weights.where != "upstream" or organisation() != ORGANISATION:
            yield "find the file", "a file, with the sha256 of the table if that knows it", self.find_the_file
            return
        yield "read the settings", "upstream on; other settings only where they are meant", self.read_the_settings
        yield "open the cache", "a folder that can be written to, or that has the weights", self.open_the_cache
        if weights.host == "hub":  # the files of a release on GitHub are not listed
            files = f"{repr(weights.file) if weights.file else 'checkpoints'} at {weights.revision!r}"
            yield "list the files", files, self.list_the_files
        shapes = ", ".join(f"{name} {shape}" for name, shape in weights.shapes.items())
        one = f"one file {'with ' + shapes if shapes else 'as the table names it'}"
        yield "look into them", one, self.look_into_them
        yield "fit the model", f"the names and shapes of {self.entry}", self.fit_the_model
        if fetch:
            yield "fetch the file", f"sha256 {weights.sha256 or 'not known beforehand'}", self.fetch_the_file
            yield "load the model", "finite answers", self.load_the_model

    def read_the_table(self) -> str:
        weights = self.weights
        if weights.where == "planned" and hub_repository(self.entry) is None:
            raise CheckpointError(ways_on(self.entry))
        if weights.where != "bundled" and organisation() != ORGANISATION:
            return f"ARM_ZOO_HUB_ORG has {hub_repository(self.entry)} in place of what is {weights.where}"
        if weights.where != "upstream":
            return weights.where
        host = "GitHub" if weights.host == "github" else "the Hub"
        place = f"{weights.repository} on {host}, {weights.revision!r}"
        return f"upstream, {place}, licence {weights.license or 'not stated'}"

    def find_the_file(self) -> str:
        return f"{find_weights(self.entry)}"

    def read_the_settings(self) -> str:
        if not upstream_is_on():
            raise CheckpointError("ARM_ZOO_UPSTREAM=0 turns fetching from authors off")
        names = ("ARM_ZOO_ARM_FILE", "ARM_ZOO_KEEP_PICKLES", "HF_HUB_DISABLE_XET", "HTTPS_PROXY")
        settings = [f"{name}={without_login(os.environ[name])}" for name in names if name in os.environ]
        token = "a token" if get_token() else "no token"
        offline = "offline" if constants.HF_HUB_OFFLINE else "online"
        host = endpoint() if self.weights.host == "github" else constants.ENDPOINT
        return ", ".join([without_login(host), offline, token, *settings])

    def open_the_cache(self) -> str:
        folder = cache_folder(self.entry, self.weights)
        free = f"{shutil.disk_usage(folder).free:,} bytes free"
        there = cached(self.entry, self.weights)
        source = f"has the weights of {read_record(there)['source']}" if there else "has no copy yet"
        if not there and not os.access(folder, os.W_OK):
            raise CheckpointError(f"{folder} cannot be written to; set HF_HOME to a folder of yours")
        return f"{folder}, {free}, {source}"

    def list_the_files(self) -> str:
        files = list_files(self.weights)
        known = [f"{file.size or '?'} bytes, sha256 {file.sha256 or 'unknown'}" for file in files]
        return "; ".join(f"{file.address} ({facts})" for file, facts in zip(files, known, strict=True))

    def look_into_them(self) -> str:
        chosen = choose(self.entry, self.weights)
        self.contents = chosen.contents(self.weights)
        read = f"{self.contents.bytes_read:,} bytes read, {len(self.contents.tensors)} tensors"
        return f"{tell(chosen, self.contents, self.weights)} ({read})"

    def fit_the_model(self) -> str:
        model: Any = timm.create_model(self.entry, device="meta")
        model.adapt(self.contents.tensors, model)
        return f"{len(model.state_dict())} tensors of the model are there"

    def fetch_the_file(self) -> str:
        file = fetch_upstream(self.entry)
        record = read_record(file)
        return f"{record['source']}, sha256 {record['sha256']}, as {file}"

    @torch.inference_mode()
    def load_the_model(self) -> str:
        model: Any = timm.create_model(self.entry, pretrained=True).eval()
        answers = model(torch.zeros(1, *model.pretrained_cfg["input_size"]))
        if not answers.isfinite().all():
            raise CheckpointError("the model's answers are not finite")
        return f"answers of shape {tuple(answers.shape)}, finite"
