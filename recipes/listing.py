"""``arm_zoo/images/listing.py`` without the package around it: importing ``arm_zoo`` brings torch and timm.

Those take seconds, and a mistake in what a person typed is to be told at once. The file needs nothing of its package.
"""

import importlib.util
from pathlib import Path
from types import ModuleType


def _load() -> ModuleType:
    package = importlib.util.find_spec("arm_zoo")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("arm_zoo is not installed; type `pip install .` at the top of the checkout")
    file = Path(package.submodule_search_locations[0], "images", "listing.py")
    spec = importlib.util.spec_from_file_location(f"{__name__}.file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_listing = _load()
globals().update({name: getattr(_listing, name) for name in _listing.__all__})
