"""Images with masks in two layouts, and what is wrong with those that are refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arm_zoo.images.errors import SourceError
from arm_zoo.images.masks import IGNORED, compare_class_names, open_masks

MASK = np.array([[0, 1, 2], [3, 1, 0]], np.uint8)


def write_pair(image: Path, mask: Path, numbers: np.ndarray = MASK, size: tuple[int, int] = (3, 2)) -> None:
    for file in (image, mask):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(image)
    Image.fromarray(numbers).save(mask)


def ade20k(root: Path) -> Path:
    for split in ("training", "validation"):
        write_pair(root / "images" / split / "a.jpg", root / "annotations" / split / "a.png")
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{k}\t0.1\t1\t1\t0\t{name}" for k, name in enumerate("xyz", 1))]
    (root / "objectInfo150.txt").write_text("\n".join(lines))
    return root


def voc(root: Path) -> Path:
    mask = root / "SegmentationClass" / "b.png"
    write_pair(root / "JPEGImages" / "b.jpg", mask)
    palette = Image.fromarray(np.where(MASK == 3, IGNORED, MASK).astype(np.uint8), "P")
    palette.putpalette(range(256))
    palette.save(mask)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("b\n")
    return root


def test_other_counts_nowhere_in_the_layout_of_ade20k(tmp_path: Path) -> None:
    split = open_masks(ade20k(tmp_path), "validation")
    assert (split.class_names, len(split)) == (("x", "y", "z"), 1)
    image, labels = split[0]
    assert image.shape == (3, 2, 3) and labels.tolist() == [[IGNORED, 0, 1], [2, 0, IGNORED]]


def test_255_counts_nowhere_in_the_layout_of_voc(tmp_path: Path) -> None:
    split = open_masks(voc(tmp_path), "training")
    assert len(split.class_names) == 21 and split.class_names[0] == "background"
    assert split[0][1].tolist() == [[0, 1, 2], [IGNORED, 1, 0]]
    (tmp_path / "classes.txt").write_text("sky\n\nroad\ncar\n")
    assert open_masks(tmp_path, "validation").class_names == ("sky", "road", "car")


def test_lists_may_have_names_with_spaces_and_be_of_windows(tmp_path: Path) -> None:
    root = voc(tmp_path)
    write_pair(root / "JPEGImages" / "b 2.jpg", root / "SegmentationClass" / "b 2.png")
    (root / "ImageSets" / "Segmentation" / "train.txt").write_bytes(b"\xef\xbb\xbfb 2\r\nb\r\n\r\n")
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfnear sky\r\nroad\r\nb\r\nc\r\nd\r\ne\r\nf")
    split = open_masks(root, "training")
    assert [image.name for image in split.images] == ["b 2.jpg", "b.jpg"]
    assert split.class_names == ("near sky", "road", "b", "c", "d", "e", "f")


def test_endings_of_masks_may_be_in_capitals(tmp_path: Path) -> None:
    mask = voc(tmp_path) / "SegmentationClass" / "b.png"
    expected = open_masks(tmp_path, "training")[0][1]
    mask.rename(mask.with_suffix(".PNG"))
    assert open_masks(tmp_path, "training")[0][1].equal(expected)
    mask.write_bytes(b"")  # another file only where the disk tells the two names apart
    if len([*mask.parent.iterdir()]) == 2:
        assert "these are there more than once: b; keep one of each" in refusal(tmp_path)


def refusal(root: Path) -> str:
    with pytest.raises(SourceError) as error:
        open_masks(root, "training")[0]
    return str(error.value)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    assert "has no training images with masks; allowed: a folder with images/training" in refusal(tmp_path)
    assert f"{tmp_path / 'gone'} is no folder; allowed: a folder with images/training" in refusal(tmp_path / "gone")
    root = ade20k(tmp_path / "ade")
    mask = root / "annotations" / "training" / "a.png"
    Image.fromarray(MASK * 2).save(mask)
    assert f"{mask} has the numbers 4, 6; allowed: 1 to 3, the 3 classes, and 0, which counts nowhere" in refusal(root)
    Image.new("L", (4, 2)).save(mask)
    assert f"{mask} has 4x2 pixels, its image 3x2; allowed: a mask of the image's size" in refusal(root)
    Image.new("RGB", (3, 2)).save(mask)
    assert "has colours (mode RGB); allowed: one number for each pixel" in refusal(root)
    mask.write_bytes(b"gone")
    assert f"{mask} cannot be decoded" in refusal(root)
    mask.unlink()
    assert "these have no mask: a; add or remove them" in refusal(root)
    (root / "objectInfo150.txt").unlink()
    write_pair(root / "images" / "training" / "a.png", mask)
    assert "these are there more than once: a; keep one of each" in refusal(root)
    (root / "images" / "training" / "a.png").unlink()
    assert "tells no names of classes; write classes.txt there" in refusal(root)
    (root / "classes.txt").write_text("a\na\n")
    assert "names of classes in" in refusal(root)
    other = voc(tmp_path / "voc")
    (other / "ImageSets" / "Segmentation" / "train.txt").write_text("b\nc d\n")
    assert "these have no image: c d;" in refusal(other)
    (other / "ImageSets" / "Segmentation" / "train.txt").write_text("b\n")
    Image.new("RGB", (3, 2)).save(other / "JPEGImages" / "b.png")  # which of the two is meant?
    assert "these are there more than once: b; keep one of each" in refusal(other)


def test_lists_of_classes_are_compared() -> None:
    compare_class_names(["a", "b"], ("a", "b"), "x and y")
    with pytest.raises(SourceError, match="only in the first: a; only in the second: c; allowed: one list"):
        compare_class_names(["a", "b"], ["b", "c"], "x and y")
    with pytest.raises(SourceError, match=r"x and y have other classes .* the same names in another order"):
        compare_class_names(["a", "b"], ["b", "a"], "x and y")
