"""Loads a model with its weights by a name, from the Hub, a folder or a file."""

import difflib
import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import timm
import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg, split_model_name_tag

from arm_zoo import files
from arm_zoo.files import CONFIG, PICKLED_WEIGHTS, WEIGHTS, CheckpointError, StateDict
from arm_zoo.heads.models import HEADED, AttentiveProbe, Segmenter
from arm_zoo.identify import MAX_DEPTH, find_variant
from arm_zoo.images.locate import HUB_ID
from arm_zoo.models._builder import ARCHITECTURES, SHORT_NAMES, Backbone
from arm_zoo.pretraining._registry import DEFAULT_OBJECTIVE, OBJECTIVES, PretrainingModel
from arm_zoo.weights.download import download
from arm_zoo.weights.find import hub_repository, is_upstream
from arm_zoo.weights.hosted import TABLE, known_sha256
from arm_zoo.weights.reading import read_checkpoint
from arm_zoo.weights.tensor_names import under_our_names
from arm_zoo.weights.upstream import CHECKPOINTS, fetch_address, fetch_upstream, read_record

_REPOSITORY = re.compile(rf"{HUB_ID.pattern}(@[\w./-]+)?")

# What a config.json must not say, as the weights lie beside it, and the types of what it may say.
_ELSEWHERE = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "device", "dtype", "return"}
_NAMES_OF_CLASSES = {"label_names": list[str] | dict[str, str] | None, "label_descriptions": Any}
_PRETRAINED_CFG = {**get_type_hints(PretrainedCfg), **_NAMES_OF_CLASSES, "custom_load": Literal[False]}
_OF_FEATURES = ("features_only", "out_indices", "feature_cls")  # by which timm wraps a model, under other names
_MAX_CLASSES = 1_000_000  # only a damaged file has more; a head for them could exhaust the memory


class Loaded(NamedTuple):
    """A model with its weights, in training mode as `timm.create_model` returns it."""

    model: Any  # an nn.Module, with attributes that type checkers do not know
    file: Path | None  # the file of the weights; None if timm does not tell it
    source: str  # what tables show as origin: a repository, a URL, or the name of a file or folder
    config: dict[str, Any]  # the content of the config.json beside the weights; empty if there is none


def load(name: str | Path, weights: str | Path | None = None, *, as_backbone: bool = False, **kwargs: Any) -> Loaded:
    """Load a model of ours or of timm with its weights, never with random ones.

    See `from_pretrained` for the other arguments and what is raised.

    Args:
        name: an entry of ours or timm's, or a source that tells its model itself: "hf-hub:ORG/NAME@REVISION", a folder
            with config.json (also "local-dir:FOLDER"), or a file with weights of one of our models, also one in a
            repository of the Hub ("hf://ORG/NAME/FILE").
        weights: a file, a folder, "hf-hub:..." or "hf://..." in place of the entry's own weights. A bare file decides
            how many classes the model has, none if it has no head, and how many channels a model of ours takes.
    """
    return _Loader(as_backbone, kwargs).load(name, weights)


