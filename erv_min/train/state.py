"""A run's training state on disk: written whole or not at all, checksummed, the newest few kept.

FOLDER/state-STEP/ holds RANK.safetensors (with --sharding hand each process's shards, which any number of processes can
read; else one file with everything) and state.json with shapes, sizes and checksums. It is written as .state-STEP
and renamed when all of it is on the disk; only then do older ones go. `policy` is one of train/sharding.py's; every
process must call `save_state` and `load_state`.
"""

import os
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from erv_min.base.errors import CheckpointError, DataError
from erv_min.base.files import fsync_folder, read_json, write_json
from erv_min.base.processes import all_gather_object, rank_and_size
from erv_min.base.weights import write_safetensors
from erv_min.train.sharding import to_full


def saved_states(folder: str | Path) -> list[Path]:
    """The state folders of a run, newest first."""
    found = (path for path in Path(folder).glob("state-*") if path.name.removeprefix("state-").isdecimal())
    return sorted(found, key=lambda path: int(path.name.removeprefix("state-")), reverse=True)


def keep_states(newest: Path, keep: int) -> None:
    """Leaves `keep` states of a run, from `newest` back (later ones were damaged), and nothing that a kill cut off."""
    folder, states = newest.parent, saved_states(newest.parent)
    at = states.index(newest)
    for path in [*states[:at], *states[at + keep :], *folder.glob(".state-*"), *folder.glob(".*.????????")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def save_state(folder: str | Path, step: int, policy, optimizer: torch.optim.Optimizer, keep: int = 2) -> None:
    """Writes the state after `step` steps and keeps `keep` in all. Raises DiskError if there is no room: the states
    there were are left as they are."""
    folder, rank = Path(folder), rank_and_size()[0]
    place, target = folder / f".state-{step:06d}", folder / f"state-{step:06d}"
    params = policy.named_parameters()
    tensors = {f"param.{name}": p.detach() for name, p in params.items()}
    tensors |= {f"{key}.{name}": x for name, p in params.items() for key, x in optimizer.state.get(p, {}).items()}
    stream = ((key, to_full(value)) for key, value in tensors.items())
    path, written = place / f"{rank:05d}.safetensors", {}
    if policy.every_process_writes or rank == 0:
        crc = write_safetensors(path, {key: value.to("meta") for key, value in tensors.items()}, stream)
        written = {path.name: {"bytes": path.stat().st_size, "crc32": crc}}
    for _ in stream:  # what to_full() gathers needs every process
        pass
    parts = all_gather_object(written)
    if rank == 0:
        files = {name: about for part in parts for name, about in part.items()}
        write_json(place / "state.json", {"step": step, "shapes": policy.state_shapes(), "files": files})
        if target.exists():
            shutil.rmtree(target)
        os.rename(place, target)
        fsync_folder(folder)
        keep_states(target, keep)


def load_state(folder: str | Path, policy, optimizer: torch.optim.Optimizer) -> int:
    """Puts the newest state that is whole back, naming damaged ones; returns its steps, 0 if there is no state. Raises
    CheckpointError if all are damaged, or if it is of other parameters."""
    found = saved_states(folder)
    for place in found:
        damage = [x for x in all_gather_object(_damage(place)) if x]
        if not damage:
            return _read_state(place, policy, optimizer)
        if rank_and_size()[0] == 0:
            print(f"{place}: damaged ({damage[0]}); the state before it is used", flush=True)
    if found:
        raise CheckpointError(f"{found[0]}: damaged ({damage[0]}), and no state before it is whole; delete "
                              f"{folder}/state-* to start again")
    return 0


def _damage(place: Path) -> str:
    """What is wrong with a state folder, "" if nothing; each process checks its share of the files."""
    rank, size = rank_and_size()
    try:
        files = read_json(place / "state.json")["files"]
        for name in sorted(files)[rank::size]:
            crc = 0
            with open(place / Path(name).name, "rb") as f:
                while block := f.read(1 << 24):
                    crc = zlib.crc32(block, crc)
            if crc != files[name]["crc32"]:
                return f"{name!r} has changed since it was written"
    except (DataError, OSError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@torch.no_grad()
def _read_state(place: Path, policy, optimizer: torch.optim.Optimizer) -> int:
    state = read_json(place / "state.json")
    if state.get("shapes") != policy.state_shapes():
        raise CheckpointError(f"{place}: holds other parameters than this run trains; resume with the settings it was "
                              "started with")
    try:
        files = [safe_open(place / Path(name).name, "pt") for name in sorted(state["files"])]
        keys = set(files[0].keys())
        for name, p in policy.named_parameters().items():
            p.copy_(policy.read(files, f"param.{name}", name))
            if f"step.{name}" in keys:
                optimizer.state[p] = {"step": files[0].get_tensor(f"step.{name}").to(p.device)} | {
                    key: policy.read(files, f"{key}.{name}", name).to(p) for key in ("exp_avg", "exp_avg_sq")}
    except (SafetensorError, OSError, ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{place}: its tensors are not those of a state ({error}); delete it") from None
    return int(place.name.removeprefix("state-"))
