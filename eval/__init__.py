"""Measuring models: accuracy, speed and the leaderboard; runs from a checkout."""

import importlib.util

for _name in ("accelerate", "rich"):  # nearly every command needs them
    if importlib.util.find_spec(_name) is None:
        _message = f"{_name} is not installed; type `pip install -e '.[eval]'` at the top of the checkout"
        raise ModuleNotFoundError(_message, name=_name)
