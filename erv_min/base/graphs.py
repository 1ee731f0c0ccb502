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
            self.graph, self.result = capture(lambda: function(self.x), x.device)
        return result


capture_stream = functools.cache(torch.cuda.Stream)  # one of a device: graphs share memory on the same stream alone
latest = {}  # device -> the graph that was captured last, alive for its memory, which the next one takes over
ROOM = 2**30  # bytes that must be free on the device; no capture of a decode step takes as many


def capture(function: Callable, device: torch.device):
    """(graph, result): `function` recorded as a CUDA graph, and the tensor that each replay fills. It is not run yet.

    Graphs of a device share memory, so they may take turns but not run side by side. Only what runs on a stream of the
    tensors' own `device` is recorded. torch.cuda.graph would empty the allocator's cache each time, which cost the next
    pass hundreds of cudaMalloc; here only if there is no room left, since none can be made during a capture.
    """
    graph, pool = torch.cuda.CUDAGraph(), (latest[device].pool(),) if device in latest else ()
    with torch.cuda.device(device), torch.cuda.stream(capture_stream(device)):
        torch.cuda.synchronize()
        if torch.cuda.mem_get_info()[0] < ROOM:
            torch.cuda.empty_cache()
        graph.capture_begin(*pool)
        try:
            result = function()
        finally:
            graph.capture_end()
    latest[device] = graph
    return graph, result
