"""The authors' files: what they are reported to be, where the way to them breaks, and the licence to pass them on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn

from arm_zoo import to_official
from arm_zoo.weights.hosted import TABLE
from hub.__main__ import main
from hub.folders import read_header
from hub.upstream import origin
from tests.helpers.hub_server import Client, HubServer
from tests.helpers.official import NARROW, finetuned, official_bytes, pretrained

ENTRY = "arm_base_patch16_224.arm_in1k_ft_in1k"
ARM = "OliverRen/ARM"
VMAMBA, TAG, FILE = "MzeroMiko/VMamba", "#v2cls", "vssm_base_0229_ckpt_epoch_237.pth"
SMALL_MAPS: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return finetuned(ENTRY)


def test_sources(server: HubServer, client: Client, model: nn.Module, tmp_path: Path) -> None:
    """Names come from the Hub as they are, hostile ones too; what a file is, a few reads of it tell."""
    save_file(to_official(model), tmp_path / "official.safetensors")
    files = {
        "official.safetensors": (tmp_path / "official.safetensors").read_bytes(),
        "b_ft.pth": official_bytes(model),
        "b_pt.pth": official_bytes(pretrained()),
        "broken.safetensors": b"no",
        "\x1b[31m../../red.pth": b"",
        "README.md": b"",
    }
    server.add(ARM, files)
    server.requests.clear()
    row = {"where": "upstream", "repository": ARM, "shapes": {"pos_embed": (1, 197, 32), "head.weight": (1000, 32)}}
    reply = client.load("hub", "sources", table={ENTRY: row})
    assert reply["code"] == 0, reply
    lines = {line.split()[0]: line for line in reply["out"].splitlines()}
    found = "arm_tiny_patch16_224, backbone, 1000 classes; fits " + ENTRY
    assert found in lines["'official.safetensors'"] and found in lines["'b_ft.pth'"]
    told = (
        "; beside 'optimizer', 'scaler', 'epoch', 'args'; arguments model='arm_base_pz16', input_size=224; told from "
    )
    assert told in lines["'b_ft.pth'"] and told in lines["'b_pt.pth'"]
    assert ", pretraining model; beside" in lines["'b_pt.pth'"] and "fits" not in lines["'b_pt.pth'"]
    assert "cannot be told: cannot read the checkpoint" in lines["'broken.safetensors'"]
    assert "\x1b" not in reply["out"] and "red.pth" not in reply["out"] and "4 checkpoints" in lines[ARM]
    read = [int(each.replace(",", "")) for each in re.findall(r"told from ([\d,]+) bytes", reply["out"])]
    assert len(read) == 3 and max(read) < 120_000
    spans = [line.partition("bytes=")[2] for line in server.requests if line.startswith("GET") and "/resolve/" in line]
    assert spans and all(re.fullmatch(r"\d+-\d+", span) for span in spans)  # none is fetched whole
    assert re.search(rf"arm_large_patch16_224\.arm_in1k_ft_in1k +upstream +ARM-L; from {ARM}, a file ", reply["out"])
    assert re.search(
        r"arm_large_patch16_224\.in1k +ours +not trained yet; MambaMLP-L.*; reported by the paper: in1k 81",
        reply["out"],
    )
    assert re.search(
        r"arm_pico_patch2_8\S+ +ours +from the runs of recipes/RESULTS\.md.*; licence apache-2\.0", reply["out"]
    )
    reply = client.load("hub", "sources", "--repo", "ada/none")
    assert reply["code"] == 1 and "cannot list ada/none: there is no such repository" in reply["err"]


def test_sources_without_a_network(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table has is told before the Hub is asked."""

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Network is unreachable")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    assert main(["sources"]) == 1
    told = capsys.readouterr()
    assert [line.split()[0] for line in told.out.splitlines()[1:]] == [*TABLE]
    assert "hf://hustvl/Vim-tiny-midclstok@main/vim_t_midclstok_76p1acc.pth" in told.out
    assert told.err.startswith(f"error: cannot list {ARM}: ") and "unreachable" in told.err


def test_origins_are_addresses_pages_or_commands() -> None:
    known = r"accelerate launch |the runs of recipes/RESULTS|OliverRen/ARM, a file|hf://|https://github\.com/"
    for name in TABLE:
        assert re.match(known, origin(name)), name


def steps(out: str) -> dict[str, tuple[str, str, str]]:
    """By its name, whether a step went well, what it got and what it expected."""
    found = re.findall(r"(ok|FAILED) +(.*?): (.*?)\n +expected (.*?)(?=\nok|\nFAILED|\n*$)", out, re.DOTALL)
    return {name: (state, got, expected) for state, name, got, expected in found}


