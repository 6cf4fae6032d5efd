#!/usr/bin/env bash
# datasets 5.2.0, WebDataset reader: the columns are those of the first five rows, and nothing says what is lost after.
# A tar whose first images are .jpg and later ones .png is valid WebDataset (a reader asks for "jpg;png"). Here the
# whole PNG files of the later rows are dropped without a warning: their rows have None as image and no other column.
# Seen: columns jpg, cls, __key__, __url__ only; rows 6 and 7 have jpg=None. The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pillow==13.0.0
cd "$folder"
HF_HOME="$folder/cache" venv/bin/python - <<'PYTHON'
import io
import tarfile

from datasets import load_dataset
from PIL import Image

with tarfile.open("shard.tar", "w") as tar:
    for row in range(8):
        ending, kind = ("png", "PNG") if row > 5 else ("jpg", "JPEG")
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind)
        for suffix, data in ((ending, file.getvalue()), ("cls", b"%d" % (row % 2))):
            info = tarfile.TarInfo(f"{row:04}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

data = load_dataset("webdataset", data_files="shard.tar", split="train")
print("columns:", sorted(data.column_names))
lost = [row for row, example in enumerate(data) if example["jpg"] is None]
print("rows without an image:", lost)
if "png" in data.column_names or lost != [6, 7]:
    raise SystemExit("the behaviour has changed")
PYTHON
