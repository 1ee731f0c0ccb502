"""A run's folder: logs, states, resume, and what to do about SIGTERM, Ctrl-C and numbers that are not finite.

It holds `config.json` (settings, versions, commit, a digest of the data), `metrics.jsonl` (an object per step),
`state-STEP/` (state.py), and at the end `model.safetensors`. No random state is saved because there is none: data order
and sampling noise are functions of the seed and the step.
"""

import dataclasses
import fcntl
import hashlib
import logging
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from erv_min.base.errors import STOPPED, DiskError, NumbersError, SettingsError
from erv_min.base.files import append_jsonl, gigabytes, read_json, read_jsonl, write_json, write_jsonl
from erv_min.base.options import option_name
from erv_min.base.processes import Processes, all_gather_object, barrier, gather_lists
from erv_min.base.progress import Progress
from erv_min.train.state import keep_states, load_state, save_state, saved_states

log = logging.getLogger("erv_min")
TOO_MANY = 3  # steps in a row without a finite loss and gradient that end a run
LOGS = ("metrics.jsonl", "completions.jsonl", "failed_clips.jsonl", "epochs.jsonl")
SHOWN = ("loss", "reward", "reward_format", "reward_answer", "reward_explanation", "held_out_EEA", "held_out_EPC", "kl",
         "completion_length", "lr", "tokens_per_s")
PACKAGES = ("safetensors", "tokenizers", "huggingface_hub", "huggingface-hub", "numpy", "av", "soundfile")
# Settings that a resumed run may have otherwise: they change where and how fast it runs, and what is watched, not its
# numbers. (--steps and --epochs would change the learning rates; what lies in another --world is compared by itself.)
FREE_ON_RESUME = {"out", "resume", "save_every", "keep", "workers", "device", "sample_every", "baseline",
                  "allow_missing", "cache_features", "world", "micro_batch", "recompute", "eval_temperature",
                  "eval_clips", "watch_every", "watch_erv", "rollout_batch", "deterministic"}
LOCKS = []  # files whose locks this process holds until it ends, however it ends


def provenance(settings) -> dict:
    """What config.json keeps of a run. The commit has a "+" if the source was changed; "" outside a checkout."""
    versions = {x.name: x.version for x in metadata.distributions() if x.name in PACKAGES}
    versions |= {"python": platform.python_version(), "torch": torch.__version__}  # with its build (2.15.0+cu132)
    git = shutil.which("git") and subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"], cwd=Path(__file__).parent,
        capture_output=True, text=True)
    return {"settings": dataclasses.asdict(settings), "versions": versions,
            "git_commit": git.stdout.strip() if git else "", "command": sys.argv}


def open_folder(out: str | Path, resume: bool, processes: Processes) -> bool:
    """Locks the folder of a run for this job; every process must call it. Returns whether to resume: if asked to, or
    if torchrun starts this very job again (--max-restarts). Raises SettingsError, OSError."""
    resume, note = processes.from_main(lambda: _take_folder(Path(out), resume))
    lock = Path(out, ".lock")
    # The main process does not read its own file: closing it once more would end the lock.
    seen = all_gather_object(processes.main or lock.exists() and lock.read_text() == note)
    if not all(seen):
        raise SettingsError(f"{out}: process {seen.index(False)} does not see the folder of process 0: --out must be "
                            "one folder that all machines share")
    return resume


def _take_folder(out: Path, resume: bool) -> tuple[bool, str]:
    """(whether to resume, what the lock says from now on: which job began the run, and a text no other lock holds)"""
    out.mkdir(parents=True, exist_ok=True)
    LOCKS.append(lock := open(out / ".lock", "a+"))
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by decoding processes
    except (BlockingIOError, PermissionError):
        raise SettingsError(f"{out}: another run is writing into this folder: wait for it, stop it, or give another "
                            "--out") from None
    except OSError as error:
        log.warning("%s: its file system has no locks (%s): nothing keeps a second run out", out, error.strerror)
    job = os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("/attempt_")[0]  # torchrun's own folder of this job
    lock.seek(0)
    restart = job != "" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    resume = resume or restart and lock.readline() == f"{job}\n"
    if not resume and (out / "metrics.jsonl").exists():
        raise SettingsError(f"{out} already holds a run: give --resume to go on with it, another --out, or delete it")
    note = f"{job}\n{time.time_ns()}"
    lock.truncate(0)
    lock.write(note)
    lock.flush()
    os.fsync(lock.fileno())
    return resume, note


def check_disk(out: str | Path, keep: int, model: nn.Module) -> None:
    """Raises DiskError without room for what a run of this model writes, in float32. It may have shapes alone."""
    state = 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # 3: AdamW's moments
    needed = (keep + 1) * state + 4 * sum(p.numel() for p in model.parameters())
    there = [*Path(out).glob("*state-*/*"), *Path(out).glob("model.safetensors")]
    free = shutil.disk_usage(out).free + sum(path.stat().st_size for path in there)
    if needed > free:
        raise DiskError(f"{out}: {gigabytes(needed)} are needed ({keep + 1} states of {gigabytes(state)} and the "
                        f"model), {gigabytes(free)} are free: make room, give another --out or a smaller --keep")


def changed_settings(before: dict, now: dict) -> list[str]:
    """Options that differ between two runs and change what is computed."""
    return sorted(option_name(name) for name in before.keys() & now.keys() - FREE_ON_RESUME
                  if before[name] != now[name])


