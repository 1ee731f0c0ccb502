"""What the stage scripts share: processes, optimizer, learning rate, the run's folder, logs, checkpoints, resume.

A run's folder holds `config.json` (every setting, versions, git commit), `metrics.jsonl` (one object a step),
`state-STEP/` (parameters and optimizer, state.py), and at the end `model.safetensors`.
No random state is saved because there is none: data order and sampling noise are functions of the seed and the step.
SIGTERM, a cluster's warning, writes a state at the end of the step and ends the run with exit code STOPPED.
"""

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from erv_min.errors import DiskError, NumbersError, SettingsError
from erv_min.files import append_jsonl, atomic_write, gigabytes, read_json, read_jsonl, write_json
from erv_min.fsdp import Sharded
from erv_min.launch import join
from erv_min.parallel import average_gradients
from erv_min.state import everyones, load_state, save_state, state_bytes

STOPPED = 75  # exit code after SIGTERM: the state is written, start again with --resume (sysexits.h: EX_TEMPFAIL)
TOO_MANY = 3  # steps in a row without a finite loss and gradient that end a run

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
    return [row for part in everyones(rows) for row in part]


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
           clip: Callable[[float], float] | None = None, loss: float = 0.0) -> float:
    """One optimizer step on gradients averaged over processes and clipped to a global norm; returns the norm before.

    `clip` does both where given (of `Sharded` and its like). Gradients are cleared. A norm, or a `loss` of any process,
    that is not finite leaves the weights alone; the norm is not finite then.
    """
    if not math.isfinite(loss):
        grad = next(p.grad for p in params if p.grad is not None)
        grad.fill_(math.nan)  # the norm tells every process
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
    """A run's folder: logs, states, resume, and what to do about SIGTERM and numbers that are not finite.

    The main process writes; where not said otherwise every process must call each method.
    """

    def __init__(self, out: str | Path, settings, world: World, total_steps: int, towers: dict | None = None):
        self.out, self.world, self.total_steps = Path(out), world, total_steps
        self.metrics = self.out / "metrics.jsonl"
        self.save_every, self.keep = getattr(settings, "save_every", 100), getattr(settings, "keep", 2)
        self.settings = provenance(settings) | ({"towers": towers} if towers else {})
        self.started, self.first_step = time.time(), 0
        self.stop, self.watched, self.skipped, self.in_a_row = False, [], 0, 0
        signal.signal(signal.SIGTERM, self._on_sigterm)
        if world.main:
            self.out.mkdir(parents=True, exist_ok=True)
            config = self.out / "config.json"
            write_json(config, {**(read_json(config) if config.exists() else {}), "erv_min": self.settings})

    def _on_sigterm(self, *_) -> None:
        self.stop = True  # checkpoint() acts on it; further signals change nothing: torchrun and a cluster both send one

    def begin(self, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, resume: bool, policy=None) -> int:
        """Checks the disk; with `resume` puts the last state back and cuts the logs to it. Returns the steps done.

        Raises DiskError, CheckpointError.
        """
        held = policy if isinstance(policy, Sharded) else params
        model = sum(p.numel() * p.element_size() for p in (policy.model.parameters() if policy else params.values()))
        size = sum_over_processes({"state": state_bytes(held), "model": model * (held is policy or self.world.main)},
                                  self.world)
        needed = (self.keep + 1) * size["state"] + size["model"]
        there = [*self.out.glob("*state-*/*"), *self.out.glob("model.safetensors")]
        free = shutil.disk_usage(self.out).free + sum(path.stat().st_size for path in there)
        if needed > free:
            raise DiskError(f"{self.out}: {gigabytes(needed)} are needed ({self.keep + 1} states of "
                            f"{gigabytes(size['state'])} and the model), {gigabytes(free)} are free: make room, give "
                            "another --out or a smaller --keep")
        if resume:
            self.first_step = load_state(self.out, held, optimizer)
            if self.world.main:
                for row in [self._cut(self.out / name) for name in LOGS][0]:
                    self.skipped, self.in_a_row = row["skipped"], self.in_a_row + 1 if "skipped_because" in row else 0
                for path in self.out.glob(".*"):  # what was being written when the run was killed
                    if re.fullmatch(r"\.state-\d+", path.name):
                        shutil.rmtree(path)
                    elif re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name) and path.is_file():
                        path.unlink()
            self.skipped, self.in_a_row = everyones((self.skipped, self.in_a_row))[0]  # nobody appends before the cut
        return self.first_step

    def _cut(self, path: Path) -> list[dict]:
        """Leaves the rows of steps before the first that is still to do; returns them."""
        rows = [row for row in read_jsonl(path) if row["step"] < self.first_step] if path.exists() else []
        if path.exists():
            atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return rows

    def watch(self, names: list[str], values: Tensor) -> None:
        """Remembers a pass's rows [R, ...] and their gradients until `log`, which names those that are not finite."""
        self.watched.append((names, values.detach()))
        values.register_hook(lambda grad: self.watched.append((names, grad)))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends {"step": step, ...} to metrics.jsonl and shows a line with rate and time left.

        A "grad_norm" that is not finite is a skipped step: the row says why. Raises NumbersError after TOO_MANY in a row.
        """
        values, skip = {**values, "skipped": self.skipped}, not math.isfinite(values.get("grad_norm", 0.0))
        self.in_a_row = self.in_a_row + 1 if skip else 0
        if skip:
            self.skipped += 1
            why = list(dict.fromkeys(name for names, x in self.watched for name, ok in
                                     zip(names, x.flatten(1).isfinite().all(1).tolist()) if not ok))
            names = list(dict.fromkeys(name for names, _ in self.watched for name in names))
            parts = everyones((why, names))
            why, names = ([name for part in parts for name in part[i]] for i in (0, 1))
            values |= {"skipped": self.skipped, "skipped_because": f"not finite: log-probabilities or their gradient of "
                       f"{'; '.join(why[:8])}" if why else "a gradient inside the model is not finite, the losses are; "
                       f"in the batch: {'; '.join(names[:8])}"}
        self.watched.clear()
        if self.world.main:
            append_jsonl(self.metrics, {"step": step} | {
                k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})
            done, elapsed = step + 1 - self.first_step, time.time() - self.started
            if skip:
                print(f"step {step + 1}: skipped, {values['skipped_because']}", flush=True)
            if step + 1 == self.total_steps or step % 10 == 0:
                left = elapsed / done * (self.total_steps - step - 1)
                shown = " ".join(f"{k} {v:.4g}" for k, v in values.items() if k in SHOWN)
                print(f"step {step + 1}/{self.total_steps} {shown} | {done / elapsed:.2f} steps/s, "
                      f"{datetime.timedelta(seconds=round(left))} left", flush=True)
        if self.in_a_row >= TOO_MANY:
            raise NumbersError(f"{self.metrics}: {TOO_MANY} steps in a row up to step {step + 1} were skipped, the last: "
                               f"{values['skipped_because']}. Look at these clips; a lower --lr or float32 may help")

    def checkpoint(self, done: int, params: dict[str, Tensor], optimizer: torch.optim.Optimizer, policy=None) -> None:
        """After `done` steps: writes the state where it is due. After SIGTERM, too, and then ends with STOPPED."""
        stop = sum_over_processes({"stop": float(self.stop)}, self.world)["stop"] > 0
        if stop or done % self.save_every == 0 or done == self.total_steps:
            if self.world.main and self.metrics.exists():
                with open(self.metrics, "rb+") as f:
                    os.fsync(f.fileno())  # the state never knows more steps than the log
            save_state(self.out, done, policy if isinstance(policy, Sharded) else params, optimizer, self.keep)
        if stop:
            if self.world.main:
                print(f"SIGTERM: the state after step {done} of {self.total_steps} is in {self.out}; go on with "
                      f"--resume (exit code {STOPPED})", flush=True)
            raise SystemExit(STOPPED)

    def finish(self) -> None:
        """Adds the run's settings to the model's config.json: one file says what made the weights. SIGTERM ends again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.world.main:
            config = self.out / "config.json"
            write_json(config, {**read_json(config), "erv_min": self.settings})


LOGS = ("metrics.jsonl", "completions.jsonl", "failed_clips.jsonl")
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
