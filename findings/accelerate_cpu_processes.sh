#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch --cpu --num_processes 2 script.py` starts the script once, and does not say that
# the number of processes was dropped; the script then believes that it has the whole batch and all images to itself.
# `torchrun --nproc_per_node 2` starts the same script twice, and accelerate's Accelerator sees both processes.
# Seen with torch 2.14.1 without a GPU: "processes 1" once by the former, "processes 2" twice by the latter. The script
# fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet accelerate==1.15.0 torch==2.14.1
cat >"$folder/script.py" <<'PYTHON'
from accelerate import Accelerator

print("processes", Accelerator(cpu=True).num_processes, flush=True)
PYTHON
export PATH="$folder/venv/bin:$PATH" HF_HOME="$folder" CUDA_VISIBLE_DEVICES=
accelerate launch --cpu --num_processes 2 "$folder/script.py" >"$folder/accelerate.txt" 2>"$folder/said.txt"
torchrun --nproc_per_node 2 "$folder/script.py" >"$folder/torchrun.txt" 2>/dev/null
echo "accelerate launch:" && cat "$folder/accelerate.txt"
echo "torchrun:" && cat "$folder/torchrun.txt"
if [ "$(cat "$folder/accelerate.txt")" != "processes 1" ]; then
  echo "accelerate no longer starts one process" >&2
  exit 1
fi
if grep --quiet num_processes "$folder/said.txt"; then
  echo "accelerate says what becomes of --num_processes" >&2
  exit 1
fi
if [ "$(grep --count "processes 2" "$folder/torchrun.txt")" != 2 ]; then
  echo "torchrun does not start two processes" >&2
  exit 1
fi