def from_pretrained(
    source: str | Path,
    *,
    as_backbone: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> Backbone | PretrainingModel | AttentiveProbe | Segmenter:
    """Load a model of ours with its weights, in training mode as `timm.create_model` returns it.

    Args:
        source: an entry ("arm_large", "arm_base_patch16_224.arm_in1k"), a repository of the Hub ("ORG/NAME",
            "hf-hub:ORG/NAME@REVISION"), a folder with config.json and model.safetensors or pytorch_model.bin
            (also "local-dir:FOLDER"), a .safetensors or .pth file of this project, the authors or timm's scripts, or
            such a file in a repository of the Hub ("hf://ORG/NAME/FILE").
        as_backbone: of a pretraining model's weights, too, make a backbone, for finetuning or features.
        revision: branch, tag or commit of the repository.
        cache_dir: instead of the default cache of huggingface_hub.
        token: see `huggingface_hub.hf_hub_download`.
        kwargs: arguments of the model that replace the saved ones, such as num_classes, img_size, drop_path_rate.

    Returns:
        What the weights are of: a backbone, a pretraining model, or, for a folder written by `recipes.probe` or
        `recipes.segment`, a backbone of any kind with its head. Call `.eval()` before using it.

    Raises:
        CheckpointError: if the weights are not hosted, cannot be fetched or read, or are another model's.
        FileNotFoundError: if there is no such file or folder.
        ValueError: if `source` is none of the above.
    """
    is_repository = isinstance(source, str) and _REPOSITORY.fullmatch(source) and not Path(source).exists()
    if is_repository and not str(source).endswith(CHECKPOINTS):
        source = f"hf-hub:{source}"
    return _Loader(as_backbone, kwargs, revision, cache_dir, token, timms_too=False).load(source).model


def unknown_model(name: str, known: Collection[str]) -> ValueError:
    """The error for an unknown name; it suggests similar ones."""
    close = difflib.get_close_matches(name, sorted(known))
    hint = f"did you mean {', '.join(close)}?" if close else "`python -m arm_zoo list` shows the entries"
    return ValueError(f"unknown model {name!r}; {hint}")


def saved_config(source: str | Path) -> dict[str, Any]:
    """The content of the config.json of a source of `load`: a repository, a folder or a file in one; else empty.

    Raises:
        CheckpointError: if it cannot be fetched or read.
        FileNotFoundError: if a folder has none.
    """
    scheme, _, rest = str(source).partition(":")
    if scheme in ("hf-hub", "hf_hub"):
        return files.read_config(download(rest, CONFIG).parent)
    path = Path(os.path.expanduser(rest if scheme == "local-dir" else source))
    folder = path.parent if files.described_by_folder(path) else path
    return files.read_config(folder) if folder.is_dir() else {}


def label_names(cfg: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """The names of the classes by index, if a configuration has one for each class; else none.

    Names may be of other classes than the model's: transformers saves those that a model had before it got a new head,
    or, if it had none, LABEL_0, LABEL_1 and so on.
    """
    saved = cfg.get("label_names") or ()
    pairs = saved.items() if isinstance(saved, Mapping) else enumerate(saved)
    names = {str(index): str(name) for index, name in pairs}
    indices = list(map(str, range(num_classes)))
    if names.keys() != set(indices) or all(name == f"LABEL_{index}" for index, name in names.items()):
        return ()
    return tuple(names[index] for index in indices)


def entries() -> set[str]:
    """The names of all our entries, long and short, with and without tags."""
    names = {*ARCHITECTURES, *SHORT_NAMES}
    return names | {tagged for name in names for tagged in get_arch_pretrained_cfgs(name)}


def timm_entries() -> set[str]:
    """The names of all models that timm knows, including ours, with and without tags."""
    return {*timm.list_models(), *timm.list_models(include_tags=True)}


def architecture_of(name: str) -> str:
    """The name of an entry without its tag; for a short name the long one."""
    architecture: str = split_model_name_tag(name)[0]
    return SHORT_NAMES.get(architecture, architecture)


def entry_of(name: str) -> str:
    """The full name, with a tag, of an entry that is given with or without one, or by a short name."""
    architecture, tag = architecture_of(name), split_model_name_tag(name)[1]
    default: Any = get_pretrained_cfg(architecture)
    return f"{architecture}.{tag or default.tag}"


@dataclass(frozen=True)
class _Loader:
    """The arguments of `load` or `from_pretrained` apart from the names."""

    as_backbone: bool
    kwargs: dict[str, Any]
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    timms_too: bool = True  # whether models of timm are loaded, or only ours

    def load(self, name: str | Path, weights: str | Path | None = None) -> Loaded:
        """Load from a repository, an entry, a folder or a file, as the source tells; see `arm_zoo.loading.load`."""
        source, wanted = (str(name), None) if weights is None else (str(weights), str(name))
        scheme, _, rest = source.partition(":")
        path = Path(os.path.expanduser(rest if scheme == "local-dir" else source))
        if scheme in ("hf-hub", "hf_hub"):
            return self.from_hub(rest, wanted)._replace(source=source)
        if scheme == "hf":
            file = fetch_address(source, self.revision, self.cache_dir, self.token)
            model = self.from_file(file) if wanted is None else self.from_named_file(wanted, file)
            return Loaded(model, file, source, {})
        known = timm_entries() if self.timms_too else entries()
        if weights is None and source in known and (isinstance(name, str) or not path.exists()):
            entry = entry_of(source) if source in entries() else ""
            if is_upstream(entry) and not self.brings_weights():
                return self.from_upstream(source, entry)
            repository = hub_repository(entry)
            if repository is None:
                return self.from_timm(source)
            return self.from_hub(repository, None)._replace(source=repository)
        if scheme == "local-dir" or path.is_dir() or (path.is_file() and files.described_by_folder(path)):
            folder = path.parent if path.is_file() else path
            return self.from_folder(folder, wanted)._replace(source=path.resolve().name)
        if path.is_file():
            model = self.from_file(path) if wanted is None else self.from_named_file(wanted, path)
            return Loaded(model, path, path.name, {})
        is_tag = architecture_of(source) in known and path.suffix not in (".safetensors", ".pth")
        if weights is not None or "/" in source or (path.suffix and not is_tag):
            allowed = "an entry (`python -m arm_zoo list`), a folder, a file, hf-hub:ORG/NAME or hf://ORG/NAME/FILE"
            raise FileNotFoundError(f"no checkpoint at {source}; name {allowed}")
        raise unknown_model(source, known)

    def from_upstream(self, name: str, entry: str) -> Loaded:
        """Load the authors' file: a pretraining model if it is of one and no backbone is asked for."""
        if self.revision is not None:
            said = f"{name} is fetched from its authors at the revision {TABLE[entry].revision!r}"
            raise ValueError(f"{said}; a file of another is named by its address, hf://ORG/NAME@REVISION/FILE")
        file = fetch_upstream(entry, self.cache_dir, self.token)
        cfg: Any = get_pretrained_cfg(entry)
        if cfg.num_classes == 0 and not self.as_backbone:
            model = self.from_file(file)
        else:
            model = timm.create_model(name, pretrained=True, **self.with_tensors(read_checkpoint(file)))
        return Loaded(model, file, read_record(file)["source"], {})

    def with_tensors(self, tensors: StateDict) -> dict[str, Any]:
        """The caller's arguments for `timm.create_model`, with the tensors to load in its configuration."""
        overlay = {**(self.kwargs.get("pretrained_cfg_overlay") or {}), "state_dict": tensors}
        return {**self.kwargs, "pretrained_cfg_overlay": overlay}

    def brings_weights(self) -> bool:
        """Whether the caller replaces an entry's weights by timm's `pretrained_cfg_overlay`."""
        overlay = self.kwargs.get("pretrained_cfg_overlay") or {}
        return any(overlay.get(key) for key in ("file", "state_dict", "url", "hf_hub_id"))

    def from_timm(self, name: str) -> Loaded:
        """Load by `timm.create_model`, and find out which file that has read, if a cache still has it."""
        model: Any = timm.create_model(name, pretrained=True, cache_dir=self.cache_dir, **self.kwargs)
        cfg = getattr(model, "pretrained_cfg", {})
        if cfg.get("file"):
            return Loaded(model, Path(cfg["file"]), Path(cfg["file"]).resolve().name, {})
        if source := cfg.get("hf_hub_id"):
            from huggingface_hub import try_to_load_from_cache

            repo, _, revision = source.partition("@")
            names = filter(None, (cfg.get("hf_hub_filename"), WEIGHTS, PICKLED_WEIGHTS))
            cached = (try_to_load_from_cache(repo, each, self.cache_dir, revision or None) for each in names)
            return Loaded(model, next((Path(each) for each in cached if isinstance(each, str)), None), source, {})
        url = cfg.get("url") or ""
        file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        return Loaded(model, file if file.is_file() else None, url, {})

    def from_hub(self, repo: str, wanted: str | None) -> Loaded:
        """Load a repository's configuration and weights, both of the same commit."""
        name, _, at = repo.partition("@")
        revision = self.revision or at or None
        folder = download(name, CONFIG, revision, self.cache_dir, self.token).parent
        config = files.read_config(folder)
        if self.is_timms(config):
            _check_architecture(config, wanted, repo)
            at = f"@{revision}" if revision else ""
            return self.from_described(f"hf-hub:{name}{at}", config, folder)
        sha256 = known_sha256(name, revision)
        weights = download(name, WEIGHTS, folder.name, self.cache_dir, self.token, sha256)
        if weights.parent != folder:
            raise CheckpointError(f"{folder} and {weights.parent} should be one folder of the cache; load again")
        return self.from_folder(folder, wanted)

    def is_timms(self, config: Mapping[str, Any]) -> bool:
        """Whether timm loads the model of a config.json: a backbone with a head of ours, or a model of timm's own."""
        name = config.get("architecture")
        ours = "pretraining_model" in config or name in [*entries()]  # a list: the name may be whatever JSON has
        taken = self.timms_too or name in [*HEADED]
        return taken and not ours and isinstance(name, str) and timm.is_model(name)

    def from_described(self, name: str, config: dict[str, Any], folder: Path) -> Loaded:
        """Load what config.json describes by timm; CheckpointError if that is damaged or does not fit the weights."""
        if headed := HEADED.get(config["architecture"]):
            _check_table(config.get("model_args", {}), get_type_hints(headed.__init__), "model_args", folder)
        try:
            return self.from_timm(name)._replace(config=config)
        except (OSError, ValueError):  # these say what is wrong
            raise
        except Exception as error:  # from damaged files timm and PyTorch raise all sorts
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(f"no model can be made of {name}: {reason}") from error

    def from_folder(self, folder: Path, wanted: str | None) -> Loaded:
        """Load what config.json describes, with the weights beside it; CheckpointError if they do not fit together."""
        config = files.read_config(folder)
        own, name = config.get("pretraining_model"), f"local-dir:{folder}"
        if self.is_timms(config):
            _check_architecture(config, wanted, folder)
            found = next(filter(Path.is_file, (folder / WEIGHTS, folder / PICKLED_WEIGHTS)), None)
            return self.from_described(name, config, folder)._replace(file=found)
        file = files.weights_in(folder)
        if own is not None and not self.as_backbone:
            tensors = read_checkpoint(file)
            objective = objective_of(config, file, tensors)
            return Loaded(self.pretraining_model(objective, own, file, tensors), file, "", config)
        if own is not None and "architecture" not in config:  # as `save_pretrained` of a pretraining model writes it
            model = self.from_file(file) if wanted is None else self.from_named_file(wanted, file)
            return Loaded(model, file, "", config)
        if config.get("architecture") not in [*entries()]:
            said = f"{folder / CONFIG} is of {config.get('architecture', 'no timm model')!r}"
            advice = f"timm.create_model('{name}', pretrained=True) takes timm's own"
            raise CheckpointError(f"{said}, which is no model of arm_zoo; {advice}")
        _check_architecture(config, wanted, folder)
        backbone_class = ARCHITECTURES[architecture_of(config["architecture"])].model_class
        _check_table(config.get("model_args", {}), get_type_hints(backbone_class.__init__), "model_args", folder)
        _check_table(config.get("pretrained_cfg"), _PRETRAINED_CFG, "pretrained_cfg", folder)
        above = {key: config[key] for key in ("num_classes", *_NAMES_OF_CLASSES) if key in config}
        _check_table(above, _PRETRAINED_CFG, "its first level", folder)
        tensors = read_checkpoint(file)
        _check_description(file, tensors, timm.create_model, {"model_name": name})
        model = timm.create_model(name, pretrained=True, **self.with_tensors(tensors))
        return Loaded(model, file, "", config)

    def from_file(self, file: Path) -> Any:
        """The model in a file, as the shapes of its tensors tell it."""
        tensors = read_checkpoint(file)
        variant = find_variant(tensors)
        if variant.pretraining is not None and variant.objective is not None and not self.as_backbone:
            return self.pretraining_model(variant.objective, variant.pretraining, file, tensors)
        overlay = {"file": str(file), "state_dict": tensors, "num_classes": variant.num_classes}
        overlay |= {"input_size": variant.input_size} if variant.pretraining is None else {}
        arguments = {"num_classes": variant.num_classes, **variant.model_args, **self.kwargs}
        return timm.create_model(variant.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)

    def from_named_file(self, name: str, file: Path) -> Any:
        """An entry's model, ours or timm's, with as many classes as the file has, so that no head stays random."""
        cfg = timm.models.resolve_pretrained_cfg(architecture_of(name))
        if name in entries():
            official_names = ARCHITECTURES[architecture_of(name)].model_class.official_names
            tensors = under_our_names(read_checkpoint(file), official_names)
        else:
            tensors = under_timms_names(read_checkpoint(file, unwrap=False), name, self.kwargs)
        if cfg.classifier is None:  # registered without a configuration, so that timm would not load anything
            model: Any = timm.create_model(name, **self.kwargs)
            model.load_state_dict(tensors)
            return model
        classifier = cfg.classifier if isinstance(cfg.classifier, str) else cfg.classifier[0]
        head, stem = tensors.get(f"{classifier}.weight"), tensors.get(f"{cfg.first_conv}.weight")
        classes = 0 if head is None else len(head)
        overlay = {"file": str(file), "state_dict": tensors, "num_classes": classes, "hf_hub_id": None, "url": ""}
        sizes = {"num_classes": classes - (cfg.label_offset or 0) if classes else 0}
        if name in entries() and stem is not None:
            sizes["in_chans"] = stem.shape[1]
            overlay["input_size"] = (stem.shape[1], *cfg.input_size[1:])
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**sizes, **self.kwargs})
        model.pretrained_cfg.pop("state_dict", None)  # timm keeps a copy of all tensors there
        return model

    def pretraining_model(self, objective: str, saved: Mapping[str, Any], file: Path, tensors: StateDict) -> Any:
        """The objective's model, made by the saved arguments, or the caller's instead, with the tensors loaded."""
        model_class = OBJECTIVES[objective].model_class
        allowed = inspect.signature(model_class).parameters
        if unknown := sorted(set(self.kwargs) - set(allowed)):
            said = f"{file} is of a pretraining model: unknown keyword {', '.join(unknown)}"
            raise TypeError(f"{said}; it takes {', '.join(sorted(allowed))}; as_backbone=True makes a backbone of it")
        try:
            model = model_class(**{**saved, **self.kwargs})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the pretraining model of {file} cannot be built: {error}") from error
        model.load_state_dict(model.adapt(tensors, model))
        return model


