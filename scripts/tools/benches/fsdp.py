"""Sharding by hand (erv_min/fsdp.py) against PyTorch's fully_shard: time and peak memory of one training step.

`python scripts/tools/benches/fsdp.py [--size toy|0.5b|7b] [--group G] [--new-tokens T] [--dtype ...] [--processes N]`

Both ways in one run on the same processes, taking turns step by step, so that whatever else the machine does meets
both: nccl where each process has a GPU, else gloo with one thread per process. A step is the policy's half of GRPO or
SFT on one clip per process: log-probs of G targets on a shared prompt, backward, clipping, AdamW; units, types and
recomputation are the same. `toy` has the toy model's towers and a language model of 6 layers of width 384: 20 M parameters.
Memory is counted where no step is timed: on CUDA by its allocator, on the CPU as the storages that exist (plan.Live).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[i]) for i in (3, 1)]

from erv_min.base.processes import leave
from erv_min.config import HumanOmniConfig, humanomni
from erv_min.logps import Completions, Prompts, completion_logps
from erv_min.model.humanomni import freeze_except, random_humanomni
from erv_min.train.sharding import shard
from plan import Live

WAYS = ("hand", "torch")
PROMPT = 64  # tokens


def dimensions(size: str) -> HumanOmniConfig:
    config = humanomni(size)
    if size == "toy":
        text = replace(config.text, hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
        config = replace(config, text=text)
    return config


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """One row a way and a setting of recomputation: median seconds of a step, peak bytes of process 0, and how many
    times faster and smaller than fully_shard by hand is."""
    get = vars(options).get
    given = {"size": get("size") or "toy", "group": get("group") or 8, "new_tokens": get("new_tokens") or 64,
             "dtype": get("dtype") or "float32", "processes": get("processes") or 2, "steps": get("steps") or 20}
    gpus = 0 if get("device") == "cpu" else torch.cuda.device_count()
    given["device"] = "cuda" if gpus >= given["processes"] else "cpu"
    for recompute in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_process, (folder, given, recompute), nprocs=given["processes"])
            found = json.loads(Path(folder, "found.json").read_text())
        other = found["torch"]
        for way in ("torch", "hand"):
            seconds, peak = found[way]["seconds"], found[way]["peak_bytes"]
            yield {"bench": "fsdp", "variant": {"hand": "ours", "torch": "fully_shard"}[way], **given,
                   "recompute": recompute, "parameters": found["parameters"], "seconds": seconds, "peak_bytes": peak,
                   "ratio_time": other["seconds"] / seconds if way == "hand" else None,
                   "ratio_memory": other["peak_bytes"] / peak if way == "hand" else None}


def _process(rank: int, folder: str, given: dict, recompute: bool) -> None:
    device = torch.device(given["device"], rank) if given["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", f"file://{folder}/meet", rank=rank,
                            world_size=given["processes"])
    config, dtype = dimensions(given["size"]), getattr(torch, given["dtype"])
    draw = torch.Generator().manual_seed(rank)
    embeds = torch.randn(1, PROMPT, config.text.hidden_size, generator=draw).to(device, dtype)
    prompts = Prompts(embeds, torch.ones(1, PROMPT, dtype=torch.bool, device=device))
    ids = torch.randint(config.text.vocab_size, (given["group"], given["new_tokens"]), generator=draw).to(device)
    targets = Completions(ids, torch.ones_like(ids, dtype=torch.bool))

    def build(way: str):
        model = random_humanomni(config, device="cpu")
        model.model.recompute = recompute
        freeze_except(model, "language_model")
        run = shard(model, way, device, dtype)
        return run, torch.optim.AdamW(run.named_parameters().values(), lr=1e-4)

    def backward(run) -> None:
        with run.forward_pass():
            loss = -completion_logps(run.model, prompts, targets)[0].mean()
        loss.backward()

    def finish(run, optimizer) -> None:
        run.clip_gradients(1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    pairs, times, found = {way: build(way) for way in WAYS}, {way: [] for way in WAYS}, {}
    found["parameters"] = sum(shape.numel() for shape in pairs["hand"][0].full_shapes().values())
    for step in range(given["steps"] + 3):  # three to warm up
        for way in WAYS if step % 2 else reversed(WAYS):
            dist.barrier()
            started = time.perf_counter()
            backward(pairs[way][0])
            finish(*pairs[way])
            times[way].append(time.perf_counter() - started)
    pairs.clear()
    for way in WAYS:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        with Live() as live:
            run, optimizer = build(way)
            backward(run)
            finish(run, optimizer)  # from now on there is the optimizer's state
            live.peak = 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            backward(run)
            finish(run, optimizer)
            peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else live.peak
        found[way] = {"seconds": statistics.median(times[way][3:]), "peak_bytes": peak}
        del run, optimizer
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("toy", "0.5b", "7b"), default="toy")
    parser.add_argument("--group", type=int, default=8, help="targets a prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens a target")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("", "cpu", "cuda"), default="")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each way")
    for row in measure(parser.parse_args()):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
