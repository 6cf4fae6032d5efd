"""A function of images whose kernels are launched all at once: one by one can take the host longer than they run."""

from collections.abc import Callable

import torch
from torch import Tensor

from recipes.data.sources import tell

Arrays = dict[str, Tensor]


class Replayed:
    """Calls a function of images (N, C, H, W), from the second batch of a shape on by replaying a CUDA graph of it.

    What it gives is valid until the next call. The function must launch the same kernels for all images of a shape;
    one that waits for the GPU cannot become a graph, and is then called as usual, which is said once. So are batches
    of another shape, such as a last one of fewer images, and all on a CPU.
    """

    def __init__(self, function: Callable[[Tensor], Arrays]) -> None:
        self._function = function
        self._shape: torch.Size | None = None  # of the batch before
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False
        self._images: Tensor  # that the graph reads
        self._made: Arrays  # that it writes

    def __call__(self, images: Tensor) -> Arrays:
        """Call the function, or replay it, on the current stream."""
        repeated, self._shape = images.shape == self._shape, images.shape
        if self._graph is None and repeated and images.is_cuda and not self._refused:
            self._capture(images)
        if self._graph is None or images.shape != self._images.shape:
            return self._function(images)
        self._images.copy_(images)
        self._graph.replay()
        return self._made

    def _capture(self, images: Tensor) -> None:
        graph, read = torch.cuda.CUDAGraph(), images.clone()
        stream = torch.cuda.current_stream(images.device)
        generator = torch.cuda.default_generators[images.device.index]
        state = generator.clone_state()
        try:
            # other threads, which decode images, may go on to ask for memory
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                made = self._function(read)
        except RuntimeError as error:
            self._refused = True
            # torch stays on the stream of a capture that failed, and its generator refuses to draw numbers elsewhere
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(state)
            reason = str(error).partition("\n")[0]
            tell(f"no CUDA graph can hold the model, so its kernels are launched one by one, more slowly: {reason}")
            return
        self._graph, self._images, self._made = graph, read, made
