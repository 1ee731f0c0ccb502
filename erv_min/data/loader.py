"""Clips decoded in worker processes ahead of the model, in order; one that cannot be decoded comes as its ClipError.

    examples -> clip_inputs (workers, or the feature cache) -> Inputs
    places of the order of training -> training_inputs -> Inputs, as many for every process, whatever breaks
"""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from itertools import islice

import torch

from erv_min.base.errors import ClipError
from erv_min.config import HumanOmniConfig
from erv_min.data.cache import FeatureCache
from erv_min.inputs import Example, Inputs
from erv_min.media import Clip, load_clip

log = logging.getLogger("erv_min")


def clip_loader(examples, load: Callable, workers: int = 2, prefetch: int = 4) -> Iterator[tuple]:
    """Yields (example, load(example) | ClipError) in order, decoded by `workers` processes ahead of the consumer.

    At most workers * prefetch clips are under way or waiting. A clip that breaks is tried once more and then comes out
    as its ClipError: the consumer lists it and leaves it out or replaces it. A worker that ends (crash, out of memory)
    counts as a broken clip too: the other clips that it held are decoded again, one by one. workers 0 decodes inline.
    Clips travel as bytes through a pipe, so that neither /dev/shm nor the limit of open files is in the way.
    """
    if workers == 0:
        yield from ((example, _load_twice(load, example)) for example in examples)
        return
    rest, waiting, pool = iter(examples), deque(), _pool(workers, load)  # waiting: (example, future)
    try:
        while True:
            for example in islice(rest, workers * prefetch - len(waiting)):
                try:
                    future = pool.submit(_decode, example)
                except BrokenProcessPool:  # a worker ended since the last clip was handed in
                    pool = _pool(workers, load)
                    future = pool.submit(_decode, example)
                waiting.append((example, future))
            if not waiting:
                return
            example, future = waiting.popleft()
            try:
                result = pickle.loads(future.result())
            except BrokenProcessPool:  # by this clip or by another one that was under way
                result = _decode_alone(load, example)
            yield example, result
    finally:
        pool.shutdown(cancel_futures=True)


def counts_silent(stream: Callable) -> Callable:
    """Decorates a function that yields clips: their log says at the first clip without sound that it is heard as
    silence (`silent`, divergence 19), and at the end how many there were."""
    @wraps(stream)
    def counted(*args, **kwargs):
        silent = set()
        try:
            for x in stream(*args, **kwargs):
                if getattr(x, "silent", False):
                    if not silent:
                        log.warning("%s: no sound, heard as 10 s of silence (--silence)", x.example.path)
                    silent.add(x.example.path)
                yield x
        finally:
            if len(silent) > 1:
                log.warning("%d clips without sound were heard as 10 s of silence (--silence)", len(silent))
    return counted


@dataclass
class Job:
    """A visit of an example, for the decoding workers: nothing to decode where its features are cached."""

    example: Example
    cached: bool

    @property
    def path(self):
        return self.example.path


def load_job(job: Job, **how) -> Clip | None:
    """Decodes one clip, as media.load_clip; runs in the worker processes. Frames go through the pipe, which is slower
    than decoding, as the 8-bit values that they are made of."""
    clip = None if job.cached else load_clip(job.path, **how)
    if clip and clip.video is not None:
        clip.video = ((clip.video + 1) * 127.5).round().to(torch.uint8)
    return clip


@counts_silent
def clip_inputs(order: Iterable[Example], config: HumanOmniConfig, cache: FeatureCache | None, workers: int = 2,
                **how) -> Iterator[Inputs | ClipError]:
    """Yields one item for each example of `order`, decoded ahead by `workers` processes unless its features are cached.

    A clip that cannot be decoded comes as its ClipError, never as another clip. `how`: media.load_clip's arguments that
    are not the model's dimensions.
    """
    load = partial(load_job, image_size=config.vision.image_size, n_mels=config.audio.num_mel_bins,
                   n_frames=2 * config.audio.max_source_positions, **how)
    jobs = (Job(example, cache is not None and cache.has(example)) for example in order)
    for job, clip in clip_loader(jobs, load, workers=workers):
        if job.cached and (features := cache.get(job.example)) is not None:
            yield Inputs(job.example, None, features[:2], features[2])
            continue
        if job.cached:  # damaged in the cache: made again
            ((_, clip),) = clip_loader([Job(job.example, False)], load, workers=0)
        if isinstance(clip, ClipError):
            yield clip
            continue
        if clip.video is not None:
            clip.video = (clip.video.float() / 255 - 0.5) / 0.5  # as media.pixel_values, to the last bit
        yield Inputs(job.example, clip, silent=clip.silent)


def training_inputs(places: Iterable[int], example_at: Callable[[int], Example], count: int,
                    on_error: Callable[[int, ClipError], None], **how) -> Iterator[tuple[int, Inputs]]:
    """(place, Inputs) for each of `places` in the order of training: every process has equal work, whatever breaks.

    `example_at(place)` is the example at a place of the endless order. Where its clip cannot be decoded, `on_error` is
    told, and the next of the order stands in its place: the place that comes out is the one whose example it is. Raises
    ClipError where none of the `count` examples can be decoded. `how`: `clip_inputs`' other arguments.
    """
    places = list(places)
    for place, x in zip(places, clip_inputs(map(example_at, places), **how)):
        taken = place
        while isinstance(x, ClipError):
            on_error(place, x)
            if (taken := taken + 1) - place == 2 * count:  # among so many places stands every example
                raise ClipError(f"none of the {count} clips could be decoded, the last: {x}")
            (x,) = clip_inputs([example_at(taken)], **{**how, "workers": 0})
        yield taken, x


# ---- the order of training -----------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def data_order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of `count` items that epoch `epoch` reads: a function of its arguments alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def item_at(place: int, count: int, seed: int) -> int:
    """Which of `count` items stands at a place of the endless order: epoch after epoch, each in an order of its own."""
    return data_order(count, seed, place // count)[place % count]


def batch_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Items of step `step`'s global batch: places step * batch_size and on, so that no item is dropped."""
    return [item_at(place, count, seed) for place in range(step * batch_size, (step + 1) * batch_size)]


# ---- in the worker processes ------------------------------------------------------------------------------------------


def _load_twice(load: Callable, example):
    for attempt in (1, 2):
        try:
            return load(example)
        except Exception as error:  # whatever a decoder throws is about this clip, and is named
            named = isinstance(error, ClipError)
            failure = error if named else ClipError(f"{example.path}: {type(error).__name__}: {error}")
    return failure


def _pool(workers: int, load: Callable) -> ProcessPoolExecutor:
    # Forked where there is fork: workers start at once and `load` may be a closure; they never touch CUDA.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, (load, os.getpid()))


def _start_worker(load: Callable, parent: int) -> None:
    global _load
    _load = load
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent is gone: no orphans

    threading.Thread(target=watch, daemon=True).start()


def _decode(example) -> bytes:
    return pickle.dumps(_load_twice(_load, example), protocol=pickle.HIGHEST_PROTOCOL)


def _decode_alone(load: Callable, example):
    """One clip in a process of its own, whose death is this clip's error."""
    with _pool(1, load) as pool:
        try:
            return pickle.loads(pool.submit(_decode, example).result())
        except BrokenProcessPool:
            return ClipError(f"{example.path}: the decoder process died twice on it "
                             "(a crash in a codec, or out of memory)")
