"""Sharding by hand, with real processes on gloo: the same weights as one process and as PyTorch's own fully_shard."""

import copy
import datetime
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from erv_min.base.errors import CheckpointError, ClipError, SettingsError
from erv_min.base.options import preset_values
from erv_min.base.processes import join_processes, leave, run_script
from erv_min.config import humanomni
from erv_min.fsdp import ALIGN, Sharded
from erv_min.generate import rollout, sampling_noise
from erv_min.grpo import group_advantages, grpo_loss
from erv_min.logps import Completions, Prompts, completion_logps
from erv_min.model.parameters import freeze_except, random_humanomni
from erv_min.sft import sft_loss
from erv_min.train.settings import TRAINABLE, GRPOSettings, SFTSettings, trained_parts
from erv_min.train.sharding import FullyShard, Replicated
from erv_min.train.state import load_state, save_state

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "tools"))
from live import Live  # noqa: E402
from plan import GPUS, RESERVE, TARGET_TOKENS, TEXT_TOKENS, plan, show, ways_to_fit  # noqa: E402

WAYS = {"none": Replicated, "hand": Sharded, "torch": FullyShard}
CLIPS, STEPS, GROUP, LR = 4, 5, 2, 1e-3


def tower_features(model, clips: list[int]) -> list[torch.Tensor]:
    """What the frozen towers say of these clips."""
    config = model.config
    draw = [torch.Generator().manual_seed(clip) for clip in clips]
    video = torch.stack([torch.randn(4, 3, *[config.vision.image_size] * 2, generator=g) for g in draw])
    audio = torch.stack([torch.randn(config.audio.num_mel_bins, 100, generator=g) for g in draw])
    with torch.no_grad():
        return [model.vision_features(video), model.audio_features(audio)]


def clip_prompts(model, clips: list[int], features=None) -> Prompts:
    """Prompts of these clips through gate and projectors, as `inputs.embed` makes them; the towers run if they must."""
    vision, audio = features or tower_features(model, clips)
    ids = torch.tensor([[5, -201, -202, 7 + clip] for clip in clips])
    return model.prompt_embeds(ids, vision, audio, torch.tensor([[2, 9, 3]]))


def batch(step: int, rank: int, size: int) -> list[list[int]]:
    """This process's clips of a step, in passes of one clip."""
    return [[clip] for clip in range(step * CLIPS + rank, (step + 1) * CLIPS, size)]


def sft(run, optimizer, steps=range(STEPS), rank=0, size=1, shape=(2, 6)) -> None:
    """Steps of Eq. 2 on `shape` target tokens per clip, one pass per clip."""
    for step in steps:
        for clips in batch(step, rank, size):
            own = [torch.randint(0, 500, shape, generator=torch.Generator().manual_seed(1000 + clip)) for clip in clips]
            targets = Completions(torch.cat(own), torch.ones(len(clips) * shape[0], shape[1], dtype=torch.bool))
            with run.forward_pass():
                logps, _ = completion_logps(run.model, clip_prompts(run.model, clips), targets)
            (sft_loss(logps, targets.mask, CLIPS * shape[0] * shape[1]) * size).backward()
        update(run, optimizer)


def grpo(run, reference, optimizer, rank=0, size=1) -> None:
    """Steps of Eq. 3: rollouts, advantages of a made-up reward, log-probs of both models, one update."""
    for step in range(STEPS):
        for clips in batch(step, rank, size):
            with run.unsharded():
                noise = sampling_noise(0, step, clips, GROUP, 8)
                completions = rollout(run.model, clip_prompts(run.model, clips), GROUP, 8, 0, noise)
            rewards = (completions.ids * completions.mask).sum(1).float() / 1000

            def logps(model):
                return completion_logps(model, clip_prompts(model, clips), completions)[0]

            with torch.no_grad(), reference.forward_pass():
                ref = logps(reference.model)
            with run.forward_pass():
                own = logps(run.model)
            loss = grpo_loss(own, own.detach(), ref, group_advantages(rewards, GROUP), completions.mask)
            (loss / CLIPS * size).backward()
        update(run, optimizer)


