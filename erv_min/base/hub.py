"""A model's folder, from this machine or from the Hugging Face hub."""

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from erv_min.base.errors import CheckpointError
from erv_min.base.weights import LAYOUTS

TEXT_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "generation_config.json", "chat_template.jinja", "text_gate/tokenizer.json",
              "text_gate/tokenizer_config.json"]


def resolve(folder_or_repo: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """A local folder as it is; else a snapshot of the hub repository of that name, fetched or from the cache;
    `weights=False`: config and tokenizer alone. Raises CheckpointError naming repository, file and the way out."""
    name = str(folder_or_repo)
    if os.path.isdir(name):
        if revision:
            raise CheckpointError(f"{name} is a folder here, and has no revision {revision}")
        return Path(name)
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CheckpointError(f"{name}: no such folder, and not the name of a hub repository (owner/name)")
    at, option = (f"{name} at {revision}", f" --revision {revision}") if revision else (name, "")
    way = (f"Give a local folder, or with a network run 'hf download {name}{option}' and bring that folder (or the "
           "cache, HF_HOME) here")
    for layout in LAYOUTS if weights else [()]:  # a repository's .bin files if it has no safetensors
        try:
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[
                "config.json", "towers.json", *TEXT_FILES, *layout]))
        except Exception as error:  # network, permission, name, revision, disk: one message for all, with its cause
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{at}: no such folder here, and the hub repository could not be fetched "
                                  f"({type(error).__name__}: {reason}). {way}") from error
        if any(any(folder.glob(file)) for file in layout):
            break
    else:  # the hub or an offline cache has a part
        if weights:
            raise CheckpointError(f"{at}: {folder} has no {' or '.join(sum(LAYOUTS, ()))}. {way}")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{at}: {folder} has no config.json. {way}")
    return folder
