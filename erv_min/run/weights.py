"""Weight files: names and shapes first, tensors one at a time, so that weights are never in memory twice.

Reads safetensors and torch's .bin, single or sharded, fills a model that was built on the meta device, and writes
safetensors as a stream. What the tensors mean is checkpoint.py's business. Left out: quantised weights, sharded saving.
"""

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from erv_min.run.errors import CheckpointError, DataError
from erv_min.run.files import disk_errors, read_json, replacing

# Exact names: openai/whisper-large-v3 also holds model.fp32-*.safetensors, twice the size.
SAFE_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
BIN_FILES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BUFFERS = (".position_ids", ".inv_freq")  # what older transformers stored beside weights; computed here


def read_object(path: Path) -> dict:
    """A JSON file that holds an object. Raises CheckpointError naming the file."""
    try:
        value = read_json(path)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@dataclass
class Stored:
    """A tensor in a file: its shape is known, `read()` fetches it."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def open_weights(folder: Path) -> dict[str, Stored]:
    """Name -> Stored for every tensor of a folder's weight files, whichever of the four layouts it has.

    Raises CheckpointError naming the file that is missing, damaged, holds code, or a tensor that is not floating point.
    """
    for names, opener in ((SAFE_FILES, _open_safetensors), (BIN_FILES, _open_bin)):
        if (folder / names[0]).exists():
            return opener(folder / names[0])
        if (index := folder / names[1]).exists():
            shards = read_object(index).get("weight_map")
            inside = isinstance(shards, dict) and all(isinstance(s, str) and Path(s).name == s and len(s) < 250
                                                      for s in shards.values())
            if not inside:
                raise CheckpointError(f"{index}: field 'weight_map' must map tensor names to files of this folder")
            if absent := sorted({s for s in shards.values() if not (folder / s).exists()}):
                raise CheckpointError(f"{folder}: {len(absent)} shards are missing: {', '.join(absent[:4])}")
            stored = {}
            for shard in sorted(set(shards.values())):
                stored |= opener(folder / shard)
            if absent := sorted(set(shards) - set(stored)):
                raise CheckpointError(f"{index}: no shard holds {len(absent)} of its tensors, such as {absent[0]}")
            return stored
    raise CheckpointError(f"{folder}: no weights (none of {', '.join(SAFE_FILES[:2] + BIN_FILES[:2])})")


def _open_safetensors(file: Path) -> dict[str, Stored]:
    try:
        handle = safe_open(file, "pt")
        stored = {}
        for name in handle.keys():
            part = handle.get_slice(name)
            if part.get_dtype() not in FLOATS.values():
                raise CheckpointError(f"{file}: tensor {name} is {part.get_dtype()}, weights must be one of "
                                      f"{', '.join(FLOATS.values())}")
            stored[name] = Stored(file, tuple(part.get_shape()), lambda name=name: handle.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file ({error}); fetch it again") from None
    return _without_buffers(stored)


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
        if tensor.dtype not in FLOATS and not name.endswith(BUFFERS):
            raise CheckpointError(f"{file}: tensor {name} is {tensor.dtype}, weights must be floating point")
    return _without_buffers({k: Stored(file, tuple(t.shape), lambda t=t: t) for k, t in tensors.items()})


def _without_buffers(stored: dict[str, Stored]) -> dict[str, Stored]:
    """Drops computed buffers; TensorFlow's names of a layer norm (BERT's own repository) become torch's."""
    named = {k: v for k, v in stored.items() if not k.endswith(BUFFERS)}
    return {k.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): v
            for k, v in named.items()}


def fill(model: nn.Module, stored: dict[str, Stored], may_miss: set[str], dtype: torch.dtype, device,
         part_of: Callable[[str], str], where: str | Path) -> list[str]:
    """Puts `stored` into a model on the meta device; returns the names of `may_miss` that were absent (now zeros).

    A tied parameter goes by its first name; tying again is the caller's. Raises CheckpointError listing missing,
    unknown and wrongly shaped tensors with counts by part (`part_of` a name).
    """
    expected = {k: tuple(p.shape) for k, p in model.named_parameters()}
    absent = [k for k in expected if k not in stored]
    problems = {"missing": [k for k in absent if k not in may_miss],
                "unknown": [k for k in stored if k not in expected],
                "of another shape": [k for k in stored if k in expected and stored[k].shape != expected[k]]}
    lines = []
    for kind, names in problems.items():
        for part, count in Counter(map(part_of, names)).items():
            first = next(n for n in names if part_of(n) == part)
            shapes = f" {list(stored[first].shape)}, not {list(expected[first])}" if kind == "of another shape" else ""
            lines.append(f"  {kind}: {count} in {part}, such as {first}{shapes}")
    if lines:
        raise CheckpointError("\n".join([f"{where}: the weights do not fit the config", *lines]))
    filled = {}
    for name, entry in stored.items():
        try:
            tensor = entry.read()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{entry.file}: tensor {name} cannot be read ({error})") from None
        moved = tensor.to(device, dtype)
        filled[name] = moved.clone() if moved is tensor else moved  # a clone: not a view of the mapped file
    filled |= {k: torch.zeros(expected[k], dtype=dtype, device=device) for k in absent}
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
