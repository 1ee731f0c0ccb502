"""Weight files: safetensors or torch's .bin, one file or shards, read as views of the mapped files; safetensors are
written, as a stream. So weights are never in memory twice. Left out: quantised weights, writing shards."""

import json
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from erv_min.base.errors import CheckpointError
from erv_min.base.files import replacing
from erv_min.base.progress import Progress

WEIGHTS = "model.safetensors"
# A layout: one file, or its shards. (openai/whisper-large-v3 also holds model.fp32-*.safetensors, twice the size.)
LAYOUTS = [(WEIGHTS, "model-*-of-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*-of-*.bin")]
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BUFFERS = (".position_ids", ".inv_freq")  # what older transformers stored beside weights; computed here
# What DDP, PEFT, torch.compile and FSDP put before a name, the last two also into it.
WRAPPERS = re.compile(r"^((module|base_model\.model|_orig_mod)\.)+|\b_(orig_mod|fsdp_wrapped_module)\.")


def open_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's weight files by name, on the CPU; its bytes are read from the disk when it is used.
    Buffers are left out, and the names of what wrapped the model; TensorFlow's names of a layer norm (BERT's own
    repository) become torch's."""
    tensors = {}
    for file in weight_files(folder):
        for name, tensor in _tensors(file).items():
            if name.endswith(BUFFERS):
                continue
            if tensor.dtype not in FLOATS:
                raise CheckpointError(f"{file}: tensor {name} is {tensor.dtype}, weights must be one of "
                                      f"{', '.join(FLOATS.values())}")
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            tensors[WRAPPERS.sub("", name)] = tensor
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files of the first of LAYOUTS that a folder has."""
    for single, pattern in LAYOUTS:
        if (folder / single).exists():
            return [folder / single]
        shards = sorted(x for x in folder.glob(pattern) if re.fullmatch(r"(pytorch_)?model-\d+-of-\d+", x.stem))
        if shards and len(shards) != (count := int(shards[0].stem.split("-")[-1])):
            raise CheckpointError(f"{folder}: {len(shards)} of the {count} files {pattern} are here")
        if shards:
            return shards
    raise CheckpointError(f"{folder}: no weights (neither {' nor '.join(single for single, _ in LAYOUTS)}, nor shards)")


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix != ".bin":
            return load_file(file)
        with Progress(f"{file}: opening"):
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever the opcodes of a damaged pickle come to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file}: damaged, or holds code besides tensors ({reason}); fetch it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise CheckpointError(f"{file}: holds no dictionary of tensors")
    return tensors


def fill(model: nn.Module, tensors: dict[str, Tensor], may_miss: set[str], dtype: torch.dtype,
         device: str | torch.device, where: str) -> list[str]:
    """Puts copies of `tensors` into a model on the meta device; returns which of `may_miss` were absent (now zeros).
    With `device` meta no byte is read. A tied parameter goes by its first name; tying again is the caller's. Raises
    CheckpointError with the missing, unknown and wrongly shaped tensors, or with one that is read and not finite."""
    expected = {k: p.shape for k, p in model.named_parameters()}
    absent = [k for k in expected if k not in tensors]
    problems = {"missing": [k for k in absent if k not in may_miss],
                "unknown": [k for k in tensors if k not in expected],
                "of another shape": [f"{k} {list(x.shape)}, not {list(expected[k])}" for k, x in tensors.items()
                                     if k in expected and x.shape != expected[k]]}
    told = [f"{len(names)} {kind}, such as {min(names)}" for kind, names in problems.items() if names]
    if told:
        raise CheckpointError(f"{where}: the weights do not fit the config: {'; '.join(told)}")
    filled = {k: torch.zeros(expected[k], dtype=dtype, device=device) for k in absent}
    with Progress(f"{where}: reading the weights", len(tensors), "tensor") as progress:
        for name, tensor in tensors.items():
            filled[name] = x = tensor.to(device, dtype, copy=True)
            progress.add()
            # aminmax takes a 25th of the time of isfinite on every value
            if not x.is_meta and name not in may_miss and not torch.stack(x.aminmax()).isfinite().all():
                raise CheckpointError(f"{where}: tensor {name} holds values that are not finite: its training went "
                                      "astray")
    model.load_state_dict(filled, assign=True, strict=False)  # not strict: a tied parameter's other name is left out
    return absent


def write_safetensors(path: Path, like: dict[str, Tensor], stream: Iterable[tuple[str, Tensor]] | None = None,
                      dtype: torch.dtype | None = None) -> int:
    """Writes `path` whole or not at all, one tensor at a time, in its own type or `dtype`; returns the file's CRC-32.
    With `stream` the tensors come from there, in the order of `like`, which then gives names, shapes and types alone
    (sharded models: one unit is whole at a time)."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in like.items():
        kind, start = dtype or tensor.dtype, end
        end += tensor.numel() * kind.itemsize
        header[name] = {"dtype": FLOATS[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    crc = zlib.crc32(head)
    with replacing(path, len(head) + end) as f:
        f.write(head)
        for _, tensor in stream or like.items():
            tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            crc = zlib.crc32(data, crc)
            f.write(data)
    return crc