def under_timms_names(tensors: StateDict, name: str, kwargs: Mapping[str, Any]) -> StateDict:
    """The tensors without a prefix that all share, such as `net.`, if their names are then those of timm's model.

    Others stay as they are: some of its models have a prefix of their own, and timm's filters look for some.
    """
    first = next(iter(tensors), "")
    prefixes = [first[: dot.end()] for dot in re.finditer(r"\.", first)]
    shared = [prefix for prefix in prefixes if all(key.startswith(prefix) for key in tensors)]
    if not shared:
        return tensors
    whole = {key: value for key, value in kwargs.items() if key not in _OF_FEATURES}
    with torch.device("meta"):
        own = timm.create_model(name, **whole).state_dict().keys()
    for prefix in shared:
        unwrapped = {key.removeprefix(prefix): value for key, value in tensors.items()}
        if unwrapped.keys() <= own or own <= unwrapped.keys():  # either may have a head that the other lacks
            return unwrapped
    return tensors


def objective_of(config: Mapping[str, Any], file: Path, tensors: StateDict) -> str:
    """The objective in the config.json beside a pretraining model's weights; CheckpointError if the two do not fit."""
    objective, arguments = config.get("objective", DEFAULT_OBJECTIVE), config["pretraining_model"]
    if objective not in [*OBJECTIVES]:  # a list: the name may be whatever JSON has
        said = f"{file.parent / CONFIG} names the objective {_short(objective)}"
        raise CheckpointError(f"{said}; expected one of {', '.join(OBJECTIVES)}")
    model_class = OBJECTIVES[objective].model_class
    _check_table(arguments, get_type_hints(model_class.__init__), "pretraining_model", file.parent)
    _check_description(file, tensors, model_class, arguments)
    return objective


