"""Model cards: one template, filled from the folder itself, the catalogue and the evaluator's figures.

What the template writes stands between two marks; what people write outside them, and keys that they add to the
metadata, stay when a card is written anew.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg

from arm_zoo.files import WEIGHTS, read_config, sha256_of

from .catalog import AUTHORS_CODE, AUTHORS_REPOSITORY, PAPER, RESULTS, SETS, Entry, candidates, measured
from .folders import CARD, read_header

BEGIN = "<!-- arm-zoo: written by python -m hub, from here -->"
END = "<!-- arm-zoo: to here; what you write outside the two marks stays -->"
RGB = 3  # channels
OURS = {"library_name", "license", "license_name", "model-index", "pipeline_tag"}  # metadata that the template writes

CITATION = """```bibtex
@article{ren2024autoregressive,
  title   = {Autoregressive Pretraining with Mamba in Vision},
  author  = {Ren, Sucheng and Li, Xianhang and Tu, Haoqin and Wang, Feng and Shu, Fangxun and Zhang, Lei and
             Mei, Jieru and Yang, Linjie and Wang, Peng and Wang, Heng and Yuille, Alan and Xie, Cihang},
  journal = {arXiv preprint arXiv:2406.07537},
  year    = {2024}
}
```"""

TEMPLATE = """{begin}
# {title}

{what}

| | |
|---|---|
{facts}

## Licence and origin

{licence}

## Use

Needs the package `arm_zoo` (in a checkout of arm-zoo: `pip install .`); importing it registers the models. Without
`import arm_zoo` timm says "Unknown model ({architecture})", and transformers "The model architecture '{architecture}'
is not supported in your version of timm ... Please upgrade timm": no upgrade helps, the import is what is missing. The
weights are safetensors: loading them runs no code of this repository.

{snippets}

`golden.safetensors` holds a fixed picture and the model's answer to it: `python -m hub check` compares them.

## Figures

{figures}

## Training

{training}

## Limits

{limits}

## Citation

{citation}
{end}
"""

CLASSIFY = """Classify a picture:

```python
import timm, torch
import arm_zoo
from PIL import Image

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
picture = transform(Image.open("picture.jpg").convert("{mode}"))
probabilities = model(picture[None]).softmax(dim=1)
```"""

FEATURES = """Features of every block as maps, and pooled:

```python
import torch
import arm_zoo

model = arm_zoo.from_pretrained("{repo}").eval()
pictures = torch.randn(2, {channels}, {height}, {width})
final, maps = model.forward_intermediates(pictures)
pooled = model.forward_head(final, pre_logits=True)
```"""

EMBED = """A vector for a picture:

```python
import timm, torch
import arm_zoo
from PIL import Image

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
vector = model(transform(Image.open("picture.jpg").convert("{mode}"))[None])
```"""

TRANSFORMERS = """With transformers:

```python
import arm_zoo
from transformers import pipeline

classify = pipeline("image-classification", model="{repo}")
print(classify("picture.jpg"))
```"""

FINETUNE = """{title}

```python
import timm
import arm_zoo

model = timm.create_model("hf-hub:{repo}", pretrained=True, num_classes=10)
```"""

PRETRAIN = """The pretraining model, to look at its predictions or to train it further:

```python
import torch
import arm_zoo

model = arm_zoo.from_pretrained("{repo}")
pictures = torch.randn(2, {channels}, {height}, {width})
loss, prediction, target = model(pictures)
```

Features of the causal encoder:

