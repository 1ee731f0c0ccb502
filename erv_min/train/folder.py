"""A run's folder: logs, states, resume, and what to do about SIGTERM, Ctrl-C and numbers that are not finite.

It holds `config.json` (settings, versions, commit), `data.jsonl` (what it trains on, in order), `metrics.jsonl` (an
object per step), `state-STEP/` (state.py), and at the end `model.safetensors`. No random state is saved because there
is none: data order and sampling noise are functions of the seed and the step.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from erv_min.base.errors import STOPPED, DiskError, NumbersError, SettingsError
from erv_min.base.files import append_jsonl, gigabytes, read_json, read_jsonl, write_json, write_jsonl
from erv_min.base.options import option_name
from erv_min.base.processes import Processes, all_gather_object, barrier, gather_lists
from erv_min.base.progress import Progress
from erv_min.train.state import load_state, save_state, saved_states

log = logging.getLogger("erv_min")
TOO_MANY = 3  # steps in a row without a finite loss and gradient that end a run
LOGS = ("metrics.jsonl", "completions.jsonl", "failed_clips.jsonl", "epochs.jsonl")
SHOWN = ("loss", "reward", "reward_format", "reward_answer", "reward_explanation", "held_out_EEA", "held_out_EPC", "kl",
         "completion_length", "lr", "tokens_per_s")
PACKAGES = ("erv-min", "torch", "safetensors", "tokenizers", "huggingface-hub", "numpy", "av", "soundfile")
# Settings that a resumed run may have otherwise: they change where and how fast it runs, and what is watched, not its
# numbers. (--steps and --epochs would change the learning rates; what lies in another --world is compared by itself.)
FREE_ON_RESUME = {"out", "resume", "save_every", "keep", "workers", "device", "sample_every", "baseline",
                  "allow_missing", "cache_features", "world", "micro_batch", "recompute", "eval_temperature",
                  "eval_clips", "watch_every", "watch_erv", "rollout_batch", "deterministic"}


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
    """Locks the folder of a run for this job; every process must call it. Returns whether to resume: if asked to, or
    if torchrun starts this very job again (--max-restarts).

    Raises SettingsError if a run lies there and nobody asked to go on with it, if one is still writing, or if not every
    process sees this folder.
    """
    out, problem, token = Path(out), "", ""
    with contextlib.ExitStack() as stack:
        if processes.main:
            try:
                resume = _take_folder(out, resume)
                token = stack.enter_context(tempfile.NamedTemporaryFile(dir=out, prefix=".token.")).name
            except OSError as error:
                problem = f"{out}: cannot be written ({error.strerror}): give another --out"
            except SettingsError as error:
                problem = str(error)
        problem, token, resume = all_gather_object((problem, Path(token).name, resume))[0]
        if problem:
            raise SettingsError(problem)
        seen = all_gather_object((out / token).exists())
        if not all(seen):
            raise SettingsError(f"{out}: process {seen.index(False)} does not see the folder of process 0: --out must "
                                "be one folder that all machines share")
    return resume


def _take_folder(out: Path, resume: bool) -> bool:
    """Makes and locks it, and notes in its lock which job began the run; whether to resume."""
    out.mkdir(parents=True, exist_ok=True)
    if str(out) not in LOCKS:
        handle = open(out / ".lock", "a+")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by decoding processes
        except (BlockingIOError, PermissionError):
            raise SettingsError(f"{out}: another run is writing into this folder: wait for it, stop it, or give "
                                "another --out") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            log.warning("%s: its file system has no locks (%s): nothing keeps a second run out", out, error.strerror)
        LOCKS[str(out)] = handle
    lock = LOCKS[str(out)]
    lock.seek(0)
    job = os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("/attempt_")[0]  # torchrun's own folder of this job
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and job != "" and lock.read() == job
    if not resume and not again and (out / "metrics.jsonl").exists():
        raise SettingsError(f"{out} already holds a run: give --resume to go on with it, another --out, or delete it")
    lock.truncate(0)
    lock.write(job)
    lock.flush()
    return resume or again


def check_disk(out: str | Path, keep: int, model: nn.Module) -> None:
    """Raises DiskError without room for what a run of this model writes, in float32. It may have shapes alone."""
    out, state = Path(out), 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # 3: AdamW's moments
    needed = (keep + 1) * state + 4 * sum(p.numel() for p in model.parameters())
    there = [*out.glob("*state-*/*"), *out.glob("model.safetensors")]
    free = shutil.disk_usage(out).free + sum(path.stat().st_size for path in there)
    if needed > free:
        raise DiskError(f"{out}: {gigabytes(needed)} are needed ({keep + 1} states of {gigabytes(state)} and the "
                        f"model), {gigabytes(free)} are free: make room, give another --out or a smaller --keep")


def changed_settings(before: dict, now: dict) -> list[str]:
    """Options that differ between two runs and change what is computed."""
    return sorted(option_name(name) for name in before.keys() & now.keys() - FREE_ON_RESUME
                  if before[name] != now[name])


def changed_data(before: list, now: list) -> str:
    """What differs between two runs' rows of data.jsonl; "" if nothing."""
    if before == now:
        return ""
    before, now = Counter(map(tuple, before)), Counter(map(tuple, now))
    gone, new = before - now, now - before
    if not gone and not new:
        return f"the same {now.total()} examples stand in another order"
    return (f"{gone.total()} of {before.total()} examples are gone or changed, {new.total()} are new or changed, e.g. "
            + next(iter(gone or new))[0])


