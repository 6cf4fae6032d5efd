"""The data sets that come with packages: each is a function and a row of OPENERS, and of BUILT_IN in `config.py`."""

import functools
import importlib.resources
from collections.abc import Callable, Iterable, Mapping

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arm_zoo.images.columns import Columns
from arm_zoo.images.errors import SourceError
from arm_zoo.images.tables import ImageTable, Reading
from recipes.data.source import Source

SPLIT_SEED = 0  # fixed: a run's seed must not move images between training and test
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_TEST_IMAGES = 360
PICTURES = {  # of a class of pieces: a file of an installed package
    "brick": "skimage/data/brick.png",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "cameraman": "skimage/data/camera.png",
    "astronaut": "skimage/data/astronaut.png",
    "cell": "skimage/data/cell.png",
    "cat": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "galaxies": "skimage/data/hubble_deep_field.jpg",
    "tissue": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "page": "skimage/data/page.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "temple": "sklearn/datasets/images/china.jpg",
    "flower": "sklearn/datasets/images/flower.jpg",
}
PIECE = 64  # pixels of a piece's side
PIECES = {"train": 60, "test": 20}  # of each picture
TRAINING_SHARE = 0.65  # of a picture's width, from the left; the pieces to score on are from the rest
FLAT = 0.02  # standard deviation, of values from 0 to 1, of a piece that is drawn again, up to TRIES times
TRIES = 20
MIDDLE, SPREAD = 128, 64  # the mean and the standard deviation of every piece


def table_of(
    name: str, images: Iterable[NDArray[np.uint8]], labels: Iterable[int], classes: int | None, mode: str
) -> ImageTable:
    """Grey images, kept as PNG files in memory, that are read in PIL's `mode`; without `classes`, without labels."""
    data = datasets.Dataset.from_dict(
        {"image": list(images), "label": list(labels)},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    numbers = None if classes is None else {number: number for number in range(classes)}
    return ImageTable(data, Reading(name, Columns("image", "label"), numbers, mode))


@functools.cache
def open_digits(labels_needed: bool = True) -> Source:
    """1,797 handwritten digits, 8x8 grey: 1,437 to train, 360 held out, each class in the same proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as counts 0..16
    train, test = train_test_split(
        np.arange(len(images)), test_size=DIGITS_TEST_IMAGES, stratify=digits.target, random_state=SPLIT_SEED
    )

    def split(name: str, rows: NDArray[np.int64]) -> ImageTable:
        classes = len(DIGIT_NAMES) if labels_needed else None
        return table_of(f"digits [{name}]", images[rows], digits.target[rows], classes, "L")

    return Source(
        train=split("train", train),
        test=split("test", test),
        class_names=DIGIT_NAMES if labels_needed else (),
        mean=(float(images[train].mean() / 255),),
        std=(float(images[train].std(ddof=1) / 255),),
    )


@functools.cache
def open_pieces(labels_needed: bool = True) -> Source:
    """1,440 grey pieces of 18 pictures, 64x64: which picture is a piece from? 1,080 to train, 360 held out.

    Training pieces are from the left of each picture, the others from its right. All pieces have one mean and one
    standard deviation, so that brightness and contrast tell nothing.
    """
    draws = np.random.default_rng(SPLIT_SEED)
    drawn: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in PIECES}
    for picture in map(read_picture, PICTURES):
        cut = round(picture.shape[1] * TRAINING_SHARE)
        for name, part in (("train", picture[:, :cut]), ("test", picture[:, cut:])):
            drawn[name] += [draw_piece(part, draws) for _ in range(PIECES[name])]

    def split(name: str) -> ImageTable:
        labels = np.repeat(np.arange(len(PICTURES)), PIECES[name])
        return table_of(f"pieces [{name}]", drawn[name], labels, len(PICTURES) if labels_needed else None, "RGB")

    values = np.stack(drawn["train"]) / 255
    mean, std = float(values.mean()), float(values.std(ddof=1))
    return Source(split("train"), split("test"), tuple(PICTURES) if labels_needed else (), (mean,) * 3, (std,) * 3)


def read_picture(name: str) -> NDArray[np.float32]:
    """The picture of a class of pieces, (height, width), grey values from 0 to 1; SourceError if it is missing."""
    package, _, file = PICTURES[name].partition("/")
    try:
        with (importlib.resources.files(package) / file).open("rb") as opened:
            return np.asarray(Image.open(opened).convert("L"), np.float32) / np.float32(255)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        problem = f"the pieces need the pictures of {distribution}, and {file} is not there ({type(error).__name__})"
        raise SourceError(f"{problem}; type pip install {distribution}") from None


def draw_piece(part: NDArray[np.float32], draws: np.random.Generator) -> NDArray[np.uint8]:
    """A random piece of a part of a picture, with the mean and the standard deviation that all pieces have."""
    for _ in range(TRIES):
        top, left = (int(draws.integers(side - PIECE + 1)) for side in part.shape)
        piece = part[top : top + PIECE, left : left + PIECE]
        if piece.std() > FLAT:
            break
    spread = (piece - piece.mean()) / max(float(piece.std()), 1 / 255)
    return np.clip(np.round(MIDDLE + SPREAD * spread), 0, 255).astype(np.uint8)


OPENERS: Mapping[str, Callable[[bool], Source]] = {"digits": open_digits, "pieces": open_pieces}
