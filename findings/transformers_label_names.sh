#!/usr/bin/env bash
# transformers 5.24.0: a timm model's folder that is loaded for other classes (num_labels, id2label), as before
# finetuning, and saved, keeps the names of the OLD classes in label_names and does not save the new id2label: whoever
# reads the folder later finds ten names for three classes, or, with as many classes as before, wrong ones.
# Seen: config.json has num_classes 3, label_names of ten classes, and no id2label. Fails if that changes.
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

old = [f"old {i}" for i in range(10)]
model = timm.create_model("test_vit", num_classes=10)
save_for_hf(model, "ten", model_config={"label_names": old}, safe_serialization=True)
config = json.load(open("ten/config.json"))
del config["model_args"]  # as in folders of earlier versions of timm; with it transformers refuses the folder
json.dump(config, open("ten/config.json", "w"))
new = {0: "cat", 1: "dog", 2: "fox"}
tuned = AutoModelForImageClassification.from_pretrained(
    "ten", num_labels=3, id2label=new, label2id={name: i for i, name in new.items()}, ignore_mismatched_sizes=True
)
tuned.save_pretrained("three")
saved = json.load(open("three/config.json"))
print("num_classes:", saved["num_classes"])
print("label_names:", saved.get("label_names"))
print("id2label:", saved.get("id2label"))
if saved["num_classes"] != 3 or saved.get("label_names") != old or "id2label" in saved:
    raise SystemExit("the behaviour has changed")
PYTHON
