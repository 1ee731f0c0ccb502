"""A run's folder: logs, states, resume, and what to do about SIGTERM and numbers that are not finite.

A run's folder holds `config.json` (every setting, versions, git commit), `metrics.jsonl` (one object a step),
`state-STEP/` (parameters and optimizer, state.py), and at the end `model.safetensors`.
No random state is saved because there is none: data order and sampling noise are functions of the seed and the step.
SIGTERM, a cluster's warning, writes a state at the end of the step and ends the run with exit code STOPPED.
"""

import dataclasses
import datetime
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from erv_min.run.errors import DiskError, NumbersError, SettingsError
from erv_min.run.files import append_jsonl, gigabytes, read_json, read_jsonl, write_json, write_jsonl
from erv_min.fsdp import Sharded
from erv_min.run.processes import Processes, all_gather_object, all_reduce_sum
from erv_min.run.state import load_state, save_state, state_bytes

STOPPED = 75  # exit code after SIGTERM: the state is written, start again with --resume (sysexits.h: EX_TEMPFAIL)
TOO_MANY = 3  # steps in a row without a finite loss and gradient that end a run


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

    def __init__(self, out: str | Path, settings, processes: Processes, total_steps: int, towers: dict | None = None):
        self.out, self.processes, self.total_steps = Path(out), processes, total_steps
        self.metrics = self.out / "metrics.jsonl"
        self.save_every, self.keep = getattr(settings, "save_every", 100), getattr(settings, "keep", 2)
        self.settings = provenance(settings) | ({"towers": towers} if towers else {})
        self.started, self.first_step = time.time(), 0
        self.stop, self.watched, self.skipped, self.in_a_row = False, [], 0, 0
        signal.signal(signal.SIGTERM, self._on_sigterm)
        if processes.main:
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
        size = all_reduce_sum({"state": state_bytes(held), "model": model * (held is policy or self.processes.main)})
        needed = (self.keep + 1) * size["state"] + size["model"]
        there = [*self.out.glob("*state-*/*"), *self.out.glob("model.safetensors")]
        free = shutil.disk_usage(self.out).free + sum(path.stat().st_size for path in there)
        if needed > free:
            raise DiskError(f"{self.out}: {gigabytes(needed)} are needed ({self.keep + 1} states of "
                            f"{gigabytes(size['state'])} and the model), {gigabytes(free)} are free: make room, give "
                            "another --out or a smaller --keep")
        if resume:
            self.first_step = load_state(self.out, held, optimizer)
            if self.processes.main:
                for row in [self._cut(self.out / name) for name in LOGS][0]:
                    self.skipped, self.in_a_row = row["skipped"], self.in_a_row + 1 if "skipped_because" in row else 0
                for path in self.out.glob(".*"):  # what was being written when the run was killed
                    if re.fullmatch(r"\.state-\d+", path.name):
                        shutil.rmtree(path)
                    elif re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name) and path.is_file():
                        path.unlink()
            self.skipped, self.in_a_row = all_gather_object((self.skipped, self.in_a_row))[0]  # nobody appends before the cut
        return self.first_step

    def _cut(self, path: Path) -> list[dict]:
        """Leaves the rows of steps before the first that is still to do; returns them."""
        rows = [row for row in read_jsonl(path) if row["step"] < self.first_step] if path.exists() else []
        if path.exists():
            write_jsonl(path, rows)
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
            parts = all_gather_object((why, names))
            why, names = ([name for part in parts for name in part[i]] for i in (0, 1))
            values |= {"skipped": self.skipped, "skipped_because": f"not finite: log-probabilities or their gradient of "
                       f"{'; '.join(why[:8])}" if why else "a gradient inside the model is not finite, the losses are; "
                       f"in the batch: {'; '.join(names[:8])}"}
        self.watched.clear()
        if self.processes.main:
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
        stop = all_reduce_sum({"stop": float(self.stop)})["stop"] > 0
        if stop or done % self.save_every == 0 or done == self.total_steps:
            if self.processes.main and self.metrics.exists():
                with open(self.metrics, "rb+") as f:
                    os.fsync(f.fileno())  # the state never knows more steps than the log
            save_state(self.out, done, policy if isinstance(policy, Sharded) else params, optimizer, self.keep)
        if stop:
            if self.processes.main:
                print(f"SIGTERM: the state after step {done} of {self.total_steps} is in {self.out}; go on with "
                      f"--resume (exit code {STOPPED})", flush=True)
            raise SystemExit(STOPPED)

    def finish(self) -> None:
        """Adds the run's settings to the model's config.json: one file says what made the weights. SIGTERM ends again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.processes.main:
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