```python
import torch
import arm_zoo

model = arm_zoo.from_pretrained("{repo}").eval()
latents = model.forward_encoder(torch.randn(2, {channels}, {height}, {width}))
```"""


def write_card(folder: Path, old: Path | None = None, repo: str = "ORG/NAME", results: Path = RESULTS) -> None:
    """Write README.md of a converted folder.

    Args:
        folder: with model.safetensors and config.json.
        old: a card whose hand-written parts are kept, if it exists.
        repo: the repository in the snippets; before there is one, ORG/NAME stands for it.
        results: the evaluator's CSV, which may be missing.
    """
    config, header, sha256 = read_config(folder), read_header(folder / WEIGHTS), sha256_of(folder / WEIGHTS)
    rows = measured(sha256, results)
    text = _text(config, header, sha256, repo, rows)
    data = _metadata(config, header, repo, rows)
    if old is not None and old.exists():
        card = ModelCard(old.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        theirs = {key: value for key, value in card.data.to_dict().items() if key not in OURS}
        tags = list(dict.fromkeys([*data["tags"], *(card.data.tags or [])]))
        data = {**theirs, **data, "tags": tags}
        before, begin, rest = card.text.partition(BEGIN)
        _, end, after = rest.partition(END)
        text = before.lstrip("\n") + text.rstrip("\n") + after if begin and end else f"{text}\n{card.text.strip()}\n"
    data = ModelCardData(**data, ignore_metadata_errors=True)
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def _metadata(config: dict[str, Any], header: dict[str, str], repo: str, rows: dict[str, Any]) -> dict[str, Any]:
    """The card's YAML block; its model-index has measured figures only."""
    license = header.get("license", "unknown")
    pretraining = "pretraining_model" in config
    colour = not pretraining and config["pretrained_cfg"]["input_size"][0] == RGB  # all that transformers opens
    named = {"license": "other", "license_name": "unknown"} if license == "unknown" else {"license": license}
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            metric_type="accuracy",
            metric_name="top1",
            metric_value=float(row["top1"]),
        )
        for name, row in rows.items()
    ]
    data = ModelCardData(
        **named,
        library_name="arm-zoo" if pretraining else "timm",
        pipeline_tag="image-feature-extraction" if not config["num_classes"] else "image-classification",
        tags=["arm-zoo", "mamba", *([] if pretraining else ["timm"]), *(["transformers"] if colour else [])],
        **({"model_name": repo.rpartition("/")[2], "eval_results": results} if results else {}),
    )
    return data.to_dict()


def _text(config: dict[str, Any], header: dict[str, str], sha256: str, repo: str, rows: dict[str, Any]) -> str:
    official = header.get("source_names") == "official"
    default = get_pretrained_cfg(config["architecture"])
    own_sizes = set(config["model_args"]) & {"embed_dim", "depth", "d_state", "patch_size"}
    standard = not own_sizes and list(default.input_size) == config["pretrained_cfg"]["input_size"]
    entries = candidates(config["architecture"], config["num_classes"], standard) if official else []
    return TEMPLATE.format(
        begin=BEGIN,
        end=END,
        title=config["architecture"] if repo == "ORG/NAME" else repo.rpartition("/")[2],
        what=_what(config),
        architecture=config["architecture"],
        facts="\n".join(f"| {key} | {value} |" for key, value in _facts(config, header, sha256).items()),
        licence=_licence(header, official),
        snippets=_snippets(config, repo),
        figures=_figures(entries, rows),
        training=_training(config, entries, official),
        limits=_limits(config, header),
        citation=CITATION,
    )


def _what(config: dict[str, Any]) -> str:
    kind = (
        "A pretraining model: a causal encoder and the decoder that predicts the next part of a picture from it. "
        "timm loads its encoder as a backbone with four scans."
        if "pretraining_model" in config
        else "An image classifier."
        if config["num_classes"]
        else "An image encoder without a head."
    )
    return f"{kind} Mamba blocks after *Autoregressive Pretraining with Mamba in Vision* ([ARM]({PAPER}))."


def _facts(config: dict[str, Any], header: dict[str, str], sha256: str) -> dict[str, Any]:
    cfg = config["pretrained_cfg"]
    channels, height, width = cfg["input_size"]
    preprocessing = f"{cfg['crop_mode']}, crop {cfg['crop_pct']}, {cfg['interpolation']}"
    own = config.get("pretraining_model", {})
    return {
        "entry": f"`{config['architecture']}`",
        "differs from the entry in": ", ".join(_differences(config)) or "nothing",
        **({"pretraining model": ", ".join(f"{k}={v}" for k, v in own.items())} if own else {}),
        "classes": config["num_classes"] or "none",
        "input": f"{channels}x{height}x{width}; {preprocessing}; mean {cfg['mean']}, std {cfg['std']}",
        "numbers": header.get("dtype", "unknown"),
        "sha256 of model.safetensors": f"`{sha256}`",
        "sha256 of the file it was converted from": f"`{header.get('source_sha256', 'unknown')}`",
        "converted by": f"arm-zoo {header.get('library_version', 'unknown')}",
    }


