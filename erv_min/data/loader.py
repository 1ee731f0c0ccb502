"""Clips decoded in worker processes ahead of the model, in order; one that cannot be decoded comes as its ClipError.

    examples -> clip_inputs (workers, or the feature cache) -> Inputs
    places of the order of training -> training_inputs -> Inputs, as many for every process, whatever breaks
"""

import logging
import math
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
from functools import lru_cache, partial
from itertools import islice, tee
from pathlib import Path

import torch

from erv_min.base.errors import ClipError
from erv_min.config import HumanOmniConfig
from erv_min.data.cache import FeatureCache
from erv_min.inputs import Example, Inputs
from erv_min.media import load_clip

log = logging.getLogger("erv_min")


def clip_inputs(order: Iterable[Example], config: HumanOmniConfig, cache: FeatureCache | None, workers: int = 2,
                **how) -> Iterator[Inputs | ClipError]:
    """Yields one item for each example of `order`, decoded ahead by `workers` processes unless its features are cached.

    A clip that cannot be decoded comes as its ClipError, never as another clip. The log names the first clip without
    sound, which is heard as silence (divergence 19), and at the end says how many there were. `how`: media.load_clip's
    arguments that are not the model's dimensions.
    """
    load = partial(load_clip, image_size=config.vision.image_size, n_mels=config.audio.num_mel_bins,
                   n_frames=2 * config.audio.max_source_positions, **how)
    order, ahead = tee(order)
    paths = (None if cache is not None and cache.has(example) else example.path for example in ahead)
    silent = set()
    try:
        for example, clip in zip(order, clip_loader(paths, load, workers)):
            x = cache.get(example) if clip is None else None
            if x is None:
                if clip is None:  # damaged in the cache: decoded after all
                    (clip,) = clip_loader([example.path], load, workers=0)
                x = clip if isinstance(clip, ClipError) else Inputs(example, clip, silent=clip.silent)
            if isinstance(x, Inputs) and x.silent:
                if not silent:
                    log.warning("%s: no sound, heard as 10 s of silence (--silence)", example.path)
                silent.add(example.path)
            yield x
    finally:
        if len(silent) > 1:
            log.warning("%d clips without sound were heard as 10 s of silence (--silence)", len(silent))


def training_inputs(places: Iterable[int], example_at: Callable[[int], Example], count: int,
                    on_error: Callable[[int, ClipError], None], **how) -> Iterator[tuple[int, Inputs]]:
    """(place, Inputs) for each of `places` in the order of training: every process has equal work, whatever breaks.

    `example_at(place)` is the example at a place of the endless order. If its clip cannot be decoded, `on_error` is
    told, and the next of the order stands in its place: the place that comes out is the one whose example it is. Raises
    ClipError if none of the `count` examples can be decoded. `how`: `clip_inputs`' other arguments.
    """
    places = list(places)
    for place, x in zip(places, clip_inputs(map(example_at, places), **how)):
        taken = place
        while isinstance(x, ClipError):
            on_error(place, x)
            taken += 1
            if taken == place + 2 * count:  # among so many places stands every example
                raise ClipError(f"none of the {count} clips could be decoded, the last: {x}")
            (x,) = clip_inputs([example_at(taken)], **how | {"workers": 0})
        yield taken, x


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


def clip_loader(paths: Iterable[Path | None], load: Callable, workers: int = 2, prefetch: int = 4) -> Iterator:
    """Yields load(path) or its ClipError for each path, in order, decoded by `workers` processes ahead of the consumer.

    None comes out as None. At most workers * prefetch clips are under way or waiting; workers 0 decodes in this one.
    A clip that breaks is tried once more. A worker that ends (crash, out of memory) counts as a broken clip, too: the
    other clips that it held are decoded again, one by one. Clips travel as bytes through a pipe, so that neither
    /dev/shm nor the limit of open files is in the way.
    """
    if workers == 0:
        for path in paths:
            yield _load_twice(load, path)
        return
    paths, waiting = iter(paths), deque()  # waiting: (path, future)
    try:
        while True:
            for path in islice(paths, workers * prefetch - len(waiting)):
                waiting.append((path, _submit(workers, load, path)))
            if not waiting:
                return
            path, future = waiting.popleft()
            try:
                clip = pickle.loads(future.result())
            except BrokenProcessPool:  # by this clip or by another one that was under way
                clip = _decode_alone(load, path)
            yield clip
    finally:
        for _, future in waiting:
            future.cancel()


_pools: dict[tuple[int, int], ProcessPoolExecutor] = {}  # by process and number of workers; they live as long as it


def start_workers(workers: int) -> ProcessPoolExecutor | None:
    """Forks the decoding processes, if they do not run yet. Called before a model is loaded that will train on the CPU:
    what is forked later keeps the weights as they were then, beside those that change."""
    if workers and (os.getpid(), workers) not in _pools:
        pool = _pools[os.getpid(), workers] = _pool(workers)
        for _ in range(workers):
            pool.submit(time.sleep, 0.1)  # a process starts if no other is idle
    return _pools.get((os.getpid(), workers))


def _submit(workers: int, load: Callable, path: Path | None):
    try:
        return start_workers(workers).submit(_decode, load, path)
    except BrokenProcessPool:  # a worker ended since the last clip was handed in
        del _pools[os.getpid(), workers]
        return start_workers(workers).submit(_decode, load, path)


def _load_twice(load: Callable, path: Path | None):
    if path is None:
        return None
    for attempt in (1, 2):
        try:
            return load(path)
        except ClipError as error:
            failure = error
        except Exception as error:  # whatever a decoder throws is about this clip, and is named
            failure = ClipError(f"{path}: {type(error).__name__}: {error}")
    return failure


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forked if there is fork: workers start at once, and never touch CUDA.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, (os.getpid(),))


def _start_worker(parent: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent is gone: no orphans

    threading.Thread(target=watch, daemon=True).start()


def _decode(load: Callable, path: Path | None) -> bytes:
    return pickle.dumps(_load_twice(load, path), protocol=pickle.HIGHEST_PROTOCOL)


def _decode_alone(load: Callable, path: Path):
    """One clip in a process of its own, whose death is this clip's error."""
    with _pool(1) as pool:
        try:
            return pickle.loads(pool.submit(_decode, load, path).result())
        except BrokenProcessPool:
            return ClipError(f"{path}: the decoder process died twice on it (a crash in a codec, or out of memory)")
