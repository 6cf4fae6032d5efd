#!/usr/bin/env bash
# A folder that timm 1.0.31 writes for the Hub (save_for_hf) cannot be loaded by transformers 5.24.0, which wraps timm's
# models: timm writes num_classes into model_args too, and transformers hands it on twice. Neither says so when writing.
# Seen: TypeError "got multiple values for keyword argument 'num_classes'"; without model_args in config.json, as earlier
# versions of timm wrote it, the same folder loads. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 timm==1.0.31 torch==2.14.1 torchvision==0.29.1
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json

import timm
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification

save_for_hf(timm.create_model("test_vit"), "saved", safe_serialization=True)
config = json.load(open("saved/config.json"))
print("timm wrote model_args:", config["model_args"])
try:
    AutoModelForImageClassification.from_pretrained("saved")
except TypeError as error:
    print("transformers:", error)
    if "multiple values for keyword argument 'num_classes'" not in str(error):
        raise SystemExit("the message has changed") from error
else:
    raise SystemExit("the behaviour has changed: the folder loads")
del config["model_args"]
json.dump(config, open("saved/config.json", "w"))
AutoModelForImageClassification.from_pretrained("saved")
print("without model_args: loads")
PYTHON