class Run:
    """A run's logs and states. The main process writes; every process must call each method."""

    def __init__(self, out: str | Path, settings, processes: Processes, total_steps: int, data: list = ()):
        """To be made before a model is read. data: what training reads of each example, in their order. Raises
        SettingsError if a resume changes it, or a setting that it may not."""
        self.out, self.settings, self.processes, self.total_steps = Path(out), settings, processes, total_steps
        self.metrics, self.config = self.out / "metrics.jsonl", self.out / "config.json"
        digest = hashlib.sha256(repr(list(data)).encode()).hexdigest()[:16]
        self.about = provenance(settings) | {"data": f"{len(data)} examples of digest {digest}"}
        self.progress, self.first_step, self.interrupted = Progress("training", total_steps, "step"), 0, 0.0
        self.stop, self.tracked, self.skips, self.shown = "", [], [], 0.0  # skips: of each step, whether it was skipped
        if settings.resume:
            processes.from_main(self._check_resume)
        if len(set(all_gather_object(self.about["data"]))) > 1:
            raise SettingsError("the processes of this job read different data: every machine needs the same files")

    def _check_resume(self) -> None:
        """Raises SettingsError if there is a run in the folder that this command cannot go on with."""
        steps, states = len(read_jsonl(self.metrics, log=True)) if self.metrics.exists() else 0, saved_states(self.out)
        before = read_json(self.config).get("erv_min", {}) if self.config.exists() and (steps or states) else {}
        settings, data = before.get("settings", {}), before.get("data", self.about["data"])
        if changed := changed_settings(settings, self.about["settings"]):
            raise SettingsError(f"{self.config}: this run has other values of {', '.join(changed)}; resume with the "
                                "same, or give another --out")
        if data != self.about["data"]:
            raise SettingsError(f"{self.config}: this run was started on other data ({data}, now "
                                f"{self.about['data']}); resume with the same, or give another --out")
        finished = (self.out / "model.safetensors").exists()
        if steps and not states and (finished or steps > settings.get("save_every", steps)):
            raise SettingsError(f"{self.metrics}: {steps} steps were made, and the state-* folders are gone: put them "
                                "back, or give another --out")

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
        """Acts on signals from here on; on a resume puts the last state back and cuts the logs to it. Returns the steps
        done."""
        self.policy, self.optimizer = policy, optimizer
        self.about["towers"] = getattr(policy.model, "tower_source", {})
        if self.processes.main:
            write_json(self.config, {**(read_json(self.config) if self.config.exists() else {}), "erv_min": self.about})
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        if self.settings.resume:
            self.first_step = load_state(self.out, policy, optimizer)
            logs = {path: [row for row in read_jsonl(path, log=True) if row["step"] < self.first_step]
                    for path in (self.out / name for name in LOGS) if path.exists()}
            self.skips = ["skipped_because" in row for row in logs.get(self.metrics, [])]
            if self.processes.main:
                for path, rows in logs.items():
                    write_jsonl(path, rows)
                if self.first_step:
                    keep_states(self.out / f"state-{self.first_step:06d}", self.settings.keep)
                print(f"resume: {self.out} holds a state after step {self.first_step} of {self.total_steps}"
                      if self.first_step else f"resume: {self.out} holds no state; starting at step 1", flush=True)
            barrier()  # nobody writes into a log that is being cut
        self.progress.first = self.progress.done = self.first_step
        self.progress.start()  # until `finish`; at an error run_script ends it
        return self.first_step

    def track_rows(self, names: list[str], values: Tensor) -> None:
        """Remembers a pass's rows [R, ...] and their gradients for `log`, which names those that are not finite."""
        self.tracked.append((names, values.detach()))
        values.register_hook(lambda grad: self.tracked.append((names, grad)))

    def _why_skipped(self) -> str:
        """Which watched rows, of all processes, are not finite; without one, what was in the batch."""
        rows = gather_lists([row for names, x in self.tracked
                             for row in zip(names, x.flatten(1).isfinite().all(1).tolist())])
        bad = [name for name, finite in rows if not finite]
        names = "; ".join([*dict.fromkeys(bad or [name for name, _ in rows])][:8])
        if bad:
            return f"not finite: log-probabilities or their gradient of {names}"
        return f"a gradient inside the model is not finite, the losses are; in the batch: {names}"

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends {"step": step, ...} to metrics.jsonl and shows a line with rate and time left.

        A "grad_norm" that is not finite is a skipped step: the row says why. NumbersError after TOO_MANY in a row.
        """
        self.skips.append(not math.isfinite(values.get("grad_norm", 0.0)))
        values = {**values, "skipped": sum(self.skips)}
        if self.skips[-1]:
            values["skipped_because"] = why = self._why_skipped()
        self.tracked.clear()
        if self.processes.main:
            append_jsonl(self.metrics, {"step": step} | {
                k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})
            self.progress.done = step + 1
            if self.skips[-1]:
                print(f"step {step + 1}: skipped, {why}", flush=True)
            if step + 1 == self.total_steps or step % 10 == 0 or time.time() - self.shown > 5:
                self.shown = self.progress.last = time.time()
                shown = " ".join(f"{k} {v:.4g}" for k, v in values.items() if k in SHOWN and v is not None)
                print(f"{self.out.name} step {step + 1}/{self.total_steps} {shown} |", self.progress.pace(), flush=True)
        if self.skips[-TOO_MANY:] == [True] * TOO_MANY:
            raise NumbersError(f"{self.metrics}: {TOO_MANY} steps in a row up to step {step + 1} were skipped, the "
                               f"last: {why}. Look at these clips; a lower --lr or float32 may help")

    def checkpoint(self, done: int) -> None:
        """After `done` steps: writes the state if it is due. After a signal, too, and then ends with STOPPED."""
        stop = max(all_gather_object(self.stop))
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
        """Once the model is written: signals end the process again."""
        self.progress.stop()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.processes.main:
            print(f"{self.out}/model.safetensors is written", flush=True)
        barrier()
