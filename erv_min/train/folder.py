"""A run's folder: logs, states, resume, and what to do about SIGTERM, Ctrl-C and numbers that are not finite.

It holds `config.json` (settings, versions, commit), `metrics.jsonl` (an object per step), `state-STEP/` (state.py), and
at the end `model.safetensors`. No random state is saved because there is none: data order and sampling noise are
functions of the seed and the step.
"""

import dataclasses
import fcntl
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
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from erv_min.base.errors import STOPPED, DiskError, NumbersError, SettingsError
from erv_min.base.files import append_jsonl, gigabytes, read_json, read_jsonl, write_json, write_jsonl
from erv_min.base.options import option_name
from erv_min.base.processes import Processes, all_gather_object, all_reduce_sum, barrier, gather_lists
from erv_min.base.progress import EVERY, Progress
from erv_min.train.state import load_state, save_state, saved_states

TOO_MANY = 3  # steps in a row without a finite loss and gradient that end a run
LOGS = ("metrics.jsonl", "completions.jsonl", "failed_clips.jsonl", "epochs.jsonl")
SHOWN = ("loss", "reward", "reward_format", "reward_answer", "reward_explanation", "held_out_EEA", "held_out_EPC", "kl",
         "completion_length", "lr", "tokens_per_s")
PACKAGES = ("erv-min", "torch", "safetensors", "tokenizers", "huggingface-hub", "numpy", "av", "soundfile")
# Settings that a resumed run may have otherwise: they change how long, where and how fast it runs, not its numbers.
FREE_ON_RESUME = {"out", "resume", "steps", "epochs", "save_every", "keep", "workers", "device", "sample_every",
                  "baseline", "allow_missing", "cache_features", "world", "micro_batch", "recompute",
                  "eval_temperature", "eval_clips", "watch_every", "watch_erv", "patience", "rollout_batch",
                  "deterministic"}


def provenance(settings) -> dict:
    """What config.json keeps of a run. The commit has a "+" if the source was changed; "" outside a checkout."""
    installed = {(x.name or "").lower().replace("_", "-"): x.version for x in metadata.distributions()}
    versions = {"python": platform.python_version()} | {x: installed.get(x, "not installed") for x in PACKAGES}
    versions["torch"] = torch.__version__  # with its build, which the package's version may leave out (2.15.0+cu132)
    tf32 = {"matmul": torch.backends.cuda.matmul.allow_tf32, "conv": torch.backends.cudnn.allow_tf32}
    git = shutil.which("git") and subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"], cwd=Path(__file__).parent,
        capture_output=True, text=True)
    return {"settings": dataclasses.asdict(settings), "versions": versions, "tf32": tf32,
            "git_commit": git.stdout.strip() if git else "", "command": sys.argv}


LOCKS: dict = {}  # folder -> open file whose lock this process holds until it ends, however it ends


def open_folder(out: str | Path, resume: bool, processes: Processes) -> bool:
    """Locks the folder of a run for this job, on every process; returns whether to resume: if asked to, and if
    torchrun starts the job again (--max-restarts).

    Raises SettingsError if a run lies there and nobody asked to go on with it, or if one is still writing.
    """
    out, resume = Path(out), resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    problem = ""
    if processes.main:
        out.mkdir(parents=True, exist_ok=True)
        try:
            if str(out) not in LOCKS:
                handle = open(out / ".lock", "a+")
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by decoding processes
                LOCKS[str(out)] = handle
        except (BlockingIOError, PermissionError):
            problem = f"{out}: another run is writing into this folder: wait for it, stop it, or give another --out"
        if not problem and not resume and (out / "metrics.jsonl").exists():
            problem = f"{out} already holds a run: give --resume to go on with it, another --out, or delete it"
    if problem := all_gather_object(problem)[0]:
        raise SettingsError(problem)
    return resume


def changed_settings(before: dict, now: dict) -> list[str]:
    """Options that differ between two runs and change what is computed."""
    return sorted(option_name(name) for name in before.keys() & now.keys() - FREE_ON_RESUME
                  if before[name] != now[name])


