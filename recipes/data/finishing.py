"""The last steps of a batch, on the device that works on it: decoding what is left, and all after the crop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from recipes.data.batches import AugmentedImages, Batch, Files, Loaded, LoadedToScore, transformed
from recipes.data.config import DataConfig
from recipes.data.draws import Box, Draws
from recipes.data.erasing import erase
from recipes.data.gpu_decode import Decoder
from recipes.data.randaugment import on_device
from recipes.data.resample import RaggedImages, crop_resize
from recipes.data.source import Source
from recipes.data.transforms import Normalisation, ScoringTransform, Window, warp

ItemT = TypeVar("ItemT")
LoadedT = TypeVar("LoadedT", Loaded, LoadedToScore)
Prepared = tuple[list[Batch], torch.cuda.Event | None]  # batches of a step; when the GPU has made them


@dataclass(frozen=True)
class Begun(Generic[LoadedT]):
    """A batch whose files are being decoded."""

    loaded: LoadedT
    decoded: Callable[[], list[Tensor | None]]  # waits for the files left encoded; None: the GPU refused the file


class Finishing(ABC, Generic[LoadedT]):
    """Makes batches of what workers load; the host waits for the device only until it has decoded the files.

    On a GPU, they are made on a stream of their own while the GPU works on others.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._decoder = device, Decoder(device)
        # A high priority, or each of the decoder's many small kernels waits for a large one of the training: 153
        # images a second beside large matrix products, 20,451 alone.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def begin(self, loaded: LoadedT) -> Begun[LoadedT]:
        """Begin to decode the files that the workers did not decode."""
        return Begun(loaded, self._decoder.begin(loaded.left_encoded()))

    @abstractmethod
    def finish(self, begun: Begun[LoadedT]) -> Batch:
        """Do the rest."""

    def prepared(self, steps: Iterable[list[LoadedT]]) -> Iterator[Prepared]:
        """The batches of each step. By then, the files of the next one are being decoded."""
        for begun in taken_ahead([self.begin(loaded) for loaded in step] for step in steps):
            with self.on_its_stream():
                batches = [self.finish(batch) for batch in begun]
                made = None if self._stream is None else self._stream.record_event()
            yield batches, made

    def on_its_stream(self) -> AbstractContextManager[Any]:
        """Work on the stream on which the batches are made."""
        return torch.cuda.stream(self._stream)  # None: as everywhere

    def handed_over(self, batches: list[Batch], made: torch.cuda.Event | None) -> list[Batch]:
        """Hand a prepared step over to the current stream."""
        if made is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(made)
            for tensor in (tensor for batch in batches for tensor in (batch.images, batch.classes)):
                tensor.record_stream(stream)  # its memory may be reused only after this stream's work on it
        return batches


def taken_ahead(items: Iterable[ItemT]) -> Iterator[ItemT]:
    """Give each item only after the next one has been taken from `items`."""
    iterator = iter(items)
    for item in islice(iterator, 1):
        for following in iterator:
            yield item
            item = following
        yield item


class TrainFinishing(Finishing[Loaded]):
    """Makes training batches."""

    def __init__(
        self,
        images: AugmentedImages,
        source: Source,
        config: DataConfig,
        image_size: tuple[int, int],
        device: torch.device,
    ) -> None:
        super().__init__(device)
        self._images, self._size = images, image_size
        self._statistics = (source.mean, source.std)
        self._normalise = Normalisation(source.mean, source.std, device)
        self.kept: RaggedImages | None = None  # the whole split, if the GPU keeps it
        self._affine = config if config.max_shift or config.max_rotation or config.max_zoom else None

    def finish(self, begun: Begun[Loaded]) -> Batch:
        """Crop, resize, flip and change where the workers did not; then warp, normalise and erase."""
        loaded = begun.loaded
        draws, undecodable = loaded.draws, list(loaded.undecodable)
        images, classes = loaded.images, loaded.classes
        if loaded.files is not None:
            images = self._cropped(draws, *self._opened(loaded, loaded.files, begun.decoded(), classes, undecodable))
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


class ScoringFinishing(Finishing[LoadedToScore]):
    """Makes batches to score on, as a model's data configuration says."""

    def __init__(self, data_config: Mapping[str, Any], transform: ScoringTransform, device: torch.device) -> None:
        super().__init__(device)
        self._transform, self._statistics = transform, (data_config["mean"], data_config["std"])

    def finish(self, begun: Begun[LoadedToScore]) -> Batch:
        """Resize, crop and normalise.

        The CPU decodes a JPEG file that the GPU refuses. If it cannot either, the image is left out.
        """
        loaded, undecodable = begun.loaded, list(begun.loaded.undecodable)
        by_workers = iter(loaded.images.to(self._device, non_blocking=True))
        by_gpu = enumerate(begun.decoded())
        images, windows, kept = list[Tensor](), list[Window](), list[int]()
        for row, window in enumerate(loaded.windows):
            if window is None:
                image = next(by_workers)
            else:
                file, image = next(by_gpu)
                if image is None:
                    window, encoded = None, loaded.files.encoded(file)
                    image = transformed(encoded, "RGB", self._transform, undecodable)
            if image is not None:
                images.append(image.to(self._device))
                windows.append(window or (*self._transform.size, 0, 0))
                kept.append(row)
        classes, indices = loaded.classes, loaded.indices
        if len(kept) < len(classes):
            classes, indices = classes[kept], indices[kept]
        made = self._made(images, windows)
        return Batch(made, classes.to(self._device, non_blocking=True), indices, undecodable)

    def _made(self, images: list[Tensor], windows: list[Window]) -> Tensor:
        if not images:
            return torch.empty(0, len(self._statistics[0]), *self._transform.size, device=self._device)
        ragged, none = RaggedImages.of(images), torch.zeros(len(images), dtype=torch.bool)
        boxes = torch.cat([torch.zeros_like(ragged.sizes), ragged.sizes], dim=1)
        size, filtered = self._transform.size, self._transform.interpolation
        return crop_resize(ragged, boxes, none, size, *self._statistics, filtered, torch.tensor(windows))
