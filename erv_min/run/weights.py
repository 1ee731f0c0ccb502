"""Weight files: names and shapes first, tensors one at a time, so that weights are never in memory twice.

Reads safetensors and torch's .bin, single or sharded, fills a model that was built on the meta device, and writes
safetensors as a stream. What the tensors mean is checkpoint.py's business. Left out: quantised weights, sharded saving.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from erv_min.run.errors import CheckpointError
from erv_min.run.files import disk_errors, read_object, replacing

# Exact names: openai/whisper-large-v3 also holds model.fp32-*.safetensors, twice the size.
SAFE_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
BIN_FILES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BUFFERS = (".position_ids", ".inv_freq")  # what older transformers stored beside weights; computed here


@dataclass
class Stored:
    """A tensor in a file: its shape and type (a FLOATS key or value, or unfit) are known, `read()` fetches it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


def open_weights(folder: Path) -> dict[str, Stored]:
    """Name -> Stored for every tensor of a folder's weight files, whichever of the four layouts it has.

    Buffers are left out; TensorFlow's names of a layer norm (BERT's own repository) become torch's. Raises
    CheckpointError naming the file that is missing, damaged, holds code, or a tensor that is not floating point.
    """
    stored = {}
    for file in _weight_files(folder):
        for name, entry in (_open_bin if file.suffix == ".bin" else _open_safetensors)(file).items():
            if name.endswith(BUFFERS):
                continue
            if entry.dtype not in (*FLOATS, *FLOATS.values()):
                raise CheckpointError(f"{file}: tensor {name} is {entry.dtype}, weights must be one of "
                                      f"{', '.join(FLOATS.values())}")
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            stored[name] = entry
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """The files of the layout that a folder has, its index checked; what a shard lacks is found by `fill`."""
    for single, index, _ in (SAFE_FILES, BIN_FILES):
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).exists():
            shards = read_object(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(file, str) and Path(file).name == file
                                                       and len(file) < 250 for file in shards.values()):
                raise CheckpointError(f"{folder / index}: field 'weight_map' must map tensor names to files of this "
                                      "folder")
            files = [folder / file for file in sorted(set(shards.values()))]
            if absent := [file.name for file in files if not file.exists()]:
                raise CheckpointError(f"{folder}: {len(absent)} shards are missing: {', '.join(absent[:4])}")
            return files
    raise CheckpointError(f"{folder}: no weights (none of {', '.join(SAFE_FILES[:2] + BIN_FILES[:2])})")


def _open_safetensors(file: Path) -> dict[str, Stored]:
    try:
        handle = safe_open(file, "pt")
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # shape and type alone
        return {name: Stored(file, tuple(part.get_shape()), part.get_dtype(), partial(handle.get_tensor, name))
                for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file ({error}); fetch it again") from None


def _open_bin(file: Path) -> dict[str, Stored]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever the opcodes of a damaged pickle come to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file}: damaged, or holds code beside tensors, which is refused ({reason})") from None
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{file}: expected a dictionary of tensors, found {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file}: entry {name!r} is no tensor ({type(tensor).__name__})")
    return {name: Stored(file, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


def by_part(names: Iterable[str], parts: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Tensor names under the part whose prefixes (`parts`: table 8's PARTS) fit, else the first two components."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        part = next((k for k, prefixes in parts.items() if name.startswith(prefixes)), ".".join(name.split(".")[:2]))
        grouped.setdefault(part, []).append(name)
    return grouped


def fill(model: nn.Module, stored: dict[str, Stored], may_miss: set[str], dtype: torch.dtype,
         device: str | torch.device, parts: dict[str, tuple[str, ...]], where: str | Path) -> list[str]:
    """Puts `stored` into a model on the meta device; returns the names of `may_miss` that were absent (now zeros).

    With `device` meta nothing is read: the model keeps shapes alone. A tied parameter goes by its first name; tying
    again is the caller's. Raises CheckpointError with the missing, unknown and wrongly shaped tensors counted by part.
    """
    expected = {k: tuple(p.shape) for k, p in model.named_parameters()}
    absent = [k for k in expected if k not in stored]
    problems = {"missing": [k for k in absent if k not in may_miss],
                "unknown": [k for k in stored if k not in expected],
                "of another shape": [k for k in stored if k in expected and stored[k].shape != expected[k]]}
    lines = [f"{where}: the weights do not fit the config"]
    for kind, names in problems.items():
        for part, (first, *more) in by_part(names, parts).items():
            shapes = f" {list(stored[first].shape)}, not {list(expected[first])}" if kind == "of another shape" else ""
            lines.append(f"  {kind}: {1 + len(more)} in {part}, such as {first}{shapes}")
    if len(lines) > 1:
        raise CheckpointError("\n".join(lines))
    unread = expected if torch.device(device).type == "meta" else absent
    filled = {k: torch.zeros(expected[k], dtype=dtype, device=device) for k in unread}
    for name in [k for k in stored if k not in filled]:
        try:
            tensor = stored[name].read()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{stored[name].file}: tensor {name} cannot be read ({error})") from None
        moved = tensor.to(device, dtype)
        filled[name] = moved.clone() if moved is tensor else moved  # a clone: not a view of the mapped file
    model.load_state_dict(filled, assign=True, strict=False)  # not strict: a tied parameter's other name is left out
    return absent


def write_safetensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None,
                      stream: Iterable[tuple[str, Tensor]] | None = None) -> int:
    """Writes `path` whole or not at all, one tensor at a time: no second copy of the model exists, on GPU or CPU.

    `dtype` None keeps each tensor's own. With `stream`, that is where the tensors come from, in the order of `tensors`,
    which then gives names, shapes and types alone (sharded models: one unit is whole at a time). Returns the CRC-32 of
    the file. Raises DiskError where there is no room.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        size = tensor.numel() * kind.itemsize
        header[name] = {"dtype": FLOATS[kind], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    crc = zlib.crc32(head)
    with disk_errors(path, len(head) + offset), replacing(path) as f:
        f.write(head)
        for name, (got, tensor) in zip(tensors, stream or tensors.items()):
            if got != name:
                raise CheckpointError(f"{path}: tensor {got} comes where {name} was announced")
            tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            crc = zlib.crc32(data, crc)
            f.write(data)
    return crc
