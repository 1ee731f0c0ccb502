"""A run's training state on disk: written whole or not at all, checksummed, the newest few kept.

FOLDER/state-STEP/ holds RANK.safetensors (with --sharding hand each process's shards, which any number of processes can
read; else one file with everything) and state.json with shapes, sizes and checksums. It is written as .state-STEP
and renamed when all of it is on the disk; only then do older ones go. Several machines need FOLDER on a shared disk.
`policy` is one of train/sharding.py's; every process must call these functions.
"""

import contextlib
import os
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from erv_min.base.errors import CheckpointError, DataError, DiskError
from erv_min.base.files import fsync_folder, read_json, write_json
from erv_min.base.processes import all_gather_object, rank_and_size
from erv_min.base.weights import write_safetensors


def saved_states(folder: str | Path) -> list[Path]:
    """The state folders of a run, newest first."""
    found = (path for path in Path(folder).glob("state-*") if path.name.removeprefix("state-").isdecimal())
    return sorted(found, key=lambda path: int(path.name.removeprefix("state-")), reverse=True)


def save_state(folder: str | Path, step: int, policy, optimizer: torch.optim.Optimizer, keep: int = 2) -> None:
    """Writes the state after `step` steps and keeps `keep` in all. Raises DiskError on every process if one has no
    room: the states there were are left as they are."""
    folder, rank = Path(folder), rank_and_size()[0]
    place, target = folder / f".state-{step:06d}", folder / f"state-{step:06d}"
    params = policy.named_parameters()
    tensors = {f"param.{name}": p.detach() for name, p in params.items()}
    tensors |= {f"{key}.{name}": x for name, p in params.items() for key, x in optimizer.state.get(p, {}).items()}
    stream = ((key, policy.to_full(value)) for key, value in tensors.items())
    written, problem = {}, ""
    try:
        if policy.every_process_writes or rank == 0:
            path = place / f"{rank:05d}.safetensors"
            crc = write_safetensors(path, {key: value.to("meta") for key, value in tensors.items()}, stream)
            written = {path.name: {"bytes": path.stat().st_size, "crc32": crc}}
    except DiskError as error:
        problem = str(error)
    for _ in stream:  # what to_full() gathers needs every process, also if writing failed
        pass
    parts = all_gather_object((written, problem))
    if problem := next((p for _, p in parts if p), ""):
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)
        raise DiskError(f"the state after step {step} could not be written: {problem}")
    if rank == 0:
        files = {name: about for part, _ in parts for name, about in part.items()}
        write_json(place / "state.json", {"step": step, "shapes": policy.state_shapes(), "files": files})
        if target.exists():
            shutil.rmtree(target)
        os.rename(place, target)
        fsync_folder(folder)
        states = saved_states(folder)
        at = states.index(target)
        for old in states[:at] + states[at + keep :]:  # a later one was damaged: the run went on from one before it
            shutil.rmtree(old)


def load_state(folder: str | Path, policy, optimizer: torch.optim.Optimizer) -> int:
    """Puts the newest state that is whole back, naming damaged ones; returns its steps, 0 if there is no state.

    Raises CheckpointError if there are only damaged ones, or if it is of other parameters."""
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
        state = read_json(place / "state.json")
        if not isinstance(state["step"], int) or not state["files"]:
            return "state.json names no step or no file"
        for name, file in sorted(state["files"].items())[rank::size]:
            path, crc = place / Path(name).name, 0
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                return f"{name!r} is {'cut' if path.is_file() else 'missing'}"
            with open(path, "rb") as f:
                while block := f.read(1 << 24):
                    crc = zlib.crc32(block, crc)
            if crc != file["crc32"]:
                return f"{name!r} has changed since it was written"
    except (DataError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"state.json: {type(error).__name__} {error}"
    return ""


def _read_state(place: Path, policy, optimizer: torch.optim.Optimizer) -> int:
    state, shapes = read_json(place / "state.json"), policy.state_shapes()
    if state.get("shapes") != shapes:
        there = state["shapes"] if isinstance(state.get("shapes"), dict) else {}
        different = sorted(k for k in there.keys() | shapes.keys() if there.get(k) != shapes.get(k))
        raise CheckpointError(f"{place}: holds other parameters than this run trains, e.g. {different[:3]}; "
                              "resume with the settings it was started with")
    try:
        with contextlib.ExitStack() as stack, torch.no_grad():
            files = [stack.enter_context(safe_open(place / Path(name).name, "pt")) for name in sorted(state["files"])]
            keys = set(files[0].keys())
            for name, p in policy.named_parameters().items():
                p.copy_(policy.read(files, f"param.{name}", name))
                if f"step.{name}" in keys:
                    optimizer.state[p] = {"step": files[0].get_tensor(f"step.{name}").to(p.device)} | {
                        key: policy.read(files, f"{key}.{name}", name).to(p) for key in ("exp_avg", "exp_avg_sq")}
    except (SafetensorError, OSError, ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{place}: its tensors are not those of a state ({error}); delete it") from None
    return state["step"]
