"""How the models of a family become timm models: entry points, arguments, weights and config.json."""

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype, get_norm_layer
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    filter_pretrained_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._input import get_model_args
from torch import nn

from arm_zoo.base import ZooModel, check_keywords
from arm_zoo.files import CONFIG, WEIGHTS, CheckpointError, StateDict, weights_in
from arm_zoo.layers.init import zero_bias
from arm_zoo.layers.sizes import check_whole
from arm_zoo.weights.download import download
from arm_zoo.weights.find import find_weights
from arm_zoo.weights.hosted import TABLE, bundled_file, repository_of, upstream_is_on
from arm_zoo.weights.reading import read_checkpoint
from arm_zoo.weights.releases import release_url
from arm_zoo.weights.tensor_names import under_our_names


@dataclass(frozen=True)
class Architecture:
    """A registered model: its class, and the arguments that make it."""

    model_class: "type[Backbone]"
    arguments: Mapping[str, Any]

    def sizes(self, name: str) -> dict[str, Any]:
        """All arguments with values: the class's defaults, the entry's input size, and its own arguments."""
        defaults = {key: value.default for key, value in inspect.signature(self.model_class).parameters.items()}
        cfg: Any = get_pretrained_cfg(name)
        return {**defaults, "in_chans": cfg.input_size[0], "img_size": cfg.input_size[1:], **self.arguments}


ARCHITECTURES: dict[str, Architecture] = {}
SHORT_NAMES: dict[str, str] = {}  # short name -> architecture


def register_family(
    model_class: "type[Backbone]", table: Mapping[str, Mapping[str, Any]], short_names: Mapping[str, str]
) -> None:
    """Register models, name -> arguments, with timm; the module of the class must define timm's `default_cfgs`."""
    module = model_class.__module__
    ARCHITECTURES.update((name, Architecture(model_class, arguments)) for name, arguments in table.items())
    SHORT_NAMES.update(short_names)
    # timm's scripts look a configuration up by the name that is typed, before they create a model
    cfgs = sys.modules[module].default_cfgs
    cfgs.update((short, cfgs[name]) for short, name in short_names.items())
    for name, architecture in {**{name: name for name in table}, **short_names}.items():
        _register_entry_point(name, architecture, module)


