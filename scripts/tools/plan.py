"""Will it fit? `python scripts/tools/plan.py --preset paper-7b --gpu a100-80 --gpus 8 [--stage grpo|sft] [settings]`

Prints the bytes that one GPU holds with --sharding hand, and whether they fit; if not, the switches that help. No GPU,
no weights: the sharded step itself runs on PyTorch's fake tensors, which have shapes and no memory, as one process of N
whose collectives do nothing; `Live` adds up the storages that exist. Fake tensors have no values, so prompts and
masks are built here from their shapes. Estimated, not run: CUDA's and NCCL's own memory and fragmentation (RESERVE),
prompt text and target lengths.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from live import Live
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from erv_min.base.chunked import CHUNK_LOGITS, ON_CUDA
from erv_min.base.options import OneLineParser, checked, parser_for, positive, preset_values
from erv_min.base.processes import run_script
from erv_min.base.progress import Progress
from erv_min.config import HumanOmniConfig, humanomni
from erv_min.fsdp import Sharded
from erv_min.generate import sample_token
from erv_min.logps import token_logps
from erv_min.model.attention import GroupCache, PackedGroups
from erv_min.model.humanomni import HumanOmni
from erv_min.model.parameters import freeze_except
from erv_min.train.settings import GRPOSettings, SFTSettings, trained_parts

GPUS = {"3090-24": 24 * 2**30, "a100-40": 40 * 2**30, "a100-80": 80 * 2**30, "h200": 141 * 10**9}
RESERVE = 1.5 * 2**30, 0.05  # CUDA context, NCCL buffers; share of the memory lost to fragmentation
TIGHT = 0.85  # of that room: CUDA's allocator, which holds 10% more than it hands out, may fail
VERIFIER = 125e6 * 4  # RoBERTa base in float32, whole on every GPU
TEXT_TOKENS, TARGET_TOKENS = 128, 256  # of a prompt beside its clip; of an SFT target


@dataclass(frozen=True)
class Plan:
    """Bytes on each GPU. `rollout` and `update` are the peaks of the two halves of a step beside what stays."""

    shards: int
    reference: int
    optimizer: int
    gradients: int
    verifier: int
    rollout_copy: int
    kv_cache: int
    rollout: int  # peak of --rollout-batch prompts: copy, cache, activations of towers, prefill and decoding
    update: int  # peak: gradients, gathered units, activations, logits

    @property
    def stays(self) -> int:
        return self.shards + self.reference + self.optimizer + self.verifier

    @property
    def peak(self) -> int:
        return self.stays + max(self.rollout, self.update)  # AdamW's fused kernel needs nothing beside its state

    def fits(self, memory: int) -> bool:
        return self.peak <= room(memory)


def room(memory: int) -> float:
    """What of a GPU's memory tensors can take."""
    return (memory - RESERVE[0]) * (1 - RESERVE[1])


def plan(config: HumanOmniConfig, settings: GRPOSettings | SFTSettings, gpus: int) -> Plan:
    """Runs a pass of the settings' stage on fake tensors, for a model of these dimensions sharded over `gpus`."""
    def nothing(*_, **__) -> None:  # the other processes' share of a collective; a mock would keep its tensors alive
        pass

    with (FakeTensorMode(), patch("erv_min.base.chunked.CHUNK_LOGITS", CHUNK_LOGITS * ON_CUDA),  # they lie on a CPU
          patch("erv_min.fsdp.rank_and_size", lambda: (0, gpus)), patch("torch.distributed.scatter", nothing),
          patch.multiple("erv_min.fsdp", all_gather=nothing, reduce_scatter=nothing),
          Progress(f"a step on {gpus} GPUs is planned")):
        return _run(config, settings, gpus)


