"""A model's folder, from this machine or from the Hugging Face hub."""

import os
import re
import sys
import time
from fnmatch import filter as matching
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import LocalEntryNotFoundError

from erv_min.base.errors import CheckpointError
from erv_min.base.weights import LAYOUTS

TEXT_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "generation_config.json", "chat_template.jinja", "text_gate/tokenizer.json",
              "text_gate/tokenizer_config.json"]
WAITS = (1, 2, 4, 8, 16)  # seconds before a file whose connection broke is asked for again


def resolve(folder_or_repo: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """A local folder as it is; else a snapshot of the hub repository of that name, fetched or from the cache;
    `weights=False`: config and tokenizer alone. Raises CheckpointError with the hub's reason and the way out."""
    name, revision = str(folder_or_repo), revision or None
    if os.path.isdir(name):
        if revision:
            raise CheckpointError(f"{name} is a folder here, and has no revision {revision}")
        return Path(name)
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CheckpointError(f"{name}: no such folder, and not the name of a hub repository (owner/name)")
    try:
        try:
            files = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings]
        except Exception:  # the hub cannot be asked: what the cache holds
            if isinstance(config := try_to_load_from_cache(name, "config.json", revision=revision), str):
                return Path(config).parent
            raise
        layouts = [[file for pattern in layout for file in matching(files, pattern)] for layout in LAYOUTS]
        chosen = next(filter(None, layouts), []) if weights else []  # .bin files if there are no safetensors
        folder = _fetch(name, "config.json", revision).parent
        for file in ["towers.json", *TEXT_FILES, *chosen]:
            if file in files:
                _fetch(name, file, revision)
        return folder
    except Exception as error:  # network, permission, name, revision, disk: the cause is in the message
        told = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        reason = " ".join(f"{type(told).__name__}: {told}".split())
        at = f"{name} --revision {revision}" if revision else name
        way = (f"Give a local folder, or with a network run 'hf download {at}' and bring that folder (or the cache, "
               "HF_HOME) here")
        if _refused(error):
            way = ("Check the name (and --revision); if it is private or asks for consent, get access on its page, and "
                   "log in with 'hf auth login' or set HF_TOKEN")
        elif "No space left" in reason or "quota exceeded" in reason:
            way = "Make room, or set HF_HOME to a folder on another disk; whole files that were fetched are kept"
        raise CheckpointError(f"{at}: no such folder here, and the hub repository could not be fetched ({reason}). "
                              f"{way}") from error


def _fetch(name: str, file: str, revision: str | None) -> Path:
    """One file, in this thread: Ctrl-C ends it at once, but not a pool of threads (the hub's `snapshot_download`)."""
    for wait in (*WAITS, None):
        try:
            return Path(hf_hub_download(name, file, revision=revision))
        except Exception as error:
            if wait is None or _refused(error) or getattr(error, "errno", None):  # by the hub, or by the disk
                raise
            print(f"{name}: {file}: {type(error).__name__}; asking again in {wait} s, whole files are kept",
                  file=sys.stderr)
            time.sleep(wait)


def _refused(error: Exception) -> bool:
    """Whether the hub answered that there is no such thing, or not for this user: asking again gives the same."""
    return getattr(getattr(error, "response", None), "status_code", 0) in (401, 403, 404)
