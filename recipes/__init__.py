"""Training recipes: pretraining, finetuning and the quickstart; run from a checkout, not part of the wheel."""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

# Queues from which the GPU takes what streams have to do. With CUDA's default of 8, streams that make images ahead
# share one with the step that trains, and wait for it; CUDA reads this when it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def _open_images() -> None:
    """Let `arm_zoo.images` be imported without `arm_zoo`, which brings torch and timm and so takes seconds.

    A mistake in what a person typed is to be told at once. The package stands in `sys.modules` under its own name,
    where a later import of `arm_zoo` finds it, so that its classes exist once.
    """
    found = importlib.util.find_spec("arm_zoo")
    if found is None:
        raise ModuleNotFoundError("arm_zoo is not installed; type `pip install .` at the top of the checkout")
    spec = PathFinder.find_spec("arm_zoo.images", found.submodule_search_locations)
    module = sys.modules["arm_zoo.images"] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]


if not {"arm_zoo", "arm_zoo.images"} & sys.modules.keys():
    _open_images()
