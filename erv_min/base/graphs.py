"""CUDA graphs: the hundreds of kernels of a function launched at once, without Python between them."""

import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

WORTH = 8  # calls that must be left for a capture, which takes as long as two or three calls without it


class Replay:
    """Calls a function of one tensor many times; on CUDA by replaying its graph.

    `shape` stands for the shapes of all that the function reads. When it changes, the function is run once without a
    graph, which warms up, and then captured; the next calls replay that. A result is overwritten by the next call.
    """

    def __init__(self):
        self.graph, self.shape = None, None

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor, shape: Hashable, left: int) -> Tensor:
        """function(x); `left`: how many calls may follow. `function` is not stored: a method of the object that owns
        this one would make a cycle of references, and GPU memory would be freed late."""
        if shape == self.shape:
            self.x.copy_(x)
            self.graph.replay()
            return self.result
        result, self.shape = function(x), None
        if x.is_cuda and left > WORTH:
            self.shape, self.x = shape, x.clone()
            self.graph, self.result = capture(lambda: function(self.x), x.device, self.graph)
        return result


capture_stream = functools.cache(torch.cuda.Stream)  # one of a device: graphs share memory on the same stream alone


def capture(function: Callable, device: torch.device, before=None):
    """(graph, result): `function` recorded as a CUDA graph, and the tensor that each replay fills. It is not run yet.

    It takes over the memory of the graph `before`, which must not be replayed again. Only what runs on a stream of the
    tensors' own `device` is recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, before and before.pool(), capture_stream(device)):
        result = function()
    return graph, result
