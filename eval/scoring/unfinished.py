"""Predictions of a pass that is under way, kept beside the results so that a killed run goes on from there."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Unfinished:
    """Each process appends records of one fixed size to its own file; a record cut short by the kill is left out."""

    def __init__(self, output: Path, row: Sequence[str], way: Sequence[str], record: np.dtype) -> None:
        """By what the row of the table measures, and what else must be the same for the rest of a pass to fit."""
        self._folder = Path(f"{output}.partial")
        self._row, rest = (hashlib.sha256("\t".join(part).encode()).hexdigest()[:16] for part in (row, way))
        self._name, self._record = f"{self._row}-{rest}", record

    def begin(self, resume: bool) -> tuple[np.ndarray, str]:
        """Whole records of a run that died, each image once, if it is resumed, and what to tell; others are gone."""
        records, said = [np.zeros(0, self._record)], ""
        for file in sorted(self._folder.glob(f"{self._row}-*")):
            if file.name.startswith(f"{self._name}."):
                data = file.read_bytes()
                records.append(np.frombuffer(data, self._record, len(data) // self._record.itemsize))
            elif resume:
                said = "starting over; a run that died had another batch size, device or version of the packages"
            file.unlink()
        left = np.concatenate(records)
        left = left[np.unique(left["index"], return_index=True)[1]]
        if len(left):
            doing = "going on after" if resume else "starting over; --resume would have gone on after"
            said = f"{doing} {len(left)} images of a run that died"
        kept = left if resume else left[:0]
        self.add("kept", kept)
        return kept, said

    def add(self, part: int | str, records: np.ndarray) -> None:
        """Append records to the file of a process."""
        self._folder.mkdir(parents=True, exist_ok=True)  # other machines' processes have their own disk
        with open(self._folder / f"{self._name}.{part}", "ab") as file:
            file.write(records.tobytes())

    def end(self) -> None:
        for file in self._folder.glob(f"{self._name}.*"):
            file.unlink()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()
