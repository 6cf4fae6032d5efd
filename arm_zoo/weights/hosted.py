"""Where the weights of the entries are, and the commands that train those that are not hosted.

No weights are hosted yet. An entry is hosted from the commit on whose row says so, with the revision and the sha256
that `python -m hub publish` prints; it is bundled when its file lies in `arm_zoo/bundled/`, its row says so, and the
golden answers that `python -m hub convert` wrote with it lie in `hub/golden/`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ORGANISATION = "arm-zoo"
BUNDLED_FOLDER = Path(__file__).parent.parent / "bundled"


@dataclass(frozen=True)
class Weights:
    """Where an entry's weights are."""

    where: Literal["bundled", "hosted", "planned"] = "planned"  # planned: on the Hub once it is published
    sha256: str | None = None  # of model.safetensors, or of the bundled file
    revision: str = "main"  # tag or commit of the repository to load
    repository: str | None = None  # ORG/NAME on the Hub, where it is not the entry's name within our organisation
    configs: tuple[str, ...] = ()  # of `recipes/configs`, that train them; of bundled ones those named as their set


TABLE: dict[str, Weights] = {
    # small ones of our own, in fp16: recipes/RESULTS.md
    "arm_pico_patch2_8.arm_digits_ft_digits": Weights(
        "bundled", "ca52358e2046918e7fc139fcedd5d91f320c54711bb84143dc304bccb050d4c4"
    ),
    "arm_tiny_patch4_32.arm_cifar10_ft_cifar10": Weights(
        "bundled", "25d469f0755eaf57fad300d6a9a7f2f7736f6879e7f267d41b69b0c0ed4ce712"
    ),
    "arm_tiny_patch8_64.arm_tiny_imagenet_ft_tiny_imagenet": Weights(
        "bundled", "d0e401c50d022ba24e9b94224e1570b9329cc45b188479c86a4df52076ea6af2"
    ),
    "arm_base_patch16_224.arm_in1k_ft_in1k": Weights(configs=("pretrain_base", "finetune_base")),
    "arm_base_patch16_224.arm_in1k": Weights(configs=("pretrain_base",)),
    "arm_base_patch16_224.in1k": Weights(configs=("supervised_base",)),
    "arm_base_patch16_384.arm_in1k_ft_in1k": Weights(configs=("pretrain_base", "finetune_base_384")),
    "arm_base_patch16_stride8_448.arm_in1k_ft_in1k": Weights(configs=("pretrain_base", "finetune_base_stride8_448")),
    "arm_large_patch16_224.arm_in1k_ft_in1k": Weights(configs=("pretrain_large", "finetune_large")),
    "arm_large_patch16_224.arm_in1k": Weights(configs=("pretrain_large",)),
    "arm_large_patch16_224.in1k": Weights(configs=("supervised_large",)),
    "arm_large_patch16_384.arm_in1k_ft_in1k": Weights(configs=("pretrain_large", "finetune_large_384")),
    "arm_huge_patch16_224.arm_in1k_ft_in1k": Weights(configs=("pretrain_huge", "finetune_huge")),
    "arm_huge_patch16_224.arm_in1k": Weights(configs=("pretrain_huge",)),
    "arm_huge_patch16_384.arm_in1k_ft_in1k": Weights(configs=("pretrain_huge", "finetune_huge_384")),
    "vmamba_tiny_s1l8.in1k": Weights(configs=("supervised_vmamba_tiny",)),
    "vmamba_small_s2l15.in1k": Weights(configs=("supervised_vmamba_small",)),
    "vmamba_base_s2l15.in1k": Weights(configs=("supervised_vmamba_base",)),
}


def repository_of(entry: str) -> str:
    """ORG/NAME of an entry's weights, which are or will be there."""
    return TABLE[entry].repository or f"{ORGANISATION}/{entry}"


def bundled_file(entry: str) -> Path:
    """Where the package has, or would have, the weights of an entry."""
    return BUNDLED_FOLDER / f"{entry}.safetensors"


def bundled_entries() -> list[str]:
    """The entries whose weights come with the package."""
    return [entry for entry, weights in TABLE.items() if weights.where == "bundled"]


def known_sha256(repo: str, revision: str | None) -> str | None:
    """What the table has for the weights of a repository at a revision; None if it does not know them."""
    hosted = {repository_of(entry): weights for entry, weights in TABLE.items() if weights.where == "hosted"}
    weights = hosted.get(repo, Weights())
    return weights.sha256 if revision in (None, weights.revision) else None


def training_commands(entry: str) -> str:
    """How the weights of an entry are trained, from a checkout."""
    architecture, _, tag = entry.partition(".")
    weights, trained_on = TABLE.get(entry, Weights()), tag.rpartition("_ft_")[2]
    bundled = [f"pretrain_{trained_on}", f"finetune_{trained_on}"] if weights.where == "bundled" else []
    commands = ", then ".join(
        f"accelerate launch -m recipes.{'pretrain' if path.startswith('pretrain') else 'finetune'} "
        f"--config recipes/configs/{path} data.source=PATH"
        for path in [f"{name}.yaml" for name in weights.configs or bundled]
        or [f"supervised_base.yaml model={architecture}"]
    )
    if tag == "in1k" and f"{architecture}.arm_in1k_ft_in1k" in TABLE:
        return f"{commands} (recipes.pretrain first gives the better .arm_in1k_ft_in1k)"
    return commands


def ways_on(entry: str) -> str:
    """What a person can do where weights are not hosted."""
    return (
        f"the weights of {entry} are not hosted yet. Ways on:\n"
        "  an official .pth or a file of your own: python -m arm_zoo predict ... --weights FILE, or in Python "
        f"create_model({entry.partition('.')[0]!r}, pretrained=True, pretrained_cfg_overlay=dict(file=PATH)); "
        "python -m hub convert FILE OUT, from a checkout, makes a folder of it that all programs take\n"
        f"  train it yourself, from a checkout: {training_commands(entry)}\n"
        f"  a small model that comes with the package: {bundled_entries()[0]}; or start untrained: pretrained=False"
    )
