"""The loaders for training and for scoring. Training batches are made one step ahead of their use.

The order of an epoch is a function of (seed, epoch), and the augmentation of an image one of (seed, epoch, index). So
the position (epoch, step) is all that a resumed run has to know about its data, for any number of workers.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch

from arm_zoo.images.decode import jpeg_decoder
from recipes.config import TrainConfig
from recipes.data.batches import AugmentedImages, Batch, EncodedImages, EncodedImagesToScore, Images, KeptImages
from recipes.data.cache import fill
from recipes.data.config import DataConfig
from recipes.data.draws import Drawing
from recipes.data.finishing import Prepared, ScoringFinishing, TrainFinishing
from recipes.data.gpu_decode import decoder_missing
from recipes.data.sampling import BatchPlan, Key, ScoringOrder, training_order
from recipes.data.source import Source, Split
from recipes.data.sources import tell
from recipes.data.transforms import Normalisation, ScoringTransform
from recipes.data.undecodable import check_undecodable, name_once
from recipes.data.views import TwoViews
from recipes.data.workers import WorkerLoader
from recipes.errors import RunError
from recipes.signals import StopWaiting

CPU = torch.device("cpu")
BLOCKS_UNKNOWN = 5  # measured blocks that the GPU may still have to do; a step has two
# Pixels below which the CPU decodes images to score on: nvJPEG's time for a small one is that of its many calls.
LEAST_PIXELS = 128 * 128


class TrainLoader:
    """Gives this process its part of each global batch of training images, augmented as `config.data` says.

    At the end of an epoch the workers go on with the images of the next one, so that it starts without waiting. On a
    GPU, images are made on a stream of their own while the GPU trains on others.
    """

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        plan: BatchPlan,
        image_size: tuple[int, int],
        process: int,
        processes: int,
        device: torch.device,
    ) -> None:
        self._order = training_order(source.train, config, plan, process, processes)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.class_names = source.class_names
        if jpeg_decoder() is None:
            tell("torchcodec is not installed, or not one for this torch: Pillow decodes, which takes twice as long")
        images, drawing = kind_of_images(config.data, device), TwoViews if config.views == 2 else Drawing
        self.images = images(source, config.data, image_size, config.seed, drawing)
        self._loader = WorkerLoader(self.images.batch, self._order, config.data.workers, device.type == "cuda")
        self._finishing = TrainFinishing(self.images, source, config.data, image_size, device)
        self._plan, self._config, self._device = plan, config, device
        self._is_filled = False
        self._steps: Iterator[Prepared] = iter(())
        self._ahead: Prepared | BaseException | None = None  # the next step, or why there is none
        self._next: tuple[int, int] | None = None
        self._pauses = Pauses(device)
        self.undecodable: set[str] = set()  # a line for each damaged image; the trainer adds those of other processes

    @property
    def seconds_waited(self) -> float:
        """Seconds for which training has waited for images."""
        return self._pauses.seconds

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step of an epoch, from `first_step` on.

        Raises if this process alone has found more damaged images than `data.max_undecodable` tolerates.
        """
        if self._next != (epoch, first_step):
            self._order.start = (epoch, first_step)
            self._steps, self._ahead = self._prepared(), None
        for step in range(first_step, self.steps_per_epoch):
            ahead, self._ahead = self.look_ahead(), None
            if isinstance(ahead, BaseException):
                raise ahead
            with self._pauses.measured():
                batches = self._finishing.handed_over(*ahead)
            name_once((line for batch in batches for line in batch.undecodable), self.undecodable)
            self.check_undecodable()
            self._next = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            yield batches

    def look_ahead(self) -> Prepared | BaseException:
        """Begin to make the images of the next step, unless that was done; best called while the device is busy.

        An error, such as a worker that died, is raised only when that step is asked for.
        """
        if self._ahead is None:
            with self._pauses.measured():
                try:
                    self._ahead = next(self._steps)
                except (Exception, StopWaiting) as error:
                    self._ahead = error
        return self._ahead

    def check_undecodable(self) -> None:
        """Raise `SourceError` if more training images are damaged than `data.max_undecodable` tolerates."""
        check_undecodable(len(self.undecodable), self._order.size, "training", self._config.data.max_undecodable)

    def _prepared(self) -> Iterator[Prepared]:
        if not self._is_filled:
            with self._finishing.on_its_stream():
                self._finishing.kept = fill(self.images, self._config.data, self._device)
            self._is_filled = True
        loaded = iter(self._loader)
        yield from self._finishing.prepared(iter(lambda: list(islice(loaded, self._plan.accumulation)), []))


