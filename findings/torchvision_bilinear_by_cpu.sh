#!/usr/bin/env bash
# torchvision 0.29.1 resizes an image of 8 bits bilinearly (`transforms.v2.functional.resize`, antialiased, on the CPU) in
# whole numbers where the CPU has AVX2 or AVX-512, rounding after each of the two axes, and elsewhere in float32, rounding
# once: the same image becomes another on another x86-64 CPU. The bicubic resize is the same on all, and so is
# `torch.nn.functional.interpolate`, whose bilinear filter takes 8 bits on any CPU. (0.23 took float32 with AVX-512, too.)
# Seen on a CPU with AVX2, which the script needs, with torch's own switch for older ones: "differs: bilinear 16.5%,
# bicubic 0.0%, interpolate 0.0%". Fails if the bilinear share falls below 5% or another is not 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.4.0
for capability in avx2 default; do
    ATEN_CPU_CAPABILITY=$capability "$folder/venv/bin/python" - "$folder/$capability.pt" <<'PYTHON'
import sys

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
found = {
    "bilinear": resize(image, [64, 64], InterpolationMode.BILINEAR, antialias=True),
    "bicubic": resize(image, [64, 64], InterpolationMode.BICUBIC, antialias=True),
    "interpolate": torch.nn.functional.interpolate(image[None], (64, 64), mode="bilinear", antialias=True),
}
torch.save(found, sys.argv[1])
PYTHON
done
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import torch

whole, single = (torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True) for name in ("avx2", "default"))
shares = {name: (whole[name] != single[name]).double().mean().item() for name in whole}
print("differs: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
if shares["bilinear"] < 0.05 or shares["bicubic"] + shares["interpolate"] > 0:
    sys.exit("the behaviour has changed")
PYTHON