def _run(config: HumanOmniConfig, settings, gpus: int) -> Plan:
    compute = getattr(torch, settings.dtype)
    model = HumanOmni(config)
    model.model.recompute = settings.recompute
    freeze_except(model, trained_parts(settings))
    towers_too = ("model.vision_tower.", "model.audio_tower.")  # which the reference does without
    language = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(towers_too))
    run = Sharded(model, compute=compute)
    grpo = settings.stage == "grpo"
    clips = settings.micro_batch if grpo else max(1, settings.micro_batch // settings.targets_per_clip)
    group = settings.group_size if grpo else settings.targets_per_clip
    length = settings.max_new_tokens if grpo else TARGET_TOKENS
    own = -(-settings.batch_size // gpus)  # a step's prompts of one process
    video = torch.zeros(1, settings.num_frames, 3, *[config.vision.image_size] * 2, dtype=compute)
    audio = torch.zeros(1, config.audio.num_mel_bins, 2 * config.audio.max_source_positions, dtype=compute)
    gate_ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.long)

    def prompts(count: int) -> Tensor:  # [B, P, D]; inputs.embed without its look at ids
        text = model.model.embed_tokens(torch.zeros(count, TEXT_TOKENS, dtype=torch.long))
        vision, sound = model.project_video(features[0][:count], gate_ids), model.project_audio(features[1][:count])
        return torch.cat([vision, sound, text], 1)

    def sample() -> int:
        embeds = prompts(own)[: settings.rollout_batch or own]
        _, kv = model.model(embeds, keep_kv=True)
        cache = GroupCache(kv, torch.ones(embeds.shape[:2], dtype=torch.bool), group, length)
        cache.length += length - 1
        rows = torch.zeros(len(embeds) * group, 1, dtype=torch.long)
        hidden = model.model.decode(model.model.embed_tokens(rows), rows, cache)[:, 0]
        sample_token(hidden @ model.head_weight.T, torch.zeros(len(rows)), settings.temperature)
        return sum(t.nbytes for pairs in (cache.prefix, cache.own) for pair in pairs for t in pair)

    def loss() -> Tensor:  # logps.completion_logps without its look at masks
        hidden, kv = model.model(prompts(clips), keep_kv=True)
        fold = config.text.num_attention_heads // config.text.num_key_value_heads
        mask = kv[0][1].new_zeros(1, 1, fold * (length - 1), hidden.shape[1] + length - 1)
        places = torch.zeros(1, clips * group * (length - 1), dtype=torch.long)
        past = PackedGroups(kv, mask, (clips * group, length - 1), places[0])
        rest, _ = model.model(model.model.embed_tokens(places), places, past)
        hidden = torch.cat([hidden[:, -1].repeat_interleave(group, 0), rest[0]])
        ids = torch.zeros(len(hidden), dtype=torch.long)
        return token_logps(hidden, model.head_weight, ids, with_entropy=grpo)[0].sum()

    with Live() as live, run.unsharded():
        copy = live.now
        towers = model.vision_features(video), model.audio_features(audio)  # of one clip at a time
        features = [x.repeat(max(clips, own), *[1] * (x.dim() - 1)) for x in towers]  # kept for the update
        cache = sample() if grpo else 0
        rollout = grpo * live.peak
    with Live() as live:
        for shard in run.named_parameters().values():
            shard.grad = torch.zeros_like(shard)  # of the passes before, that this one adds to
        with run.forward_pass():
            total = loss()
        total.backward()
        update = live.peak
    size, trained = compute.itemsize, sum(len(p) for p in run.named_parameters().values())
    return Plan(shards=4 * sum(len(u.shard) for u in run.units), reference=grpo * size * language // gpus,
                optimizer=8 * trained, gradients=4 * trained, verifier=int(grpo * VERIFIER),
                rollout_copy=grpo * copy, kv_cache=cache, rollout=rollout, update=update)


def ways_to_fit(config: HumanOmniConfig, settings, gpus: int) -> Iterator[tuple[str, Plan]]:
    """Switches that lower the peak: (what to give, the plan with it), each added to those before it."""
    for switch, name, value in (("--dtype bfloat16", "dtype", "bfloat16"), ("--recompute", "recompute", True),
                                ("--micro-batch 1", "micro_batch", 1), ("--rollout-batch 1", "rollout_batch", 1)):
        if getattr(settings, name, value) == value:
            continue
        settings = replace(settings, **{name: value})
        yield switch, plan(config, settings, gpus)
    yield f"{gpus + 8} GPUs", plan(config, settings, gpus + 8)


KINDS = {"sft": SFTSettings, "grpo": GRPOSettings}
ROWS = {"what stays": "stays", "  parameter shards, float32": "shards", "  reference shards": "reference",
        "  optimizer shards": "optimizer", "  verifier, whole": "verifier", "while it samples": "rollout",
        "  policy, whole": "rollout_copy", "  KV cache": "kv_cache", "while it updates": "update",
        "  gradient shards": "gradients", "peak": "peak"}


def show(p: Plan, gpu: str, gpus: int) -> str:
    lines = [f"{title:<34}{getattr(p, name) / 2**30:8.2f} GiB" for title, name in ROWS.items() if getattr(p, name)]
    lines.append(f"{'room on ' + gpu:<34}{room(GPUS[gpu]) / 2**30:8.2f} GiB, after {RESERVE[0] / 2**30:g} GiB for "
                 f"CUDA and {RESERVE[1]:.0%} for fragmentation")
    verdicts = [f"{'FITS' if p.fits(GPUS[name]) else 'DOES NOT FIT'} on {gpus} x {name}"
                for name in sorted(GPUS, key=lambda name: name != gpu)]
    if p.fits(GPUS[gpu]) and p.peak > TIGHT * room(GPUS[gpu]):
        verdicts.insert(1, "tight: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
                        + ", and give --rollout-batch 1" * (p.rollout > p.update))
    return "\n".join([*lines, *verdicts])


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(add_help=False)
    parser.add_argument("--stage", choices=KINDS, default="grpo", help="whose settings these are [grpo]")
    stage = parser.parse_known_args(argv)[0].stage
    parser = parser_for(KINDS[stage], __doc__, parents=[parser])
    parser.add_argument("--gpu", choices=GPUS, default="a100-80", help="[a100-80]")
    parser.add_argument("--gpus", type=positive, default=8, help="number of GPUs [8]")
    own = parser.parse_args(argv)
    given = {"preset": "paper-7b", "out": "."} | vars(own)  # nothing is written
    values = preset_values(KINDS[stage], given["preset"])
    settings = checked(parser, KINDS[stage], {name: given.get(name, value) for name, value in values.items()})
    config = humanomni(settings.preset.removeprefix("paper-"))
    targets = f"targets of {TARGET_TOKENS}"
    if own.stage == "grpo":
        sampled = f"{settings.rollout_batch or 'all'} sampled at once"
        targets = f"{settings.batch_size} per step, {sampled}, G {settings.group_size} of {settings.max_new_tokens}"
    print(f"{settings.preset} {own.stage} on {own.gpus} x {own.gpu}: micro batch {settings.micro_batch}, prompts of "
          f"{config.video_tokens + config.audio_tokens + TEXT_TOKENS} tokens, {targets}, {settings.dtype}, "
          f"recomputation {'on' if settings.recompute else 'off'}")
    first = plan(config, settings, own.gpus)
    print(show(first, own.gpu, own.gpus))
    if first.fits(GPUS[own.gpu]):
        return 0
    print("what helps, one after the other (logits are in chunks already):")
    for switch, p in ways_to_fit(config, settings, own.gpus):
        fits = p.fits(GPUS[own.gpu])
        print(f"  {switch}: peak {p.peak / 2**30:.2f} GiB{', fits' if fits else ''}", flush=True)
        if fits:
            return 1
    print("  with all of these it does not fit: take a GPU with more memory")
    return 1


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
