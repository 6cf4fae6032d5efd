"""Model cards: hub/templates, filled from the folder itself, the catalogue and the evaluator's figures.

The text of the template stands between two marks. Text that people write outside them, and keys that they add to the
metadata, stay when a card is written anew.
"""

import re
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg

from arm_zoo.files import WEIGHTS, read_config, sha256_of, write_text
from arm_zoo.models import ARCHITECTURES
from arm_zoo.pretraining import DEFAULT_OBJECTIVE, OBJECTIVES
from arm_zoo.pretraining.autoregressive import DVAE_TOKENS
from arm_zoo.weights.hosted import training_commands
from hub.catalog import FROZEN, PAPER_NAMES, RESULTS, candidates, measured, measured_frozen, reported, set_names
from hub.folders import CARD, read_header

BEGIN = "<!-- arm-zoo: written by python -m hub, from here -->"
END = "<!-- arm-zoo: to here; what you write outside the two marks stays -->"
OURS = {"library_name", "license", "license_name", "model-index", "pipeline_tag"}  # metadata that the template writes

RGB = 3  # channels: the image processor of transformers opens no other images
TEMPLATES = Path(__file__).parent / "templates"
UNKNOWN = dict.fromkeys(("license", "dtype", "source_sha256", "library_version"), "unknown")
SNIPPETS = {  # kind of model -> headings in parts.md
    "classifier": ("classify", "features", "transformers"),
    "encoder": ("embed", "features", "finetune"),
    "pretraining": ("pretraining", "latents", "finetune"),
    "tokens": ("tokens", "latents", "finetune"),  # pretraining that predicts those of a dVAE
}


