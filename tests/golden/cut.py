"""Cuts the small golden set from the whole one: python tests/golden/cut.py ../shared/golden tests/golden"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
CASES: dict[str, list[str]] = {  # with the files that are taken as they are
    "arm_pretrain_train_steps": ["state_dict.safetensors"],
    "arm_surgery_d12": ["missing_init.safetensors"],
    "mixer_vmamba": ["inputs.safetensors", "param_grads.safetensors", "state_dict.safetensors"],
    "mixer_arm_plain_short": [
        "inputs.safetensors",
        "meta.json",
        "outputs_f64.safetensors",
        "param_grads.safetensors",
        "state_dict.safetensors",
    ],
    "mae_small": ["inputs.safetensors"],
    "mocov3_loss": ["inputs.safetensors", "outputs_f64.safetensors"],
    "mocov3_step": ["inputs.safetensors", "param_grads.safetensors", "state_dict.safetensors"],
    "optim": ["lrd_group_sequence_d12_ld065.json", "lrd_groups_d12_ld065.json", "pretrain_wd_groups_d12.json"],
    "arm_ft_img64_gp": [],
    "arm_pretrain_d12": [],
    "vim_small_img64": [],
    "vmamba_t_96x64": [],
}
# of ARM the first blocks, and what the last one gives, for norm and head
ARM_BLOCKS = 3
HIDDEN = (*(f"hidden_{i:02}" for i in range(ARM_BLOCKS + 1)), "hidden_12")
OUTPUTS = ("logits", "features", "logits_cls", "features_cls", "normed", *HIDDEN)
OF_A_MIXER = ("output", "merged", "grad_input")
# of Vim the first two blocks, and what the last one gives, for norm and head; of VMamba the first two stages
VIM = ("block_00_", "block_01_", "block_23_", "features", "logits")
MAE_DECODER = ("decoder_", "mask_token")
VMAMBA = ("stage_0_block_0", "stage_1_block_0")
VMAMBA_STAGES = ("patch_embed.", "layers.0.", "layers.1.blocks.")
PATCH = 4  # pixels that are left of the patches of 16 in the surgery, which copies their weights as they are


def cut(whole: Path, small: Path) -> None:
    """Write the small set."""
    for case, names in CASES.items():
        (small / case).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(whole / case / name, small / case / name)

    case = "arm_ft_img64_gp"  # the first image, without gradients, which are of all three
    edit_tensors(case, "inputs", whole, small, lambda t: {name: value[:1] for name, value in t.items()})
    edit_tensors(case, "outputs_f64", whole, small, lambda t: {name: t[name][:1] for name in OUTPUTS})
    edit_tensors(case, "state_dict", whole, small, lambda t: first_blocks(t, ARM_BLOCKS))
    edit_constructor(case, whole, small, {"depth": ARM_BLOCKS}, batch=1)

    case = "mixer_vmamba"
    edit_tensors(case, "outputs_f64", whole, small, lambda t: {name: t[name] for name in OF_A_MIXER})

    case = "arm_pretrain_train_steps"  # the first step
    edit_tensors(case, "inputs", whole, small, lambda t: {"images_0": t["images_0"]})
    log = json.loads((whole / case / "meta.json").read_text())["log"]
    edit_meta(case, whole, small, {"log": log[:1]})

    case = "vim_small_img64"
    edit_tensors(case, "inputs", whole, small, lambda t: {"images": t["images"][:1]})
    edit_tensors(case, "outputs_f64", whole, small, lambda t: {n: v[:1] for n, v in t.items() if n.startswith(VIM)})
    edit_tensors(case, "state_dict", whole, small, lambda t: first_blocks(t, 2))
    edit_constructor(case, whole, small, {"depth": 2}, batch=1)

    case = "mae_small"  # what the decoder takes, and the loss
    edit_tensors(case, "outputs_f64", whole, small, lambda t: {name: t[name] for name in ("latent", "loss")})
    edit_tensors(case, "state_dict", whole, small, lambda t: {n: v for n, v in t.items() if n.startswith(MAE_DECODER)})
    norms = json.loads((whole / case / "grad_norms.json").read_text())
    kept = {name: norm for name, norm in norms.items() if name.startswith(MAE_DECODER)}
    (small / case / "grad_norms.json").write_text(json.dumps(kept, indent=1) + "\n")
    edit_constructor(case, whole, small, {})

    case = "mocov3_step"  # without the matrices of the encoder that has moved
    edit_tensors(case, "outputs_f64", whole, small, lambda t: {name: v for name, v in t.items() if not is_moved(name)})
    edit_meta(case, whole, small, {})

    case = "vmamba_t_96x64"
    edit_tensors(case, "inputs", whole, small, lambda t: {"images": t["images"]})
    edit_tensors(case, "outputs_f64", whole, small, lambda t: {name: t[name] for name in VMAMBA})
    edit_tensors(
        case, "state_dict", whole, small, lambda t: {n: v for n, v in t.items() if n.startswith(VMAMBA_STAGES)}
    )
    edit_constructor(case, whole, small, {"depths": [1, 1]})

    sizes = {"depth": 1, "patch_size": PATCH}  # the first block, and a corner of the patches' weights
    for case, name, side in (("arm_pretrain_d12", "state_dict", 12), ("arm_surgery_d12", "mapped", 14)):
        edit_tensors(case, name, whole, small, first_block)
        edit_constructor(case, whole, small, {**sizes, "img_size": side * PATCH})


def is_moved(name: str) -> bool:
    """Whether this is a matrix of MoCo v3's momentum encoder after the step."""
    return re.fullmatch(r"after\.momentum_encoder\.(body|head\.[036])\.weight", name) is not None


def first_block(tensors: Tensors) -> Tensors:
    """An encoder of one block; of the decoder stays what tells that the checkpoint is of a pretraining."""
    kept = ("layers.0.", "patch_embed.", "pos_embed", "ar_token", "enc2dec.")
    taken = {name: value for name, value in tensors.items() if name.startswith(kept)}
    taken["patch_embed.proj.weight"] = taken["patch_embed.proj.weight"][..., :PATCH, :PATCH]
    return {name: value[:1] if name.startswith("enc2dec.") else value for name, value in taken.items()}


def first_blocks(tensors: Tensors, depth: int) -> Tensors:
    """All but the blocks after these."""
    later = tuple(f"layers.{number}." for number in range(depth, 24))
    return {name: value for name, value in tensors.items() if not name.startswith(later)}


def edit_tensors(case: str, name: str, whole: Path, small: Path, edit: Any) -> None:
    tensors = edit(load_file(whole / case / f"{name}.safetensors"))
    save_file({key: value.contiguous() for key, value in tensors.items()}, small / case / f"{name}.safetensors")


def edit_meta(case: str, whole: Path, small: Path, changes: dict[str, Any]) -> None:
    kept = ("what", "constructor", "batch", "schedule_args", "log", "momentum", "versions")
    meta = json.loads((whole / case / "meta.json").read_text())
    meta = {key: value for key, value in {**meta, **changes}.items() if key in kept}
    (small / case / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def edit_constructor(case: str, whole: Path, small: Path, changes: dict[str, Any], **others: Any) -> None:
    arguments = json.loads((whole / case / "meta.json").read_text())["constructor"]
    edit_meta(case, whole, small, {"constructor": {**arguments, **changes}, **others})


if __name__ == "__main__":
    cut(Path(sys.argv[1]), Path(sys.argv[2]))
