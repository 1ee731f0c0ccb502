"""What the frozen towers made of a clip, kept on the disk or in memory: later visits neither decode nor run them."""

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
    """Frozen-tower features of clips, keyed by file path, size, modification time and `key`: in `folder` as
    safetensors, or without one in memory, up to `memory` bytes (the first clips stay: each is passed once per epoch, so
    that evicting the oldest would always throw out the next one)."""

    def __init__(self, folder: str | Path | None, key: str, memory: int = 2 << 30):
        self.folder, self.key, self.room, self.kept = Path(folder) if folder else None, key, memory, {}

    def _name(self, example: Example) -> str:
        """The clip's key, and its file's name in `folder`; "" for a clip that is not there."""
        try:
            stats = [(file.name, file.stat()) for file in frame_files(example.path) or [example.path]]
        except OSError:
            return ""
        state = [f"{file}|{stat.st_size}|{stat.st_mtime_ns}|" for file, stat in stats]
        text = f"{os.path.realpath(example.path)}|{''.join(state)}|{self.key}"
        name = hashlib.sha256(text.encode()).hexdigest()
        return f"{name[:2]}/{name}.safetensors"

    def get(self, example: Example) -> Inputs | None:
        """The clip as its features on the CPU, vision [T, N, C] and audio [P, C]; None if they are not there."""
        name = self._name(example)
        parts = self.kept.get(name)
        if self.folder and (self.folder / name).is_file():
            try:
                parts = load_tensors((self.folder / name).read_bytes())
            except (SafetensorError, OSError) as error:
                log.warning("%s: damaged, made again (%s)", self.folder / name, error)
        return parts and Inputs(example, None, (parts.get("vision"), parts.get("audio")), "silent" in parts)

    def put(self, example: Example, vision=None, audio=None, silent: bool = False) -> None:
        """Keeps a clip's features; a modality that the model is not given is None."""
        parts = {"vision": vision, "audio": audio, "silent": torch.ones(1, dtype=torch.bool) if silent else None}
        parts = {part: value.detach().cpu().contiguous() for part, value in parts.items() if value is not None}
        name, size = self._name(example), sum(value.nbytes for value in parts.values())
        if name and self.folder:
            atomic_write(self.folder / name, save_tensors(parts))
        elif name and name not in self.kept and size <= self.room:
            self.kept[name] = parts
            self.room -= size
