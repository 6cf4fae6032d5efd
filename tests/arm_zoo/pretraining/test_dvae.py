"""The dVAE: the authors' numbers, their pickled weights read without running anything, and one of our own."""

import sys
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from arm_zoo import CheckpointError
from arm_zoo.files import DownloadError
from arm_zoo.pretraining import dvae
from arm_zoo.pretraining.dvae import DVAE, DVAEEncoder, fetched, map_pixels, read_dvae


@pytest.fixture(scope="module")
def authors(golden: Path) -> Path:
    return golden / "dvae_small"


def test_logits_and_tokens_are_the_authors(authors: Path) -> None:
    """Bit by bit in float64, with the state after every group."""
    encoder = read_dvae(authors / "state_dict.safetensors").double()
    inputs = load_file(authors / "inputs.safetensors")
    assert torch.equal(map_pixels(inputs["images"]), inputs["mapped"])
    outputs = {}
    for name, part in encoder.blocks.named_children():
        part.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    logits = encoder(inputs["mapped"].double())
    exact = load_file(authors / "outputs_f64.safetensors")
    for name in ("input", "group_1", "group_2", "group_3", "group_4"):
        assert torch.equal(outputs[name], exact[name]), name
    assert torch.equal(logits, exact["logits"])
    assert torch.equal(encoder.float().tokens(inputs["images"], (3, 5)), exact["token_ids"].flatten(1))


def test_the_published_size() -> None:
    with torch.device("meta"):
        encoder = DVAEEncoder()
    assert len(encoder.state_dict()) == 74
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 53_786_240


def test_tokens_go_row_by_row_and_pictures_are_resized() -> None:
    """A picture of the grid's size is taken as it is, under autocast too; another one is resized to it."""
    encoder = DVAEEncoder(8, 16, blocks=1).eval()
    pixels = torch.rand(2, 3, 16, 24)
    expected = encoder(map_pixels(pixels)).argmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder.tokens(pixels, (2, 3))
    assert torch.equal(tokens, expected.flatten(1))
    doubled = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert encoder.tokens(doubled, (2, 3)).shape == (2, 6)
    assert encoder.tokens(doubled, (4, 6)).shape == (2, 24)


def test_pictures_are_resized_as_by_pillow() -> None:
    """Bicubic with antialiasing, which makes values outside of 0..1 that are cut off."""
    encoder, seen = DVAEEncoder(8, 16, in_chans=1, blocks=1), list[torch.Tensor]()
    encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    picture = (torch.rand(40, 40) > 0.5).float()
    encoder.tokens(picture[None, None], (3, 2))
    resized = np.asarray(Image.fromarray(picture.numpy()).resize((16, 24), Image.Resampling.BICUBIC))
    assert resized.max() > 1
    expected = torch.from_numpy(0.8 * resized.clip(0, 1) + 0.1)
    torch.testing.assert_close(seen[0][0, 0], expected, rtol=0, atol=1e-5)


# files


@pytest.fixture
def dall_e(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[nn.Module]]:
    """Classes that pickle under the names of OpenAI's package, and must not be there when the file is read."""
    classes = {}
    monkeypatch.setitem(sys.modules, "dall_e", ModuleType("dall_e"))
    for module, name in (("encoder", "Encoder"), ("encoder", "EncoderBlock"), ("utils", "Conv2d")):
        path = f"dall_e.{module}"
        monkeypatch.setitem(sys.modules, path, sys.modules.get(path, ModuleType(path)))
        classes[name] = type(name, (nn.Module,), {"__module__": path})
        setattr(sys.modules[path], name, classes[name])
    return classes


def as_published(encoder: DVAEEncoder, classes: dict[str, type[nn.Module]]) -> nn.Module:
    """The encoder as a tree of the package's classes, with its parameters w and b."""

    def remade(part: nn.Module) -> nn.Module:
        kind = type(part)
        if isinstance(part, nn.Conv2d):
            conv = classes["Conv2d"]()
            assert part.bias is not None
            conv.w, conv.b = nn.Parameter(part.weight.data), nn.Parameter(part.bias.data)
            return conv
        if kind in (nn.ReLU, nn.MaxPool2d, nn.Identity):
            return part
        whole = nn.Sequential() if kind is nn.Sequential else classes[names[kind]]()
        for name, child in part.named_children():
            whole.add_module(name, remade(child))
        return whole

    names = {DVAEEncoder: "Encoder", dvae._Block: "EncoderBlock"}
    return remade(encoder)


