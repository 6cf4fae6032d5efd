"""Any model of the family in one line: by name, from the Hub, from a folder or from a file."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import timm
from timm.models import PretrainedCfg, list_models

from arm_zoo.arm import ARM
from arm_zoo.files import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    described_by_folder,
    read_checkpoint,
    read_config,
    read_shapes,
    weights_in,
)
from arm_zoo.hosted import ORGANISATION, TABLE, download, known_sha256, organisation
from arm_zoo.pretrain import ARMPretrain
from arm_zoo.variant import MAX_DEPTH, find_variant
from arm_zoo.weights import adapt_state_dict

__all__ = ["entries", "from_pretrained", "label_names"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

# What a config.json may say, by the types of timm and of the models. Not where weights are: they lie beside it.
_ELSEWHERE = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "device", "dtype", "return"}
_NAMES_OF_CLASSES = {"label_names": list[str] | dict[str, str] | None, "label_descriptions": Any}
_PRETRAINED_CFG = {**get_type_hints(PretrainedCfg), **_NAMES_OF_CLASSES, "custom_load": Literal[False]}
_MAX_CLASSES = 1_000_000  # more are a damaged file, and a head for them would take all memory
_MODEL_ARGS = get_type_hints(ARM.__init__)
_FETCH_AGAIN = "write it anew or fetch it again"
_PRETRAINING_MODEL = get_type_hints(ARMPretrain.__init__)


def from_pretrained(
    source: str | Path,
    *,
    as_backbone: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> ARM | ARMPretrain:
    """A model with its weights: a backbone, or the pretraining model where the weights are of one.

    Args:
        source: an entry ("arm_large", "arm_base_patch16_224.arm_in1k"), a repository of the Hub ("ORG/NAME",
            "hf-hub:ORG/NAME@REVISION"), a folder with config.json and model.safetensors or pytorch_model.bin
            ("local-dir:FOLDER" too), or a .safetensors or .pth file of this project, the authors or timm's scripts.
        as_backbone: make a backbone also of a pretraining model, for finetuning or features.
        revision: branch, tag or commit of the repository.
        cache_dir: instead of the default cache of huggingface_hub.
        token: see `huggingface_hub.hf_hub_download`.
        kwargs: arguments of the model that replace the saved ones, such as num_classes, img_size, drop_path_rate.

    Returns:
        `ARM` or `ARMPretrain`, in training mode like what timm.create_model gives; `.eval()` is the caller's.

    Raises:
        CheckpointError: if the weights are not hosted, cannot be fetched or read, or are another model's.
        FileNotFoundError: if there is no such file or folder.
        ValueError: if `source` is nothing of the above.
    """
    scheme, _, rest = str(source).partition(":")
    if scheme == "hf-hub":
        return _from_folder(_fetch(rest, revision, cache_dir, token), as_backbone, kwargs)
    path = Path(rest if scheme == "local-dir" else source)
    if isinstance(source, str) and source in entries():
        hosted = _repository(source)
        if hosted is None:
            return cast(ARM, timm.create_model(source, pretrained=True, cache_dir=cache_dir, **kwargs))
        name, table_revision = hosted
        return _from_folder(_fetch(name, revision or table_revision, cache_dir, token), as_backbone, kwargs)
    if path.is_dir() or scheme == "local-dir":
        return _from_folder(path, as_backbone, kwargs)
    if path.is_file():
        if described_by_folder(path):
            return _from_folder(path.parent, as_backbone, kwargs)
        return _from_file(path, as_backbone, kwargs)
    if isinstance(source, str) and _REPOSITORY.fullmatch(source) and not source.endswith((".safetensors", ".pth")):
        return _from_folder(_fetch(source, revision, cache_dir, token), as_backbone, kwargs)
    if path.suffix or "/" in str(source):
        raise FileNotFoundError(
            f"no checkpoint at {source}; name an entry (`python -m arm_zoo list`), ORG/NAME, a folder or a file"
        )
    close = difflib.get_close_matches(str(source), sorted(entries()))
    hint = f"did you mean {', '.join(close)}?" if close else "`python -m arm_zoo list` shows the entries"
    raise ValueError(f"{str(source)!r} is no entry, ORG/NAME on the Hub, folder or file; {hint}")


def label_names(cfg: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Names of the classes by index, where a configuration has one for each; otherwise none.

    transformers gives a model other classes and saves the names of the old ones with it, or, where it had none,
    LABEL_0, LABEL_1 and so on.
    """
    saved = cfg.get("label_names") or ()
    pairs = saved.items() if isinstance(saved, Mapping) else enumerate(saved)
    names = {str(index): str(name) for index, name in pairs}
    indices = [str(index) for index in range(len(names))]
    named = len(names) == num_classes and names.keys() == set(indices)
    if not named or all(name == f"LABEL_{index}" for index, name in names.items()):
        return ()
    return tuple(names[index] for index in indices)


