"""What only a GPU shows: its numbers beside the CPU's, graphs beside plain steps, nccl, and that no step waits for the
host. Skipped without CUDA, but for the last part. `python scripts/tools/gpu_check.py` runs it with the benchmarks."""

import contextlib
import copy
import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import erv_min.generate as generation
from erv_min import decoding
from erv_min.base.processes import Processes, deterministic_kernels, exact_kernels, join_processes
from erv_min.fsdp import Sharded
from erv_min.generate import prefill, rollout, sampling_noise
from erv_min.grpo import group_advantages, grpo_loss, split_batch
from erv_min.inputs import Batch, embed
from erv_min.logps import Completions, Prompts, completion_logps
from erv_min.model.parameters import freeze_except
from erv_min.train.hooks import sample
from erv_min.train.log import token_sums
from erv_min.train.optimizer import make_optimizer, update
from erv_min.train.settings import TRAINABLE, GRPOSettings
from erv_min.train.sharding import Replicated
from erv_min.train.state import load_state, save_state
from tiny import tiny_model, tiny_prompts

sys.path[:0] = [str(Path(__file__).parent.parent / "scripts"), str(Path(__file__).parent.parent / "scripts" / "tools")]
import erv  # noqa: E402
import evaluate  # noqa: E402
import gpu_check  # noqa: E402
import grpo  # noqa: E402
import sft  # noqa: E402

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
EOS = 17


@pytest.fixture(autouse=True)
def no_tf32():
    exact_kernels()


@pytest.fixture
def plain_kernels(monkeypatch):
    """Undoes --deterministic at the end."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def on_gpu(prompts: Prompts, dtype=torch.float32) -> Prompts:
    return Prompts(prompts.embeds.to("cuda", dtype), prompts.mask.cuda())


def some_completions(rows: int, length: int, device="cuda") -> Completions:
    ids = torch.randint(0, 500, (rows, length), generator=torch.Generator().manual_seed(3))
    lengths = torch.arange(rows) % length + 1
    return Completions(ids.to(device), (torch.arange(length) < lengths[:, None]).to(device))


def a_clip() -> dict[str, torch.Tensor]:
    """What HumanOmni's forward takes, random."""
    config, g = tiny_model().config, torch.Generator().manual_seed(0)
    return {"input_ids": torch.tensor([[5, -201, -202, 7, 8]]), "gate_ids": torch.tensor([[2, 9, 3]]),
            "video": torch.randn(1, config.num_frames, 3, *[config.vision.image_size] * 2, generator=g),
            "audio": torch.randn(1, config.audio.num_mel_bins, 2 * config.audio.max_source_positions, generator=g)}


def step_of(run, device: str) -> dict[str, torch.Tensor]:
    """Log-probs and gradients of one pass, by name, on the CPU."""
    prompts = tiny_prompts(tiny_model(), (7, 5))
    prompts = Prompts(prompts.embeds.to(device), prompts.mask.to(device))
    with run.forward_pass():
        logps, entropy = completion_logps(run.model, prompts, some_completions(8, 6, device), with_entropy=True)
    logps.sum().backward()
    found = {n: p.grad for n, p in run.named_parameters().items() if p.grad is not None}
    return {name: x.cpu() for name, x in (found | {"logps": logps.detach(), "entropy": entropy}).items()}


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert (found - expected).abs().max() < tolerance * scale, name


@gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_logps_and_gradients_are_the_cpus(recompute):
    found = {}
    for device in ("cpu", "cuda"):
        model = tiny_model(3).to(device)
        model.model.recompute = recompute
        found[device] = step_of(Replicated(model, device, torch.float32), device)
    assert found["cpu"].keys() == found["cuda"].keys()
    for name, value in found["cpu"].items():
        near(found["cuda"][name], value, 1e-4, name)


@gpu
def test_deterministic_kernels_repeat_their_bits(plain_kernels):
    deterministic_kernels()
    first, *others = (step_of(Replicated(tiny_model(3).cuda(), "cuda", torch.float32), "cuda") for _ in range(4))
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


@gpu
def test_towers_and_logits_are_the_cpus():
    """Convolutions, projectors, gate and prompt: 1e-4, which TF32 would miss."""
    model, given = tiny_model(), a_clip()
    with torch.no_grad():
        expected = model(**given).logits
        found = copy.deepcopy(model).cuda()(**{k: v.cuda() for k, v in given.items()}).logits.cpu()
    near(found, expected, 1e-4, "logits")


