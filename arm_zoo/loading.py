"""A model with its weights in one line: by name, from the Hub, from a folder or from a file."""

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import timm
import torch
from timm.models import (
    PretrainedCfg,
    get_pretrained_cfg,
    list_models,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from arm_zoo.arm import ARM, SHORT_NAMES
from arm_zoo.files import (
    CONFIG,
    PICKLED_WEIGHTS,
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

__all__ = ["Loaded", "architecture_of", "entries", "entry_of", "from_pretrained", "label_names", "load"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

# What a config.json may say, by the types of timm and of the models. Not where weights are: they lie beside it.
_ELSEWHERE = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "device", "dtype", "return"}
_NAMES_OF_CLASSES = {"label_names": list[str] | dict[str, str] | None, "label_descriptions": Any}
_PRETRAINED_CFG = {**get_type_hints(PretrainedCfg), **_NAMES_OF_CLASSES, "custom_load": Literal[False]}
_MAX_CLASSES = 1_000_000  # more are a damaged file, and a head for them would take all memory
_MODEL_ARGS = get_type_hints(ARM.__init__)
_FETCH_AGAIN = "write it anew or fetch it again"
_PRETRAINING_MODEL = get_type_hints(ARMPretrain.__init__)


class Loaded(NamedTuple):
    """A model with its weights.

    Attributes:
        model: in training mode, like what `timm.create_model` gives.
        file: that the weights were read from; None where timm does not say.
        source: what tables call the weights: a repository, a URL, or the name of a file or folder, not where it lies.
        config: what the config.json beside the weights says; empty where there is none.
    """

    model: Any  # an nn.Module whose attributes type checkers do not know
    file: Path | None
    source: str
    config: dict[str, Any]


def load(
    name: str | Path,
    weights: str | Path | None = None,
    *,
    as_backbone: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> Loaded:
    """A model of ours or of timm with its weights, never with weights drawn at random.

    Args:
        name: an entry of ours or timm's, or what names its model itself: "hf-hub:ORG/NAME@REVISION", a folder with
            config.json ("local-dir:FOLDER" too), or a file with the weights of one of our models.
        weights: a file, a folder or "hf-hub:..." in place of the entry's own weights. A bare file's classes count, and
            of our models its channels; without a head in the file the model has none.
        as_backbone: make a backbone also of a pretraining model, for finetuning or features.
        revision: branch, tag or commit of the repository.
        cache_dir: instead of the default cache of huggingface_hub.
        token: see `huggingface_hub.hf_hub_download`.
        kwargs: arguments of the model that replace the saved ones, such as num_classes, img_size, drop_path_rate.

    Raises:
        CheckpointError: if the weights are not hosted, cannot be fetched or read, or are another model's.
        FileNotFoundError: if there is no such file or folder.
        ValueError: for an unknown name, and for a folder of another model than `name`.
    """
    hub = {"revision": revision, "cache_dir": cache_dir, "token": token}
    return _load(name, weights, as_backbone, hub, kwargs, timms_too=True)


def from_pretrained(
    source: str | Path,
    *,
    as_backbone: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> ARM | ARMPretrain:
    """A model of ours with its weights: a backbone, or the pretraining model where the weights are of one.

    Args:
        source: an entry ("arm_large", "arm_base_patch16_224.arm_in1k"), a repository of the Hub ("ORG/NAME",
            "hf-hub:ORG/NAME@REVISION"), a folder with config.json and model.safetensors or pytorch_model.bin
            ("local-dir:FOLDER" too), or a .safetensors or .pth file of this project, the authors or timm's scripts.
        as_backbone: see `load`; revision, cache_dir, token and kwargs likewise.

    Returns:
        `ARM` or `ARMPretrain`, in training mode like what timm.create_model gives; `.eval()` is the caller's.

    Raises:
        CheckpointError: if the weights are not hosted, cannot be fetched or read, or are another model's.
        FileNotFoundError: if there is no such file or folder.
        ValueError: if `source` is nothing of the above.
    """
    hub = {"revision": revision, "cache_dir": cache_dir, "token": token}
    is_repository = isinstance(source, str) and _REPOSITORY.fullmatch(source) and not Path(source).exists()
    if is_repository and not str(source).endswith((".safetensors", ".pth")):
        source = f"hf-hub:{source}"
    return cast(ARM | ARMPretrain, _load(source, None, as_backbone, hub, kwargs, timms_too=False).model)


def _load(
    name: str | Path,
    weights: str | Path | None,
    as_backbone: bool,
    hub: dict[str, Any],
    kwargs: dict[str, Any],
    timms_too: bool,
) -> Loaded:
    source = str(name if weights is None else weights)
    wanted = None if weights is None else str(name)
    scheme, _, rest = source.partition(":")
    path = Path(rest if scheme == "local-dir" else source)
    if scheme in ("hf-hub", "hf_hub"):
        return _from_hub(rest, source, wanted, as_backbone, hub, kwargs, timms_too)
    if name in entries() and weights is None:
        if hosted := _repository(source):
            repo, table_revision = hosted
            hub = {**hub, "revision": hub["revision"] or table_revision}
            called = f"{repo}@{hub['revision']}" if hub["revision"] else repo
            return _from_hub(repo, called, None, as_backbone, hub, kwargs, timms_too)
        return _from_timm(source, hub["cache_dir"], kwargs)
    if name in list_entries() and weights is None and timms_too:
        return _from_timm(source, hub["cache_dir"], kwargs)
    if scheme == "local-dir" or path.is_dir() or (path.is_file() and described_by_folder(path)):
        folder = path.parent if path.is_file() else path
        loaded = _from_folder(folder, wanted, as_backbone, kwargs, timms_too)
        return loaded._replace(source=path.resolve().name)
    if path.is_file():
        model = _from_file(path, as_backbone, kwargs) if wanted is None else _from_named_file(wanted, path, kwargs)
        return Loaded(model, path, path.name, {})
    if weights is not None or path.suffix or "/" in source:
        raise FileNotFoundError(
            f"no checkpoint at {source}; name an entry (`python -m arm_zoo list`), a folder, a file or hf-hub:ORG/NAME"
        )
    raise unknown_model(source, list_entries() if timms_too else entries())


def unknown_model(name: str, known: Collection[str]) -> ValueError:
    """The error for a name that is not known."""
    close = difflib.get_close_matches(name, sorted(known))
    hint = f"did you mean {', '.join(close)}?" if close else "`python -m arm_zoo list` shows the entries"
    return ValueError(f"unknown model {name!r}; {hint}")


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
    """Names of all entries of ours, with and without tags."""
    return {*list_models(module="arm"), *list_models(module="arm", include_tags=True)}


def list_entries() -> set[str]:
    """Names of all models that timm knows, ours among them, with and without tags."""
    return {*list_models(), *list_models(include_tags=True)}


def architecture_of(name: str) -> str:
    """The entry's name without its tag; the long name of a short one."""
    architecture: str = split_model_name_tag(name)[0]
    return SHORT_NAMES.get(architecture, architecture)


def entry_of(name: str) -> str:
    """The name with its tag, of an entry that may be named without, or by a short name."""
    architecture, tag = architecture_of(name), split_model_name_tag(name)[1]
    default: Any = get_pretrained_cfg(architecture)
    return f"{architecture}.{tag or default.tag}"


def _repository(name: str) -> tuple[str, str | None] | None:
    """Repository and revision of an entry that is on the Hub, else None: `timm.create_model` says what to do."""
    weights = TABLE.get(entry_of(name))
    if weights is None or weights.bundled or not weights.repository:
        return None
    if organisation() != ORGANISATION:
        return f"{organisation()}/{weights.repository}", None
    return (f"{ORGANISATION}/{weights.repository}", weights.revision) if weights.hosted else None


def _from_hub(
    repo: str,
    source: str,
    wanted: str | None,
    as_backbone: bool,
    hub: dict[str, Any],
    kwargs: dict[str, Any],
    timms_too: bool,
) -> Loaded:
    """From the cache's folder with a repository's configuration and weights of one and the same commit."""
    name, _, at = repo.partition("@")
    revision = hub["revision"] or at or None
    file = download(name, CONFIG, revision, hub["cache_dir"], hub["token"])
    config = read_config(file.parent)
    if timms_too and not _is_ours(config):
        _check_architecture(config, wanted, source)
        at_revision = f"hf-hub:{name}@{revision}" if revision else f"hf-hub:{name}"
        return _from_timm(at_revision, hub["cache_dir"], kwargs)._replace(source=source, config=config)
    weights = download(name, WEIGHTS, file.parent.name, hub["cache_dir"], hub["token"], known_sha256(name, revision))
    if weights.parent != file.parent:
        raise CheckpointError(f"{file.parent} and {weights.parent} should be one folder of the cache; load again")
    return _from_folder(file.parent, wanted, as_backbone, kwargs, timms_too)._replace(source=source)


def _from_timm(name: str, cache_dir: str | Path | None, kwargs: Mapping[str, Any]) -> Loaded:
    """By `timm.create_model`, and which file that read, where a cache still has it."""
    model: Any = timm.create_model(name, pretrained=True, cache_dir=cache_dir, **kwargs)
    cfg = getattr(model, "pretrained_cfg", {})
    if cfg.get("file"):
        file = Path(cfg["file"])
        return Loaded(model, file, file.resolve().name, {})
    if cfg.get("hf_hub_id"):
        from huggingface_hub import try_to_load_from_cache

        repo, _, revision = str(cfg["hf_hub_id"]).partition("@")
        for filename in filter(None, (cfg.get("hf_hub_filename"), WEIGHTS, PICKLED_WEIGHTS)):
            found = try_to_load_from_cache(repo, filename, cache_dir, revision or None)
            if isinstance(found, str):
                return Loaded(model, Path(found), str(cfg["hf_hub_id"]), {})
        return Loaded(model, None, str(cfg["hf_hub_id"]), {})
    url = str(cfg.get("url") or "")
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    return Loaded(model, file if file.is_file() else None, url, {})


def _is_ours(config: Mapping[str, Any]) -> bool:
    return "pretraining_model" in config or config.get("architecture") in [*entries()]  # it may be whatever JSON has


def _check_architecture(config: Mapping[str, Any], wanted: str | None, where: object) -> None:
    """Refuse weights of another model than the one that they are named for."""
    if wanted is not None and config.get("architecture") != architecture_of(wanted):
        found = config.get("architecture") or "no timm model"
        raise ValueError(f"the weights in {where} are of {found}, not of {architecture_of(wanted)}")


def _from_folder(
    folder: Path, wanted: str | None, as_backbone: bool, kwargs: Mapping[str, Any], timms_too: bool
) -> Loaded:
    config = read_config(folder)
    own, name = config.get("pretraining_model"), f"local-dir:{folder}"
    if timms_too and not _is_ours(config):
        _check_architecture(config, wanted, folder)
        return _from_timm(name, None, kwargs)._replace(file=_weights_if_any(folder), config=config)
    file = weights_in(folder)
    if own is not None and not as_backbone:
        _check_table(own, _PRETRAINING_MODEL, "pretraining_model", folder)
        _check_description(file, lambda: ARMPretrain(**own, device="meta"))
        return Loaded(_pretraining_model(own, kwargs, file), file, "", config)
    if own is not None and "architecture" not in config:  # as ARMPretrain.save_pretrained writes it
        return Loaded(_from_file(file, as_backbone, kwargs), file, "", config)
    if not _is_ours({"architecture": config.get("architecture")}):
        raise CheckpointError(
            f"{folder / CONFIG} is of {config.get('architecture', 'no timm model')!r}, which is no model of arm_zoo; "
            f"timm.create_model('{name}', pretrained=True) takes timm's own"
        )
    _check_architecture(config, wanted, folder)
    _check_table(config.get("model_args", {}), _MODEL_ARGS, "model_args", folder)
    _check_table(config.get("pretrained_cfg"), _PRETRAINED_CFG, "pretrained_cfg", folder)
    above = {key: config[key] for key in ("num_classes", *_NAMES_OF_CLASSES) if key in config}
    _check_table(above, _PRETRAINED_CFG, "its first level", folder)
    _check_description(file, lambda: cast(ARM, timm.create_model(name, device="meta")))
    return Loaded(timm.create_model(name, pretrained=True, **kwargs), file, "", config)


def _weights_if_any(folder: Path) -> Path | None:
    """The file of a folder; None where timm takes a file of another name there."""
    try:
        return weights_in(folder)
    except FileNotFoundError:
        return None


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


def _from_named_file(name: str, file: Path, kwargs: Mapping[str, Any]) -> nn.Module:
    """An entry's model, ours or timm's, with as many classes as the file says, so that timm draws none at random."""
    state_dict = read_checkpoint(file)
    cfg = resolve_pretrained_cfg(architecture_of(name))
    if cfg.classifier is None:  # registered without a configuration, so that timm would not load anything
        model = timm.create_model(name, **kwargs)
        model.load_state_dict(state_dict)
        return model
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else cfg.classifier[0]
    head, stem = state_dict.get(f"{classifier}.weight"), state_dict.get(f"{cfg.first_conv}.weight")
    classes = 0 if head is None else len(head)
    overlay: dict[str, Any] = {"file": str(file), "num_classes": classes, "hf_hub_id": None, "url": ""}
    sizes = {"num_classes": classes - (cfg.label_offset or 0) if classes else 0}
    if name in entries() and stem is not None:
        sizes["in_chans"] = stem.shape[1]
        overlay["input_size"] = (stem.shape[1], *cfg.input_size[1:])
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**sizes, **kwargs})


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