class Run:
    """A run's logs and states. The main process writes; every process must call each method."""

    def __init__(self, out: str | Path, settings, processes: Processes, total_steps: int, towers: dict | None = None):
        """Keeps the settings in config.json. Raises SettingsError if a resume changes one that it may not."""
        self.out, self.settings, self.processes, self.total_steps = Path(out), settings, processes, total_steps
        self.metrics, self.config = self.out / "metrics.jsonl", self.out / "config.json"
        self.about = provenance(settings) | ({"towers": towers} if towers else {})
        self.progress, self.first_step, self.interrupted = Progress("training", total_steps, "step"), 0, 0.0
        self.stop, self.tracked, self.skipped, self.in_a_row = "", [], 0, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        kept = read_json(self.config) if self.config.exists() else {}
        if settings.resume and saved_states(self.out):
            before = kept.get("erv_min", {}).get("settings", {})
            if changed := changed_settings(before, json.loads(json.dumps(self.about["settings"]))):
                raise SettingsError(f"{self.config}: this run was started with other values of {', '.join(changed)}; "
                                    "resume with the same, or give another --out")
        all_gather_object(None)  # every process has read the file before the main one changes it
        if processes.main:
            write_json(self.config, {**kept, "erv_min": self.about})

    def _on_signal(self, number: int, _) -> None:
        """`checkpoint` acts on it. A second Ctrl-C ends at once: two seconds later, since torchrun sends the first
        one again."""
        if number == signal.SIGINT and self.stop and time.time() - self.interrupted > 2:
            raise KeyboardInterrupt
        if not self.stop:
            self.stop, self.interrupted = signal.Signals(number).name, time.time()
            if self.processes.main and number == signal.SIGINT:
                print("Ctrl-C: the step is finished and a state written; once more to end at once", flush=True)

    def begin(self, policy, optimizer: torch.optim.Optimizer) -> int:
        """Checks the disk; on a resume puts the last state back and cuts the logs to it. Returns the steps done."""
        self.policy, self.optimizer, keep = policy, optimizer, self.settings.keep
        writes = policy.every_process_writes or self.processes.main
        trained, whole = (writes * sum(p.numel() * p.element_size() for p in params)
                          for params in (policy.named_parameters().values(), policy.model.parameters()))
        size = all_reduce_sum({"state": 3 * trained, "model": whole})  # 3: parameters and AdamW's two moments
        needed = (keep + 1) * size["state"] + size["model"]
        there = [*self.out.glob("*state-*/*"), *self.out.glob("model.safetensors")]
        free = shutil.disk_usage(self.out).free + sum(path.stat().st_size for path in there)
        if needed > free:
            raise DiskError(f"{self.out}: {gigabytes(needed)} are needed ({keep + 1} states of "
                            f"{gigabytes(size['state'])} and the model), {gigabytes(free)} are free: make room, give "
                            "another --out or a smaller --keep")
        if self.settings.resume:
            self.first_step = load_state(self.out, policy, optimizer)
            if self.processes.main:
                self._cut_logs()
                print(f"resume: {self.out} holds a state after step {self.first_step} of {self.total_steps}"
                      if self.first_step else f"resume: {self.out} holds no state; starting at step 1", flush=True)
            self.skipped, self.in_a_row = all_gather_object((self.skipped, self.in_a_row))[0]  # nobody logs before
        if self.processes.main:
            count = sum(p.numel() for p in policy.named_parameters().values())
            print(f"{self.out}: {self.total_steps} steps, {count / 1e6:.2f} M trainable parameters on this process",
                  flush=True)
        self.progress.first = self.progress.done = self.first_step
        self.progress.start()  # until `finish`; at an error run_script ends it
        return self.first_step

    def _cut_logs(self) -> None:
        """Leaves the logs' rows of the steps before the state, and nothing that was being written at a kill."""
        for path in [self.out / name for name in LOGS if (self.out / name).exists()]:
            rows = [row for row in read_jsonl(path) if row["step"] < self.first_step]
            write_jsonl(path, rows)
            for row in rows if path == self.metrics else []:
                self.skipped, self.in_a_row = row["skipped"], self.in_a_row + 1 if "skipped_because" in row else 0
        whole = [path for path in saved_states(self.out) if int(path.name.removeprefix("state-")) <= self.first_step]
        for path in whole[self.settings.keep :]:  # a kill came between a state and the removal of older ones
            shutil.rmtree(path)
        for path in self.out.glob(".*"):
            if re.fullmatch(r"\.state-\d+", path.name):
                shutil.rmtree(path)
            elif re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name) and path.is_file():
                path.unlink()

    def track_rows(self, names: list[str], values: Tensor) -> None:
        """Remembers a pass's rows [R, ...] and their gradients until `log`, which names those that are not finite."""
        self.tracked.append((names, values.detach()))
        values.register_hook(lambda grad: self.tracked.append((names, grad)))

    def _why_skipped(self) -> str:
        """Which watched rows, of all processes, are not finite; without one, what was in the batch."""
        rows = [row for names, x in self.tracked for row in zip(names, x.flatten(1).isfinite().all(1).tolist())]
        rows = gather_lists(rows)
        bad, names = list(dict.fromkeys(x for x, ok in rows if not ok)), list(dict.fromkeys(x for x, _ in rows))
        if bad:
            return f"not finite: log-probabilities or their gradient of {'; '.join(bad[:8])}"
        return f"a gradient inside the model is not finite, the losses are; in the batch: {'; '.join(names[:8])}"

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends {"step": step, ...} to metrics.jsonl and shows a line with rate and time left.

        A "grad_norm" that is not finite is a skipped step: the row says why. NumbersError after TOO_MANY in a row.
        """
        skip = not math.isfinite(values.get("grad_norm", 0.0))
        self.in_a_row, self.skipped = (self.in_a_row + 1 if skip else 0), self.skipped + skip
        values = {**values, "skipped": self.skipped}
        if skip:
            values["skipped_because"] = self._why_skipped()
        self.tracked.clear()
        if self.processes.main:
            append_jsonl(self.metrics, {"step": step} | {
                k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})
            self.progress.done = step + 1
            if skip:
                print(f"step {step + 1}: skipped, {values['skipped_because']}", flush=True)
            if step + 1 == self.total_steps or step % 10 == 0 or time.time() - self.progress.last > EVERY / 2:
                self.progress.last = time.time()
                shown = " ".join(f"{k} {v:.4g}" for k, v in values.items() if k in SHOWN and v is not None)
                print(f"step {step + 1}/{self.total_steps} {shown} | {self.progress.pace()}", flush=True)
        if self.in_a_row >= TOO_MANY:
            raise NumbersError(f"{self.metrics}: {TOO_MANY} steps in a row up to step {step + 1} were skipped, the "
                               f"last: {values['skipped_because']}. Look at these clips; a lower --lr or float32 may "
                               "help")

    def checkpoint(self, done: int) -> None:
        """After `done` steps: writes the state if it is due. After a signal, too, and then ends with STOPPED."""
        stop = next((name for name in all_gather_object(self.stop) if name), "")
        if stop or done % self.settings.save_every == 0 or done == self.total_steps:
            if self.processes.main and self.metrics.exists():
                with open(self.metrics, "rb+") as f:
                    os.fsync(f.fileno())  # the state never knows more steps than the log
            save_state(self.out, done, self.policy, self.optimizer, self.settings.keep)
        if stop:
            if self.processes.main:
                print(f"{stop}: the state after step {done} of {self.total_steps} is in {self.out}; go on with "
                      f"--resume (exit code {STOPPED})", flush=True)
            raise SystemExit(STOPPED)

    def finish(self) -> None:
        """Adds the run's settings to the model's config.json, which has replaced ours. Signals end again."""
        self.progress.stop()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.processes.main:
            write_json(self.config, {**read_json(self.config), "erv_min": self.about})
            print(f"{self.out}/model.safetensors is written", flush=True)
        barrier()
