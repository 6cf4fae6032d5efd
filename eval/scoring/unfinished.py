"""The predictions of an unfinished pass, kept beside the results so that a killed run can go on from there."""

import hashlib
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np


class Unfinished:
    """Each process appends records of a fixed size to its own file; a record that a kill cut short is left out."""

    def __init__(self, output: Path, row: Sequence[str], way: Sequence[str], record: np.dtype) -> None:
        """`row` is the key of the table's row; `way` is what else must be the same for a pass to go on."""
        self._folder = Path(f"{output}.partial")
        self._row, rest = (hashlib.sha256("\t".join(part).encode()).hexdigest()[:16] for part in (row, way))
        self._name, self._record = f"{self._row}-{rest}", record

    def begin(self, resume: bool) -> tuple[np.ndarray, str]:
        """The whole records of a run that died, each image once, if `resume`, and a message; others are deleted."""
        records, said = [np.zeros(0, self._record)], ""
        files = sorted(self._folder.glob(f"{self._row}-*"))
        for file in files:
            if file.name.startswith(f"{self._name}."):
                data = file.read_bytes()
                records.append(np.frombuffer(data, self._record, len(data) // self._record.itemsize))
            elif resume:
                said = "starting over; a run that died had another batch size, device or version of the packages"
        left = np.concatenate(records)
        left = left[np.unique(left["index"], return_index=True)[1]]
        if len(left):
            doing = "going on after" if resume else "starting over; --resume would have gone on after"
            said = f"{doing} {len(left)} images of a run that died"
        kept = left if resume else left[:0]
        names = {file.name for file in files}
        # under a new name, before the old files go, so that a kill in between loses nothing
        self.add(next(part for part in map("kept{}".format, count()) if f"{self._name}.{part}" not in names), kept)
        for file in files:
            file.unlink()
        return kept, said

    def add(self, part: int | str, records: np.ndarray) -> None:
        """Append records to the file of a process."""
        self._folder.mkdir(parents=True, exist_ok=True)  # other machines' processes have their own disk
        path = self._folder / f"{self._name}.{part}"
        try:
            with open(path, "ab") as file:
                file.write(records.tobytes())
        except OSError as error:
            error.filename = str(path)  # which the system names only where it cannot be opened
            raise

    def end(self) -> None:
        for file in self._folder.glob(f"{self._name}.*"):
            file.unlink()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()
