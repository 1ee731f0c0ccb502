"""Is this machine's GPU as fast and as exact as promised? `python scripts/tools/gpu_check.py [PART ...] [--json]`

Prints a line for each part: expected, measured, ok. Each runs in processes of its own; one that fails is a line, too.
About 10 minutes on one card with 22 GB and more.

`--device cpu` runs all parts at toy size: it says that the command works and judges no figure. Status 1: a part missed.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "scripts" / "tools"
TINY = ["--group-size", 3, "--batch-size", 2, "--micro-batch", 2, "--max-new-tokens", 6, "--workers", 0]
WORLD = """import sys
from erv_min.toy.world import WorldSettings, build_world
build_world(sys.argv[1], WorldSettings(train=8, test=4, pretrain=0, sft_clips=5, erv_train=60, erv_valid=20))"""
PROBE = """import json, sys
sys.path.insert(0, sys.argv[1])
import gpu_probes
print(json.dumps(getattr(gpu_probes, sys.argv[2])(sys.argv[3])))"""
MEASURED = """import runpy, sys, torch
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
runpy.run_path(sys.argv[0])["main"]()
print("PEAK", torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)"""


@dataclass
class Machine:
    device: str
    cuda: bool
    folder: Path  # of worlds and runs

    def python(self, *words: object) -> str:
        """What `python WORDS` prints. Raises RuntimeError: the line that names what went wrong, or the last."""
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            lines = ((done.stderr or done.stdout).strip() or "no output").splitlines()
            raise RuntimeError(next((line for line in lines if "Error: " in line), lines[-1]))
        return done.stdout

    def bench(self, name: str, size: str, group: int, tokens: int) -> tuple[dict, dict]:
        """bench.py's rows, ours and transformers': at `size` in bfloat16, or on a CPU at toy size."""
        options = ["--size", size, "--dtype", "bfloat16", "--group", group, "--tokens", tokens]
        if not self.cuda:
            options = ["--group", 3, "--tokens", 4, "--repeats", 1]
        out = self.python(TOOLS / "bench.py", name, "--device", self.device, "--json", *options)
        ours, theirs = map(json.loads, out.splitlines())
        return ours, theirs

    def probe(self, name: str) -> dict[str, float]:
        return json.loads(self.python("-c", PROBE, TOOLS, name, self.device))

    def train(self, script: str, out: str, preset: str, *options: object, start=()) -> tuple[list[dict], int]:
        """metrics.jsonl of a training script from random weights, on a world of eight clips; peak bytes on CUDA.
        `start`: what of torchrun stands before the script."""
        world = self.folder / "world"
        if not world.exists():
            self.python("-c", WORLD, world)
        found = self.python(*(start or ("-c", MEASURED)), ROOT / "scripts" / script, "--preset", preset,
                            "--random-weights", "--world", world, "--device", self.device,
                            "--out", self.folder / out, *options)
        rows = [json.loads(line) for line in (self.folder / out / "metrics.jsonl").read_text().splitlines()]
        if skipped := [row["skipped_because"] for row in rows if "skipped_because" in row]:
            raise RuntimeError(f"skipped steps, the first: {skipped[0]}")
        return rows, 0 if start else int(found.split("PEAK")[-1])


def suite(on: Machine) -> tuple[str, bool]:
    return on.python("-m", "pytest", "-q", "tests/test_cuda.py").strip().splitlines()[-1], True


def gradients(on: Machine) -> tuple[str, bool]:
    found = on.probe("gradients")
    ok = all(gap < (0.01 if name.startswith("sampler") else 0.05) for name, gap in found.items())  # NaN is not
    return ", ".join(f"{name} {gap:.4f}" for name, gap in found.items()), ok


def decode(on: Machine) -> tuple[str, bool]:
    found = on.probe("decode")
    return ("{kernels} kernels, {ms_per_token:.2f} ms a token, sample_token {sample_ms:.2f} ms, rollouts {first:.2f} "
            "and {second:.2f} s".format(**found), found["kernels"] <= 720 and found["ms_per_token"] <= 4)


def pair(on: Machine) -> tuple[str, bool]:
    if on.cuda and torch.cuda.device_count() < 2:
        return "left out: one GPU", True
    size = ["--steps", 4, "--batch-size", 6, "--micro-batch", 3, "--workers", 0, "--sharding", "hand"]
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    one, both = (on.train("sft.py", out, "toy", *size, start=start)[0] for out, start in (("one", ()), ("two", two)))
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, both))
    return f"losses of 4 steps {apart:.1e} apart", len(both) == 4 and apart < 1e-4


def toy(on: Machine) -> tuple[str, bool]:
    steps, size = (40, []) if on.cuda else (2, TINY)
    rows, _ = on.train("grpo.py", "toy", "toy", "--steps", steps, *size)
    return f"{len(rows)} steps, {rows[-1]['seconds']:.2f} s each", len(rows) == steps


def rollout(on: Machine) -> tuple[str, bool]:
    ours, theirs = on.bench("rollout", "0.5b", 16, 512)
    ratio, milliseconds = theirs["ratio_time"], 1e3 * ours["seconds"] / ours["tokens"]
    return f"{ratio:.1f}x transformers, {milliseconds:.2f} ms a token", ratio >= 3


def step(on: Machine) -> tuple[str, bool]:
    ours, theirs = on.bench("step", "0.5b", 16, 256)
    ratio, gib = theirs["ratio_time"], ours["peak_bytes"] / 2**30
    return f"{ratio:.1f}x transformers, {gib:.1f} GiB beside the weights", ratio >= 4


def logps(on: Machine) -> tuple[str, bool]:
    _, theirs = on.bench("logps", "0.5b", 16, 512)
    time_, memory = theirs["ratio_time"], theirs["ratio_memory"]
    return f"{time_:.2f}x the speed, 1/{memory:.1f} of the memory", time_ >= 1 / 1.2 and memory >= 10


def grpo(on: Machine) -> tuple[str, bool]:
    size = ["--group-size", 16, "--batch-size", 4] if on.cuda else TINY
    preset = "paper-0.5b" if on.cuda else "toy"
    _, peak = on.train("grpo.py", "grpo", preset, "--steps", 3, "--save-every", 3, *size)
    rows, _ = on.train("grpo.py", "grpo", preset, "--steps", 4, "--resume", *size)
    table = on.python(TOOLS / "plan.py", "--stage", "grpo", "--gpus", 1, "--gpu", "h200", "--preset", preset, *size)
    planned, gib = float(re.search(r"^peak +([\d.]+) GiB", table, re.MULTILINE)[1]), peak / 2**30
    return (f"{gib:.2f} GiB of {planned:.2f} planned, then step {len(rows)}",
            len(rows) == 4 and abs(gib / planned - 1) <= 0.1 and gib < 22)


def sft(on: Machine) -> tuple[str, bool]:
    rows, _ = on.train("sft.py", "sft", "paper-0.5b" if on.cuda else "toy", "--steps", 9, "--batch-size", 8,
                       "--micro-batch", 8, "--workers", 0, "--cache-features", on.folder / "features")
    return f"{len(rows)} steps over 5 clips, loss {rows[0]['loss']:.2f} to {rows[-1]['loss']:.2f}", len(rows) == 9


def large(on: Machine) -> tuple[str, bool]:
    if on.cuda and torch.cuda.get_device_properties(0).total_memory < 75 * 2**30:
        return "left out: less than 75 GiB", True
    ratio = on.bench("rollout", "7b", 16, 64)[1]["ratio_time"]
    ours, _ = on.bench("step", "7b", 4, 32)
    return f"{ratio:.1f}x transformers, step {ours['seconds']:.1f} s", ratio >= 2


PARTS: dict[str, tuple[str, Callable[[Machine], tuple[str, bool]]]] = {  # name -> what is expected, what measures it
    "suite": ("tests/test_cuda.py passes", suite),
    "gradients": ("bfloat16's within 5% of float32's, sampler_gap under 0.01", gradients),
    "decode": ("<= 720 kernels and 4 ms a token at 0.5B", decode),
    "toy": ("40 GRPO steps of the toy's dimensions", toy),
    "rollout": (">= 3x transformers at 0.5B", rollout),
    "step": (">= 4x transformers at 0.5B", step),
    "logps": (">= 1/1.2 of the speed, <= 1/10 of the memory of transformers' loss on whole logits", logps),
    "grpo": ("paper-0.5b: plan.py's bytes within 10%, under 22 GiB, resumed to step 4", grpo),
    "sft": ("9 steps across epochs, with cached features", sft),
    "pair": ("SFT on two GPUs beside one: losses within 1e-4", pair),
    "7b": ("from 75 GiB on: sampling >= 2x transformers, a step ends", large)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help="; ".join(
        f"{name}: {expected}".replace("%", "%%") for name, (expected, _) in PARTS.items()) + " (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one object a line")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.parts if name not in PARTS]:
        parser.error(f"{', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        on = Machine(given.device, given.device != "cpu", Path(folder))
        if not given.json:
            print(torch.cuda.get_device_name(given.device) if on.cuda else "a CPU, toy size: figures are not judged")
        for name in given.parts or PARTS:
            expected, part = PARTS[name]
            started = time.time()
            try:
                measured, ok = part(on)
                ok = ok or not on.cuda  # a CPU's figures promise nothing
            except Exception as error:  # it is a line, and the next part still runs
                measured, ok = f"{type(error).__name__}: {error}", False
            missed, seconds = missed + (not ok), time.time() - started
            line = {"part": name, "expected": expected, "measured": measured, "ok": ok, "seconds": seconds}
            print(json.dumps(line) if given.json else f"{'ok    ' if ok else 'MISSED'} {name:<10} expected {expected}; "
                  f"measured {measured} ({seconds:.0f} s)", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
