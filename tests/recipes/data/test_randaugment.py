"""RandAugment: timm's draws, and Pillow's pixels for single images and for batches."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import pil_to_tensor

from recipes.data.config import RANDAUGMENT
from recipes.data.randaugment import MATRICES, RULES, Operation, RandAugment, plain_name, posterized

MEAN = (0.485, 0.456, 0.406)
WORDS = "rand-m9-mstd0.5-inc1"
LEVELS = (0.0, 0.7, 5.5, 8.3, 9.0, 9.6, 10.0)  # strengths, from the weakest to the strongest


def seed_generators(number: int) -> None:
    random.seed(number)
    np.random.seed(number)


def pictures(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    """Images (5, height, width, channels): noise, noise of few values, waves, overexposed waves, and one colour."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, channels))
    rows, columns, band = np.mgrid[0:height, 0:width, 0:channels]
    waves = 128 + 120 * np.sin(columns / (5 + band) + rows / 9)
    images = [noise, noise // 128 * 190 + 30, waves, (waves * 2 - 128).clip(0, 255), np.full_like(noise, 77)]
    return np.stack(images).astype(np.uint8)


def to_batch(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_pillow(images: NDArray[np.uint8]) -> list[Image.Image]:
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]


def selectable(words: str, size: tuple[int, int], channels: int) -> Iterator[Operation]:
    """Every operation that the words can select, at every level, either way."""
    _, randaugment, _ = create_transform(
        size, is_training=True, auto_augment=words, mean=MEAN[:channels], separate=True, color_jitter=None
    )
    for operation in randaugment.transforms[0].ops:
        for level in LEVELS if operation.level_fn else LEVELS[:1]:
            for number in range(2):
                random.seed(number)  # the first draws of 0 and 1 lie on either side of a half
                arguments = operation.level_fn(level, operation.hparams) if operation.level_fn else ()
                yield Operation(operation.name, arguments)


# None of these posterizes to 0 bits, which timm itself fails at with Pillow 13.
@pytest.mark.parametrize("words", [f"{WORDS}-mmax9", "rand-m7-n3-p0.9-mstd101-inc1"])
def test_draws_and_pixels_are_those_of_timm(words: str) -> None:
    reference = create_transform(
        (33, 24), is_training=True, color_jitter=None, auto_augment=words, interpolation="bicubic",
        mean=MEAN, separate=True,
    )[1]  # fmt: skip
    randaugment = RandAugment(words, (33, 24), MEAN)
    [image, *_] = to_pillow(pictures(33, 24)[2:])
    drawn = set()
    for number in range(60):
        seed_generators(number)
        expected, state = reference(image), random.getstate()
        seed_generators(number)
        operations = randaugment.draw()
        assert random.getstate() == state
        assert randaugment.apply_to_image(image, operations) == expected
        drawn.add(len(operations))
    assert len(drawn) > 2


@pytest.mark.parametrize("words", [WORDS, "rand-m9"])
@pytest.mark.parametrize("shape", [(33, 46, 3), (32, 32, 1), (5, 4, 3)], ids=str)
def test_batches_are_changed_as_by_pillow(shape: tuple[int, int, int], words: str) -> None:
    height, width, channels = shape
    randaugment = RandAugment(words, (height, width), MEAN[:channels])
    images, operations = pictures(*shape), list(selectable(words, (height, width), channels))
    batch = to_batch(images).repeat(len(operations), 1, 1, 1)
    randaugment.apply_to_batch(batch, [[operation] for operation in operations for _ in images])
    for operation, found in zip(operations, batch.split(len(images)), strict=True):
        expected = [pil_to_tensor(randaugment.apply_to_image(image, [operation])) for image in to_pillow(images)]
        apart = (found.short() - torch.stack(expected).short()).abs()
        is_geometric = plain_name(operation) in MATRICES
        assert apart.max() <= is_geometric and (apart > 0).sum() <= 0.01 * apart.numel() + 5, operation


def test_every_operation_that_words_can_select_has_a_rule() -> None:
    selected = {plain_name(operation) for words in (WORDS, "rand-m9") for operation in selectable(words, (8, 8), 3)}
    assert selected == set(RULES)


def drawn_batch(size: int, images: int) -> tuple[RandAugment, torch.Tensor, list[list[Operation]]]:
    randaugment = RandAugment(WORDS, (size, size), MEAN)
    seed_generators(0)
    operations = [randaugment.draw() for _ in range(images)]
    return randaugment, to_batch(pictures(size, size)).repeat(-(-images // 5), 1, 1, 1)[:images], operations


def test_each_image_of_a_batch_has_its_own_operations() -> None:
    randaugment, images, operations = drawn_batch(32, 64)
    alone = [randaugment.apply_to_batch(images[i : i + 1].clone(), operations[i : i + 1]) for i in range(64)]
    pillow = [
        pil_to_tensor(randaugment.apply_to_image(image, drawn))
        for image, drawn in zip(to_pillow(images.permute(0, 2, 3, 1).numpy()), operations, strict=True)
    ]
    changed = randaugment.apply_to_batch(images, operations)
    assert changed is images and torch.equal(changed, torch.cat(alone))
    assert ((changed.short() - torch.stack(pillow).short()).abs() <= 1).float().mean() > 0.99


def test_a_batch_without_operations_stays() -> None:
    randaugment, images, _ = drawn_batch(8, 5)
    before = images.clone()
    assert torch.equal(randaugment.apply_to_batch(images, [[]] * 5), before)
    assert randaugment.apply_to_batch(images[:0], []).shape == (0, 3, 8, 8)


@pytest.mark.gpu
def test_the_gpu_agrees_and_the_host_does_not_wait() -> None:
    randaugment, images, operations = drawn_batch(64, 128)
    on_gpu = images.cuda()
    randaugment.apply_to_batch(on_gpu.clone(), operations)  # what is allocated or compiled once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = randaugment.apply_to_batch(on_gpu, operations)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    apart = (found.cpu().short() - randaugment.apply_to_batch(images, operations).short()).abs()
    assert (apart <= 1).float().mean() > 0.99


def test_posterizing_to_nothing_leaves_black() -> None:
    image = Image.new("RGB", (2, 2), "white")

    def refusing(image: Image.Image, bits: int) -> Image.Image:
        if bits < 1:
            raise ValueError
        return image

    for bits in (0, -1):
        assert posterized(image, bits, posterize=refusing).getextrema() == ((0, 0),) * 3
    assert posterized(image, 1, posterize=refusing) is image


@pytest.mark.parametrize("words", ["rand", "rand-m0-n1", "rand-m30-mmax30-inc1-p0.7-mstd0.5", "rand-mstd101-inc0-n3"])
def test_words_that_are_allowed_can_be_drawn(words: str) -> None:
    _, is_allowed = RANDAUGMENT
    assert is_allowed(words)
    randaugment = RandAugment(words, (8, 8), MEAN)
    operations = [randaugment.draw() for _ in range(20)]
    images = to_batch(pictures(8, 8))[:1].repeat(20, 1, 1, 1)
    assert randaugment.apply_to_batch(images, operations).shape == (20, 3, 8, 8)


@pytest.mark.parametrize("words", ["rand-w0", "rand-m9.5", "rand-n0", "rand-mstd.5.", "rand-inc", "rand-t0", "augmix"])
def test_words_that_timm_does_not_take_are_refused(words: str) -> None:
    _, is_allowed = RANDAUGMENT
    assert not is_allowed(words)