def update(run, optimizer) -> float:
    norm = run.clip_gradients(1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def start(way: str, stage: str, compute: torch.dtype, recompute: bool = False):
    """(run, optimizer) of a tiny HumanOmni with tied embeddings, frozen towers and unused parameters."""
    model = random_humanomni(humanomni("toy"))
    model.model.recompute = recompute
    freeze_except(model, TRAINABLE[stage])
    run = WAYS[way](model, compute=compute)
    # eps lies above rounding noise, which Adam would blow up where a gradient is zero by symmetry (k_proj.bias: softmax
    # does not see a shift of all keys).
    return run, torch.optim.AdamW(run.named_parameters().values(), lr=LR, weight_decay=0.0, eps=1e-4)


def scenario(out: Path, way: str, stage: str, compute: torch.dtype, recompute=False, rank=0, size=1) -> None:
    """Five steps; process 0 keeps the weights."""
    run, optimizer = start(way, stage, compute, recompute)
    if stage == "sft":
        sft(run, optimizer, rank=rank, size=size)
    else:
        frozen = random_humanomni(humanomni("toy")).requires_grad_(False)
        grpo(run, WAYS[way](frozen, compute=compute), optimizer, rank, size)
    keep(run, rank, out / f"{name_of(way, stage, compute, recompute, size)}.safetensors")


def keep(run, rank: int, path: Path) -> None:
    tensors = {name: p.detach().clone() for name, p in run.full_tensors()}
    if rank == 0:
        save_file(tensors, path)


def name_of(way, stage, compute, recompute, size) -> str:
    return f"{way}-{stage}-{str(compute)[6:]}-{'recompute' if recompute else 'keep'}-{size}"


F32, BF16 = torch.float32, torch.bfloat16
HAND = [("hand", "sft", F32, True), ("hand", "grpo", F32, False), ("hand", "sft", BF16, True)]
SCENARIOS = {1: [*HAND, ("hand", "sft", F32, False), ("hand", "grpo", BF16, False)],
             2: [*HAND, ("hand", "sft", F32, False), ("hand", "grpo", BF16, False)],
             4: HAND}
FULLY_SHARD = not torch.__version__.startswith("2.6.")  # of that version it does not run on a CPU
if FULLY_SHARD:
    SCENARIOS[2] += [("torch", "sft", F32, True), ("torch", "grpo", F32, False), ("torch", "sft", BF16, True)]


# ---- awkward models --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Nothing divides by 2 or 4, and one parameter has no use."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.unused = nn.Linear(7, 5), nn.Linear(5, 7), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))


class Odd(nn.Module):
    """Tied ends; block 0 runs twice, block 1 is frozen with gradients passing through, block 2 is frozen in part, block
    3 has no use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 7), nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.blocks[1].requires_grad_(False)
        self.blocks[2].inner.requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in (self.blocks[0], self.blocks[0], self.blocks[1], self.blocks[2]):
            x = block(x)
        return self.head(x)


def odd(run, steps: int = 3, rank: int = 0, size: int = 1) -> list[float]:
    """Steps on eight samples in two passes a process; the norms before clipping to 0.5."""
    optimizer, norms = torch.optim.SGD(run.named_parameters().values(), lr=1.0), []
    for step in range(steps):
        ids = torch.arange(step, step + 8) * 3 % 11
        for half in ids[rank::size].chunk(2):
            with run.forward_pass():
                loss = nn.functional.cross_entropy(run.model(half), (half + 1) % 11, reduction="sum")
            (loss / 8 * size).backward()
        norms.append(run.clip_gradients(0.5))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norms


class Stack(nn.Module):
    """16 equal layers: what is held shows in whole layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(16))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.sum()


LAYER = 128 * 128 * 4


def forward(run, x: torch.Tensor) -> torch.Tensor:
    with run.forward_pass():
        return run.model(x)


def held(size: int) -> dict[str, float]:
    """Bytes in layers: parameters between passes; the most in a forward pass; the most in a training pass."""
    out, x = {}, torch.ones(1, 128)
    run = Sharded(Stack(), compute=F32)
    out["stays"] = sum(p.untyped_storage().nbytes() for p in run.model.parameters()) / LAYER
    with torch.no_grad(), Live() as live:
        forward(run, x)
    out["forward"] = live.peak / LAYER
    with Live() as live:
        forward(run, x).backward()
    out["training"] = live.peak / LAYER
    return out