@gpu
def test_tokens_with_graphs_and_without(monkeypatch):
    """Rows end at many steps and windows grow: three times the same tokens, and memory back where it began."""
    model, prompts = tiny_model(3).cuda(), on_gpu(tiny_prompts(tiny_model(), (3, 7, 5)))
    noise, sample = sampling_noise(5, 0, [4, 9, 2], 8, 40), generation.sample_token
    likely = 4.5 * torch.nn.functional.one_hot(torch.tensor(EOS, device="cuda"), model.config.text.vocab_size)
    monkeypatch.setattr(generation, "sample_token", lambda logits, *rest: sample(logits + likely, *rest))
    monkeypatch.setattr(decoding, "WORTH", 10**6)  # no capture
    plain = rollout(model, prompts, 8, 40, EOS, noise)
    monkeypatch.setattr(decoding, "WINDOW", 4)
    monkeypatch.setattr(decoding, "WORTH", 1)
    count = []
    capture = decoding.capture
    monkeypatch.setattr(decoding, "capture", lambda *given: count.append(1) or capture(*given))
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        found = rollout(model, prompts, 8, 40, EOS, noise)
        assert torch.equal(plain.ids, found.ids) and torch.equal(plain.mask, found.mask)
    assert len(count) >= 9  # several of each rollout
    del found
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held


@gpu
@torch.no_grad()
def test_a_decode_step_waits_for_nothing():
    model = tiny_model().cuda()
    logits, decoder = prefill(model, on_gpu(tiny_prompts(tiny_model(), (3, 7))), 2, 12)
    last = logits.argmax(-1)
    decoder.next_logits(last, 1)  # which warms up and captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (2, 3, 4):
            decoder.next_logits(last, number)
        decoder.run(last)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_bfloat16_trains_what_it_sampled():
    """|log pi of the sampler - of the training pass|: bfloat16's own noise on a peaked toy, and no more."""
    model, prompts = tiny_model(3, torch.bfloat16).cuda(), on_gpu(tiny_prompts(tiny_model(), (3, 7)), torch.bfloat16)
    completions = rollout(model, prompts, 8, 24, EOS, sampling_noise(0, 0, [0, 1], 8, 24))
    logps, _ = completion_logps(model, prompts, completions)
    gap = (logps - completions.logps)[completions.mask].abs()
    assert gap.mean() < 0.05, gap.mean()


@gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_sharded_is_replicated(nccl, recompute):
    """The log-probs and gradients of the whole model, beside an nccl group of one. (Collectives between two GPUs:
    gpu_check.py's part `pair`.)"""
    models = [trained(recompute) for _ in range(2)]
    whole = step_of(Replicated(models[0].cuda(), "cuda", torch.float32), "cuda")
    run = Sharded(models[1], "cuda", torch.float32)
    torch.testing.assert_close(step_of(run, "cuda")["logps"], whole["logps"], atol=1e-5, rtol=1e-5)
    for name, shape in run.full_shapes().items():
        if name in whole:
            of = next(unit for unit in run.units if name in unit.names)
            part = of.views(of.shard.grad)[of.names.index(name)].cpu()
            near(part, whole[name], 1e-5, name)


def trained(recompute: bool):
    model = tiny_model(3)
    model.model.recompute = recompute
    freeze_except(model, TRAINABLE["grpo"])
    return model


@pytest.fixture
def nccl(tmp_path):
    """A group of one whose watchdog thread lives, as in training."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@gpu
def test_collectives_and_a_capture_beside_the_watchdog(nccl):
    x, parts = torch.arange(4.0, device="cuda"), [None]
    dist.scatter(y := torch.empty_like(x), [x])
    dist.all_gather_object(parts, {"rank": 0})
    assert torch.equal(x, y) and parts == [{"rank": 0}]
    for _ in range(20):
        dist.all_reduce(y)
        graph, result = decoding.capture(lambda: x * 2, x.device)
        graph.replay()
        assert torch.equal(result, 2 * x)


@gpu
def test_sft_across_an_epoch_with_cached_features(tmp_path):
    """The second epoch takes features from the host, and a step may hold both kinds."""
    pytest.importorskip("av")
    from erv_min.toy.world import WorldSettings, build_world
    build_world(tmp_path / "world", WorldSettings(train=5, test=1, pretrain=0, sft_clips=5, erv_train=60, erv_valid=20))
    sft.main(["--random-weights", "--world", str(tmp_path / "world"), "--device", "cuda", "--steps", "9",
              "--batch-size", "8", "--micro-batch", "8", "--workers", "0", "--out", str(tmp_path / "run"),
              "--cache-features", str(tmp_path / "features")])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 9


# ---- without a GPU ---------------------------------------------------------------------------------------------------


class There(torch.Tensor):
    """A tensor of another device, "meta" by name; `here` holds its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, here):
        self = torch.Tensor._make_wrapper_subclass(cls, here.size(), strides=here.stride(), dtype=here.dtype,
                                                   storage_offset=here.storage_offset(), device="meta")
        self.here = here
        return self

    def tolist(self):
        return [x.tolist() if x.dim() else x.item() for x in self.unbind()]