def _check_architecture(config: Mapping[str, Any], wanted: str | None, where: object) -> None:
    """Refuse weights of another model than the wanted one, if one is wanted."""
    if wanted is not None and config.get("architecture") != architecture_of(wanted):
        found = config.get("architecture")
        said = f"the weights in {where} are of {found or 'no timm model'}, not of {architecture_of(wanted)}"
        raise ValueError(f"{said}; name {found or 'the model that they are of'}, or other weights")


def _check_table(table: Any, types: Mapping[str, Any], name: str, folder: Path) -> None:
    """Refuse a part of config.json with unknown keys, values of other types, or absurd sizes."""
    allowed = sorted(set(types) - _ELSEWHERE)
    unknown = sorted(set(table) - set(allowed)) if isinstance(table, dict) else [_short(table)]
    if unknown:
        raise CheckpointError(f"{folder / CONFIG}: {name} has {', '.join(unknown)}; expected {', '.join(allowed)}")
    for key, value in table.items():
        most = _MAX_CLASSES if key == "num_classes" else MAX_DEPTH if key.endswith(("depth", "depths")) else None
        if not _is_a(value, types[key]) or (most and value and (sum(value) if key == "depths" else value) > most):
            expected = types[key].__name__ if isinstance(types[key], type) else str(types[key])
            expected = f"at most {most}" if most else expected
            raise CheckpointError(f"{folder / CONFIG}: {name} has {key}={_short(value)}; expected {expected}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_a(value: Any, wanted: Any) -> bool:
    """Whether a JSON value fits a type; lists may stand for tuples, whole numbers for floats."""
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


def _check_description(file: Path, tensors: StateDict, build: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """CheckpointError if the weights beside a config.json do not fit the model that it describes.

    The model is built without the caller's arguments, and on the meta device, so that it takes no memory.
    """
    config = file.parent / CONFIG
    try:
        model = build(**arguments, device="meta")
        model.adapt({name: value.to("meta") for name, value in tensors.items()}, model, timm_adapts=False)
    except CheckpointError:
        raise
    except Exception as error:  # from damaged configurations timm and PyTorch raise all sorts
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"the model of {config} cannot be built: {reason}; write or fetch it again") from error
    rows = tensors["pos_embed"].shape[1:2] if "pos_embed" in tensors else ()
    if rows and rows[0] - (patches := model.patch_embed.num_patches) not in (0, 1):
        said = f"{config} describes {patches} patches, but {file.name} beside it has position embeddings"
        raise CheckpointError(f"{said} for {rows[0]} tokens: the two files do not belong together")
