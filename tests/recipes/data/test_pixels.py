"""Images and masks that are scaled, cropped and flipped together."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from arm_zoo.images.masks import IGNORED, open_masks
from recipes.config import SegmentConfig
from recipes.data.config import DataConfig
from recipes.data.pixels import AugmentedPixels
from recipes.data.sampling import Key


def halves(root: Path) -> Path:
    """Images whose left is black, and their masks' class the first one; the right is white, and the second one."""
    right = np.arange(40) >= 25
    for number in range(4):
        image = np.repeat(np.where(right, 255, 0).astype(np.uint8)[None, :, None], 3, axis=2).repeat(30, axis=0)
        for place, pixels in (("images", image), ("annotations", np.where(image[..., 0] > 0, 2, 1).astype(np.uint8))):
            (root / place / "training").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / place / "training" / f"{number}.png")
    (root / "classes.txt").write_text("black\nwhite\n")
    return root


def test_masks_go_with_their_images(tmp_path: Path) -> None:
    split = open_masks(halves(tmp_path), "training")
    config = SegmentConfig(data=DataConfig(flip=0.5), scale=(0.5, 2.0))
    images = AugmentedPixels(split, config, (16, 16), (0.5, 0.5, 0.5))
    keys = [Key(epoch, place) for epoch in range(6) for place in range(4)]
    batch = images.batch(keys)
    assert batch.images.shape == (24, 3, 16, 16) and batch.classes.shape == (24, 16, 16)
    clear = (batch.images[:, 0] < 30) | (
        batch.images[:, 0] > 225
    )  # not at the border of the two, nor beside the image
    shown = (batch.images[:, 0] > 127).long()
    labelled = batch.classes != IGNORED
    assert torch.equal(batch.classes[clear & labelled].long(), shown[clear & labelled])
    assert (batch.images[:, :, :, :].permute(0, 2, 3, 1)[~labelled] == 128).all()
    share = [(~labelled).float().mean().item(), (clear & labelled).float().mean().item()]
    assert 0.01 < share[0] < 0.5 and share[1] > 0.4
    first, last = (shown * labelled)[:, :, 0].any(dim=1), (shown * labelled)[:, :, -1].any(dim=1)
    assert (first & ~last).any() and (last & ~first).any()  # flipped, and not


def test_an_image_is_a_function_of_seed_epoch_and_place(tmp_path: Path) -> None:
    split = open_masks(halves(tmp_path), "training")

    def drawn(seed: int, *keys: Key) -> torch.Tensor:
        return AugmentedPixels(split, SegmentConfig(seed=seed), (16, 16), (0.5, 0.5, 0.5)).batch(keys).classes

    keys = [Key(0, place) for place in range(4)]
    assert torch.equal(drawn(0, *keys), torch.cat([drawn(0, key) for key in keys]))
    assert not torch.equal(drawn(0, *keys), drawn(1, *keys))
    assert not torch.equal(drawn(0, *keys), drawn(0, *(Key(1, place) for place in range(4))))
    assert len(drawn(0, *keys).unique(dim=0)) == 4  # of equal images


def test_at_scale_one_the_image_just_covers_what_is_cut_out(tmp_path: Path) -> None:
    split = open_masks(halves(tmp_path), "training")
    for size in ((16, 16), (16, 40), (60, 40)):
        batch = AugmentedPixels(split, SegmentConfig(scale=(1.0, 1.0)), size, (0.5, 0.5, 0.5)).batch([Key(0, 0)])
        assert (batch.classes != IGNORED).all()
    [labels] = AugmentedPixels(split, SegmentConfig(scale=(1.0, 1.0)), (60, 80), (0.5,) * 3).batch([Key(0, 0)]).classes
    assert labels[0].tolist() == 50 * [0] + 30 * [1]  # the whole image, twice as large