class Run:
    """A run's logs and states. The main process writes; every process must call each method."""

    def __init__(self, out: str | Path, settings, processes: Processes, total_steps: int, data: list[tuple] = ()):
        """To be made before a model is read. data: the training examples in their order, each a name and all that is
        read of it. Raises SettingsError if a resume changes them, or a setting that it may not."""
        self.out, self.settings, self.processes, self.total_steps = Path(out), settings, processes, total_steps
        self.metrics, self.config, self.data = (self.out / x for x in ("metrics.jsonl", "config.json", "data.jsonl"))
        self.about = provenance(settings)
        self.listed = [[example[0], hashlib.sha256(repr(example).encode()).hexdigest()[:16]] for example in data]
        self.progress, self.first_step, self.interrupted = Progress("training", total_steps, "step"), 0, 0.0
        self.stop, self.tracked, self.skipped, self.in_a_row, self.shown = "", [], 0, 0, 0.0
        problem = self._why_not() if processes.main else ""
        problems, lists = zip(*all_gather_object((problem, self.listed)))
        if problems[0]:
            raise SettingsError(f"{problems[0]}, or give another --out")
        if any(listed != lists[0] for listed in lists):
            raise SettingsError("the processes of this job read different data: every machine needs the same files")

    def _why_not(self) -> str:
        """Why this command does not go on with the run in the folder; "" if it does, or if there is none."""
        steps, states = len(read_jsonl(self.metrics, log=True)) if self.metrics.exists() else 0, saved_states(self.out)
        if not self.settings.resume or not steps and not states:
            return ""
        before = read_json(self.config).get("erv_min", {}).get("settings", {}) if self.config.exists() else {}
        if changed := changed_settings(before, json.loads(json.dumps(self.about["settings"]))):
            return f"{self.config}: this run has other values of {', '.join(changed)}; resume with the same"
        if self.data.exists() and (changed := changed_data(read_jsonl(self.data), self.listed)):
            return f"{self.data}: this run was started on other data: {changed}; resume with the same"
        finished = (self.out / "model.safetensors").exists()
        if not states and (finished or steps > before.get("save_every", steps)):
            return f"{self.metrics}: {steps} steps were made, and the state-* folders are gone: put them back"
        return ""

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
        """Keeps settings and data, and acts on signals from here on; on a resume puts the last state back and cuts the
        logs to it. Returns the steps done."""
        self.policy, self.optimizer = policy, optimizer
        self.about |= {"towers": policy.model.tower_source} if hasattr(policy.model, "tower_source") else {}
        if self.processes.main:
            kept = read_json(self.config) if self.config.exists() else {}
            write_json(self.config, {**kept, "erv_min": self.about})
            write_jsonl(self.data, self.listed)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
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
            rows = [row for row in read_jsonl(path, log=True) if row["step"] < self.first_step]
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
            if step + 1 == self.total_steps or step % 10 == 0 or time.time() - self.shown > 5:
                self.shown = self.progress.last = time.time()
                shown = " ".join(f"{k} {v:.4g}" for k, v in values.items() if k in SHOWN and v is not None)
                print(f"{self.out.name} step {step + 1}/{self.total_steps} {shown} | {self.progress.pace()}", flush=True)
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
