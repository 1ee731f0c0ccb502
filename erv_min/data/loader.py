"""Clips decoded in worker processes ahead of the model, in order; one that cannot be decoded comes as its ClipError."""

import logging
import math
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch

from erv_min.base.errors import ClipError
from erv_min.config import HumanOmniConfig
from erv_min.data.cache import FeatureCache
from erv_min.inputs import Example, Inputs
from erv_min.media import Clip, load_clip

log = logging.getLogger("erv_min")
AHEAD = 4  # clips per worker that are under way or waiting for the model


def clip_inputs(examples: list[Example], config: HumanOmniConfig, cache: FeatureCache | None, workers: int = 2,
                **how) -> Iterator[Inputs | ClipError]:
    """Yields one item for each of `examples`, decoded ahead by `workers` processes unless its features are cached.
    The log names the first clip that is heard as silence (divergence 19), and at the end says how many there were.
    `how`: media.load_clip's arguments that are not the model's dimensions."""
    load = partial(load_clip, image_size=config.vision.image_size, n_mels=config.audio.num_mel_bins,
                   n_frames=2 * config.audio.max_source_positions, **how)
    items = (cache and cache.get(example) or example.path for example in examples)
    silent = set()
    try:
        for example, x in zip(examples, clip_loader(items, load, workers)):
            if isinstance(x, Clip):
                x = Inputs(example, x, silent=x.silent)
            if isinstance(x, Inputs) and x.silent:
                if not silent:
                    log.warning("%s: no sound, heard as 10 s of silence (--silence)", example.path)
                silent.add(example.path)
            yield x
    finally:
        if len(silent) > 1:
            log.warning("%d clips without sound were heard as 10 s of silence (--silence)", len(silent))


# ---- the order of training ------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def data_order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of `count` items that epoch `epoch` reads: a function of its arguments alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def steps_per_epoch(count: int, batch_size: int) -> int:
    """An epoch is whole steps, as transformers' Trainer makes them on several processes."""
    return math.ceil(count / batch_size)


def item_at(place: int, count: int, batch_size: int, seed: int) -> int:
    """Which of `count` items stands at a place of the endless order: epoch after epoch, each in an order of its own.
    An epoch's last step is filled up with the first items of its order."""
    epoch, at = divmod(place, steps_per_epoch(count, batch_size) * batch_size)
    return data_order(count, seed, epoch)[at % count]


def batch_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Items of step `step`'s global batch: places step * batch_size and on."""
    return [item_at(place, count, batch_size, seed) for place in range(step * batch_size, (step + 1) * batch_size)]


# ---- decoding ahead --------------------------------------------------------------------------------------------------


def clip_loader(items: Iterable, load: Callable, workers: int = 2) -> Iterator:
    """Yields load(path) or its ClipError for each Path of `items`, in order, and other items as they are.

    `workers` processes decode ahead of the consumer, AHEAD clips each; 0: this process does. If one ends (crash, out of
    memory), what was under way is decoded again, clip by clip; a clip that ends a process of its own is broken. Clips
    travel as bytes through a pipe: neither /dev/shm nor the limit of open files is in the way.
    """
    if not workers:
        yield from (_load(load, item) if isinstance(item, Path) else item for item in items)
        return
    handed_in = ((item, _submit(workers, load, item) if isinstance(item, Path) else None) for item in items)
    waiting = deque(islice(handed_in, AHEAD * workers))
    try:
        while waiting:
            item, future = waiting.popleft()
            try:
                clip = pickle.loads(future.result()) if future else item
            except BrokenProcessPool:
                clip = _load_alone(load, item)
            yield clip
            waiting += islice(handed_in, 1)
    finally:
        for _, future in waiting:
            if future:
                future.cancel()


@lru_cache
def start_workers(workers: int) -> ProcessPoolExecutor:
    """The decoding processes, forked at the first call. That is before a model is loaded that will train on the CPU:
    what is forked later keeps the weights as they were then, beside those that change."""
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin, (os.getpid(),))  # forked: they never touch CUDA
    for _ in range(workers):
        pool.submit(time.sleep, 0.1)  # a process starts if no other is idle
    return pool


def _submit(workers: int, load: Callable, path: Path) -> Future:
    try:
        return start_workers(workers).submit(_load_bytes, load, path)
    except BrokenProcessPool:  # a worker ended since the last clip was handed in
        start_workers.cache_clear()
        return start_workers(workers).submit(_load_bytes, load, path)


def _begin(parent: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent is gone: no orphans

    threading.Thread(target=watch, daemon=True).start()


def _load(load: Callable, path: Path):
    try:
        return load(path)
    except Exception as error:  # whatever a decoder throws is about this clip, and is named
        return error if isinstance(error, ClipError) else ClipError(f"{path}: {type(error).__name__}: {error}")


def _load_bytes(load: Callable, path: Path) -> bytes:
    return pickle.dumps(_load(load, path), protocol=pickle.HIGHEST_PROTOCOL)


def _load_alone(load: Callable, path: Path):
    """One clip in a process of its own, whose end is this clip's error."""
    with ProcessPoolExecutor(1, get_context("fork"), _begin, (os.getpid(),)) as pool:
        try:
            return pickle.loads(pool.submit(_load_bytes, load, path).result())
        except BrokenProcessPool:
            return ClipError(f"{path}: the decoder process died twice on it (a crash in a codec, or out of memory)")
