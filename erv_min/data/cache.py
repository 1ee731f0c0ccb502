"""What the frozen towers made of a clip, kept on the disk: later visits neither decode nor run them."""

import hashlib
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from erv_min.base.decode import frame_files
from erv_min.base.files import atomic_write
from erv_min.inputs import Example, Inputs

log = logging.getLogger("erv_min")
FEATURES = 2  # part of the key; to be raised if decoding or the towers' arithmetic makes others of the same clip


class FeatureCache:
    """Frozen-tower features of clips as safetensors in `folder`, keyed by file path, size, modification time, `key`."""

    def __init__(self, folder: str | Path, key: str):
        self.folder, self.key = Path(folder), key

    def _file(self, example: Example) -> Path | None:
        """The file of a clip's features; None for a clip that is not there."""
        try:
            stats = [(file.name, file.stat()) for file in frame_files(example.path) or [example.path]]
        except OSError:
            return None
        state = [f"{file}|{stat.st_size}|{stat.st_mtime_ns}|" for file, stat in stats]
        text = f"{os.path.realpath(example.path)}|{''.join(state)}|{self.key}"
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, example: Example) -> Inputs | None:
        """The clip as its features on the CPU, vision [T, N, C] and audio [P, C]; None if they are not there."""
        file = self._file(example)
        if not file or not file.is_file():
            return None
        try:
            parts = load_tensors(file.read_bytes())
        except (SafetensorError, OSError) as error:
            log.warning("%s: damaged, made again (%s)", file, error)
            return None
        return Inputs(example, None, (parts.get("vision"), parts.get("audio")), "silent" in parts)

    def put(self, example: Example, vision=None, audio=None, silent: bool = False) -> None:
        """Keeps a clip's features; a modality that the model is not given is None."""
        parts = {"vision": vision, "audio": audio, "silent": torch.ones(1, dtype=torch.bool) if silent else None}
        parts = {part: value.detach().cpu().contiguous() for part, value in parts.items() if value is not None}
        if file := self._file(example):
            atomic_write(file, save_tensors(parts))
