"""How sampling is made fast: decode steps on a KV cache that are replayed as CUDA graphs, and completions that are
dropped once they are finished."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from erv_min.base.onednn import linear
from erv_min.model.attention import GroupCache
from erv_min.model.humanomni import HumanOmni, Prompts

WINDOW = 64  # steps after which a decode step's shapes change on CUDA for the first time
WORTH = 8  # steps that must be left for a capture, which takes as long as two or three steps without it
ROOM = 2**30  # bytes that must be free on the device; no capture of a decode step takes as many


class Decoder:
    """The completions that are still sampled, on a KV cache that grows by one token per step. On CUDA a step of new
    shapes is run once, which warms up, and then captured: from then on its hundreds of kernels are launched at once."""

    def __init__(self, model: HumanOmni, prompts: Prompts, kv: list, group_size: int, max_new_tokens: int):
        """kv: keys and values of the prompts, per layer [B, KV, P, d] twice."""
        self.model, self.group_size = model, group_size
        self.lengths = prompts.lengths.repeat_interleave(group_size)[:, None]  # [R, 1], tokens of each row's prompt
        self.rows = torch.arange(len(self.lengths), device=self.lengths.device)  # the completion in each row
        self.cache = GroupCache(kv, prompts.mask, group_size, max_new_tokens)
        self.captured = None  # the shapes of the graph's step

    def next_logits(self, last: Tensor, step: int) -> Tensor:
        """The last token of each row, [R], and the number of the step, from 1 on -> logits [R, V], which the next step
        may overwrite. A step looks at what is filled of the cache; on CUDA at the first WINDOW places, then at twice as
        many, and so on, so that its shapes stay the same for long."""
        longest = self.cache.own[0][0].shape[3]
        window = WINDOW << ((step - 1) // WINDOW).bit_length() if last.is_cuda else step
        self.cache.window = min(longest, window)
        shapes = len(last), self.cache.window
        if shapes == self.captured:
            self.last.copy_(last)
            self.graph.replay()
            return self.logits
        logits, self.captured = self.run(last), None
        if last.is_cuda and longest - step > WORTH:
            self.captured, self.last = shapes, last.clone()
            self.graph, self.logits = capture(lambda: self.run(self.last), last.device)
        return logits

    def run(self, last: Tensor) -> Tensor:
        """The step itself, on the cache's window: launches kernels and waits for nothing."""
        language = self.model.language_model
        hidden = language.decode(language.embed_tokens(last[:, None]), self.lengths + self.cache.length, self.cache)
        return linear(hidden[:, 0], self.model.head_weight)

    def drop_finished(self, done: Tensor, left: int) -> None:
        """Goes on without finished completions once that halves the rows; each prompt that goes on has equally many.
        done: bool [R], of all completions; `left`: how many are not done."""
        if 2 * left > len(self.rows):
            return
        prompts, kept = unfinished(done[self.rows].view(-1, self.group_size))
        if 2 * len(kept) <= len(self.rows):
            self.cache.keep(prompts, kept)
            self.rows, self.lengths = self.rows[kept], self.lengths[kept]
            self.group_size = len(kept) // len(prompts)


def unfinished(done: Tensor) -> tuple[Tensor, Tensor]:
    """done [B, G] -> the prompts [B'] and rows [B' * G'] to go on with, if something is left. G' is the most that a
    prompt has left; if another has fewer, finished rows fill up."""
    left = (~done).sum(1)
    prompts, group = left.nonzero()[:, 0], int(left.max())
    columns = done[prompts].int().argsort(dim=1, stable=True)[:, :group]
    return prompts, (prompts[:, None] * done.shape[1] + columns).flatten()


capture_stream = functools.cache(torch.cuda.Stream)  # one of a device: graphs share memory on the same stream alone
latest = {}  # device -> the graph that was captured last, alive for its memory, which the next one takes over


def capture(function: Callable, device: torch.device):
    """(graph, result): `function` recorded as a CUDA graph, and the tensor that each replay fills. It is not run yet.

    Graphs of a device share memory, so they take turns. Only what runs on a stream of the tensors' own `device` is
    recorded. torch.cuda.graph would empty the allocator's cache each time, which cost the next pass hundreds of
    cudaMalloc; here only if there is no room left, since none can be made during a capture."""
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
