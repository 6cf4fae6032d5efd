"""Checkpoints that are looked into without their numbers: what is told, how little is read, and what is refused."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from arm_zoo import CheckpointError, to_official
from arm_zoo.weights import reading
from arm_zoo.weights.reading import Choice, read_checkpoint, read_contents
from tests.helpers.official import CfgNode, RunsCode, finetuned, official_bytes

ENTRY = "arm_base_patch16_224"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return finetuned(ENTRY)


def test_a_training_is_told_from_a_small_part_of_its_file(model: nn.Module) -> None:
    """Shapes, what lies beside the weights, and the arguments, from less than a tenth of the bytes."""
    wide = finetuned(ENTRY, embed_dim=128)
    contents = official_bytes(wide)
    told = read_contents(io.BytesIO(contents), "b.pth")
    expected = {name: tuple(value.shape) for name, value in to_official(wide).items()}
    assert {name: tuple(value.shape) for name, value in told.tensors.items()} == expected
    assert all(value.is_meta for value in told.tensors.values())
    assert told.beside == ["optimizer", "scaler", "epoch", "args"]
    assert told.arguments == {"model": "arm_base_pz16", "input_size": 224, "lr": 1e-3}
    assert told.bytes_read < 100_000 < len(contents) / 50


def test_a_header_tells_what_safetensors_hold(model: nn.Module) -> None:
    contents = save(to_official(model), {"license": "mit"})
    told = read_contents(io.BytesIO(contents), "b.safetensors")
    assert {name: value.shape for name, value in told.tensors.items()} == {
        name: value.shape for name, value in to_official(model).items()
    }
    size = 8 + int.from_bytes(contents[:8], "little")
    assert (told.beside, told.arguments, told.bytes_read) == ([], {}, size)


@pytest.mark.parametrize("choice, shape", [(None, (2,)), ("ema", (2,)), ("model", (1,))])
def test_the_weights_that_are_wanted_are_told(choice: Choice | None, shape: tuple[int, ...]) -> None:
    buffer = io.BytesIO()
    torch.save({"model": {"x": torch.zeros(1)}, "model_ema": {"x": torch.zeros(2)}}, buffer)
    assert tuple(read_contents(buffer, "x.pth", choice).tensors["x"].shape) == shape


def test_settings_of_yacs_are_a_dict(model: nn.Module, tmp_path: Path) -> None:
    """As VMamba's checkpoints have them, nested, with the attributes of yacs; the package itself is not needed."""
    contents = official_bytes(model, config=CfgNode(MODEL=CfgNode(NAME="vssm", DEPTHS=[2, 2])), args=None)
    told = read_contents(io.BytesIO(contents), "x.pth")
    assert told.arguments == {}
    assert read_contents(io.BytesIO(official_bytes(model, args=CfgNode(A=1))), "x.pth").arguments == {"A": 1}
    (tmp_path / "x.pth").write_bytes(contents)
    assert read_checkpoint(tmp_path / "x.pth").keys() == to_official(model).keys()


def packed(contents: bytes) -> bytes:
    """The same archive with its parts compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(contents)) as whole, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as smaller:
        for member in whole.namelist():
            smaller.writestr(member, whole.read(member))
    return buffer.getvalue()


def header(entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "name, contents, message",
    [
        ("x.pth", b"", "cannot read the checkpoint x.pth: BadZipFile"),
        ("x.pth", b"PK\x03\x04" + b"\0" * 100, "cannot read the checkpoint x.pth: BadZipFile"),
        ("x.pth", header({}), "it looks like safetensors"),
        ("x.safetensors", b"", "cannot read the checkpoint x.safetensors"),
        ("x.safetensors", b"PK\x03\x04" + b"\0" * 100, "it is a pickle, not safetensors"),
        ("x.safetensors", (2**60).to_bytes(8, "little"), "its header or directory is larger than 268,435,456 bytes"),
        ("x.safetensors", header([]), "cannot read the checkpoint x.safetensors: TypeError"),
        ("x.safetensors", header({"x": {"shape": [-1]}}), "cannot read the checkpoint x.safetensors: RuntimeError"),
        ("x.safetensors", header({"x": 3}), "cannot read the checkpoint x.safetensors: TypeError"),
    ],
)
def test_damaged_and_hostile_files(name: str, contents: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_contents(io.BytesIO(contents), name)


def test_archives_are_checked(model: nn.Module, tmp_path: Path) -> None:
    contents = official_bytes(model)
    with pytest.raises(CheckpointError, match="compressed, which PyTorch never does"):
        read_contents(io.BytesIO(packed(contents)), "x.pth")
    trap = official_bytes(model, args=RunsCode(tmp_path / "trap"))
    with pytest.raises(CheckpointError, match=r"it asks to run 'posix\.mkdir'; nothing in it was run"):
        read_contents(io.BytesIO(trap), "x.pth")
    old = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="BadZipFile"):
        read_contents(old, "x.pth")
    larger = io.BytesIO()
    torch.save({"x": torch.zeros(1).expand(10**12)}, larger)
    with pytest.raises(CheckpointError, match="larger than its data in the file"):
        read_contents(larger, "x.pth")
    assert not (tmp_path / "trap").exists()


class Broken(io.BytesIO):
    """A file whose reads fail after some, as those over a network do."""

    left = 3

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("cut")
        return super().read(size)


@pytest.mark.parametrize("reads", range(8))
def test_errors_of_the_way_to_a_file_are_not_of_the_file(reads: int, model: nn.Module) -> None:
    """Wherever they come, also inside torch's reader, so that what is said is about the network."""
    file = Broken(official_bytes(model))
    file.left = reads
    with pytest.raises(ConnectionError, match="cut"):
        read_contents(file, "x.pth")


def test_no_more_is_read_than_is_allowed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_READ", 20_000)
    with pytest.raises(CheckpointError, match=r"x\.pth: its header or directory is larger than 20,000 bytes"):
        read_contents(io.BytesIO(official_bytes(model)), "x.pth")


def test_more_than_was_asked_for_is_refused(model: nn.Module) -> None:
    """As where a mirror sends the whole file for a part of it: PyTorch's reader would write past its memory."""

    class Generous(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(size) + b"more"

    with pytest.raises(CheckpointError, match=r"b\.pth: \d+ bytes came where \d+ were asked for"):
        read_contents(Generous(official_bytes(model)), "b.pth")
