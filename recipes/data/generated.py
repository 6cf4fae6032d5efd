"""Generated JPEG files with the statistics of photographs, for measuring how fast images are loaded.

The spectra of photographs fall off as 1 over the frequency, their surfaces end in edges, and their channels differ
little. The same is true here, so that decoders have as much to do: files of 500x375 pixels, ImageNet's usual size,
take 60 to 110 kB.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from arm_zoo.files import replacing_files
from arm_zoo.images.errors import SourceError
from recipes.data.config import CORES

WIDTH, HEIGHT = 500, 375
SCENE_WIDTH, SCENE_HEIGHT = 640, 480
IMAGES_OF_A_SCENE = 100
CLASSES = 100
SUBSAMPLINGS = ("4:2:0", "4:4:4")
SURFACES, SMALLEST_SURFACE = 200, 10  # their number in a scene; pixels
QUALITY = 88  # of the JPEG files
CONTRAST, NOISE = 52, 0.02  # standard deviation in grey levels; a fraction of it
OPPONENT_COLOURS = np.array([[1, 1, 1], [0.3, 0, -0.3], [0.1, -0.2, 0.1]], np.float32)  # light, then two of colour


def write_images(folder: Path, count: int, seed: int = 0, subsampling: str = SUBSAMPLINGS[0]) -> None:
    """Write `count` JPEG files as FOLDER/CLASS/NUMBER.jpg; a seed gives the same files on any number of cores.

    If that fails, as on a full disk, none is left.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SourceError(f"{str(folder)!r} exists and is not an empty folder; allowed: a new folder, or an empty one")
    scenes = [range(count)[first : first + IMAGES_OF_A_SCENE] for first in range(0, count, IMAGES_OF_A_SCENE)]
    with replacing_files(folder) as beside:
        for number in range(min(CLASSES, count)):
            (beside / f"{number:02}").mkdir()
        with ProcessPoolExecutor(min(CORES, len(scenes))) as processes:
            list(processes.map(partial(_write_scene, beside, seed, subsampling), scenes))


def _write_scene(folder: Path, seed: int, subsampling: str, numbers: Sequence[int]) -> None:
    generator = np.random.default_rng((seed, numbers[0]))
    whole = scene(generator)
    for number in numbers:
        file = folder / f"{number % CLASSES:02}" / f"{number:06}.jpg"
        view(whole, generator).save(file, quality=QUALITY, subsampling=subsampling)


def scene(generator: np.random.Generator) -> NDArray[np.float32]:
    """Draw textured surfaces that hide each other: (SCENE_HEIGHT, SCENE_WIDTH, 3), of deviation 1."""
    image = Image.new("RGB", (SCENE_WIDTH, SCENE_HEIGHT))
    draw = ImageDraw.Draw(image)
    for x, y, size, flatness in generator.random((SURFACES, 4)):
        x, y, width = x * SCENE_WIDTH, y * SCENE_HEIGHT, SMALLEST_SURFACE / (0.03 + 0.97 * size)
        height = width * (0.4 + 0.6 * flatness)
        colour = tuple(generator.integers(0, 256, 3).tolist())
        draw.ellipse((x - width, y - height, x + width, y + height), fill=colour)
    surfaces = np.asarray(image, np.float32) / 105 - 1.2
    texture = 0.5 * np.stack([_texture(generator) for _ in range(3)], axis=-1)
    values = (surfaces + texture) @ OPPONENT_COLOURS
    return values / values.std() + NOISE * generator.standard_normal(values.shape, np.float32)


def _texture(generator: np.random.Generator) -> NDArray[np.float32]:
    """Draw noise whose amplitude is 1 over the spatial frequency, of deviation 1."""
    rows, columns = np.fft.fftfreq(SCENE_HEIGHT)[:, None], np.fft.rfftfreq(SCENE_WIDTH)
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf  # no mean
    noise = np.fft.rfft2(generator.standard_normal((SCENE_HEIGHT, SCENE_WIDTH)))
    values = np.fft.irfft2(noise / frequency, (SCENE_HEIGHT, SCENE_WIDTH)).astype(np.float32)
    return values / values.std()


def view(whole: NDArray[np.float32], generator: np.random.Generator) -> Image.Image:
    """Cut a part from a scene, perhaps mirrored, and change its brightness, contrast and hue at random."""
    top, left = generator.integers(0, (SCENE_HEIGHT - HEIGHT + 1, SCENE_WIDTH - WIDTH + 1))
    part = whole[top : top + HEIGHT, left : left + WIDTH][:, :: generator.choice((-1, 1))]
    angle, gain, mean = generator.uniform((-0.5, 0.8, 100), (0.5, 1.2, 150))
    axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5  # the cross product with the direction of grey
    hue = np.eye(3) + np.sin(angle) * axis + (1 - np.cos(angle)) * axis @ axis  # Rodrigues' rotation
    values = part @ (CONTRAST * gain * hue.T).astype(np.float32) + np.float32(mean)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
