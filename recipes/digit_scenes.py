"""Write a small data set of images with masks, in the layout of ADE20K: handwritten digits on photographs.

python -m recipes.digit_scenes FOLDER

The digits and photographs are real and come with scikit-learn. Each scene is a part of a photograph with up to four
digits on it, enlarged three times; the mask covers the pixels where their ink is stronger than half. Training and
validation images share no digit and no photograph.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arm_zoo.command_line import positive, show
from arm_zoo.files import replacing_files, write_text
from arm_zoo.images.masks import SplitName
from recipes.data.built_in import DIGIT_NAMES, open_digits
from recipes.errors import RunError, reporting_mistakes

SIDE, CELL, DIGIT = 64, 32, 24  # pixels of a scene, of the place of a digit, of a digit
BACKGROUND = 1  # its number in masks; that of a digit is two more than the digit
PHOTOGRAPHS: dict[SplitName, str] = {"training": "china.jpg", "validation": "flower.jpg"}


def write_scenes(folder: Path, split: SplitName, scenes: int) -> None:
    """Write the images and masks of a split, and `classes.txt`."""
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image(PHOTOGRAPHS[split])
    digits: Any = open_digits().train if split == "training" else open_digits().test
    draws = np.random.default_rng([0, len(split)])
    images, masks = folder / "images" / split, folder / "annotations" / split
    for made in (images, masks):
        made.mkdir(parents=True, exist_ok=True)
    for number in range(scenes):
        top, left = (int(draws.integers(side - SIDE)) for side in photograph.shape[:2])
        image = photograph[top : top + SIDE, left : left + SIDE].copy()
        mask = np.full((SIDE, SIDE), BACKGROUND, np.uint8)
        for row, column in np.ndindex(SIDE // CELL, SIDE // CELL):
            ink, label, _ = digits[int(draws.integers(len(digits)))]
            if draws.random() < 0.75:
                y, x = (CELL * cell + int(draws.integers(CELL - DIGIT)) for cell in (row, column))
                place = slice(y, y + DIGIT), slice(x, x + DIGIT)
                _draw(image[place], mask[place], ink, label, draws.integers(256, size=3))
        Image.fromarray(image).save(images / f"{number:05d}.png")
        Image.fromarray(mask).save(masks / f"{number:05d}.png")
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in ("background", *DIGIT_NAMES)))


def _draw(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], ink: Image.Image, label: int, colour: NDArray[np.int64]
) -> None:
    """Put a digit on a part of a scene and on the same part of its mask, both of DIGIT pixels a side."""
    strong = np.asarray(ink.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)) > 127
    image[strong], mask[strong] = colour, BACKGROUND + 1 + label


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.digit_scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder to write to; it is made if it does not exist")
    add("--training", type=positive, default=1000, metavar="N", help="number of training images (%(default)s)")
    add("--validation", type=positive, default=200, metavar="N", help="number of validation images (%(default)s)")
    arguments = parser.parse_args(argv)
    with reporting_mistakes(parser.prog):
        if (arguments.folder / "images").exists():  # images left there by a larger set would count too
            raise RunError(f"{arguments.folder} has images already; name another folder")
        with replacing_files(arguments.folder) as beside:
            write_scenes(beside, "training", arguments.training)
            write_scenes(beside, "validation", arguments.validation)
        show(f"wrote {arguments.training} and {arguments.validation} images with masks to {arguments.folder}")


if __name__ == "__main__":
    main()
