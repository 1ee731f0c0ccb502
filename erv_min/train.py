"""What the stage scripts share: processes, optimizer, learning rate, the run's folder, logs, checkpoints, resume.

A run's folder holds `config.json` (every setting, versions, git commit), `metrics.jsonl` (one object a step),
`state.safetensors` (parameters and optimizer, replaced whole), and at the end `model.safetensors`.
No random state is saved because there is none: data order and sampling noise are functions of the seed and the step.
"""

import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from erv_min.errors import CheckpointError, SettingsError
from erv_min.files import append_jsonl, atomic_write, fsync_folder, read_json, write_json
from erv_min.fsdp import Sharded
from erv_min.launch import join
from erv_min.parallel import as_held, average_gradients, full, load_state, save_state

# ----------------------------------------------------------------------------------------------------- processes


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all: rank, world size and device. One process needs no process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def main_process() -> bool:
    """Whether this is the first of torchrun's processes (or the only one); known before they join."""
    return int(os.environ.get("RANK", 0)) == 0


def start_world(device: str = "", timeout_minutes: float = 60) -> World:
    """Joins the process group that torchrun describes (nccl on CUDA, gloo on the CPU); alone without torchrun."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not device:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError(f"--device {device}: this machine has no CUDA device; use --device cpu")
        torch.cuda.set_device(chosen)
    elif size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        join(backend, timeout_minutes)
    return World(rank, size, chosen)


def sum_over_processes(values: dict[str, float], world: World) -> dict[str, float]:
    """Sums of a dictionary of numbers over processes (the keys must be the same everywhere)."""
    if world.size == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=world.device)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def gather_lists(rows: list, world: World) -> list:
    """Concatenates each process's list, in rank order, on every process."""
    if world.size == 1:
        return rows
    parts = [None] * world.size
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


# ----------------------------------------------------------------------------------------- optimizer and schedule