class Pauses:
    """Measures how long a device stands still in blocks of code: a GPU between its work before and after a block.

    The time of a GPU is known only when the GPU has got there. If it is more than two steps behind, the host waits for
    it, which bounds the memory of the images that wait, while the GPU still has work to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0  # in all blocks whose time is known
        self._device = device
        self._unknown: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measured(self) -> Iterator[None]:
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - started
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record(torch.cuda.current_stream(self._device))
        yield
        events[1].record(torch.cuda.current_stream(self._device))
        self._unknown.append(events)
        while len(self._unknown) > BLOCKS_UNKNOWN:
            began, ended = self._unknown.popleft()
            ended.synchronize()
            self.seconds += began.elapsed_time(ended) / 1000


class EvalLoader:
    """Gives each image of a split exactly once over all processes, with the evaluation transform of `data_config`.

    `data_config` is that of `timm.data.resolve_model_data_config`, with the mean and std of the training. An image
    that cannot be decoded is left out and logged once, but counted in the batches of every pass.
    """

    def __init__(
        self,
        split: Split,
        data_config: Mapping[str, Any],
        batch_size: int,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        device: torch.device = CPU,
    ) -> None:
        images = Images(split, ScoringTransform(data_config))
        order = ScoringOrder(split, batch_size, process, processes)
        self._loader = WorkerLoader(images.batch, order, workers, device.type == "cuda")
        self._device = device
        self._normalise = Normalisation(data_config["mean"], data_config["std"], device)
        self._named: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            name_once(batch.undecodable, self._named)
            yield batch.ready(self._device, self._normalise)


class ScoringLoader:
    """Gives batches of any split to score on, prepared as by `EvalLoader`, but decoded where `data.decode` says.

    With `auto`, a GPU leaves small images to the CPU; `decoded_on` says so. Only what the GPU decodes is made ahead.
    The classes of a batch are on the device, too.
    """

    def __init__(self, data_config: Mapping[str, Any], config: DataConfig, device: torch.device) -> None:
        self._data_config, self._workers, self._device = data_config, config.workers, device
        self._least = LEAST_PIXELS if config.decode == "auto" else 0
        self._transform = ScoringTransform(data_config)
        self.decoded_on, self._finishing = "cpu", None
        if decodes_on_gpu(config.decode, device, self._transform.no_window):
            self.decoded_on = f"gpu, below {self._least} pixels cpu" if self._least else "gpu"
            self._finishing = ScoringFinishing(data_config, self._transform, device)

    def batches(self, split: Split, order: Iterable[list[Key]]) -> Iterator[Batch]:
        """The batches of these keys; images that cannot be decoded are left out."""
        pin = self._device.type == "cuda"
        if self._finishing is None:
            normalise = Normalisation(self._data_config["mean"], self._data_config["std"], self._device)
            images = Images(split, self._transform)
            for batch in WorkerLoader(images.batch, order, self._workers, pin):
                yield batch.ready(self._device, normalise)
            return
        loaded = WorkerLoader(
            EncodedImagesToScore(split, self._transform, self._least).batch, order, self._workers, pin
        )
        for prepared in self._finishing.prepared([batch] for batch in loaded):
            yield from self._finishing.handed_over(*prepared)


def kind_of_images(config: DataConfig, device: torch.device) -> type[AugmentedImages]:
    """The class that makes training batches, as `data.cache` and `data.decode` say."""
    if keeps_on_gpu(config.cache, device):
        return KeptImages
    return EncodedImages if decodes_on_gpu(config.decode, device) else AugmentedImages


def keeps_on_gpu(cache: str, device: torch.device) -> bool:
    """Whether the GPU keeps decoded images, as `data.cache` says; raises `RunError` if it should but cannot."""
    missing = resizer_missing(device) if cache == "gpu" else None
    if missing is not None:
        raise RunError(f"data.cache is gpu, but {missing}; allowed: data.cache=memory or data.cache=none")
    return cache == "gpu"


def decodes_on_gpu(decode: str, device: torch.device, no_window: str | None = None) -> bool:
    """Whether the GPU decodes JPEG files, as `data.decode` says; raises `RunError` if it should but cannot.

    `no_window` is that of `ScoringTransform`, for images to score on.
    """
    if decode == "cpu":
        return False
    missing = resizer_missing(device) or no_window or decoder_missing(device)
    if missing is not None and decode == "gpu":
        raise RunError(f"data.decode is gpu, but {missing}; allowed: data.decode=auto or data.decode=cpu")
    if missing is not None and device.type == "cuda":
        tell(f"the CPU decodes, for which the GPU may have to wait: {missing}")
    return missing is None


def resizer_missing(device: torch.device) -> str | None:
    """The reason why images cannot be cropped and resized on this device; None if they can."""
    if device.type != "cuda":
        return f"the run's device is {device}"
    return None if find_spec("triton") else "Triton is not installed, which comes with torch for CUDA on Linux"