# ---- what the processes run ------------------------------------------------------------------------------------------


def job(rank: int, out: Path) -> None:
    """One of four processes, which first work as two and then as four."""
    torch.set_num_threads(1)
    for size in (2, 4):
        if rank >= size:
            continue
        dist.init_process_group("gloo", init_method=f"file://{out}/meet-{size}", rank=rank, world_size=size,
                                timeout=datetime.timedelta(seconds=200))
        work(out, rank, size)
        if size == 4:
            leave()
        dist.barrier()
        dist.destroy_process_group()


def work(out: Path, rank: int, size: int) -> None:
    """Everything that one number of processes does; process 0 leaves files."""
    for case in SCENARIOS[size]:
        scenario(out, *case, rank, size)
    model = Odd()
    if rank:
        model.to("meta")  # process 0 gives the weights
        model.head.weight = model.embed.weight
    run = Sharded(model, compute=F32)
    norms = odd(run, rank=rank, size=size)
    keep(run, rank, out / f"odd-{size}.safetensors")
    bytes_held = held(size)
    gradients = shared_prefix_gradients(rank, size)
    if rank == 0:
        torch.save({"norms": norms, "held": bytes_held, "gradients": gradients}, out / f"numbers-{size}")
    # A state that goes 2 -> 4 -> 1 processes: two steps, one, two.
    if size > 1:
        run, optimizer = start("hand", "sft", F32)
        first = load_state(out / "run", run, optimizer)
        assert first == (0 if size == 2 else 2)
        last = 2 if size == 2 else 3
        sft(run, optimizer, range(first, last), rank, size)
        save_state(out / "run", last, run, optimizer)
    # Completions of one token each on process 1 alone: its second half of a pass has no token, and gathers all of it.
    if size == 2:
        run, optimizer = start("hand", "sft", F32, recompute=True)
        unequal(run, [rank], 2)
        optimizer.step()
        keep(run, rank, out / "unequal-2.safetensors")


def prefix_loss(model, clips: list[int], shared: bool) -> torch.Tensor:
    """- sum of log-probs of three completions per clip, on one prompt per clip or on one per completion."""
    own = [torch.randint(0, 500, (3, 5), generator=torch.Generator().manual_seed(clip)) for clip in clips]
    mask = torch.arange(5) < torch.tensor([5, 3, 1] * len(clips))[:, None]
    prompts = clip_prompts(model, clips)
    if not shared:
        prompts = Prompts(prompts.embeds.repeat_interleave(3, 0), prompts.mask.repeat_interleave(3, 0))
    return -completion_logps(model, prompts, Completions(torch.cat(own), mask))[0].sum()


def shared_prefix_gradients(rank: int, size: int) -> dict[str, torch.Tensor]:
    """Gradients of four clips, spread over the processes, with shared prompts and shards; on process 0 in full."""
    run, _ = start("hand", "grpo", F32, recompute=True)
    with run.forward_pass():
        loss = prefix_loss(run.model, list(range(rank, 4, size)), True)
    (loss * size).backward()
    for unit in run.units:  # what `full_tensors` collects: the gradients in place of the weights
        if unit.shard.requires_grad:
            unit.shard.data = unit.shard.grad
    trained = {name for unit in run.units if unit.shard.requires_grad for name in unit.names}
    return {name: g.clone() for name, g in run.full_tensors() if name in trained}


def unequal(run, clips: list[int], size: int) -> None:
    """A pass per clip: clip 0 has completions of three tokens, clip 1 of one."""
    for clip in clips:
        ids = torch.tensor([[clip + 3, clip + 4, 5], [clip + 4, clip + 3, 5]])[:, : 3 if clip == 0 else 1]
        with run.forward_pass():
            loss = -completion_logps(run.model, clip_prompts(run.model, [clip]), Completions(ids, ids > 0))[0].sum()
        (loss / 8 * size).backward()
    run.clip_gradients(1.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every scenario on 1, 2 and 4 processes; the weights lie in the folder."""
    out = tmp_path_factory.mktemp("fsdp")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for stage in ("sft", "grpo"):
        scenario(out, "none", stage, F32)
    mp.spawn(job, (out,), nprocs=4)
    work(out, 0, 1)
    torch.set_num_threads(threads)
    return out


def apart(one: Path, other: Path) -> float:
    """|a - b| / |a| of the tensor where two runs differ most."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / a[k].norm().clamp(min=1e-4)).item() for k in a)


# ---- the same weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size,way,stage,recompute",
                         [(n, w, stage, r) for n, cases in SCENARIOS.items() for w, stage, c, r in cases if c == F32])
