"""The last steps of a training batch, on the device that trains: decoding what is left, and all after the crop."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.data.batches import AugmentedImages, Batch, Files, Loaded
from recipes.data.config import DataConfig
from recipes.data.draws import Box, Draws
from recipes.data.erasing import erase
from recipes.data.gpu_decode import Decoder
from recipes.data.randaugment import on_device
from recipes.data.resample import RaggedImages, crop_resize
from recipes.data.sources import Source
from recipes.data.transforms import Normalisation, warp


class Begun(NamedTuple):
    """A batch whose files are being decoded."""

    loaded: Loaded
    decoded: Callable[[], list[Tensor | None]]  # waits for the files that have a box; None: the GPU refused the file


class Finishing:
    """Makes batches of what workers load; the host waits for the device only until it has decoded the files."""

    def __init__(
        self,
        images: AugmentedImages,
        source: Source,
        config: DataConfig,
        image_size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self._images, self._device, self._size = images, device, image_size
        self._statistics = (source.mean, source.std)
        self._normalise = Normalisation(source.mean, source.std, device)
        self.kept: RaggedImages | None = None  # the whole split, if the GPU keeps it
        self._decoder = Decoder(device)
        self._affine = config if config.max_shift or config.max_rotation or config.max_zoom else None

    def begin(self, loaded: Loaded) -> Begun:
        """Begin to decode the files that the workers did not decode."""
        files = loaded.files
        boxes = [] if files is None else files.boxes
        content = [files.stored[row] for row, box in enumerate(boxes) if files is not None and box is not None]
        return Begun(loaded, self._decoder.begin(content))

    def finish(self, begun: Begun) -> Batch:
        """Crop, resize and apply RandAugment where the workers did not; then warp, normalise and erase."""
        loaded, decoded = begun
        draws, undecodable = loaded.draws, list(loaded.undecodable)
        images, classes = loaded.images, loaded.classes
        if loaded.files is not None:
            images = self._cropped(draws, *self._opened(loaded, loaded.files, decoded(), classes, undecodable))
        elif self.kept is not None and loaded.boxes is not None:
            images = self._cropped(draws, self.kept.select(loaded.indices), loaded.boxes)
        images, classes = (tensor.to(self._device, non_blocking=True) for tensor in (images, classes))
        if self._affine is not None:
            images = warp(images.float().div_(255), on_device(draws.warps, self._device), self._affine)
        if images.dtype == torch.uint8 or self._affine is not None:
            images = self._normalise(images)
        erase(images, draws.erased, draws.noise_seeds)
        return Batch(images, classes, loaded.indices, undecodable, torch.from_numpy(draws.noise_seeds))

    def _opened(
        self, loaded: Loaded, files: Files, decoded: list[Tensor | None], classes: Tensor, undecodable: list[str]
    ) -> tuple[RaggedImages, Tensor]:
        """The images decoded here and the crops that workers made of others, and the part to crop from each (N, 4).

        The CPU decodes a JPEG file that the GPU refuses. If it cannot either, the next image takes the file's place,
        and its class goes to `classes`.
        """
        draws, drawing, boxes = loaded.draws, self._images.drawing, list(files.boxes)
        by_gpu = iter(decoded)
        by_workers = iter(loaded.images.to(self._device, non_blocking=True))
        images = []
        for row, box in enumerate(boxes):
            image = next(by_workers if box is None else by_gpu)
            if image is None:
                image, classes[row] = self._images.decoded(files.encoded(), row, int(loaded.indices[row]), undecodable)
                boxes[row] = drawing.box(draws.crops[row], *image.shape[1:])
            images.append(image.to(self._device))
        whole: Box = (0, 0, *self._size)
        return RaggedImages.of(images), torch.tensor([box or whole for box in boxes])

    def _cropped(self, draws: Draws, images: RaggedImages, boxes: Tensor) -> Tensor:
        """Crop the boxes (N, 4) of images, resize and flip them, then apply RandAugment or normalise."""
        randaugment = self._images.drawing.randaugment
        fused = () if randaugment is not None or self._affine is not None else self._statistics
        crops = crop_resize(images, boxes, torch.from_numpy(draws.flips), self._size, *fused)
        return crops if randaugment is None else randaugment.apply_to_batch(crops, draws.operations)
