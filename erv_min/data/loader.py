"""Clips decoded in worker processes ahead of the model, in order; one that cannot be decoded comes as its ClipError."""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import wraps
from itertools import islice

import torch

from erv_min.run.errors import ClipError

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