def learning_rate(step: int, total: int, peak: float, warmup: float = 0.03, schedule: str = "cosine") -> float:
    """Rate of step `step` (0-based) of `total`: linear warm-up over a share `warmup`, then cosine, linear or constant."""
    rising = math.ceil(total * warmup)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    left = 1 - (step - rising) / max(1, total - rising)
    return peak * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def make_optimizer(params: list[Tensor], weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW with beta_1 = 0.9, beta_2 = 0.999 (table 8); the rate is set at each step."""
    return torch.optim.AdamW(params, lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay)


def update(optimizer: torch.optim.Optimizer, params: list[Tensor], lr: float, max_grad_norm: float, world: World,
           clip: Callable[[float], float] | None = None) -> float:
    """One optimizer step on gradients averaged over processes and clipped to a global norm; returns the norm before.

    `clip` does both where given (of `Sharded` and its like). Gradients are cleared. A norm that is not finite leaves the
    weights alone.
    """
    if clip is None:
        average_gradients(params)
        norm = float(nn.utils.clip_grad_norm_(params, max_grad_norm))
    else:
        norm = clip(max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def data_order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of `count` items that epoch `epoch` reads: a function of its arguments alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def batch_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of step `step`'s global batch; the stream of epochs is read on, so that no item is dropped."""
    picked, position = [], step * batch_size
    order, at = [], -1
    for i in range(position, position + batch_size):
        if i // count != at:
            at = i // count
            order = data_order(count, seed, at)
        picked.append(order[i % count])
    return picked


# --------------------------------------------------------------------------------------------- the run's folder


def git_commit() -> str:
    """Commit of this source tree, with "+" where it was changed since; empty outside a checkout."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else ""


def provenance(settings) -> dict:
    """Every setting, the versions in use, the commit and the command: what config.json keeps of a run."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("erv-min", "torch", "safetensors", "tokenizers", "huggingface-hub", "numpy", "av", "soundfile"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    values = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else dict(settings)
    return {"settings": values, "versions": versions, "git_commit": git_commit(), "command": sys.argv}


class Run:
    """A run's folder on the main process: logs, checkpoints and resume. Other processes only read."""

    def __init__(self, out: str | Path, settings, world: World, total_steps: int, towers: dict | None = None):
        self.out, self.world, self.total_steps = Path(out), world, total_steps
        self.metrics, self.state = self.out / "metrics.jsonl", self.out / "state.safetensors"
        self.settings = provenance(settings) | ({"towers": towers} if towers else {})
        self.started, self.first_step = time.time(), 0
        if world.main:
            self.out.mkdir(parents=True, exist_ok=True)
            config = self.out / "config.json"
            write_json(config, {**(read_json(config) if config.exists() else {}), "erv_min": self.settings})

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends {"step": step, ...} to metrics.jsonl and shows a line with rate and time left."""
        if not self.world.main:
            return
        append_jsonl(self.metrics, {"step": step, **values})
        done, elapsed = step + 1 - self.first_step, time.time() - self.started
        if step + 1 == self.total_steps or step % 10 == 0:
            left = elapsed / done * (self.total_steps - step - 1)
            shown = " ".join(f"{k} {v:.4g}" for k, v in values.items() if k in SHOWN)
            print(f"step {step + 1}/{self.total_steps} {shown} | {done / elapsed:.2f} steps/s, "
                  f"{datetime.timedelta(seconds=round(left))} left", flush=True)

    def save(self, step: int, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, policy=None) -> None:
        """Writes the training state after `step` steps; the old one stays until the new one is whole. All must call it.

        Of a `Sharded` policy each process writes its shards.
        """
        if isinstance(policy, Sharded):
            return save_state(self.out, step, policy, optimizer)
        tensors = {f"param.{n}": full(p.detach()) for n, p in params.items()}
        for name, p in params.items():
            tensors |= {f"{key}.{name}": full(value.detach()) for key, value in optimizer.state.get(p, {}).items()}
        if not self.world.main:
            return
        temporary = self.out / ".state.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, {"step": str(step)})
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, self.state)
        fsync_folder(self.out)

    def resume(self, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, policy=None) -> int:
        """Puts the saved state back and cuts metrics.jsonl to it; returns the number of steps done, 0 without a state."""
        sharded = isinstance(policy, Sharded)
        if (other := self.state if sharded else self.out / "state.json").exists():
            raise CheckpointError(f"{other}: written {'without' if sharded else 'with'} --sharding hand; resume that way")
        if sharded:
            self.first_step = load_state(self.out, policy, optimizer)
            self._cut_metrics(self.first_step)
            return self.first_step
        if not self.state.exists():
            self._cut_metrics(0)
            return 0
        try:
            with safe_open(self.state, "pt") as f:
                step = int(f.metadata()["step"])
                saved = {k: f.get_tensor(k) for k in f.keys()}
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.state}: damaged ({error}); delete it to start again") from None
        names = {k.removeprefix("param.") for k in saved if k.startswith("param.")}
        if names != set(params):
            raise CheckpointError(f"{self.state}: holds other parameters than this run trains, e.g. "
                                  f"{sorted(names ^ set(params))[:3]}; resume with the settings it was started with")
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(as_held(p, saved[f"param.{name}"]))
                state = {k: saved[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in saved}
                if state:
                    optimizer.state[p] = {k: v if k == "step" else as_held(p, v) for k, v in state.items()}
        self._cut_metrics(step)
        self.first_step = step
        return step

    def _cut_metrics(self, step: int) -> None:
        if self.world.main and self.metrics.exists():
            lines = self.metrics.read_text().split("\n")
            kept = [line for line in lines[:-1] if line and json.loads(line)["step"] < step]
            atomic_write(self.metrics, "".join(line + "\n" for line in kept))

    def finish(self) -> None:
        """Adds the run's settings to the model's config.json, so that one file says what made the weights."""
        if self.world.main:
            config = self.out / "config.json"
            write_json(config, {**read_json(config), "erv_min": self.settings})


SHOWN = ("loss", "reward", "reward_format", "reward_answer", "reward_explanation", "kl", "completion_length", "lr",
         "tokens_per_s")


def prepare_out(out: Path, resume: bool) -> bool:
    """Whether to resume: where asked to, and where torchrun starts the job again after a failure (--max-restarts).

    Refuses to mix a new run with an old one in the same folder: raises SettingsError naming the ways out.
    """
    resume = resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not resume and (out / "metrics.jsonl").exists():
        raise SettingsError(f"{out} already holds a run: give --resume to go on with it, another --out, or delete it")
    return resume
