"""Where the weights of the entries are, and the commands that train those that are not hosted.

No weights are hosted by us yet. To host an entry, publish it and give its row the revision and the sha256 that
`python -m hub publish` prints. To bundle one, put its file into `arm_zoo/bundled/` and the golden answers that
`python -m hub convert` wrote with it into `hub/golden/`, and say so in its row. The weights of an upstream entry are
fetched from its authors; its row has a sha256 only if somebody has seen the file.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from arm_zoo.weights.reading import Choice

ORGANISATION = "arm-zoo"
ARM_REPOSITORY = "OliverRen/ARM"  # on the Hub; which files it has is asked at run time
BUNDLED_FOLDER = Path(__file__).parent.parent / "bundled"


@dataclass(frozen=True)
class Weights:
    """Where an entry's weights are."""

    # in the package, in our organisation on the Hub, where their authors put them, or nowhere until they are published
    where: Literal["bundled", "hosted", "upstream", "planned"] = "planned"
    sha256: str | None = None  # of model.safetensors, of the bundled file, or of the authors' file; None: not known
    revision: str = "main"  # branch, tag or commit of the repository to load; the tag of a release
    repository: str | None = None  # ORG/NAME, where it is not the entry's name within our organisation
    # names of `recipes/configs` that train them
    configs: tuple[str, ...] = ()
    # for upstream weights only:
    host: Literal["hub", "github"] = "hub"  # a repository of the Hub, or a release on GitHub
    file: str | None = None  # its name there; None: nobody has published it, so the file is found by `shapes`
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of some tensors, by the authors' names
    # which weights the authors report on, averaged ("ema") or trained ones; None takes averaged ones if there are any
    choice: Choice | None = None
    license: str | None = None  # SPDX identifier of what the authors state; None if they state nothing


def _bundled(sha256: str, *configs: str) -> Weights:
    return Weights("bundled", sha256, configs=configs)


def _arm(width: int, patches: int, *configs: str) -> Weights:
    """A finetuned ARM: the width tells its size, the number of patches its image size."""
    shapes = {"pos_embed": (1, patches + 1, width), "head.weight": (1000, width)}
    return Weights("upstream", repository=ARM_REPOSITORY, shapes=shapes, configs=configs)


def _arm_pretrained(width: int, config: str) -> Weights:
    """A pretrained ARM: no other checkpoint has a projection to the decoder, which is 512 wide."""
    shapes = {"enc2dec.weight": (512 * 4, width * 4)}
    return Weights("upstream", repository=ARM_REPOSITORY, shapes=shapes, configs=(config,))


# The authors of both report on the trained weights ("model"), not on the averaged ones.
_VIM = Weights("upstream", choice="model", license="apache-2.0")
_VMAMBA = replace(_VIM, host="github", repository="MzeroMiko/VMamba", revision="#v2cls", license="mit")


def _vim(size: str, file: str, *configs: str) -> Weights:
    return replace(_VIM, repository=f"hustvl/Vim-{size}-midclstok", file=file, configs=configs)


def _vmamba(file: str, config: str) -> Weights:
    return replace(_VMAMBA, file=file, configs=(config,))