def _differences(config: dict[str, Any]) -> list[str]:
    channels, *size = get_pretrained_cfg(config["architecture"]).input_size
    default = {"in_chans": channels, "img_size": size, "global_pool": "avg"}
    return [f"{key}={value}" for key, value in config["model_args"].items() if default.get(key) != value]


def _licence(header: dict[str, str], official: bool) -> str:
    code = "The code that runs the model, arm-zoo, is under Apache-2.0."
    license = header.get("license", "unknown")
    if official and license == "unknown":
        return (
            f"{code} The weights were converted from a checkpoint with the names of the authors' code "
            f"([code]({AUTHORS_CODE}), [weights](https://huggingface.co/{AUTHORS_REPOSITORY})). The authors' "
            "repository states no licence, so none can be stated here: ask them before redistributing the weights. "
            "ImageNet-1k, on which the paper's models were trained, has terms of access of its own."
        )
    said = "No licence was stated" if license == "unknown" else f"The licence stated is {license}"
    return f"{code} {said} for the weights when they were converted. The file does not tell its data."


def _snippets(config: dict[str, Any], repo: str) -> str:
    own = config.get("pretraining_model")
    channels, height, width = config["pretrained_cfg"]["input_size"]
    if own:
        size = own["img_size"]
        height, width = (size, size) if isinstance(size, int) else size
    facts = {
        "repo": repo,
        "channels": channels,
        "height": height,
        "width": width,
        "mode": "L" if channels == 1 else "RGB",
    }
    if own:
        parts = [
            PRETRAIN,
            FINETUNE.replace("{title}", "A backbone to finetune, every scan a copy of the pretrained one:"),
        ]
    elif config["num_classes"]:
        parts = [CLASSIFY, FEATURES, *([TRANSFORMERS] if channels == RGB else [])]
    else:
        parts = [EMBED, FEATURES, FINETUNE.replace("{title}", "A backbone with a fresh head, to finetune:")]
    return "\n\n".join(part.format(**facts) for part in parts)


def _figures(entries: list[Entry], rows: dict[str, Any]) -> str:
    lines = []
    if rows:
        lines += ["*Measured* on this file by `python -m eval`:", "", "| set | pictures | top-1 |", "|---|---|---|"]
        lines += [f"| {SETS.get(name, name)} | {row['n']} | {float(row['top1']):.2f} |" for name, row in rows.items()]
    else:
        lines += ["*Measured* on this file: nothing yet."]
    reported = [entry for entry in entries if entry.reported]
    if reported:
        lines += ["", "*Reported* by the paper for models of this shape, not measured on this file:", ""]
        lines += ["| model | set | top-1 |", "|---|---|---|"]
        lines += [
            f"| {entry.paper_name} | {SETS[name]} | {top1} |"
            for entry in reported
            for name, top1 in entry.reported.items()
        ]
        if len(reported) > 1:
            lines += ["", "Which of these models the file is, its shapes do not tell."]
    return "\n".join(lines)


def _training(config: dict[str, Any], entries: list[Entry], official: bool) -> str:
    if entries:
        ways = "; ".join(f"{entry.paper_name}: `{entry.recipe}`" for entry in entries)
        return f"By the authors, if it is their file. The same training from a checkout of arm-zoo: {ways}."
    if official:
        return "With the authors' code, or code that keeps its names; the file does not tell how."
    return "With arm-zoo or code that keeps its names; the file does not tell how."


def _limits(config: dict[str, Any], header: dict[str, str]) -> str:
    lines = ["- Pictures are squashed to a square before the crop, as in the official evaluation."]
    if config["pretrained_cfg"]["crop_mode"] != "squash":
        lines = []
    if "pretraining_model" in config:
        lines += [
            "- It has no classifier and the class token of a backbone made of it is untrained: finetune it first."
        ]
    elif config["num_classes"]:
        lines += ["- It names one of its classes for any picture, also for those that show none of them."]
    if header.get("dtype") != "fp32":
        lines += [f"- The numbers were rounded to {header.get('dtype')}; the scan itself always runs in float32."]
    return "\n".join([*lines, "- It was not examined for bias; its errors are those of its training data too."])
