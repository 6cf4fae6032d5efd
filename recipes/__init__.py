"""Training recipes: pretraining, finetuning and the quickstart; run from a checkout, not part of the wheel."""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

for _name in ("arm_zoo", "accelerate", "omegaconf", "rich"):  # every command needs them
    if importlib.util.find_spec(_name) is None:
        _message = f"{_name} is not installed; type `pip install -e '.[train]'` at the top of the checkout"
        raise ModuleNotFoundError(_message, name=_name)

# The number of queues from which the GPU takes the work of streams. With CUDA's default of 8, streams that make images
# ahead share a queue with the training step, and wait for it. CUDA reads this variable when it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def _open(name: str) -> None:
    """Import a module of `arm_zoo` without `arm_zoo`, which would import torch and timm and so take seconds.

    So a mistake in what a person typed can be reported at once. The module is in `sys.modules` under its own name,
    where a later import of `arm_zoo` finds it, so that its classes exist only once.
    """
    package = importlib.util.find_spec("arm_zoo")
    spec = PathFinder.find_spec(name, package.submodule_search_locations)  # type: ignore[union-attr]
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]


for _name in ("arm_zoo.images", "arm_zoo.messages", "arm_zoo.tables"):
    if not {"arm_zoo", _name} & sys.modules.keys():
        _open(_name)