def on_device(_, function, types, args=(), kwargs=None):
    """One operation, on the CPU. Raises where tensors of both devices meet, but for copies and single numbers."""
    name, to = function.overloadpacket.__name__, (kwargs or {}).get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if not isinstance(x, There)]
    if name not in ("_to_copy", "copy_") and len(here) < len(tensors) and any(x.dim() for x in here):
        raise RuntimeError(f"{name}: {[tuple(x.shape) for x in here]} on the CPU, others on the device")
    args_here, kwargs_here = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs or {}))
    out = function(*args_here, **kwargs_here | ({} if to is None else {"device": torch.device("cpu")}))
    if to is not None and to.type == "cpu" or to is None and len(here) == len(tensors):
        return out
    out = tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(function, args, kwargs or {}, out)


There.__torch_dispatch__ = classmethod(on_device)


class Device(TorchDispatchMode):
    """Tensors that are made inside for device "meta" are `There`."""

    __torch_dispatch__ = on_device


class Capture(Device):
    """Raises where the host would wait for the device or copy to it, which a CUDA graph's capture forbids."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, to = function.overloadpacket.__name__, (kwargs or {}).get("device")
        masks = name.startswith("index") and any(getattr(x, "dtype", 0) == torch.bool for x in tree_leaves(args[1]))
        if masks or to and name == "_to_copy" or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            raise RuntimeError(f"{name} in a capture")
        return on_device(self, function, types, args, kwargs)


def grpo_step(put) -> dict[str, torch.Tensor]:
    """Forward pass, sampling, log-probs and an update of a model that lies where `put` puts tensors."""
    model, settings = tiny_model(3)._apply(put), GRPOSettings(group_size=3, max_new_tokens=12)
    model.tie_weights()
    freeze_except(model, TRAINABLE["grpo"])
    policy = Replicated(model, "cpu", torch.float32)
    optimizer = make_optimizer(policy.named_parameters().values())
    given = {name: put(x) for name, x in a_clip().items()}
    ids, gate_ids, video, audio = given.values()
    with torch.no_grad():
        logits = model(**given).logits
        batch = Batch([SimpleNamespace(video_id="1")], ids, ids == ids, gate_ids, gate_ids > 0,
                      vision=model.vision_features(video), audio=model.audio_features(audio))
        collate = SimpleNamespace(model=model, tokenizer=SimpleNamespace(eos_id=EOS))
        completions = sample(collate, embed(model, batch), [0], 0, settings)
        (part,) = split_batch(batch, completions, 1, EOS)
        part.ref_logps, _ = grpo.log_probs(policy, part, settings.temperature)
    part.advantages = group_advantages(put(torch.tensor([1.0, 0, 2])), 3)
    logps, entropy = grpo.log_probs(policy, part, settings.temperature)
    part.old_logps = logps.detach()
    loss = grpo_loss(logps, part.old_logps, part.ref_logps, part.advantages, part.loss_mask)
    loss.backward()
    sums = token_sums(part, logps.detach(), entropy, EOS, settings.epsilon)
    norm = update(policy, optimizer, 1e-3, settings.max_grad_norm, loss.item())
    assert {p.device for p in model.parameters()} == {logits.device} and len(sums) == 3
    return {"logits": logits, "ids": completions.ids, "logps": part.ref_logps, "norm": put(torch.tensor(norm))}


def test_all_of_a_step_lies_on_the_device(monkeypatch):
    """The same numbers as on the CPU; a tensor made elsewhere raises, and so does a module that returns one."""
    def returned(module, _, out):
        assert all(isinstance(x, There) for x in tree_leaves(out) if isinstance(x, torch.Tensor)), type(module)

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # does not know "meta"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    expected = grpo_step(lambda x: x)
    with Device(), torch.nn.modules.module.register_module_forward_hook(returned):
        found = grpo_step(There)
        with pytest.raises(RuntimeError, match=r"add: \[\(2,\)\] on the CPU"):
            There(torch.ones(2)) + torch.ones(2)
    for name, value in expected.items():
        near(found[name].here, value, 1e-4, name)


@torch.no_grad()
def test_a_capture_of_a_decode_step_finds_nothing_to_wait_for():
    model, prompts = tiny_model(), tiny_prompts(tiny_model(), (3, 7))
    with Device():
        model._apply(There).tie_weights()
        logits, decoder = prefill(model, Prompts(There(prompts.embeds), There(prompts.mask)), 2, 6)
        last = logits.argmax(-1)
        with Capture():
            decoder.run(last)
            for breach in (lambda: last.sum().item(), lambda: torch.ones(2).to(last.device), lambda: last[last > 3]):
                with pytest.raises(RuntimeError, match="in a capture"):
                    breach()


def test_a_state_goes_back_to_the_device(tmp_path):
    """AdamW's "step" too, where the fused one asks for it."""
    policy, found = Replicated(tiny_model(), "cpu", torch.float32), Replicated(tiny_model(1), "cpu", torch.float32)
    optimizer = make_optimizer(policy.named_parameters().values())
    for p in policy.named_parameters().values():
        p.grad = torch.ones_like(p)
    update(policy, optimizer, 1e-3, 1.0)
    save_state(tmp_path, 1, policy, optimizer)
    with Device():
        found.model._apply(There).tie_weights()
        again = make_optimizer(found.named_parameters().values())
        assert load_state(tmp_path, found, again) == 1
    for name, p in policy.named_parameters().items():
        for key, value in optimizer.state[p].items():
            other = again.state[found.named_parameters()[name]][key]
            assert isinstance(other, There) and torch.equal(other.here, value), key


