"""What the frozen towers made of a clip, kept in memory and on the disk, so that later visits neither decode nor run them."""

import hashlib
import logging
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from erv_min.data.readers import Example
from erv_min.run.files import atomic_write

log = logging.getLogger("erv_min")


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
