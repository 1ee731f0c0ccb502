"""What gpu_check.py measures itself, each in a process of its own: `gradients` and `decode`."""

import time
from dataclasses import replace

import torch

from erv_min.base.processes import exact_kernels
from erv_min.config import humanomni
from erv_min.generate import prefill, rollout, sample_token, sampling_noise
from erv_min.logps import completion_logps
from erv_min.model.humanomni import HumanOmni, Prompts
from erv_min.model.parameters import random_humanomni

LENGTHS, GROUP, TOKENS = (129, 100), 4, 64  # 129 + 64 - 1 keys are 64 modulo 128, where cuDNN's attention gave NaN


def biased_model(head_width: int, device: str) -> HumanOmni:
    """Two layers whose scores lie near -100, as those of some heads of the released models."""
    config = humanomni("toy")
    text = replace(config.text, hidden_size=4 * head_width, intermediate_size=8 * head_width, num_hidden_layers=2)
    model = random_humanomni(replace(config, text=text), device=device)
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data.fill_(3)
        layer.self_attn.k_proj.bias.data.fill_(-33 * head_width**-0.5)
    return model


def prompts_of(model: HumanOmni, lengths: tuple[int, ...]) -> Prompts:
    weight = model.head_weight
    embeds = torch.randn(len(lengths), max(lengths), weight.shape[1], generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Prompts(embeds.to(weight), mask.to(weight.device))


def gradients(device: str) -> dict[str, float]:
    """Of bfloat16, at head widths 64 and 128: how far its gradient lies from float32's, relative to that, and the mean
    |log-prob of the sampler - of the trainer| on tokens that it sampled. NaN if something is."""
    exact_kernels()
    found = {}
    for width in (64, 128):
        noise, grads = sampling_noise(0, 0, range(len(LENGTHS)), GROUP, TOKENS), []
        for dtype in (torch.bfloat16, torch.float32):
            model = biased_model(width, device).to(dtype)
            prompts = prompts_of(model, LENGTHS)
            if dtype == torch.bfloat16:
                completions = rollout(model, prompts, GROUP, TOKENS, -1, noise)
            logps, _ = completion_logps(model, prompts, completions)
            if dtype == torch.bfloat16:
                found[f"sampler_gap_{width}"] = (logps - completions.logps).abs().mean().item()
            logps.mean().backward()
            grads.append(torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None]))
        found[f"gradient_gap_{width}"] = ((grads[0] - grads[1]).norm() / grads[1].norm()).item()
    return found


def seconds(work, device: str) -> float:
    """Of one call, the device's work included."""
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def kernels(work) -> int:
    """CUDA kernels that a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@torch.no_grad()
def decode(device: str) -> dict[str, float]:
    """16 completions of a prompt of 950 tokens at 0.5B in bfloat16: seconds of the first rollout, in which graphs are
    captured, and of the second; kernels of a decode step; milliseconds of sample_token alone."""
    exact_kernels()
    cuda = device.startswith("cuda")
    model = random_humanomni(humanomni("0.5b" if cuda else "toy"), dtype=torch.bfloat16, device=device)
    prompts, (group, tokens) = prompts_of(model, (950 if cuda else 9,)), (16, 512) if cuda else (3, 4)
    noise = sampling_noise(0, 0, [0], group, tokens)
    first, second = (seconds(lambda: rollout(model, prompts, group, tokens, -1, noise), device) for _ in range(2))
    logits, decoder = prefill(model, prompts, group, tokens)
    last = logits.argmax(-1)
    decoder.run(last)
    draw = noise[:, 0].to(device)
    sample_token(logits, draw, 1.0)
    sampling = seconds(lambda: [sample_token(logits, draw, 1.0) for _ in range(20)], device)
    return {"first": first, "second": second, "ms_per_token": 1e3 * second / tokens, "sample_ms": 1e3 * sampling / 20,
            "kernels": kernels(lambda: decoder.run(last)) if cuda else 0}
