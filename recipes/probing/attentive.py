"""Attentive probe: AIM's head (arXiv:2401.08541) on the patches of the last block.

The head is AIM's, its training here is not: the patches that are kept come from images without augmentation.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from arm_zoo.heads.attentive import AttentiveClassifier
from recipes.data.sources import tell
from recipes.errors import RunError
from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extracted
from recipes.probing.outputs import PATCHES
from recipes.probing.scores import Score

BATCH = 256
RATE = 1e-3  # AdamW's at the start; it falls to zero along a cosine
WEIGHT_DECAY = 0.1


def score(train: Extracted, test: Extracted, config: ProbeConfig, device: torch.device) -> list[Score]:
    """Score a head after its training; no score, but a note in the log, if the model gives no patches."""
    if PATCHES not in train.arrays:
        tell("the model gives no patches: there is no attentive probe of it")
        return []
    head = fit(train, config.attentive_epochs, config.seed, device)
    count = right(head, test, device)
    settings = {"rate": RATE, "epochs": config.attentive_epochs}
    return [Score.of_images("attentive", PATCHES, settings, count, test.images, head)]


def decodable(split: Extracted) -> Tensor:
    """The places of the images that have features; patches, which may not fit into memory, stay on the disk."""
    return torch.arange(len(split.classes)) if split.rows is None else split.rows


def batch_of(split: Extracted, places: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Patches (N, P, D) and classes (N,)."""
    return split.arrays[PATCHES][places].to(device).float(), split.classes[places].to(device)


def fit(train: Extracted, epochs: int, seed: int, device: torch.device) -> AttentiveClassifier:
    """Train a head by AdamW with cosine decay; it sees every training image once in each epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = AttentiveClassifier(train.width, int(train.classes.max()) + 1).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    places, generator = decodable(train), torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(places) // BATCH))
    for _ in range(epochs):
        for batch in places[torch.randperm(len(places), generator=generator)].split(BATCH):
            patches, classes = batch_of(train, batch, device)
            loss = F.cross_entropy(head(patches), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not loss.isfinite():
            raise RunError("the attentive probe's loss is no finite number; are the model's patches in float16?")
    return head.eval()


@torch.inference_mode()
def right(head: AttentiveClassifier, test: Extracted, device: torch.device) -> int:
    """The number of images that the head classifies correctly."""
    count = 0
    for places in decodable(test).split(BATCH):
        patches, classes = batch_of(test, places, device)
        count += int((head(patches).argmax(dim=1) == classes).sum())
    return count
