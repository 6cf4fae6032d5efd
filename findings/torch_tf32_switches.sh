#!/usr/bin/env bash
# torch 2.14.1: a program that has set `torch.backends.fp32_precision = "tf32"` does not get whole float32 convolutions
# back by `torch.backends.cudnn.allow_tf32 = False`: the assignment raises nothing, and convolutions and recurrent layers
# stay at TF32. The same switch of matrix products, `torch.backends.cuda.matmul.allow_tf32 = False`, takes effect in the
# same program. Code that measures in "fp32" has to set `torch.backends.cudnn.conv.fp32_precision = "ieee"` as well.
# Seen without a GPU, as the switches are: "convolutions tf32, products ieee", then "convolutions ieee". The script fails
# if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.0
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null | tee "$folder/out.txt"
import torch

backends = torch.backends
backends.fp32_precision = "tf32"
backends.cudnn.allow_tf32 = False
backends.cuda.matmul.allow_tf32 = False
print(f"convolutions {backends.cudnn.conv.fp32_precision}, products {backends.cuda.matmul.fp32_precision}")
backends.cudnn.conv.fp32_precision = "ieee"
print(f"convolutions {backends.cudnn.conv.fp32_precision}")
PYTHON
if [ "$(cat "$folder/out.txt")" != "$(printf 'convolutions tf32, products ieee\nconvolutions ieee')" ]; then
  echo "torch's switches for TF32 act otherwise" >&2
  exit 1
fi
