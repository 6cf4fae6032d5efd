#!/usr/bin/env bash
# timm 1.0.31 numbers the classes of an image folder by a key that is blind to case and to leading zeros (natural_key),
# and it sorts a set, so that names which tie (A and a, 1 and 01) are in the order of Python's hash seed: the same
# folder gives the same model other labels from one run to the next, and to each process of a run.
# Seen: with PYTHONHASHSEED 0 to 7 the four classes A, a, 1, 01 come in more than one order. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet timm==1.0.31 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
cd "$folder"
for class in A a 1 01; do
    mkdir -p "images/$class"
    venv/bin/python -c "import sys; from PIL import Image; Image.new('RGB', (8, 8)).save(sys.argv[1])" "images/$class/x.png"
done
for seed in 0 1 2 3 4 5 6 7; do
    PYTHONHASHSEED=$seed venv/bin/python - <<'PYTHON'
from timm.data.readers import create_reader

print(create_reader("", "images").class_to_idx)
PYTHON
done | sort | uniq -c | tee orders
test "$(wc -l < orders)" -gt 1 || { echo "the behaviour has changed: one order for all seeds"; exit 1; }
