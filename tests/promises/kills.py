"""Kills training runs with SIGKILL at random moments, resumes them, and compares the end with a run that was left alone.

    python tests/promises/kills.py FOLDER [--stages sft,erv,grpo,sft2] [--kills 20] [--seed 0] [--broken]

The stage scripts run as real processes, forked from this one (so that torch is imported once), on clips rendered here.
Moments: a time drawn evenly over the run; a random one of the run's operations on files; such a one while a state is
written; SIGTERM. sft2 is SFT on two processes with --sharding hand, of which one is killed. `--broken` leaves the
sampling state out (noise, data order and dropout from a generator that starts anew with the process): the end must
differ. Prints a JSON report.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from erv_min.train import hooks
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

TIMED = ("tokens_per_s", "seconds", "seconds_rollout", "examples_per_s")
STOPPED = 75
WATCHED = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "open", "zlib.crc32")
STAGES = {
    "sft": ["--steps", "14", "--batch-size", "4", "--micro-batch", "2", "--targets-per-clip", "2", "--save-every", "3",
            "--workers", "0"],
    "erv": ["--steps", "90", "--batch-size", "16", "--save-every", "7", "--dropout", "0.1"],
    "grpo": ["--steps", "8", "--batch-size", "4", "--micro-batch", "2", "--group-size", "4", "--max-new-tokens", "16",
             "--mu", "2", "--eval-clips", "-1", "--save-every", "2", "--sample-every", "1", "--workers", "1"],
}
STAGES["sft2"] = [*STAGES["sft"], "--sharding", "hand"]


def prepare(folder: Path) -> None:
    """Eight clips with their annotations, a policy and a verifier with random weights."""
    from erv_min.checkpoint import save_erv, save_humanomni
    from erv_min.config import humanomni
    from erv_min.emotions import ERV_LABELS
    from erv_min.erv import scratch
    from erv_min.model.parameters import random_humanomni
    from erv_min.tokenizer import EncoderTokenizer
    from erv_min.toy.world import WorldSettings, build_world

    build_world(folder, WorldSettings(train=8, test=4, pretrain=4, sft_clips=6, resamples=2, erv_train=60, erv_valid=12),
                workers=1)
    save_humanomni(random_humanomni(humanomni("toy"), 0), folder / "base")
    for path in [*(folder / "tokenizers/lm").iterdir(), folder / "tokenizers/text_gate"]:
        os.symlink(path, folder / "base" / path.name)
    tokenizer = folder / "tokenizers/erv"
    torch.manual_seed(0)
    save_erv(scratch("toy", EncoderTokenizer(tokenizer).vocab_size, len(ERV_LABELS)), folder / "verifier", ERV_LABELS)
    for path in tokenizer.iterdir():
        os.symlink(path, folder / "verifier" / path.name)


# ---- in the process that is killed -----------------------------------------------------------------------------------


def count_operations(out: Path, kill_at: int, writing_only: bool) -> None:
    """Counts operations on files of `out` and tensors written; SIGKILL at number `kill_at`; OUT.operations: all of them."""
    from erv_min.base import weights
    from erv_min.train import folder
    counts, inside = [0, 0], [False]  # all; while a state is written

    def operation(event: str, arguments: tuple) -> None:
        path = arguments[0] if arguments else ""
        if event not in WATCHED or event != "zlib.crc32" and not str(path).startswith(str(out)):
            return
        counts[0], counts[1] = counts[0] + 1, counts[1] + inside[0]
        if counts[writing_only] == kill_at and (inside[0] or not writing_only):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(operation)
    crc32, save_state = weights.zlib.crc32, folder.save_state

    class Zlib:
        @staticmethod
        def crc32(*arguments):
            operation("zlib.crc32", ())
            return crc32(*arguments)

    def saving(*arguments):
        inside[0] = True
        save_state(*arguments)
        inside[0] = False
        if not kill_at:
            Path(f"{out}.operations").write_text(json.dumps(counts))

    weights.zlib, folder.save_state = Zlib, saving


def break_sampling(script) -> None:
    """The sampling state left out: what should be a function of seed and step comes from a generator of the process."""
    generator, manual_seed = torch.Generator().manual_seed(5), torch.manual_seed
    if script.__name__ == "grpo":
        hooks.sampling_noise = lambda seed, step, prompts, group, length: torch.rand(
            len(prompts) * group, length, generator=generator, dtype=torch.float64)
    elif script.__name__ == "erv":
        script.batch_of_step = lambda count, size, seed, step: torch.randint(count, (size,), generator=generator).tolist()
    else:
        hooks.item_at = functools.cache(lambda place, count, *_: int(torch.randint(count, (), generator=generator)))
    if script.__name__ == "erv":
        manual_seed(5)
        torch.manual_seed = lambda seed: generator


def stage(name: str, folder: Path, out: Path, kill_at: int, writing_only: bool, broken: bool) -> None:
    """Runs a stage script's main in this process."""
    kind = name.rstrip("2")
    script = importlib.import_module(kind)
    count_operations(out, kill_at, writing_only)
    if broken:
        break_sampling(script)
    arguments = [*STAGES[name], "--world", str(folder), "--out", str(out), "--resume"]
    if kind != "erv":
        arguments += ["--model", str(folder / "base")]
    if kind == "grpo":
        score = hooks.score_completions
        arguments += ["--erv", str(folder / "verifier")]

        def by_letter(texts, *rest, **options):  # a policy that knows nothing earns nothing: pay for something it can do
            rewards = score(texts, *rest, **options)
            for text, reward in zip(texts, rewards):
                reward.total += text.count("e") / (1 + len(text))
            return rewards
        hooks.score_completions = by_letter
    script.main(arguments)