def entries() -> set[str]:
    """Names of all entries, with and without tags."""
    return {*list_models(module="arm"), *list_models(module="arm", include_tags=True)}


def _repository(name: str) -> tuple[str, str | None] | None:
    """Repository and revision of an entry that is on the Hub, else None: `timm.create_model` says what to do."""
    cfg = cast(ARM, timm.create_model(name, device="meta")).pretrained_cfg
    weights = TABLE.get(f"{cfg['architecture']}.{cfg.get('tag', '')}")
    if weights is None or weights.bundled or not weights.repository:
        return None
    if organisation() != ORGANISATION:
        return f"{organisation()}/{weights.repository}", None
    return (f"{ORGANISATION}/{weights.repository}", weights.revision) if weights.hosted else None


def _fetch(repo: str, revision: str | None, cache_dir: str | Path | None, token: str | bool | None) -> Path:
    """The cache's folder with a repository's configuration and weights of one and the same commit."""
    config = download(repo, CONFIG, revision, cache_dir, token)
    name, _, at = repo.partition("@")
    sha256 = known_sha256(name, revision or at or None)
    weights = download(name, WEIGHTS, config.parent.name, cache_dir, token, sha256)
    if weights.parent != config.parent:
        raise CheckpointError(f"{config.parent} and {weights.parent} should be one folder of the cache; load again")
    return config.parent


def _from_folder(folder: Path, as_backbone: bool, kwargs: Mapping[str, Any]) -> ARM | ARMPretrain:
    config = read_config(folder)
    file = weights_in(folder)
    own = config.get("pretraining_model")
    if own is not None and not as_backbone:
        _check_table(own, _PRETRAINING_MODEL, "pretraining_model", folder)
        _check_description(file, lambda: ARMPretrain(**own, device="meta"))
        return _pretraining_model(own, kwargs, file)
    if own is not None and "architecture" not in config:  # as ARMPretrain.save_pretrained writes it
        return _from_file(file, as_backbone, kwargs)
    if config.get("architecture") not in [*entries()]:  # a list, which can be asked for anything that JSON has
        raise CheckpointError(
            f"{folder / CONFIG} is of {config.get('architecture', 'no timm model')!r}, which is no model of arm_zoo; "
            f"timm.create_model('local-dir:{folder}', pretrained=True) takes timm's own"
        )
    _check_table(config.get("model_args", {}), _MODEL_ARGS, "model_args", folder)
    _check_table(config.get("pretrained_cfg"), _PRETRAINED_CFG, "pretrained_cfg", folder)
    above = {key: config[key] for key in ("num_classes", *_NAMES_OF_CLASSES) if key in config}
    _check_table(above, _PRETRAINED_CFG, "its first level", folder)
    name = f"local-dir:{folder}"
    _check_description(file, lambda: cast(ARM, timm.create_model(name, device="meta")))
    return cast(ARM, timm.create_model(name, pretrained=True, **kwargs))