def test_float32_weights_do_not_depend_on_the_processes(runs, size, way, stage, recompute):
    alone = runs / f"{name_of('none', stage, F32, False, 1)}.safetensors"
    assert apart(alone, runs / f"{name_of(way, stage, F32, recompute, size)}.safetensors") < 1e-5


def moved_apart(runs: Path, one: tuple, other: tuple) -> float:
    """Distance of two runs' weights relative to the distance that training moved them, over all weights."""
    first = {name: p.detach() for name, p in random_humanomni(humanomni("toy")).named_parameters()}
    a, b = (load_file(runs / f"{name_of(*x)}.safetensors") for x in (one, other))
    between, moved = (sum((a[k] - y[k]).square().sum().item() for k in a) ** 0.5 for y in (b, first))
    return between / moved


# bfloat16 keeps 8 bits, so a gradient of one pass is off by 2^-9 = 0.2% an element; more processes and PyTorch's own
# sum the same gradients in another order and type. Five steps of it, measured: 0.4% of the way for SFT. Against float32
# the activations are rounded as well: 3%. A GRPO run may also sample another token where two are equally likely:
# measured 0.6% without one, 10% with one. Runs that had nothing in common would stand 1.4 apart.
@pytest.mark.parametrize("one,other,most", [
    (("hand", "sft", BF16, True, 1), ("hand", "sft", BF16, True, 2), 0.02),
    (("hand", "sft", BF16, True, 1), ("hand", "sft", BF16, True, 4), 0.02),
    pytest.param(("torch", "sft", BF16, True, 2), ("hand", "sft", BF16, True, 2), 0.02,
                 marks=pytest.mark.skipif(not FULLY_SHARD, reason="fully_shard on a CPU from torch 2.7 on")),
    (("none", "sft", F32, False, 1), ("hand", "sft", BF16, True, 2), 0.1),
    (("hand", "grpo", BF16, False, 1), ("hand", "grpo", BF16, False, 2), 0.4)])
def test_bfloat16_weights_differ_by_rounding(runs, one, other, most):
    assert 0 < moved_apart(runs, one, other) < most


