"""A long GRPO run on the toy world: memory, open files, processes and speed, at its start and at its end.

    python tests/promises/soak.py FOLDER [--steps 2000]      (about 0.15 s a step on one thread)
"""

import argparse
import importlib
import json
import os
import statistics
import time
from pathlib import Path

import kills
import torch

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "world/verifier").exists():
        kills.prepare(folder / "world")
    grpo, seen, page = importlib.import_module("grpo"), [], os.sysconf("SC_PAGESIZE") / 2**20
    log = grpo.Run.log

    def measured(run, step, values):
        log(run, step, values)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        seen.append((time.perf_counter(), int(Path("/proc/self/statm").read_text().split()[1]) * page,
                     len(os.listdir("/proc/self/fd")), len(children)))

    grpo.Run.log = measured
    kills.STAGES["grpo"] = ["--steps", str(args.steps), "--batch-size", "2", "--group-size", "4", "--max-new-tokens", "8",
                            "--eval-clips", "-1", "--save-every", "200", "--workers", "1"]
    kills.stage("grpo", folder / "world", folder / f"run-{int(time.time())}", 0, False, False)
    few = args.steps // 10
    seconds = [b[0] - a[0] for a, b in zip(seen, seen[1:])]
    warm, last = ([row[1] for row in part] for part in (seen[few : 2 * few], seen[-few:]))
    print(json.dumps({
        "steps": len(seen), "memory_after_warm_up_mb": round(statistics.mean(warm), 1), "memory_at_the_end_mb":
        round(statistics.mean(last), 1), "growth_percent": round(100 * (statistics.mean(last) / statistics.mean(warm) - 1), 2),
        "open_files": [min(row[2] for row in seen[few:]), max(row[2] for row in seen[few:])],
        "processes": [min(row[3] for row in seen[few:-few]), max(row[3] for row in seen[few:-few])],
        "seconds_a_step_first": round(statistics.median(seconds[few : 2 * few]), 4),
        "seconds_a_step_last": round(statistics.median(seconds[-few:]), 4)}, indent=1))
