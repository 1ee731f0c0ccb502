"""Small files, written whole or not at all: write beside, fsync, rename."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

from erv_min.run.errors import DataError, DiskError


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


@contextlib.contextmanager
def disk_errors(path: str | Path, size: int):
    """Raises DiskError where what is done inside meets a full disk; `size`: bytes that `path` needs."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskError(f"{path}: the disk is full: {gigabytes(size)} are needed, "
                        f"{gigabytes(shutil.disk_usage(Path(path).parent).free)} are free. What was there before is "
                        "kept: make room, and go on with --resume") from None


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Writes `content` to `path` so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content  # half a surrogate
    with disk_errors(path, len(data)), replacing(path) as f:
        f.write(data)


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file beside `path` that takes its place when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path):
    """Reads a JSON file. Raises DataError naming the file and the place that does not parse."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file ({error})") from None


def append_jsonl(path: str | Path, value) -> None:
    """Appends one JSON object as one line; a partial last line, left by a stop, is ended first and so never glued to."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"  # half a surrogate: its escape
    with disk_errors(path, len(line)), open(path, "a+b") as f:
        if f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
            cut_partial_line(path)
        f.write(line)


def write_jsonl(path: str | Path, rows) -> None:
    """Writes one JSON object per line, whole or not at all."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def cut_partial_line(path: Path) -> None:
    """Removes what follows the last newline: the start of a row whose write was cut."""
    data = path.read_bytes()
    os.truncate(path, data.rfind(b"\n") + 1)


def read_jsonl(path: str | Path) -> list:
    """Reads one JSON object a line. A partial last line (an interrupted write) is left out; any other raises DataError."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            if number == len(lines):  # no newline at its end: the write was cut
                break
            raise DataError(f"{path}, line {number}: not a JSON object ({error})") from None
    return rows
