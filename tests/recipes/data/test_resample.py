"""Crops resized on the GPU against torchvision's on the CPU: in Triton's interpreter, and on a GPU if there is one."""

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from recipes.data.resample import RaggedImages, crop_resize
from recipes.data.transforms import Normalisation, ScoringTransform, cropped

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILTERS = ("bicubic", "bilinear")
Case = tuple[list[tuple[int, int]], list[list[int]], tuple[int, int]]  # sizes of images, boxes, size of the result
SMALL: list[Case] = [
    ([(20, 25), (16, 16), (9, 7)], [[0, 0, 20, 25], [0, 0, 16, 16], [1, 2, 5, 3]], (16, 16)),  # whole and up
    ([(40, 50), (70, 31), (33, 47)], [[1, 0, 39, 50], [7, 3, 60, 28], [13, 17, 20, 30]], (11, 18)),  # down, at edges
    (
        [(12, 30), (12, 30), (5, 5)],
        [[11, 29, 1, 1], [0, 4, 1, 20], [0, 4, 5, 1]],
        (6, 40),
    ),  # single pixels, rows, columns
]
LARGE: list[Case] = [
    ([(375, 500)] * 3, [[0, 0, 375, 500], [100, 20, 201, 198], [30, 299, 150, 201]], (192, 192)),
    ([(3000, 4000), (10, 8), (333, 500)], [[1, 2, 2998, 3997], [0, 0, 10, 8], [7, 9, 326, 41]], (224, 160)),
]
# Sizes of images and of the result. Where images are enlarged, the largest weights often lie outside the window.
WINDOWS_SMALL = [([(6, 9), (40, 31), (14, 14)], (14, 14)), ([(10, 10), (61, 12)], (16, 12))]
WINDOWS_LARGE = [([(375, 500), (500, 375), (97, 130), (8, 12), (2000, 1300)], (224, 224)), ([(256, 341)], (192, 160))]
PREPARATIONS = (*product(FILTERS, ["center", "squash"], [0.875, 0.9, 1.0]), ("bicubic", "center", 0.5))


def pictures(sizes: list[tuple[int, int]], channels: int) -> list[Tensor]:
    """Noise, black and white, and a smooth one, in turn."""
    made = []
    for i, size in enumerate(sizes):
        values = torch.rand(channels, *size) if i % 3 < 2 else torch.rand(1, channels, 3, 3)
        values = (values > 0.5).float() if i % 3 == 1 else values
        values = F.interpolate(values, size, mode="bicubic")[0] if i % 3 == 2 else values
        made.append((255 * values).clamp(0, 255).to(torch.uint8))
    return made


def on_the_cpu(
    images: list[Tensor],
    boxes: list[list[int]],
    flips: list[bool],
    size: tuple[int, int],
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
) -> Tensor:
    each = [cropped(image, (*box,), size, interpolation) for image, box in zip(images, boxes, strict=True)]
    return torch.stack([image.flip(-1) if flip else image for image, flip in zip(each, flips, strict=True)])


def laid_out(image: Tensor, layout: str) -> Tensor:
    """The same image, contiguous, with its channels next to each other, or every other column of a larger one."""
    if layout == "interleaved":
        return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return image.repeat_interleave(2, dim=2)[:, :, ::2] if layout == "view" else image


def check_equal(case: Case, channels: int, layout: str, device: str, filters: Sequence[str] = FILTERS) -> None:
    """The very same values, mirrored and not."""
    sizes, boxes, size = case
    images, flips = pictures(sizes, channels), [i % 2 == 0 for i in range(len(sizes))]
    batch = RaggedImages.of([laid_out(image.to(device), layout) for image in images])
    for filtered in map(InterpolationMode, filters):
        numbers = torch.tensor(boxes, dtype=torch.int32), torch.tensor(flips)
        actual = crop_resize(batch, *numbers, size, interpolation=filtered)
        assert actual.dtype == torch.uint8
        assert torch.equal(actual.cpu(), on_the_cpu(images, boxes, flips, size, filtered)), filtered