def test_float32_on_cuda_is_not_tf32_and_attention_not_cudnns(monkeypatch):
    """PyTorch lets cuDNN's convolutions round to TF32 by default: off where a script joins."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    join_processes("cpu")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("script", [sft, erv, grpo])
def test_deterministic_is_set_before_the_model_is_loaded(plain_kernels, monkeypatch, tmp_path, script):
    monkeypatch.setattr(script, "open_folder", lambda *_: 1 / 0)  # what comes next
    with pytest.raises(ZeroDivisionError):
        script.main(["--device", "cpu", "--deterministic", "--out", str(tmp_path)])
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory  # which would double a pass's kernels


def test_sampling_needs_no_deterministic_kernels(plain_kernels, monkeypatch):
    """CUDA's cumsum would be refused. (How many prompts are sampled at once: test_generate.py.)"""
    deterministic_kernels()
    seen, sample = [], generation.sample_token
    monkeypatch.setattr(generation, "sample_token", lambda *given: seen.append(
        torch.are_deterministic_algorithms_enabled()) or sample(*given))
    rollout(tiny_model(), tiny_prompts(tiny_model(), (3,)), 2, 4, EOS, sampling_noise(0, 0, [0], 2, 4))
    assert seen and not any(seen) and torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("rank, expected", [(0, ["parted", "judged"]), (1, ["parted"])])
def test_nobody_waits_for_a_judge(monkeypatch, tmp_path, rank, expected):
    """nccl ends processes that wait for an hour: they part before a judge is asked."""
    order = []
    monkeypatch.setattr(evaluate, "join_processes", lambda device: Processes(rank, 2, torch.device("cpu")))
    row = {"dataset": "dfew", "video_id": "1", "output": "", "ground_truth": "happy", "judged_emotion": None}
    monkeypatch.setattr(evaluate, "predictions_of", lambda *_: ([row], {"missing": [], "unknown": [], "failed": []}))
    monkeypatch.setattr(evaluate, "part", lambda: order.append("parted"))
    judged_by = evaluate.judged_by
    monkeypatch.setattr(evaluate, "judged_by", lambda *given: order.append("judged") or judged_by(*given))
    monkeypatch.setattr(evaluate, "report", lambda *_: "")
    evaluate.main(["--predictions", __file__, "--out", str(tmp_path), "--bootstrap", "0"])
    assert order == expected


def test_gpu_check_at_toy_size(capsys, monkeypatch):
    """Its commands run, a part that fails is a line among others, and says why."""
    monkeypatch.setitem(gpu_check.PARTS, "toy", ("nothing", lambda on: on.python("-c", "raise SystemExit('no disk')")))
    assert gpu_check.main(["toy", "sft", "--device", "cpu", "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["part"], line["ok"]) for line in lines] == [("toy", False), ("sft", True)]
    assert "no disk" in lines[0]["measured"] and "9 steps" in lines[1]["measured"]