def _check_table(table: Any, types: Mapping[str, Any], name: str, folder: Path) -> None:
    """Refuse keys that nobody reads and values of other types."""
    allowed = sorted(set(types) - _ELSEWHERE)
    unknown = sorted(set(table) - set(allowed)) if isinstance(table, dict) else [_short(table)]
    if unknown:
        raise CheckpointError(f"{folder / CONFIG}: {name} has {', '.join(unknown)}; expected {', '.join(allowed)}")
    for key, value in table.items():
        wanted = types[key].__name__ if isinstance(types[key], type) else str(types[key])
        most = MAX_DEPTH if key.endswith("depth") else _MAX_CLASSES if key == "num_classes" else None
        if most is not None:
            wanted = f"at most {most}"
        if not _is_a(value, types[key]) or (most is not None and value is not None and value > most):
            raise CheckpointError(f"{folder / CONFIG}: {name} has {key}={_short(value)}; expected {wanted}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_a(value: Any, wanted: Any) -> bool:
    """Whether a value of JSON is of a type; lists stand for tuples, whole numbers for any."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list):
        fits = isinstance(value, list) and (len(parts) == 1 or ... in parts or len(value) == len(parts))
        return fits and all(_is_a(part, parts[0]) for part in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(part, parts[1]) for part in value.values())
    if wanted is float:
        return type(value) in (int, float)
    return wanted is Any or (isinstance(wanted, type) and type(value) is wanted)


def _check_description(file: Path, build: Callable[[], ARM | ARMPretrain]) -> None:
    """Compare what config.json describes with the weights beside it before memory is taken for it.

    Args:
        file: the weights.
        build: makes the model on the meta device, where it costs nothing, from the configuration alone: what is wrong
            here is not due to arguments of the caller.
    """
    config, shapes = file.parent / CONFIG, read_shapes(file)
    try:
        model = build()
        adapt_state_dict(shapes, model, timm_adapts=False)
    except CheckpointError:
        raise
    except Exception as error:  # from damaged configurations timm and PyTorch raise all sorts
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"the model of {config} cannot be built: {reason}; {_FETCH_AGAIN}") from error
    patches = model.patch_embed.num_patches
    rows = shapes["pos_embed"].shape[1:2] if "pos_embed" in shapes else ()
    if rows and rows[0] not in (patches, patches + 1):
        raise CheckpointError(
            f"{config} describes {patches} patches, but {file.name} beside it has position embeddings for {rows[0]} "
            "tokens: the two files do not belong together"
        )


def _from_file(file: Path, as_backbone: bool, kwargs: Mapping[str, Any]) -> ARM | ARMPretrain:
    variant = find_variant(read_checkpoint(file))
    if variant.pretraining is not None and not as_backbone:
        return _pretraining_model(variant.pretraining, kwargs, file)
    overlay: dict[str, Any] = {"file": str(file), "num_classes": variant.num_classes}
    arguments = {"num_classes": variant.num_classes, **variant.model_args}
    if variant.pretraining is None:
        embed = variant.backbone(device="meta").patch_embed
        overlay["input_size"] = (embed.proj.in_channels, *embed.img_size)
    return cast(
        ARM,
        timm.create_model(
            variant.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **{**arguments, **kwargs}
        ),
    )


def _pretraining_model(saved: Mapping[str, Any], kwargs: Mapping[str, Any], file: Path) -> ARMPretrain:
    allowed = inspect.signature(ARMPretrain).parameters
    if unknown := sorted(set(kwargs) - set(allowed)):
        raise TypeError(
            f"{file} is of a pretraining model: unknown keyword {', '.join(unknown)}; it takes "
            f"{', '.join(sorted(allowed))}; as_backbone=True makes a backbone of it"
        )
    state_dict = read_checkpoint(file)
    try:
        model = ARMPretrain(**{**saved, **kwargs})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the pretraining model of {file} cannot be built: {error}") from error
    model.load_state_dict(adapt_state_dict(state_dict, model))
    return model