def write_card(
    folder: Path, old: Path | None = None, repo: str = "ORG/NAME", results: Path = RESULTS, frozen: Path = FROZEN
) -> None:
    """Write README.md of a folder with model.safetensors and config.json.

    What people wrote into the card `old`, if it exists, is kept. The snippets name `repo`. The CSV files `results`, of
    the evaluator, and `frozen`, of the probe, may be missing.
    """
    config, sha256 = read_config(folder), sha256_of(folder / WEIGHTS)
    facts = {**UNKNOWN, **read_header(folder / WEIGHTS), "sha256": sha256, "repo": repo}
    rows = measured(sha256, results)
    text, data = _text(config, facts, rows, measured_frozen(sha256, frozen)), _metadata(config, facts, rows)
    if old is not None and old.exists():
        card = ModelCard(old.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        theirs = {key: value for key, value in card.data.to_dict().items() if key not in OURS}
        data = {**theirs, **data, "tags": list(dict.fromkeys([*data["tags"], *theirs.get("tags", [])]))}
        before, begin, rest = card.text.partition(BEGIN)
        _, end, after = rest.partition(END)
        text = before.lstrip("\n") + text.rstrip("\n") + after if begin and end else f"{text}\n{card.text.strip()}\n"
    metadata = ModelCardData(**data, ignore_metadata_errors=True).to_yaml()
    write_text(folder / CARD, f"---\n{metadata}\n---\n\n{text}")


def _metadata(config: dict[str, Any], facts: dict[str, str], rows: dict[str, Any]) -> dict[str, Any]:
    """The card's YAML block; its model-index has only measured figures."""
    license = facts["license"]
    pretraining = "pretraining_model" in config
    colour = not pretraining and config["pretrained_cfg"]["input_size"][0] == RGB
    results = [
        EvalResult("image-classification", name, name, "accuracy", float(row["top1"]), metric_name="top1")
        for name, row in rows.items()
    ]
    return {
        **({"license": "other", "license_name": "unknown"} if license == "unknown" else {"license": license}),
        "library_name": "arm-zoo" if pretraining else "timm",
        "pipeline_tag": "image-classification" if config["num_classes"] else "image-feature-extraction",
        "tags": ["arm-zoo", "mamba", *([] if pretraining else ["timm"]), *(["transformers"] if colour else [])],
        **({"model_name": facts["repo"].rpartition("/")[2], "eval_results": results} if results else {}),
    }


def _text(config: dict[str, Any], facts: dict[str, str], rows: dict[str, Any], frozen: list[dict[str, str]]) -> str:
    """Fill the template with the parts for this model, and then with the facts, which may have any characters."""
    architecture, cfg, arguments = config["architecture"], config["pretrained_cfg"], config["model_args"]
    own, objective = config.get("pretraining_model", {}), OBJECTIVES[config.get("objective", DEFAULT_OBJECTIVE)]
    kind = "pretraining" if own else "classifier" if config["num_classes"] else "encoder"
    official, rounded = facts.get("source_names") == "official", facts["dtype"] != "fp32"
    default: Any = get_pretrained_cfg(architecture)
    paper = _paper(default.paper_name, default.paper_ids)
    of_entry = ARCHITECTURES[architecture].sizes(architecture)
    usual = {key: list(value) if isinstance(value, tuple) else value for key, value in of_entry.items()}  # as JSON
    differences = [f"{key}={value}" for key, value in arguments.items() if usual.get(key) != value]
    entries = candidates(architecture, config["num_classes"], standard=not differences) if official else []

    licence = "stated" if facts["license"] != "unknown" else "authors" if official else "unknown"
    training = "candidates" if entries else "official" if official else "ours"
    chosen = {"what": kind, "licence": licence, "training": training}
    limits = {"squash": cfg["crop_mode"] == "squash", kind: kind != "encoder", "rounded": rounded, "all": True}
    channels, height, width = cfg["input_size"]
    _, *pieces = re.split(r"^## (.+)\n", (TEMPLATES / "parts.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    parts = {heading: text.strip() for heading, text in zip(pieces[::2], pieces[1::2], strict=True)}
    usage = "tokens" if own.get("target") == DVAE_TOKENS else kind
    snippets = [name for name in SNIPPETS[usage] if name != "transformers" or channels == RGB]
    with_parts = Template((TEMPLATES / "card.md").read_text(encoding="utf-8")).safe_substitute(
        {name: parts[f"{name} {which}"] for name, which in chosen.items()},
        use="\n\n".join(parts[f"use {name}"] for name in snippets),
        limits="\n".join(parts[f"limits {name}"] for name, holds in limits.items() if holds),
    )
    preprocessing = f"{cfg['crop_mode']}, crop {cfg['crop_pct']}, {cfg['interpolation']}"
    of_snippets = to_2tuple(own["img_size"]) if own else (height, width)
    return Template(with_parts).substitute(
        facts,
        begin=BEGIN,
        end=END,
        after=f" after {paper}" if paper else "",
        citation=f"\n## Citation\n\n{paper}\n" if paper else "",
        origin=cfg.get("origin_url"),
        title=architecture if facts["repo"] == "ORG/NAME" else facts["repo"].rpartition("/")[2],
        architecture=architecture,
        differences=", ".join(differences) or "nothing",
        objective=objective.description,
        outputs=objective.outputs,
        pretraining=f"| pretraining model | {', '.join(f'{k}={v}' for k, v in own.items())} |\n" if own else "",
        classes=config["num_classes"] or "none",
        input=f"{channels}x{height}x{width}; {preprocessing}; mean {cfg['mean']}, std {cfg['std']}",
        figures=_figures(entries, rows) + _frozen_figures(frozen),
        recipes="; ".join(f"{PAPER_NAMES[name]}: `{training_commands(name)}`" for name in entries),
        channels=channels,
        height=of_snippets[0],
        width=of_snippets[1],
        mode="L" if channels == 1 else "RGB",
    )


def _paper(name: str | None, number: str | None) -> str:
    """The name and the arXiv number of a paper in Markdown, as far as they are known."""
    link = f"[{number}](https://arxiv.org/abs/{number.removeprefix('arXiv:')})" if number else ""
    if name and link:
        return f"*{name}* ({link})"
    return f"*{name}*" if name else link


def _figures(entries: list[str], rows: dict[str, Any]) -> str:
    """What was measured on these weights, and separately, what the paper reports for models of this shape."""
    names = set_names()
    lines = ["*Measured* on this file: nothing yet."]
    if rows:
        lines = ["*Measured* on this file by `python -m eval`:", "", "| set | images | top-1 |", "|---|---|---|"]
        lines += [f"| {names.get(name, name)} | {row['n']} | {float(row['top1']):.2f} |" for name, row in rows.items()]
    figures = {PAPER_NAMES[entry]: by_set for entry in entries if (by_set := reported(entry))}
    if figures:
        lines += ["", "*Reported* by the paper for models of this shape, not measured on this file:", ""]
        lines += ["| model | set | top-1 |", "|---|---|---|"]
        for model, by_set in figures.items():
            lines += [f"| {model} | {names[name]} | {top1} |" for name, top1 in by_set.items()]
    if len(figures) > 1:
        lines += ["", "Which of these models the file is, its shapes do not tell."]
    return "\n".join(lines)


def _frozen_figures(rows: list[dict[str, str]]) -> str:
    """What was measured on features of these weights; no text without rows."""
    if not rows:
        return ""
    said = "*Measured* on frozen features of this file by `python -m recipes.probe`, with 95% intervals:"
    lines = ["", "", said, "", "| data set | protocol | features | top-1 |", "|---|---|---|---|"]
    for row in rows:
        protocol = f"{row['protocol']}, {row['settings']}"
        top1, low, high = (f"{float(row[name]):.2f}" for name in ("top1", "low", "high"))
        lines.append(f"| {row['data_set']} | {protocol} | {row['features']} | {top1} ({low} to {high}) |")
    return "\n".join(lines)
