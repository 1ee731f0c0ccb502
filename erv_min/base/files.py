"""Small files, written whole or not at all (write beside, fsync, rename), and read with errors that name them."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from erv_min.base.errors import CheckpointError, DataError, DiskError


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


@contextlib.contextmanager
def disk_errors(path: str | Path, size: int):
    """Raises DiskError if what is done inside meets a full disk; `size`: bytes that `path` needs."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskError(f"{path}: the disk is full: {gigabytes(size)} are needed, "
                        f"{gigabytes(shutil.disk_usage(Path(path).parent).free)} are free. What was there before is "
                        "kept: make room, and go on with --resume") from None


@contextlib.contextmanager
def replacing(path: Path, size: int):
    """A binary file beside `path` that takes its place when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path, size), tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            yield f
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Writes `content` to `path` so that a reader sees the old file or the new one, never a part."""
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content  # half a surrogate
    with replacing(Path(path), len(data)) as f:
        f.write(data)


def write_json(path: str | Path, value) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable) -> None:
    """Writes one JSON value per line, whole or not at all."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: str | Path, value) -> None:
    """Appends one JSON value as a line; a partial last line, left by a stop, is removed first."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode(errors="backslashreplace")  # as in atomic_write
    with disk_errors(path, len(line)), open(path, "a+b") as f:
        if f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)
        f.write(line)


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def read_text(path: str | Path, *other_encodings: str) -> str:
    """The file's text, UTF-8 or the first of `other_encodings` that fits; a byte-order mark is dropped."""
    data = _bytes(path)
    for encoding in ("utf-8-sig", *other_encodings):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            failure = error
    raise DataError(f"{path}: not UTF-8 text (byte {failure.start}); save it as UTF-8")


def _parsed(text: bytes, kind: type, refusal: str, pairs: Callable[[list], dict] | None = None):
    try:
        value = json.loads(text, object_pairs_hook=pairs)
        if not isinstance(value, kind):
            raise ValueError(f"expected a {kind.__name__}, found a {type(value).__name__}")
        return value
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of too many digits, nested too deep
        raise DataError(f"{refusal} ({error})") from None


def _once(pairs: list) -> dict:
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def read_json(path: str | Path, kind: type = object, once: bool = False):
    """Reads a JSON file whose value is a `kind`; `once`: two equal keys, of which json.load keeps the last, are an
    error. Raises DataError naming the file and the place that does not parse."""
    return _parsed(_bytes(path), kind, f"{path}: not a JSON file", _once if once else None)


def read_object(path: str | Path) -> dict:
    """Reads a model folder's JSON file, which holds an object. Raises CheckpointError naming the file."""
    try:
        return read_json(path, dict)
    except DataError as error:
        raise CheckpointError(f"{error}; fetch it again") from None


def read_jsonl(path: str | Path, log: bool = False) -> list[dict]:
    """Reads one JSON object per line. Raises DataError naming the line. `log`: a file of append_jsonl, in which what
    follows the last newline was cut by a stop: it is left out here, and removed there."""
    lines = _bytes(path).split(b"\n")
    return [_parsed(line, dict, f"{path}, line {number}: not a JSON object, or cut off")
            for number, line in enumerate(lines[:-1] if log else lines, 1) if line.strip()]