TABLE: dict[str, Weights] = {
    # small ones of our own, in fp16: recipes/RESULTS.md
    "arm_pico_patch2_8.arm_digits_ft_digits": _bundled(
        "ca52358e2046918e7fc139fcedd5d91f320c54711bb84143dc304bccb050d4c4", "pretrain_digits", "finetune_digits"
    ),
    "arm_tiny_patch4_32.arm_cifar10_ft_cifar10": _bundled(
        "25d469f0755eaf57fad300d6a9a7f2f7736f6879e7f267d41b69b0c0ed4ce712", "pretrain_cifar10", "finetune_cifar10"
    ),
    "arm_tiny_patch4_32.arm_cifar10": _bundled(
        "874d27ad041f0fdb2c8190f5553ec89c34c350c1a7f0c6a836d003c8c8b4bac8", "pretrain_cifar10"
    ),
    "arm_tiny_patch8_64.arm_tiny_imagenet_ft_tiny_imagenet": _bundled(
        "d0e401c50d022ba24e9b94224e1570b9329cc45b188479c86a4df52076ea6af2",
        "pretrain_tiny_imagenet",
        "finetune_tiny_imagenet",
    ),
    "arm_tiny_patch8_64.arm_tiny_imagenet": _bundled(
        "1a6775710400726b9060522cdace8ca26cd3345c39117a4218ce669719058576", "pretrain_tiny_imagenet"
    ),
    "arm_base_patch16_224.arm_in1k_ft_in1k": _arm(768, 14**2, "pretrain_base", "finetune_base"),
    "arm_base_patch16_224.arm_in1k": _arm_pretrained(768, "pretrain_base"),
    "arm_base_patch16_224.in1k": Weights(configs=("supervised_base",)),
    "arm_base_patch16_384.arm_in1k_ft_in1k": _arm(768, 24**2, "pretrain_base", "finetune_base_384"),
    "arm_base_patch16_stride8_448.arm_in1k_ft_in1k": _arm(768, 55**2, "pretrain_base", "finetune_base_stride8_448"),
    "arm_large_patch16_224.arm_in1k_ft_in1k": _arm(1024, 14**2, "pretrain_large", "finetune_large"),
    "arm_large_patch16_224.arm_in1k": _arm_pretrained(1024, "pretrain_large"),
    "arm_large_patch16_224.in1k": Weights(configs=("supervised_large",)),
    "arm_large_patch16_384.arm_in1k_ft_in1k": _arm(1024, 24**2, "pretrain_large", "finetune_large_384"),
    "arm_huge_patch16_224.arm_in1k_ft_in1k": _arm(1536, 14**2, "pretrain_huge", "finetune_huge"),
    "arm_huge_patch16_224.arm_in1k": _arm_pretrained(1536, "pretrain_huge"),
    "arm_huge_patch16_384.arm_in1k_ft_in1k": _arm(1536, 24**2, "pretrain_huge", "finetune_huge_384"),
    "vim_tiny_patch16_224.in1k": _vim("tiny", "vim_t_midclstok_76p1acc.pth", "supervised_vim_tiny"),
    "vim_tiny_patch16_stride8_224.in1k_ft": _vim(
        "tiny", "vim_t_midclstok_ft_78p3acc.pth", "supervised_vim_tiny", "finetune_vim_tiny_stride8"
    ),
    "vim_small_patch16_224.in1k": _vim("small", "vim_s_midclstok_80p5acc.pth", "supervised_vim_small"),
    "vim_small_patch16_stride8_224.in1k_ft": _vim(
        "small", "vim_s_midclstok_ft_81p6acc.pth", "supervised_vim_small", "finetune_vim_small_stride8"
    ),
    "vim_base_patch16_224.in1k": _vim("base", "vim_b_midclstok_81p9acc.pth", "supervised_vim_base"),
    "vmamba_tiny_s1l8.in1k": _vmamba("vssm1_tiny_0230s_ckpt_epoch_264.pth", "supervised_vmamba_tiny"),
    "vmamba_small_s2l15.in1k": _vmamba("vssm_small_0229_ckpt_epoch_222.pth", "supervised_vmamba_small"),
    "vmamba_base_s2l15.in1k": _vmamba("vssm_base_0229_ckpt_epoch_237.pth", "supervised_vmamba_base"),
}


def repository_of(entry: str) -> str:
    """ORG/NAME of the repository that has an entry's weights, or will have them."""
    return TABLE[entry].repository or f"{ORGANISATION}/{entry}"


def bundled_file(entry: str) -> Path:
    """Where the package has, or would have, the weights of an entry."""
    return BUNDLED_FOLDER / f"{entry}.safetensors"


def bundled_entries() -> list[str]:
    """The entries whose weights come with the package."""
    return [entry for entry, weights in TABLE.items() if weights.where == "bundled"]


def known_sha256(repo: str, revision: str | None) -> str | None:
    """The sha256 that the table has for the weights of one of our repositories at a revision, or None."""
    hosted = {repository_of(entry): weights for entry, weights in TABLE.items() if weights.where == "hosted"}
    weights = hosted.get(repo, Weights())
    return weights.sha256 if revision in (None, weights.revision) else None


def training_commands(entry: str) -> str:
    """The commands, typed in a checkout, that train the weights of an entry."""
    architecture, _, tag = entry.partition(".")
    family = re.match("vim_|vmamba_", architecture)
    commands = ", then ".join(
        f"accelerate launch -m recipes.{'pretrain' if path.startswith('pretrain') else 'finetune'} "
        f"--config recipes/configs/{path} data.source=PATH"
        for path in [f"{name}.yaml" for name in TABLE.get(entry, Weights()).configs]
        or [f"supervised_{family[0] if family else ''}base.yaml model={architecture}"]
    )
    if tag == "in1k" and f"{architecture}.arm_in1k_ft_in1k" in TABLE:
        return f"{commands} (recipes.pretrain first gives the better .arm_in1k_ft_in1k)"
    return commands


def upstream_is_on() -> bool:
    """Whether weights may be fetched from their authors; the environment variable ARM_ZOO_UPSTREAM=0 forbids it.

    It is read at every call. Only timm's list of models with weights is made once, at import.
    """
    return os.environ.get("ARM_ZOO_UPSTREAM") != "0"


def ways_on(entry: str) -> str:
    """What to do instead if an entry's weights cannot be loaded by name."""
    weights = TABLE.get(entry, Weights())
    off = f"published only by their authors ({weights.repository}), and ARM_ZOO_UPSTREAM=0 forbids fetching them"
    return (
        f"the weights of {entry} are {off if weights.where == 'upstream' else 'not hosted yet'}. Ways on:\n"
        "  an official .pth or a file of your own: python -m arm_zoo predict ... --weights FILE, or in Python "
        f"create_model({entry.partition('.')[0]!r}, pretrained=True, pretrained_cfg_overlay=dict(file=PATH)); "
        "python -m hub convert FILE OUT, from a checkout, makes a folder of it that all programs take\n"
        f"  train it yourself, from a checkout: {training_commands(entry)}\n"
        f"  a small model that comes with the package: {bundled_entries()[0]}; or start untrained: pretrained=False"
    )
