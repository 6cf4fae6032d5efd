"""Small checkpoints of the layout that the authors' programs write, and what a hostile one would hold."""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch import nn

import arm_zoo
from arm_zoo import to_official

NARROW: dict[str, Any] = {"embed_dim": 32, "depth": 2}  # sizes at which an entry's model is small


def finetuned(entry: str, **sizes: Any) -> nn.Module:
    """An entry's model, of NARROW sizes or others, every tensor random, so that none can be mistaken for another."""
    model = timm.create_model(entry, **(NARROW | sizes if "depths" not in sizes else sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def pretrained() -> nn.Module:
    """A pretraining model in small."""
    return arm_zoo.create_pretraining_model("arm_base", img_size=128, decoder_dim=64, **NARROW)


def official_bytes(model: nn.Module, **others: Any) -> bytes:
    """What `torch.save` writes of weights beside an optimizer, a scaler and the arguments; `others` replace these."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {
        "model": to_official(model),
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "growth_tracker": 3},
        "epoch": 99,
        "args": argparse.Namespace(model="arm_base_pz16", input_size=224, lr=1e-3),
        **others,
    }
    buffer = io.BytesIO()
    with _yacs():
        torch.save(state, buffer)
    return buffer.getvalue()


class RunsCode:
    """A pickle of this makes a folder when it is read by pickle's own rules."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


class CfgNode(dict[str, Any]):
    """As yacs defines it: a dict whose attributes tell whether it may be changed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__.update(__immutable__=True, __deprecated_keys__=set(), __renamed_keys__={}, __new_allowed__=False)


CfgNode.__module__ = "yacs.config"


@contextmanager
def _yacs() -> Iterator[None]:
    """Let pickle find the class under yacs' name."""
    package, module = ModuleType("yacs"), ModuleType("yacs.config")
    module.__dict__["CfgNode"] = CfgNode
    before = {name: sys.modules.get(name) for name in ("yacs", "yacs.config")}
    sys.modules.update({"yacs": package, "yacs.config": module})
    try:
        yield
    finally:
        for name, value in before.items():
            del sys.modules[name]
            if value is not None:
                sys.modules[name] = value