def test_the_doctor_goes_the_whole_way(server: HubServer, client: Client, model: nn.Module) -> None:
    """On GitHub and on the Hub; every step says what it got and what it expected."""
    contents = official_bytes(finetuned("arm_pico_patch2_8", embed_dim=64, depth=4))
    server.release(VMAMBA, TAG, {FILE: contents})
    server.add(ARM, {"pico.pth": contents})
    shapes = {"shapes": {"head.weight": (10, 64)}}
    on_github = {"host": "github", "repository": VMAMBA, "revision": TAG, "file": FILE}
    for row in ({"repository": ARM, **shapes}, on_github):
        table = {"arm_pico_patch2_8.arm_digits_ft_digits": {"where": "upstream", **row}}
        reply = client.load("hub", "doctor", "arm_pico_patch2_8", "--fetch", table=table)
        assert reply["code"] == 0, reply
        found = steps(reply["out"])
        assert list(found) == [
            "read the table",
            "read the settings",
            "open the cache",
            *([] if "host" in row else ["list the files"]),
            "look into them",
            "fit the model",
            "fetch the file",
            "load the model",
        ]
        assert {state for state, *_ in found.values()} == {"ok"}
    assert "upstream, MzeroMiko/VMamba on GitHub, '#v2cls', licence not stated" in found["read the table"][1]
    assert "a token" in found["read the settings"][1] and "hf_ada" not in reply["out"]
    assert "beside 'optimizer', 'scaler', 'epoch', 'args'" in found["look into them"][1]
    assert found["load the model"][1] == "answers of shape (1, 10), finite"


@pytest.mark.parametrize(
    "files, name, message",
    [
        (None, "list the files", "there is no such repository"),
        ({}, "look into them", "no file fits"),
        ({"x.pth": b"PK"}, "look into them", "cannot read the checkpoint x.pth"),
        ("narrow", "fit the model", "does not fit the model"),
    ],
)
def test_the_doctor_stops_where_it_breaks(
    files: Any, name: str, message: str, server: HubServer, client: Client, model: nn.Module
) -> None:
    server.repositories.pop(ARM, None)
    if files is not None:
        server.add(ARM, {"b.pth": official_bytes(model)} if files == "narrow" else files)
    row = {"where": "upstream", "repository": ARM, "shapes": {"head.weight": (1000, 32)}}
    reply = client.load("hub", "doctor", ENTRY, table={ENTRY: row})
    found = steps(reply["out"])
    assert reply["code"] == 1 and reply["err"] == f"error: {ENTRY}: the step '{name}' failed\n", reply
    *before, (last, (state, got, expected)) = found.items()
    assert (last, state) == (name, "FAILED") and message in got and expected
    assert all(each[0] == "ok" for _, each in before)


@pytest.mark.parametrize("host", ["hub", "github"])
def test_names_in_a_file_do_nothing_to_a_terminal(
    host: str, server: HubServer, client: Client, model: nn.Module
) -> None:
    keys = {"\x1b]0;owned\x07": 1, **{f"key{number}": 1 for number in range(20)}}
    server.add(ARM, {"b_ft.pth": official_bytes(model, **keys), "other.pth": official_bytes(model, **keys)})
    server.release(VMAMBA, TAG, {FILE: official_bytes(model, **keys)})
    row: dict[str, Any] = {"where": "upstream", "repository": ARM}
    if host == "github":
        row |= {"host": "github", "repository": VMAMBA, "revision": TAG, "file": FILE, "license": "mit"}
    row["shapes"] = {"pos_embed": (1, 197, 32), "head.weight": (1000, 32)}
    reply = client.load("hub", "doctor", ENTRY, table={ENTRY: row})
    assert "\x1b" not in reply["out"] and "\\x1b]0;owned" in reply["out"] and "and 17 more" in reply["out"], reply


def test_the_doctor_of_other_entries(client: Client) -> None:
    """Bundled ones have their file; those without a source are told the ways on."""
    reply = client.load("hub", "doctor", "arm_tiny_patch8_64")
    assert reply["code"] == 0 and steps(reply["out"])["find the file"][1].endswith(".safetensors"), reply
    reply = client.load("hub", "doctor", "arm_base_patch16_224.in1k")
    assert reply["code"] == 1 and "are not hosted yet. Ways on:" in steps(reply["out"])["read the table"][1]
    assert "did you mean arm_base" in client.load("hub", "doctor", "arm_basis")["err"]
    environment = {"ARM_ZOO_UPSTREAM": "0"}
    row = {"where": "upstream", "repository": ARM, "shapes": {"head.weight": (1000, 32)}}
    reply = client.load("hub", "doctor", ENTRY, table={ENTRY: row}, environment=environment)
    assert steps(reply["out"])["read the settings"][:2] == (
        "FAILED",
        "ARM_ZOO_UPSTREAM=0 turns fetching from authors off",
    )