@pytest.mark.parametrize("size", [1, 2, 4])
def test_odd_sizes_ties_frozen_parts_unused_parameters_and_accumulation(runs, size):
    model = Odd()
    norms = odd(Replicated(model, compute=F32))
    got = load_file(runs / f"odd-{size}.safetensors")
    for name, p in model.named_parameters():
        torch.testing.assert_close(got.pop(name), p.detach(), rtol=1e-5, atol=1e-6)
    assert not got  # the tied head is there once
    assert torch.load(runs / f"numbers-{size}", weights_only=True)["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bytes_fall_with_the_processes(runs, size):
    layers = torch.load(runs / f"numbers-{size}", weights_only=True)["held"]
    assert layers["stays"] == 16 / size
    late = 0 if size == 1 else 3  # a busy gloo thread lets go of layers late; whole, there are 16
    assert 2 <= layers["forward"] < 2.1 + late  # a unit and the next
    # Training: the shards' gradients, this unit and the next, its gradient, and that in float32 on its way.
    assert layers["training"] < 16 / size + 4.1 + late


@pytest.mark.parametrize("size", [1, 2, 8])
def test_bytes_without_a_busy_thread(size):
    """The same where collectives do nothing, and so to the byte: a gloo thread that is late keeps nothing back."""
    if size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        layers = held(size)
    finally:
        if size > 1:
            dist.destroy_process_group()
    assert layers["stays"] == 16 / size
    assert layers["forward"] == pytest.approx(2, abs=0.1)
    # The shards' gradients, and at most this unit and the next, its gradient, and that in float32 on its way.
    assert 16 / size + 1 < layers["training"] < 16 / size + 4.1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_through_a_shared_prompt_are_those_of_separate_ones(runs, size):
    model = random_humanomni(humanomni("toy"))
    freeze_except(model, TRAINABLE["grpo"])
    prefix_loss(model, [0, 1, 2, 3], False).backward()
    got = torch.load(runs / f"numbers-{size}", weights_only=True)["gradients"]
    largest = max(p.grad.norm() for p in model.parameters() if p.grad is not None)
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            assert (got.pop(name) - expected).norm() <= 1e-5 * expected.norm() + 1e-7 * largest, name
    assert not got


def test_alignment_costs_little():
    run = Sharded(random_humanomni(humanomni("toy")), compute=F32)
    for unit in run.units:
        assert all(start % ALIGN == 0 for start in unit.starts)
        needed = sum(shape.numel() for shape in unit.shapes)
        assert needed <= unit.numel < needed + ALIGN * len(unit.shapes)


def test_bfloat16_gathers_and_float32_masters():
    run, _ = start("hand", "sft", BF16)
    assert {p.dtype for p in run.model.parameters()} == {F32}
    seen = []
    with run.forward_pass():
        seen.append(run.model.head_weight.dtype)
    with run.unsharded():
        seen.append(run.model.model.layers[0].mlp.up_proj.weight.dtype)
        with run.forward_pass():  # a pass inside: nothing is gathered twice
            assert run.model.head_weight.dtype == BF16
    assert seen == [BF16, BF16]
    with pytest.raises(AttributeError, match="weight"):  # outside of a pass nothing full is there
        run.model.head_weight
    sft(run, torch.optim.AdamW(run.named_parameters().values(), lr=LR), range(1))
    assert {type(state) for state in run.model.parameters()} == {nn.Parameter}


def test_a_weight_that_two_layers_share_is_refused():
    """Each layer's weights are there while it runs alone."""
    model = Stack()
    model.layers[1].weight = model.layers[0].weight
    with pytest.raises(SettingsError, match=r"layers.0.weight .*layers\.1.*--sharding none"):
        Sharded(model, compute=F32)


def test_an_error_in_a_pass_leaves_nothing_full():
    run, optimizer = start("hand", "sft", F32)
    with pytest.raises(ZeroDivisionError), run.forward_pass():
        run.model.model(torch.ones(1, 3, 96))
        1 / 0
    with pytest.raises(AttributeError):
        run.model.head_weight
    sft(run, optimizer, range(1))  # and the next pass works


@torch.no_grad()
def test_what_was_prefetched_for_a_pass_that_ended_is_not_used_later():
    plain, x = Stack(), torch.ones(1, 128)
    run = Sharded(copy.deepcopy(plain), compute=F32)

    def gather_in_vain():
        with run.forward_pass():
            run.model.layers[0](x)  # and so gathers layer 1 ahead
        assert run.units[1].full is not None

    gather_in_vain()
    for p in [*run.model.parameters(), *plain.parameters()]:
        p.mul_(2)
    torch.testing.assert_close(forward(run, x), plain(x))
    gather_in_vain()
    for p in run.model.parameters():
        p.mul_(0)
    with run.unsharded():
        assert run.model(x) == 0


# ---- completions without a second token; states ----------------------------------------------------------------------


def test_completions_of_one_token_keep_step_with_longer_ones(runs, tmp_path):
    run, optimizer = start("none", "sft", F32)
    unequal(run, [0, 1], 1)
    optimizer.step()
    keep(run, 0, tmp_path / "unequal")
    assert apart(tmp_path / "unequal", runs / "unequal-2.safetensors") < 1e-5


def test_a_state_of_two_processes_goes_on_four_and_then_on_one(runs, tmp_path):
    """Two steps on 2 processes, one on 4, two on 1: the weights of five steps without a stop."""
    run, optimizer = start("hand", "sft", F32)
    shutil.copytree(runs / "run", tmp_path / "run")
    files = sorted(p.name for p in (tmp_path / "run").glob("state-000003/*.*s"))
    assert files == [f"{rank:05d}.safetensors" for rank in range(4)]
    assert load_state(tmp_path / "run", run, optimizer) == 3
    sft(run, optimizer, range(3, 5))
    keep(run, 0, tmp_path / "end")
    straight = runs / f"{name_of('hand', 'sft', F32, False, 1)}.safetensors"
    assert apart(straight, tmp_path / "end") < 1e-5
    save_state(tmp_path / "run", 5, run, optimizer)
    assert [p.name for p in sorted((tmp_path / "run").glob("state-*"))] == ["state-000003", "state-000005"]


def test_states_that_do_not_fit_are_refused(runs, tmp_path):
    run, optimizer = start("hand", "grpo", F32)
    assert load_state(tmp_path, run, optimizer) == 0
    with pytest.raises(CheckpointError, match="other parameters than this run trains"):
        load_state(runs / "run", run, optimizer)
    run, optimizer = start("hand", "sft", F32)
    shutil.copytree(runs / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "state-000002")
    damaged = tmp_path / "run" / "state-000003" / "00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="state-000003: damaged.*delete"):
        load_state(tmp_path / "run", run, optimizer)


# ---- torchrun: processes that fail ----------------------------------------------------------------------------------


def faulty(out: Path) -> None:
    """Three steps with a state after each. Process 1 is killed in the third; started again, it fails after it."""
    join_processes("cpu")
    rank, again = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    run, optimizer = start("hand", "sft", F32)
    first = load_state(out, run, optimizer)
    print(f"process {rank} starts at step {first}", flush=True)
    for step in range(first, 3):
        if rank == 1 and step == 2 and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        sft(run, optimizer, [step], rank, 2)
        save_state(out, step + 1, run, optimizer)
    keep(run, rank, out / "end")
    if rank == 1:
        raise ClipError("clip 17 cannot be decoded")
    sft(run, optimizer, [3], rank, 2)  # in the middle of which process 1 is missed


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill_and_ends_with_the_error_that_began(tmp_path):
    """--max-restarts goes on from the last state to the numbers of a run without a stop; nobody waits for the dead (the
    time limit is there to stop a hang), and the process that failed is the one that is named."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    with subprocess.Popen([*command, __file__, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as job:
        try:
            printed, _ = job.communicate(timeout=300)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    assert "exitcode: -9" in printed and "process 1 starts at step 0" in printed, printed
    assert [f"process {rank} starts at step 2" in printed for rank in (0, 1)] == [True, True], printed
    run, optimizer = start("hand", "sft", F32)
    sft(run, optimizer, range(3))
    keep(run, 0, tmp_path / "straight")
    assert apart(tmp_path / "straight", tmp_path / "end") < 1e-5
    assert "ClipError: clip 17 cannot be decoded" in printed, printed
    assert "rank      : 1 (local_rank: 1)" in printed.split("Root Cause")[-1], printed


# ---- will it fit? ----------------------------------------------------------------------------------------------------


SMALL = replace(humanomni("toy"), text=replace(humanomni("toy").text, vocab_size=4096, hidden_size=256,
                                               intermediate_size=1024, num_hidden_layers=4))  # 5.5 M parameters


@pytest.mark.parametrize("recompute", [True, False])
def test_plan_counts_what_training_holds(recompute):
    """The plan on fake tensors, against the same pass on real ones."""
    settings = SFTSettings(**{**preset_values(SFTSettings, "toy"), "micro_batch": 2, "targets_per_clip": 2, "recompute": recompute})
    planned = plan(SMALL, settings, 1)
    model = random_humanomni(SMALL)
    model.model.recompute = recompute
    freeze_except(model, trained_parts(settings))
    run = Sharded(model, compute=F32)
    parameters = run.named_parameters().values()
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    with run.unsharded():
        features = tower_features(model, [0])
    ids = torch.ones(2, TARGET_TOKENS, dtype=torch.long)
    with Live() as live:
        for p in parameters:
            p.grad = torch.zeros_like(p)
        with run.forward_pass():
            loss = completion_logps(model, padded(model, [0], features), Completions(ids, ids > 0))[0].sum()
        loss.backward()
    assert planned.update == pytest.approx(live.peak, rel=0.05)
    assert planned.gradients == pytest.approx(sum(p.grad.nbytes for p in parameters), rel=1e-3)
    optimizer.step()
    assert planned.optimizer == pytest.approx(
        sum(s.nbytes for state in optimizer.state.values() for s in state.values()), rel=1e-3)
    assert planned.shards == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=1e-3)


def test_plan_counts_what_sampling_holds():
    settings = GRPOSettings(**{**preset_values(GRPOSettings, "toy"), "group_size": 3, "max_new_tokens": 40, "micro_batch": 2,
                                  "batch_size": 2})
    planned = plan(SMALL, settings, 1)
    run = Sharded(random_humanomni(SMALL), compute=F32)
    noise = sampling_noise(0, 0, [0, 1], 3, 40)
    with Live() as live, run.unsharded():
        assert planned.rollout_copy == pytest.approx(live.now, rel=1e-3)
        prompts = padded(run.model, [0, 1], tower_features(run.model, [0, 1]))
        rollout(run.model, prompts, 3, 40, -1, noise)  # nothing ends early
    assert planned.rollout == pytest.approx(live.peak, rel=0.05)
    tokens = 2 * (prompts.embeds.shape[1] + 3 * 40)
    assert planned.kv_cache == tokens * SMALL.text.num_hidden_layers * 2 * 2 * (256 // 4) * 4  # k and v, 2 heads of 64
    assert planned.reference == 4 * sum(
        p.numel() for name, p in random_humanomni(SMALL).named_parameters() if "_tower." not in name)


def padded(model, clips: list[int], features) -> Prompts:
    """Prompts with as much text as the plan thinks of."""
    embeds = clip_prompts(model, clips, features).embeds
    embeds = torch.cat([embeds, torch.zeros(len(clips), TEXT_TOKENS - 2, embeds.shape[2])], 1)
    return Prompts(embeds, torch.ones(embeds.shape[:2]) > 0)


def test_plan_says_what_helps(monkeypatch):
    config = replace(humanomni("toy"), text=replace(humanomni("0.5b").text, num_hidden_layers=2))
    settings = GRPOSettings(**{**preset_values(GRPOSettings, "toy"), "group_size": 2, "max_new_tokens": 64, "micro_batch": 4})
    one = plan(config, settings, 1)
    needed = one.peak / (1 - RESERVE[1]) + RESERVE[0]
    assert one.fits(needed + 10) and not one.fits(needed - 10)
    for memory, tight in ((needed + 10, True), (2 * needed, False)):
        monkeypatch.setitem(GPUS, "h200", memory)
        assert ("expandable_segments" in show(one, "h200", 1)) == tight
        assert "--rollout-batch" not in show(one, "h200", 1)  # the update is the larger half
        assert ("--rollout-batch 1" in show(replace(one, rollout=one.update, update=0), "h200", 1)) == tight
    steps = [*ways_to_fit(config, settings, 1)]
    assert [name for name, _ in steps] == ["--dtype bfloat16", "--recompute", "--micro-batch 1", "--rollout-batch 1", "9 GPUs"]
    peaks = [one.peak, *(p.peak for _, p in steps)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 5  # the update is the larger half:
    assert steps[3][1].peak == steps[2][1].peak and 32 * steps[3][1].kv_cache == steps[2][1].kv_cache
    assert steps[0][1].rollout_copy == pytest.approx(one.rollout_copy / 2, rel=1e-3)  # bfloat16
    assert steps[-1][1].optimizer == pytest.approx(one.optimizer / 9, rel=1e-3)
    assert steps[-1][1].rollout_copy == pytest.approx(steps[0][1].rollout_copy, rel=1e-3)  # whole, on however many


@pytest.mark.parametrize("gpu,verdict", [("3090-24", "FITS on 2 x 3090-24"), (None, "invalid choice: 'b200'")])
def test_plan_script(gpu, verdict):
    script = str(Path(__file__).parent.parent / "scripts" / "tools" / "plan.py")
    options = ["--preset", "toy", "--gpus", "2", "--stage", "grpo", "--gpu", gpu or "b200"]
    out = subprocess.run([sys.executable, script, *options], text=True, capture_output=True)
    assert (out.returncode == 0) == (gpu is not None)
    assert verdict in out.stdout + out.stderr
    assert ("32 per step, all sampled at once, G 8 of 72" in out.stdout) == (gpu is not None)
    assert "Traceback" not in out.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(lambda: faulty(Path(sys.argv[1])))
