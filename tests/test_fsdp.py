"""Sharding by hand, with real processes on gloo: the same weights as one process and as PyTorch's own fully_shard."""

import copy
import datetime
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_model  # noqa: E402

from erv_min.errors import CheckpointError  # noqa: E402
from erv_min.fsdp import ALIGN, Sharded  # noqa: E402
from erv_min.generate import rollout, sampling_noise  # noqa: E402
from erv_min.grpo import group_advantages, grpo_loss  # noqa: E402
from erv_min.model.humanomni import trainable  # noqa: E402
from erv_min.parallel import FullyShard, Replicated, idle_loss, load_state, save_state  # noqa: E402
from erv_min.plan import Live  # noqa: E402
from erv_min.policy import Completions, Prompts, completion_logps  # noqa: E402
from erv_min.settings import TRAINABLE  # noqa: E402
from erv_min.sft import sft_loss  # noqa: E402

WAYS = {"none": Replicated, "hand": Sharded, "torch": FullyShard}
CLIPS, STEPS, GROUP, LR = 4, 5, 2, 1e-3


def clip_prompts(model, clips: list[int]) -> Prompts:
    """Prompts of these clips: video and audio through towers, gate and projectors, as PromptBuilder makes them."""
    config = model.config
    draw = [torch.Generator().manual_seed(clip) for clip in clips]
    video = torch.stack([torch.randn(4, 3, config.vision.image_size, config.vision.image_size, generator=g) for g in draw])
    audio = torch.stack([torch.randn(config.audio.num_mel_bins, 100, generator=g) for g in draw])
    with torch.no_grad():
        vision, audio = model.vision_features(video), model.audio_features(audio)
    ids = torch.tensor([[5, -201, -202, 7 + clip] for clip in clips])
    return Prompts(*model.prompt_embeds(ids, gate_ids=torch.tensor([[2, 9, 3]]), video_features=vision,
                                        audio_features=audio))


def batch(step: int, rank: int, size: int) -> list[list[int]]:
    """This process's clips of a step, in passes of one clip."""
    return [[clip] for clip in range(step * CLIPS + rank, (step + 1) * CLIPS, size)]


def sft(run, optimizer, steps=range(STEPS), rank=0, size=1, shape=(2, 6)) -> None:
    """Steps of Eq. 2 on `shape` target tokens a clip, one pass a clip."""
    def loss(clips):
        own = [torch.randint(0, 500, shape, generator=torch.Generator().manual_seed(1000 + clip)) for clip in clips]
        targets = Completions(torch.cat(own), torch.ones(len(clips) * shape[0], shape[1], dtype=torch.bool))
        logps, _ = completion_logps(run.model, clip_prompts(run.model, clips), targets)
        return sft_loss(logps, targets.mask, CLIPS * shape[0] * shape[1]) * size
    for step in steps:
        for clips in batch(step, rank, size):
            run(loss, clips).backward()
        update(run, optimizer)


def grpo(run, reference, optimizer, rank=0, size=1) -> list[float]:
    """Steps of Eq. 3: rollouts, advantages of a made-up reward, log-probs of both models, one update; the rewards."""
    means = []
    for step in range(STEPS):
        total = 0.0
        for clips in batch(step, rank, size):
            with run.whole():
                noise = sampling_noise(0, step, clips, GROUP, 8)
                completions = rollout(run.model, clip_prompts(run.model, clips), GROUP, 8, 0, noise)
            rewards = (completions.ids * completions.mask).sum(1).float() / 1000
            total += rewards.sum().item()

            def logps(model):
                return completion_logps(model, clip_prompts(model, clips), completions)[0]

            with torch.no_grad():
                ref = reference(logps, reference.model)

            def loss():
                own = logps(run.model)
                return grpo_loss(own, own.detach(), ref, group_advantages(rewards, GROUP), completions.mask) / CLIPS * size

            run(loss).backward()
        update(run, optimizer)
        means.append(total)
    return means


def update(run, optimizer) -> float:
    norm = run.clip(1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def start(way: str, stage: str, compute: torch.dtype, recompute: bool = False):
    """(run, optimizer) of a tiny HumanOmni with tied embeddings, frozen towers and leftovers."""
    model = tiny_model()
    model.model.recompute = recompute
    trainable(model, TRAINABLE[stage])
    run = WAYS[way](model, compute=compute)
    return run, torch.optim.AdamW(run.parameters().values(), lr=LR, weight_decay=0.0)


def scenario(out: Path, way: str, stage: str, compute: torch.dtype, recompute=False, rank=0, size=1) -> None:
    """Five steps; process 0 keeps the weights."""
    run, optimizer = start(way, stage, compute, recompute)
    if stage == "sft":
        sft(run, optimizer, rank=rank, size=size)
    else:
        frozen = tiny_model().requires_grad_(False)
        master = {"master": compute} if way == "hand" else {}
        grpo(run, WAYS[way](frozen, compute=compute, **master), optimizer, rank, size)
    tensors = {name: p.detach().clone() for name, p in run.tensors()}
    if rank == 0:
        save_file(tensors, out / f"{name_of(way, stage, compute, recompute, size)}.safetensors")


def name_of(way, stage, compute, recompute, size) -> str:
    return f"{way}-{stage}-{str(compute)[6:]}-{'recompute' if recompute else 'keep'}-{size}"


F32, BF16 = torch.float32, torch.bfloat16
SCENARIOS = [("hand", "sft", F32, False), ("hand", "sft", F32, True), ("hand", "grpo", F32, False),
             ("hand", "sft", BF16, True), ("hand", "grpo", BF16, False),
             ("torch", "sft", F32, True), ("torch", "grpo", F32, False), ("torch", "sft", BF16, True)]


# ---- what the processes run ------------------------------------------------------------------------------------------


def job(rank: int, size: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet-{size}", rank=rank, world_size=size,
                            timeout=datetime.timedelta(seconds=120))
    for way, stage, compute, recompute in SCENARIOS:
        t=time.time()
        scenario(out, way, stage, compute, recompute, rank, size)
        if rank == 0: print(size, way, stage, compute, recompute, time.time()-t, flush=True)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every scenario on 1, 2 and 4 processes; the weights lie in the folder."""
    out = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    for stage in ("sft", "grpo"):
        scenario(out, "none", stage, F32)
    for way, stage, compute, recompute in SCENARIOS:
        if way == "hand":
            scenario(out, way, stage, compute, recompute)
    for size in (2, 4):
        mp.spawn(job, (size, out), nprocs=size)
    return out


def apart(runs: Path, one: tuple, other: tuple) -> float:
    """Largest difference of two runs' weights, relative to each tensor's largest weight."""
    a, b = (load_file(runs / f"{name_of(*x)}.safetensors") for x in (one, other))
    assert a.keys() - {"lm_head.weight"} == b.keys() - {"lm_head.weight"}
    return max(((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-3)).item() for k in b.keys() & a.keys())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("way,stage,recompute", [(w, s, r) for w, s, c, r in SCENARIOS if c == F32])
def test_same_weights(runs, way, stage, recompute, size):
    if way == "torch" and size == 1:
        return
    d = apart(runs, ("none", stage, F32, False, 1), (way, stage, F32, recompute, size))
    print(way, stage, recompute, size, d)
    assert d < 1e-5