def test_the_doctor_asks_the_organisation_that_loading_asks(server: HubServer, client: Client) -> None:
    """Of all entries but the bundled ones, also those that nobody has published so far."""
    for entry in (ENTRY, "arm_base_patch16_224.in1k"):
        environment = {"ARM_ZOO_HUB_ORG": "group"}
        reply = client.load("hub", "doctor", entry, environment=environment)
        found = steps(reply["out"])
        assert f"ARM_ZOO_HUB_ORG has group/{entry}" in found["read the table"][1], reply
        assert found["find the file"][0] == "FAILED" and "no such repository" in found["find the file"][1]
        server.add(f"group/{entry}", {"model.safetensors": b"weights"})
        reply = client.load("hub", "doctor", entry, environment=environment)
        assert reply["code"] == 0 and steps(reply["out"])["find the file"][1].endswith("model.safetensors"), reply


def test_weights_without_a_licence_are_not_passed_on(
    server: HubServer, client: Client, model: nn.Module, tmp_path: Path
) -> None:
    """Fetched, converted and shown they may be; uploaded only under a licence that somebody states."""
    server.add(ARM, {"b.pth": official_bytes(model)})
    row = {"where": "upstream", "repository": ARM, "shapes": {"head.weight": (1000, 32)}}
    keywords = {"pretrained": True, "cache_dir": tmp_path, **NARROW}
    client.load("timm", ENTRY, table={ENTRY: row}, **keywords)
    [file] = tmp_path.rglob("model.safetensors")
    out = tmp_path / "out"
    assert main(["convert", str(file), str(out)]) == 0
    assert read_header(out / "model.safetensors")["license"] == "unknown"
    arguments = ["publish", out, "--repo", "ada/b"]
    reply = client.load("hub", *arguments)
    assert reply["code"] == 0 and "licence of the weights: unknown; ask their authors" in reply["out"]
    server.requests.clear()
    reply = client.load("hub", *arguments, "--yes")
    assert reply["code"] == 1 and "no licence is stated for the weights in" in reply["err"]
    assert "ada/b" not in server.repositories and not server.requests
    reply = client.load("hub", *arguments, "--yes", "--license", "mit")
    assert reply["code"] == 0, reply
    _, files = server.repositories["ada/b"].at("v1") or ("", {})
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    assert read_header(tmp_path / "model.safetensors")["license"] == "mit"
    assert json.loads(files["config.json"])["pretrained_cfg"]["license"] == "mit"
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    assert main(["check", str(tmp_path)]) == 0
    assert read_header(out / "model.safetensors")["license"] == "unknown"  # what lies here stays as it is


def test_the_licence_of_fetched_weights_is_not_lost_by_saving_them(
    server: HubServer, client: Client, model: nn.Module, tmp_path: Path
) -> None:
    """`save_pretrained` does not tell whose weights they are, so `--yes` wants a licence of all."""
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    assert main(["convert", str(tmp_path / "saved" / "model.safetensors"), str(tmp_path / "out")]) == 0
    reply = client.load("hub", "publish", tmp_path / "out", "--repo", "ada/saved", "--yes")
    assert reply["code"] == 1 and "no licence is stated for the weights" in reply["err"]
    assert "ada/saved" not in server.repositories


def test_the_doctor_shows_no_logins(server: HubServer, client: Client) -> None:
    server.add(ARM, {})
    row = {"where": "upstream", "repository": ARM, "shapes": {"head.weight": (1000, 32)}}
    environment = {"HTTPS_PROXY": "http://ada:secret@proxy.example:3128"}
    out = client.load("hub", "doctor", ENTRY, table={ENTRY: row}, environment=environment)["out"]
    assert "HTTPS_PROXY=http://proxy.example:3128" in out and "secret" not in out
    assert client.load("run", "import os; del os.environ['HTTPS_PROXY']", "/")["names"]


@pytest.mark.parametrize(
    "entry, sizes, paper, code",
    [
        ("vim_tiny_patch16_224.in1k", NARROW, "2401.09417", "https://github.com/hustvl/Vim"),
        ("vmamba_tiny_s1l8.in1k", SMALL_MAPS, "2401.10166", "https://github.com/MzeroMiko/VMamba"),
    ],
)
def test_cards_of_peers_name_their_own_paper_and_code(
    entry: str, sizes: dict[str, Any], paper: str, code: str, tmp_path: Path
) -> None:
    """The licence is the one that was stated; where none was, the authors are to be asked."""
    (tmp_path / "bare.pth").write_bytes(official_bytes(finetuned(entry, **sizes)))
    for arguments, licence in (([], "other"), (["--license", "mit"], "mit")):
        out = tmp_path / licence
        assert main(["convert", str(tmp_path / "bare.pth"), str(out), *arguments]) == 0
        card = ModelCard.load(out / "README.md")
        assert card.data.license == licence and card.text.count(f"https://arxiv.org/abs/{paper}") == 2
        assert "2406.07537" not in card.text and "Ren" not in card.text
        assert (f"[the authors' code]({code})" in card.text) == (licence == "other")