def check_select(device: str) -> None:
    """Images of a set in any order, and some twice; none at all give none."""
    images = pictures([(12, 10)] * 5, 3)
    kept = RaggedImages.of([image.to(device) for image in images])
    places, boxes = (
        torch.tensor([4, 0, 0, 2]),
        torch.tensor([[0, 0, 12, 10], [2, 1, 9, 8], [0, 0, 12, 10], [3, 3, 4, 4]]),
    )
    flips = torch.tensor([False, True, False, True])
    actual = crop_resize(kept.select(places), boxes, flips, (9, 17), MEAN, STD)
    expected = on_the_cpu([images[place] for place in places], boxes.tolist(), flips.tolist(), (9, 17))
    expected = Normalisation(MEAN, STD, torch.device("cpu"))(expected)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-6)
    none = crop_resize(kept.select(places[:0]), boxes[:0], flips[:0], (9, 17), MEAN, STD)
    assert none.shape == (0, 3, 9, 17) and none.dtype == torch.float32


def check_windows(
    sizes: list[tuple[int, int]], size: tuple[int, int], preparations: Sequence[tuple[str, str, float]], device: str
) -> None:
    """The very same values as the transform that models are scored with."""
    images, names = pictures(sizes, 1), ("interpolation", "crop_mode", "crop_pct")
    batch = RaggedImages.of([image.to(device) for image in images])
    boxes, flips = torch.tensor([(0, 0, *size) for size in sizes]), torch.zeros(len(sizes), dtype=torch.bool)
    for preparation in preparations:
        config = dict(zip(names, preparation, strict=True), input_size=(1, *size), mean=(0.5,))
        transform = ScoringTransform(config)
        windows = torch.tensor([transform.window(*size) for size in sizes])
        actual = crop_resize(batch, boxes, flips, size, interpolation=transform.interpolation, windows=windows)
        assert torch.equal(actual.cpu(), torch.stack(list(map(transform, images)))), preparation


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "size"), WINDOWS_SMALL + WINDOWS_LARGE)
def test_windows_on_the_gpu_equal_the_scoring_transform(sizes: list[tuple[int, int]], size: tuple[int, int]) -> None:
    check_windows(sizes, size, PREPARATIONS, "cuda")


def run_in_the_interpreter(script: str) -> None:
    pytest.importorskip("triton", reason="no triton in this build of torch")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-c", f"from tests.recipes.data.test_resample import *\n{script}\nprint('all are equal')"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all are equal" in done.stdout


def test_crops_in_the_interpreter_equal_torchvision() -> None:
    run_in_the_interpreter(
        "for case, layout in zip(SMALL, ('interleaved', 'view', 'planar'), strict=True):\n"
        "    filters = ('bicubic', 'bilinear') if layout == 'view' else ('bicubic',)\n"
        "    check_equal(case, 3 if layout == 'interleaved' else 1, layout, 'cpu', filters)\n"
        "check_select('cpu')"
    )


def test_windows_in_the_interpreter_equal_the_scoring_transform() -> None:
    run_in_the_interpreter(
        "for first, case in enumerate(WINDOWS_SMALL):\n"
        "    check_windows(*case, PREPARATIONS[first::2], 'cpu')\n"
        "check_windows([(187, 250)], (112, 112), [('bicubic', 'center', 0.875)], 'cpu')"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["planar", "interleaved", "view"])
def test_crops_on_the_gpu_equal_torchvision(channels: int, layout: str) -> None:
    for case in SMALL + LARGE:
        check_equal(case, channels, layout, "cuda")


@pytest.mark.gpu
def test_sets_on_the_gpu() -> None:
    check_select("cuda")


@pytest.mark.gpu
def test_the_host_does_not_wait() -> None:
    images = RaggedImages.of([image.cuda() for image in pictures([(30, 40)] * 4, 3)])
    boxes, flips = torch.tensor([[0, 0, 30, 40]] * 4), torch.zeros(4, dtype=torch.bool)
    crop_resize(images, boxes, flips, (16, 16), MEAN, STD)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert crop_resize(images, boxes, flips, (16, 16), MEAN, STD).shape == (4, 3, 16, 16)
    finally:
        torch.cuda.set_sync_debug_mode(before)