def _register_entry_point(name: str, architecture: str, module: str) -> None:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(architecture, pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    setattr(sys.modules[module], name, register_model(entry_point))


_CONFIG = {  # timm's configuration of an entry for ImageNet-1k; entries overrule parts of it
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": None,
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}


def entry_configs(cfgs: Mapping[str, dict[str, Any]]) -> dict[str, DefaultCfg]:
    """timm's `default_cfgs`, with the places of weights, by which `timm.list_pretrained()` knows them."""
    return dict(generate_default_cfgs({entry: {**_CONFIG, **cfg, **_place(entry)} for entry, cfg in cfgs.items()}))


def _place(entry: str) -> dict[str, str]:
    """Where an entry's weights are, as timm's configurations say it; empty if they cannot be fetched."""
    weights = TABLE.get(entry)
    if weights is not None and weights.where == "bundled":
        return {"file": str(bundled_file(entry))}
    if weights is not None and weights.where == "hosted":
        return {"hf_hub_id": f"{repository_of(entry)}@{weights.revision}"}
    if weights is not None and weights.where == "upstream" and upstream_is_on():
        if weights.host == "hub":
            return {"hf_hub_id": repository_of(entry)}
        return {"url": release_url(repository_of(entry), weights.revision, str(weights.file))}
    return {}


def _build(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    architecture = ARCHITECTURES[name]
    model_class = architecture.model_class
    own = inspect.signature(model_class).parameters
    timms = {*inspect.signature(build_model_with_cfg).parameters, "features_only", "out_indices", "feature_cls"}
    check_keywords(name, kwargs.keys() - timms, own)
    given, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None) or {}
    cfg: Any = resolve_pretrained_cfg(name, given, overlay)
    # what is the model's own, whatever a configuration that the caller brings says of it or leaves out
    default = get_pretrained_cfg(name)
    own_keys = ("fixed_input_size", "first_conv", "classifier")
    cfg = dataclasses.replace(cfg, architecture=name, **{key: getattr(default, key) for key in own_keys})
    sources = ("file", "url", "state_dict", "hf_hub_id")
    # names of classes are those of the entry's own weights, or of a configuration that the caller brings
    if _is_registered(name, given) and (not pretrained or any(overlay.get(source) for source in sources)):
        cfg = dataclasses.replace(cfg, label_names=overlay.get("label_names"))
    tensors = _read_weights(name, cfg, kwargs.get("cache_dir")) if pretrained else None
    described = cfg.file if cfg.source == "local-dir" else None
    if tensors is not None:  # timm deep-copies the configuration, so it gets a stand-in for the tensors
        cfg = dataclasses.replace(cfg, state_dict={"read": True}, source=None)
    elif cfg.url and described is None:  # timm would take the file of a bundled entry before it
        cfg = dataclasses.replace(cfg, file=None)

    def adapt(state_dict: StateDict, model: Any) -> StateDict:
        model.pretrained_cfg.pop("state_dict", None)
        return _adapt(state_dict if tensors is None else tensors, model, described)

    return build_model_with_cfg(
        model_class,
        name,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=adapt,
        feature_cfg={"out_indices": kwargs.pop("out_indices", model_class.feature_maps), "feature_cls": "getter"},
        **{**architecture.arguments, **kwargs},
    )


def _is_registered(name: str, given: PretrainedCfg | dict[str, Any] | str | None) -> bool:
    """Whether the configuration given is an entry's: none, a tag, or the whole, as timm's scripts hand it on."""
    if isinstance(given, str | None):
        return True
    cfg = PretrainedCfg(**given) if isinstance(given, dict) else given
    return dataclasses.replace(cfg, architecture=name) in get_arch_pretrained_cfgs(name).values()


def _adapt(state_dict: StateDict, model: Any, described: str | None) -> StateDict:
    """Fit a checkpoint to a model, and tell timm how many classes it has: timm keeps or drops the head by that."""
    cfg = model.pretrained_cfg
    head = cfg["classifier"]
    state_dict = under_our_names(state_dict, model.official_names)
    if f"{head}.weight" not in state_dict:  # the model keeps its own, which a strict loader wants to see
        own = {f"{head}.{key}": value for key, value in model.get_submodule(head).state_dict().items()}
        return own | model.adapt(state_dict, model)
    classes = len(state_dict[f"{head}.weight"])
    if described is not None and cfg["num_classes"] == model.num_classes != classes:
        raise CheckpointError(
            f"config.json of {described} says {model.num_classes} classes, but the weights beside it have {classes}: "
            "the two files do not belong together; num_classes=... makes a head of your own"
        )
    if cfg["num_classes"] != -1:  # by which timm's train.py asks for a new head
        cfg["num_classes"] = classes
    return model.adapt(state_dict, model)


def _read_weights(name: str, cfg: PretrainedCfg, cache_dir: str | Path | None) -> StateDict | None:
    """The tensors that the caller gives or names, or else those of the entry; None leaves the reading to timm."""
    entry = f"{name}.{cfg.tag}" if cfg.tag else name
    own = (get_pretrained_cfg(entry) if entry in TABLE else None) or PretrainedCfg()
    path = Path(cfg.file or "")
    if cfg.state_dict:
        return dict(cfg.state_dict)
    if cfg.file and cfg.source == "local-dir":
        try:
            return read_checkpoint(weights_in(path))
        except FileNotFoundError:  # a file of another name, which timm may know
            return None
    if cfg.file and cfg.file != own.file:
        if path.is_dir():
            raise FileNotFoundError(f"no checkpoint at {path}, a folder: create_model('local-dir:{path}', ...)")
        return read_checkpoint(path)
    if cfg.url and cfg.url != own.url:
        return None
    if cfg.hf_hub_id and cfg.hf_hub_id != own.hf_hub_id:
        return read_checkpoint(download(cfg.hf_hub_id, cfg.hf_hub_filename or WEIGHTS, cache_dir=cache_dir))
    return read_checkpoint(find_weights(entry, cache_dir))


def norm_layer_of(norm_layer: str | Callable[..., nn.Module] | None) -> Callable[..., nn.Module] | None:
    """The norm that a name of `timm.layers`, or a class, stands for; None for None."""
    try:
        return get_norm_layer(norm_layer)
    except (AssertionError, AttributeError, KeyError) as error:
        allowed = "a name of timm.layers, such as 'layernorm' or 'rmsnorm', or a class"
        raise ValueError(f"norm_layer must be {allowed}, got {norm_layer!r}") from error


class Backbone(ZooModel):
    """A model of any family that is saved in timm's Hub form."""

    feature_maps = 3  # how many of the last ones `features_only` gives by default
    pretraining_keys: frozenset[str] = frozenset()  # `keys` that only its pretraining models have
    untrained = ("cls_token", "norm.", "head.")  # prefixes of the tensors that pretraining does not train
    global_pools: tuple[str, ...] = ("avg", "avgmax", "max", "token", "")  # that the model has, '' for none
    pretrained_cfg: dict[str, Any]  # set by timm

    def set_global_pool(self, global_pool: str) -> None:
        """Choose the pooling; ValueError if the model does not have it."""
        if global_pool not in self.global_pools:
            pools = ", ".join(repr(pool) for pool in self.global_pools if pool)
            raise ValueError(f"global_pool must be {pools} or '' (no pooling), got {global_pool!r}")
        self.global_pool = global_pool

    def make_head(self: Any, **dd: Any) -> nn.Module:
        """A new head on a device and of a type: one linear layer, or an identity if there are no classes."""
        return nn.Linear(self.num_features, self.num_classes, **dd) if self.num_classes > 0 else nn.Identity()

    def _init_head(self: Any) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.02)
            zero_bias(self.head)

    @torch.jit.ignore
    def get_classifier(self: Any) -> nn.Module:
        return self.head

    def reset_classifier(self: Any, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, freshly initialised, and optionally the pooling."""
        check_whole(type(self).__name__, {"num_classes": num_classes})
        if global_pool is not None:
            self.set_global_pool(global_pool)
        self.num_classes = num_classes
        self.head = self.make_head(**get_device_dtype(self))
        self.head.train(self.training)
        self._init_head()

    @torch.jit.ignore
    def geometry(self) -> dict[str, str]:
        """Width, depth and patches in words, for `python -m arm_zoo info`."""
        raise NotImplementedError

    @torch.jit.ignore
    def hub_config(self) -> dict[str, Any]:
        """The content of config.json, from which timm builds this model again: its Hub form."""
        model: Any = self
        cfg = filter_pretrained_cfg(dict(self.pretrained_cfg), remove_source=True)
        named = len(cfg.get("label_names") or ()) == model.num_classes
        labels = {key: cfg.pop(key) for key in ("label_names", "label_descriptions") if key in cfg}
        # num_classes among them would overrule a caller's, and break the timm wrapper of transformers
        arguments = {key: value for key, value in get_model_args(model).items() if key != "num_classes"}
        for key, value in arguments.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise CheckpointError(
                    f"cannot save the model: {CONFIG} cannot hold its argument {key}, {value!r}; make the model with "
                    "a plain value, such as norm_layer='layernorm', or torch.save(model.state_dict(), FILE) alone"
                ) from error
        cfg |= {"num_classes": model.num_classes, "input_size": model.input_size()}
        return {
            "architecture": cfg.pop("architecture"),
            "num_classes": model.num_classes,
            "num_features": model.num_features,
            **({"global_pool": model.global_pool} if model.global_pool else {}),
            **(labels if named else {}),
            "model_args": arguments,
            "pretrained_cfg": cfg,
        }
