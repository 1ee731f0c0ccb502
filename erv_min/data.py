"""Examples of any mixture of data sets -> decoded clips, in order and ahead of the consumer.

`load_examples("dfew:/path,mafw:/path", split)` reads annotations (readers.py), `check_clips` leaves out and lists what
is not on the disk, `clip_loader` decodes in worker processes, `FeatureCache` keeps what the frozen towers made of a
clip. A clip that cannot be decoded comes out as its ClipError, never as another clip. Batching is the stage's own.
"""

import hashlib
import logging
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from erv_min.emotions import labels
from erv_min.errors import ClipError, DataError
from erv_min.files import atomic_write
from erv_min.readers import (Example, read_dfew, read_emer, read_mafw, read_merr, read_ravdess,  # noqa: F401
                             read_training_json)

log = logging.getLogger("erv_min")
PAPER_COUNTS = {("dfew", "train"): 9362, ("dfew", "test"): 2342, ("mafw", "train"): 7341, ("mafw", "test"): 1831,
                ("emer", "train"): 332, ("merr", "train"): 4487}  # section 4.1
SPEC = "name:/path with name one of toy, dfew, mafw, emer, merr, ravdess, json; several joined by commas"


# ---------------------------------------------------------------------------------------------------- examples

def load_examples(spec: str, split: str = "train") -> list[Example]:
    """Reads a mixture such as "dfew:/path,mafw:/path".

    split: "train" | "test" | "sft" (what SFT trains on: the world's train.json for toy, else the training split) |
    "tune" (a toy world's clips to tune settings on).
    EMER and MERR-fine have a training split alone, RAVDESS a test split alone. `json:[dataset:]/file.json[@/clips]`
    is a training JSON in the released form. Raises DataError for an unknown name or split, and for damaged files.
    """
    examples = []
    for part in re.split(r",(?=\w+:)", spec.strip()):
        name, colon, path = part.strip().partition(":")
        name = name.lower()
        if not colon or not path:
            raise DataError(f"--data {part!r}: expected {SPEC}")
        if split not in ("train", "test", "sft", "tune") or (split == "tune" and name != "toy"):
            raise DataError(f"--data {part!r}, split {split!r}: expected train, test or sft (of toy: tune)")
        if name in ("emer", "merr", "ravdess") and (split == "test") != (name == "ravdess"):
            raise DataError(f"--data {part}: {name} has no {split} split; it is "
                            + ("R1-Omni's out-of-distribution test" if name == "ravdess" else "training data alone"))
        official = "test" if split == "test" else "train"
        if name == "toy":
            if not (Path(path) / "world.json").is_file():
                raise DataError(f"{path}: no finished toy world (world.json is written last); render it again")
            found = (read_training_json(Path(path) / "train.json", path, "dfew") if split == "sft"
                     else read_dfew(path, split))
        elif name == "json":
            dataset, file, clips = re.fullmatch(r"(?:(\w+):)?(.+?)(?:@(.+))?", path).groups()
            found = read_training_json(file, clips, dataset, split)
        elif name in ("dfew", "mafw"):
            found = {"dfew": read_dfew, "mafw": read_mafw}[name](path, official)
        elif name in ("emer", "merr", "ravdess"):
            found = {"emer": read_emer, "merr": read_merr, "ravdess": read_ravdess}[name](path)
        else:
            raise DataError(f"--data {part!r}: unknown data set {name!r}; expected {SPEC}")
        if len(found) != PAPER_COUNTS.get((name, official), len(found)):
            log.warning("%s %s: %d examples, the paper has %d (section 4.1): another version, or a part of it?",
                        name, official, len(found), PAPER_COUNTS[name, official])
        examples += found
    return examples


def check_clips(examples: list[Example], allow_missing: float = 0.01,
                report: str | Path | None = None) -> list[Example]:
    """The examples whose clip is on the disk. The others are counted, logged, and listed in `report`, a clip a line.

    Raises DataError where more than the fraction `allow_missing` of the clips is missing, or all of them.
    """
    found = {path: path.is_file() for path in {example.path for example in examples}}
    missing = sorted(str(path) for path, there in found.items() if not there)
    if report and missing:
        atomic_write(report, "".join(f"{path}\n" for path in missing))
    if missing:
        text = (f"{len(missing)} of {len(found)} clips are missing ({len(missing) / len(found):.1%}), the first: "
                f"{missing[0]}" + (f"; all of them: {report}" if report else ""))
        if len(missing) > allow_missing * len(found) or len(missing) == len(found):
            raise DataError(f"{text}. Check the data root, or allow more than {allow_missing:.1%} (--allow-missing)")
        log.warning(text)
    return [example for example in examples if found[example.path]]


def check_disjoint(train: list[Example], test: list[Example]) -> None:
    """Raises DataError where a clip is in both lists (by its path, or by data set and id)."""
    keys = {key for example in train for key in (os.path.realpath(example.path), (example.dataset, example.video_id))}
    shared = [example for example in test
              if os.path.realpath(example.path) in keys or (example.dataset, example.video_id) in keys]
    if shared:
        raise DataError(f"{len(shared)} clips are in training and test data, the first: {shared[0].path}; "
                        "take the same official split for both")