GREY = torch.zeros(1, 5, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "takes one image or more, got none"),
        ([GREY, GREY.float()], r"image 1 is \(1, 5, 4\) of torch.float32"),
        ([GREY[0]], r"image 0 is \(5, 4\) of torch.uint8"),
        ([GREY[:, :, :0]], r"one pixel or more; image 0 is \(1, 5, 0\)"),
        ([GREY, GREY.expand(3, 5, 4)], "one number of channels and one device, got . on cpu and . on cpu"),
        ([GREY, GREY.to("meta")], "one device, got 1 on (cpu|meta) and 1 on (meta|cpu)"),
    ],
)
def test_images_that_are_no_batch(images: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RaggedImages.of(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.tensor([[0, 0, 6, 4]])}, r"box 0 is not within .* \[0, 0, 6, 4\] of 5 x 4 pixels"),
        ({"boxes": torch.tensor([[0, 1, 5, 4]])}, "box 0 is not within"),
        ({"boxes": torch.tensor([[-1, 0, 5, 4]])}, "box 0 is not within"),
        ({"boxes": torch.tensor([[0, 0, 0, 4]])}, "box 0 is not within"),
        ({"boxes": torch.tensor([[1, 2**31 - 1, 4, 2**31 - 1]], dtype=torch.int32)}, "box 0 is not within"),
        ({"boxes": torch.zeros(2, 4, dtype=torch.int32)}, r"boxes of 1 images are \(1, 4\) of int32 .* got \(2, 4\)"),
        ({"boxes": torch.zeros(1, 4)}, "of torch.float32"),
        ({"boxes": torch.zeros(1, 4, dtype=torch.int32, device="meta")}, "on the CPU, got .* on meta"),
        ({"flips": torch.tensor([0])}, r"flips of 1 images are \(1,\) of bool on the CPU, got \(1,\) of torch.int64"),
        ({"windows": torch.tensor([[3, 3, 0, 0]] * 2)}, r"windows of 1 images are \(1, 4\) of int32 .* got \(2, 4\)"),
        ({"windows": torch.zeros(1, 4)}, r"windows of 1 images are .* got \(1, 4\) of torch.float32"),
        (
            {"windows": torch.tensor([[2, 3, 0, 0]])},
            r"window 0 is not .*: 3 x 3 .* \[0, 0\] on, of 2 x 3 \(height",
        ),
        ({"windows": torch.tensor([[9, 9, 0, 7]])}, r"window 0 is not within its image: .* \[0, 7\] on, of 9 x 9"),
        ({"windows": torch.tensor([[9, 9, -1, 0]])}, "window 0 is not within its image"),
        ({"size": (0, 4)}, "to one pixel or more, got 0 x 4"),
        ({"mean": (0.5,)}, r"mean and std are 1 numbers each, or both None; got \(0.5,\) and None"),
        ({"mean": MEAN, "std": STD}, "mean and std are 1 numbers each"),
        ({"interpolation": InterpolationMode.LANCZOS}, "interpolation is .*LANCZOS; allowed: .*BILINEAR, .*BICUBIC"),
    ],
)
def test_crops_that_cannot_be_meant(changes: dict[str, object], message: str) -> None:
    arguments = {"boxes": torch.tensor([[0, 0, 5, 4]]), "flips": torch.tensor([True]), "size": (3, 3)} | changes
    with pytest.raises(ValueError, match=message):
        crop_resize(RaggedImages.of([GREY]), **arguments)  # type: ignore[arg-type]


def test_images_on_the_cpu() -> None:
    pytest.importorskip("triton", reason="no triton in this build of torch")
    with pytest.raises(ValueError, match="on a GPU, got some on cpu; move them there"):
        crop_resize(RaggedImages.of([GREY]), torch.tensor([[0, 0, 5, 4]]), torch.tensor([True]), (3, 3))