def test_a_pickled_module_is_read_without_its_classes(
    dall_e: dict[str, type[nn.Module]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenAI published it."""
    encoder = DVAEEncoder(8, 16)
    published = as_published(encoder, dall_e)
    torch.save(published, tmp_path / "e.pkl")
    torch.save(published.blocks[0], tmp_path / "part.pkl")  # type: ignore[operator, index]
    for name in ("dall_e", "dall_e.encoder", "dall_e.utils"):
        monkeypatch.delitem(sys.modules, name)
    again = read_dvae(tmp_path / "e.pkl")
    assert not any(parameter.requires_grad for parameter in again.parameters())
    for name, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match=r"part.pkl is no encoder of a dVAE"):
        read_dvae(tmp_path / "part.pkl")


def test_the_layout_of_before_torch_1_6_is_refused(dall_e: dict[str, type[nn.Module]], tmp_path: Path) -> None:
    published = as_published(DVAEEncoder(8, 16), dall_e)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source code of its classes
        torch.save(published, tmp_path / "e.pkl", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"nothing in it was run: have its tensors saved alone"):
        read_dvae(tmp_path / "e.pkl")


class Harmful(nn.Module):
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_nothing_in_a_pickle_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Sequential(Harmful()), tmp_path / "e.pkl")
    with pytest.raises(CheckpointError, match=r"it asks to run .*print.*; nothing in it was run"):
        read_dvae(tmp_path / "e.pkl")
    assert "this ran" not in capsys.readouterr().out


def test_other_files_are_refused(tmp_path: Path) -> None:
    encoder = DVAEEncoder(8, 16, blocks=1)
    save_file(encoder.state_dict(), tmp_path / "e.safetensors")
    assert read_dvae(tmp_path / "e.safetensors").vocab_size == 16
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "e.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*cut.safetensors: .* fetch it again"):
        read_dvae(cut)
    save_file({"blocks.input.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"part.safetensors is no encoder of a dVAE: KeyError"):
        read_dvae(tmp_path / "part.safetensors")
    save_file(DVAE(n_hid=8, vocab_size=16).decoder.state_dict(prefix="blocks."), tmp_path / "decoder.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder.safetensors is no encoder of a dVAE"):
        read_dvae(tmp_path / "decoder.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_dvae(tmp_path / "none.pkl")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a server of the files in `tmp_path`."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_is_fetched_once(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "encoder.pkl").write_bytes(b"weights")
    file = fetched(f"{address}/encoder.pkl")
    assert file.read_bytes() == b"weights" and file.is_relative_to(tmp_path / "cache")
    (tmp_path / "encoder.pkl").unlink()
    assert fetched(f"{address}/encoder.pkl") == file
    with pytest.raises(
        DownloadError, match=r"cannot fetch .*/other.pkl: .*404.*; fetch it yourself and name the file"
    ):
        fetched(f"{address}/other.pkl")
    assert fetched("runs/e.pkl") == Path("runs/e.pkl")


# one of our own


def test_a_dvae_learns_to_draw_and_its_encoder_is_read(tmp_path: Path) -> None:
    """Pictures of one of four grey values: after some steps they are told apart by their tokens."""
    model = DVAE(img_size=16, in_chans=1, n_hid=8, vocab_size=8)
    grey = torch.tensor([0.1, 0.4, 0.7, 1.0]).repeat(4)
    pixels = grey.view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for _ in range(50):
        loss, decoded, use = model(pixels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert decoded.shape == pixels.shape
    assert use.sum().item() == pytest.approx(1)
    assert losses[-1] < losses[0] / 4
    model.save_pretrained(tmp_path)
    encoder = read_dvae(tmp_path / "model.safetensors")
    tokens = encoder.tokens(pixels[:4], (2, 2))
    assert torch.equal(tokens, model.encoder.tokens(pixels[:4], (2, 2)))
    assert len(tokens.unique()) > 1


def test_mapped_pixels_are_drawn_from_one_token_each() -> None:
    model, pixels = DVAE(img_size=16, n_hid=8, vocab_size=8, prior=0.0), torch.rand(2, 3, 16, 16)
    seen = list[torch.Tensor]()
    for part in (model.encoder.blocks, model.decoder):
        part.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    loss, decoded, _ = model(pixels)
    given, codes = seen
    torch.testing.assert_close(given, 0.8 * pixels + 0.1)
    torch.testing.assert_close(codes, F.one_hot(codes.argmax(dim=1), 8).movedim(-1, 1).float())
    assert loss.item() == pytest.approx((decoded - given).square().mean().item())


def test_recomputing_changes_no_gradient() -> None:
    model, pixels = DVAE(img_size=8, n_hid=8, vocab_size=8), torch.rand(2, 3, 8, 8)
    gradients = []
    for enable in (False, True):
        torch.manual_seed(3)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(pixels)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    torch.testing.assert_close(*gradients)


def test_the_prior_keeps_tokens_in_use() -> None:
    pixels = torch.rand(2, 3, 8, 8)
    torch.manual_seed(1)
    model = DVAE(img_size=8, n_hid=8, vocab_size=8)
    losses = []
    for model.prior in (0.0, 1.0):
        torch.manual_seed(2)
        loss, _, use = model(pixels)
        losses.append(loss.item())
    divergence = (use * (8 * use).log()).sum().item()
    assert losses[1] - losses[0] == pytest.approx(divergence, rel=1e-4)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"img_size": 20}, "DVAE: img_size must be a multiple of 8, got 20"),
        ({"n_hid": 6}, "DVAE: n_hid must be a multiple of 4, got 6"),
        ({"vocab_size": 0}, "DVAE: vocab_size must be at least 1, got 0"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DVAE(**sizes)