def summary(examples: list[Example]) -> str:
    """One line a data set and split: clips, entries, missing clips, examples per class in the order of its list."""
    lines = []
    for dataset, split in dict.fromkeys((example.dataset, example.split) for example in examples):
        part = [example for example in examples if (example.dataset, example.split) == (dataset, split)]
        clips = {example.path for example in part}
        missing = sum(not path.is_file() for path in clips)
        count = Counter(example.label for example in part)
        classes = ", ".join(f"{label} {count[label]}" for label in labels(dataset))
        lines.append(f"{dataset} {split}: {len(clips) - missing} clips found, {missing} missing, "
                     f"{len(part)} examples ({classes})")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- decoding

def clip_loader(examples, load: Callable, workers: int = 2, prefetch: int = 4) -> Iterator[tuple]:
    """Yields (example, load(example) | ClipError) in order, decoded by `workers` processes ahead of the consumer.

    At most workers * prefetch clips are under way or waiting. A clip that breaks is tried once more and then comes out
    as its ClipError: the consumer leaves it out and lists it. A decoder that dies (a crash in a codec, out of memory)
    counts as a broken clip too: what it had taken along is decoded again, one by one. workers 0 decodes inline.
    Clips travel as bytes through a pipe, so that neither /dev/shm nor the limit of open files is in the way.
    """
    if workers == 0:
        for example in examples:
            yield example, _load_twice(load, example)
        return
    waiting: deque = deque()  # (example, future)
    pool = _pool(workers, load)
    try:
        rest = iter(examples)
        while True:
            while len(waiting) < workers * prefetch and (example := next(rest, None)) is not None:
                waiting.append((example, pool.submit(_decode, example)))
            if not waiting:
                return
            try:
                example, future = waiting[0]
                result = pickle.loads(future.result())
                waiting.popleft()
                yield example, result
            except BrokenProcessPool:  # a worker died, and the pool with it: which clip was it?
                pool.shutdown()
                suspects, waiting = waiting, deque()
                for example, future in suspects:
                    if not future.done() or future.exception() is not None:
                        yield example, _decode_alone(load, example)
                    else:
                        yield example, pickle.loads(future.result())
                pool = _pool(workers, load)
    finally:
        pool.shutdown(cancel_futures=True)


def _load_twice(load: Callable, example):
    for attempt in (1, 2):
        try:
            return load(example)
        except ClipError as error:
            failure = error
        except Exception as error:  # whatever a decoder throws is about this clip, and is named
            failure = ClipError(f"{getattr(example, 'path', example)}: {type(error).__name__}: {error}")
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
            return ClipError(f"{getattr(example, 'path', example)}: the decoder process died twice on it "
                             "(a crash in a codec, or out of memory)")


# ---------------------------------------------------------------------------------------------------- features

class FeatureCache:
    """Frozen-tower features of clips, keyed by file path, size, modification time and `key` (towers, frames, size).

    In memory up to `memory` bytes (the first clips stay: an epoch passes each once, so that evicting the oldest would
    always throw out the next one), and in `folder` as safetensors where one is given. The dtype is kept.
    """

    def __init__(self, folder: str | Path | None, key: str, memory: int = 2 << 30):
        self.folder = Path(folder) if folder else None
        self.key, self.room, self.kept = key, memory, {}

    def _name(self, example: Example) -> str | None:
        try:
            stat = example.path.stat()
        except OSError:
            return None
        text = f"{os.path.realpath(example.path)}|{stat.st_size}|{stat.st_mtime_ns}|{self.key}"
        return hashlib.sha256(text.encode()).hexdigest()

    def has(self, example: Example) -> bool:
        """Whether the clip's features are there; only `get` reads them, and may yet find them damaged."""
        name = self._name(example)
        return name in self.kept or bool(self.folder and name and self._file(name).is_file())

    def _file(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, example: Example):
        """(vision [T, N, C] | None, audio [P, C] | None) on the CPU, or None where the clip is not cached."""
        name = self._name(example)
        if name in self.kept:
            return self.kept[name]
        if not (self.folder and name and self._file(name).is_file()):
            return None
        try:
            path = self._file(name)
            tensors = load_tensors(path.read_bytes())
        except (SafetensorError, OSError) as error:
            log.warning("%s: damaged, made again (%s)", path, error)
            return None
        return self._keep(name, tensors.get("vision"), tensors.get("audio"))

    def put(self, example: Example, vision=None, audio=None) -> None:
        """Keeps the features of a clip; a file appears whole or not at all."""
        name = self._name(example)
        if name is None:
            return
        parts = {"vision": vision, "audio": audio}
        parts = {part: value.detach().cpu().contiguous() for part, value in parts.items() if value is not None}
        if self.folder:
            atomic_write(self._file(name), save_tensors(parts))
        self._keep(name, parts.get("vision"), parts.get("audio"))

    def _keep(self, name: str, vision, audio):
        size = sum(value.numel() * value.element_size() for value in (vision, audio) if value is not None)
        if name not in self.kept and size <= self.room:
            self.kept[name] = (vision, audio)
            self.room -= size
        return vision, audio