# ---- in the process that kills ---------------------------------------------------------------------------------------


class Job:
    """A run of a stage on one or two processes; `log` is what they print."""

    def __init__(self, log: Path, processes: int, *arguments):
        environment, self.log = {}, log
        if processes > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
        self.pids = [self._fork({**environment, **({"RANK": str(r)} if environment else {})}, *arguments)
                     for r in range(processes)]
        self.codes = {}

    def _fork(self, environment: dict, function, *arguments) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            with open(self.log, "a") as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            os.environ.update(environment)
            function(*arguments)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)

    def wait(self, seconds: float = 1e9) -> bool:
        """Whether all ended within the time; as soon as one is killed, the others are, as torchrun does."""
        end = time.time() + seconds
        while len(self.codes) < len(self.pids):
            for pid in set(self.pids) - set(self.codes):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
            if self.codes and set(self.codes.values()) - {0, STOPPED}:
                self.send(signal.SIGKILL)
            if time.time() > end:
                return False
            time.sleep(0.005)
        return True

    def send(self, number: int, pids=()) -> None:
        for pid in pids or set(self.pids) - set(self.codes):
            with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
                os.kill(pid, number)


def rows(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if k not in TIMED} for row in found]


def differences(a: Path, b: Path) -> list[str]:
    """What differs between the ends of two runs: weights, optimizer state, metrics, completions."""
    found = []
    for name in ("metrics.jsonl", "completions.jsonl", "epochs.jsonl"):
        if rows(a / name) != rows(b / name):
            found.append(name)
    steps = [row["step"] for row in rows(b / "metrics.jsonl")]
    if steps != list(range(len(steps))):
        found.append(f"steps {steps}")
    last = max(path.name for path in a.glob("state-*"))  # the one before may be SIGTERM's
    states = [path.relative_to(a) for path in sorted(a.glob(f"{last}/*.safetensors"))]
    if last != max(path.name for path in b.glob("state-*")) or len(list(b.glob("state-*"))) != 2:
        found.append("names of states")
    for name in [Path("model.safetensors"), *states]:
        one, two = (load_file(x / name) if (x / name).exists() else {} for x in (a, b))
        apart = [k for k in one.keys() | two.keys() if k not in one or k not in two or not torch.equal(one[k], two[k])]
        if apart or not one:
            found.append(f"{name}: {len(apart)} tensors, e.g. {apart[:1]}")
    leftovers = [path.name for path in b.glob(".*") if path.name != ".lock"]
    return found + ([f"left behind: {leftovers}"] if leftovers else [])


def trial(name: str, folder: Path, kills: int, rng: random.Random, broken: bool) -> dict:
    """`kills` kills of one stage, at most five in one run; each run is resumed to its end and compared."""
    processes = 2 if name.endswith("2") else 1
    whole, log = folder / f"{name}-whole", folder / f"{name}.log"
    began = time.time()
    job = Job(log, processes, stage, name, folder / "world", whole, 0, False, broken)
    job.wait()
    seconds = time.time() - began
    assert set(job.codes.values()) == {0}, log.read_text()[-3000:]
    operations = json.loads(Path(f"{whole}.operations").read_text())
    landed, found, runs = Counter(), [], 0
    while sum(landed.values()) < kills:
        out, runs, in_this_run = folder / f"{name}-{runs}", runs + 1, 0
        while True:
            kind = rng.choice(("time", "operation", "writing", "SIGTERM"))
            if broken:  # where there is a state to go on from: a start from nothing would hide what is left out
                kind = "writing"
            if in_this_run == 5 or sum(landed.values()) == kills:
                kind = "none"
            number = {"operation": rng.randint(1, operations[0]),
                      "writing": rng.randint(operations[1] // 2 if broken else 1, operations[1])}.get(kind, 0)
            job = Job(log, processes, stage, name, folder / "world", out, number, kind == "writing", broken)
            if kind in ("time", "SIGTERM") and not job.wait(rng.uniform(0, seconds)):
                if kind == "SIGTERM":
                    job.send(signal.SIGTERM)
                else:
                    job.send(signal.SIGKILL, [rng.choice(job.pids)])
            job.wait()
            codes = set(job.codes.values())
            if codes == {0}:
                break
            alone = codes - {1} if processes > 1 and codes & {-signal.SIGKILL, -signal.SIGTERM} else codes  # 1: left alone
            if alone - {0, STOPPED, -signal.SIGKILL, -signal.SIGTERM}:
                raise SystemExit(f"{name}: a process ended with {codes}: {log.read_text()[-3000:]}")
            landed[kind] += 1
            in_this_run += 1
        found.append(differences(whole, out))
    return {"kills": dict(landed), "runs": runs, "differences": [x for x in found if x], "seconds": round(time.time() - began)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", default="sft,erv,grpo,sft2")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--broken", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "world/verifier").exists():
        making = Job(args.folder / "prepare.log", 1, prepare, args.folder / "world")
        making.wait()
        assert set(making.codes.values()) == {0}, making.log.read_text()
    for part in ("sft", "erv", "grpo"):
        importlib.import_module(part)
    report = {"seed": args.seed}
    for name in args.stages.split(","):
        report[name] = trial(name, args.folder, args.kills, random.Random(f"{args.seed} {name}"), args.broken)
        print(name, report[name], file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))
