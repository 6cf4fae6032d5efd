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
        boxes = [] if files is None else files.boxes[: len(files.stored)]  # of the first views
        content = [files.stored[row] for row, box in enumerate(boxes) if files is not None and box is not None]
        return Begun(loaded, self._decoder.begin(content))

    def finish(self, begun: Begun) -> Batch:
        """Crop, resize, flip and change where the workers did not; then warp, normalise and erase."""
        loaded, decoded = begun
        draws, undecodable = loaded.draws, list(loaded.undecodable)
        images, classes = loaded.images, loaded.classes
        if loaded.files is not None:
            images = self._cropped(draws, *self._opened(loaded, loaded.files, decoded(), classes, undecodable))
        elif self.kept is not None and loaded.boxes is not None:
            kept = self.kept.select(loaded.indices.repeat(self._images.drawing.views))
            images = self._cropped(draws, kept, loaded.boxes)
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
        """For each view, the image decoded here or the crop that workers made, and the part to crop (V * N, 4).

        The CPU decodes a JPEG file that the GPU refuses. If it cannot either, the next image takes the file's place,
        and its class goes to `classes`.
        """
        draws, drawing, boxes = loaded.draws, self._images.drawing, list(files.boxes)
        by_gpu = iter(decoded)
        by_workers = iter(loaded.images.to(self._device, non_blocking=True))
        images = list[Tensor]()
        for place, box in enumerate(boxes):
            row = place % len(classes)
            if box is not None and place > row:
                images.append(images[row])  # that of the first view
                continue
            image = next(by_workers if box is None else by_gpu)
            if image is None:
                image, classes[row] = self._images.decoded(files.encoded(), row, int(loaded.indices[row]), undecodable)
                for view in range(row, len(boxes), len(classes)):
                    boxes[view] = drawing.box(draws.crops[view], *image.shape[1:])
            images.append(image.to(self._device))
        whole: Box = (0, 0, *self._size)
        return RaggedImages.of(images), torch.tensor([box or whole for box in boxes])

    def _cropped(self, draws: Draws, images: RaggedImages, boxes: Tensor) -> Tensor:
        """Crop the boxes (N, 4) of images, resize and flip them, then change or normalise them."""
        drawing = self._images.drawing
        flips, normalise = torch.from_numpy(draws.flips), drawing.changes is None and self._affine is None
        mean, std = self._statistics if normalise else (None, None)
        crops = crop_resize(images, boxes, flips, self._size, mean, std, drawing.interpolation)
        return crops if drawing.changes is None else drawing.changes.apply_to_batch(crops, draws.changes)
