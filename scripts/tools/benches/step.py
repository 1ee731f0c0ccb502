"""A GRPO step without its optimizer: towers, rollout, reference log-probs, policy log-probs, backward (Eq. 3).

The naive schedule is the released one in our own code: towers and prompt for each completion, in each of the three
passes (sampling, reference, policy), and logits [G, T, V] whole. Both recompute, or neither does (--no-recompute).
`peak_bytes` is above the weights; `beyond_gradients` above weights and gradients, and what ratio_memory compares.
"""

import copy
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from benches.common import (Options, Peak, build, ceilings, fraction, language_flops, linear_weights, prompt_tokens,
                            prompts_of, random_clip, ratios, synchronize, tower_flops)
from erv_min.generate import rollout, sampling_noise
from erv_min.grpo import group_advantages, grpo_loss
from erv_min.logps import Completions, Prompts, completion_logps
from erv_min.model.humanomni import HumanOmni, freeze_except
from erv_min.train.settings import TRAINABLE


def features(model: HumanOmni, options: Options, clips: int) -> tuple[Tensor, Tensor]:
    video, audio = random_clip(options, clips)
    with torch.no_grad():
        return model.vision_features(video), model.audio_features(audio)


def naive_logps(model: HumanOmni, prompts: Prompts, ids: Tensor) -> Tensor:
    """Each completion [G, T] behind a prompt of its own [G, P, D], full logits at its positions: [G, T]."""
    x = torch.cat([prompts.embeds, model.model.embed_tokens(ids[:, :-1])], 1)
    hidden, _ = model.model(x)
    logits = model.lm_head(hidden[:, prompts.embeds.shape[1] - 1 :]).float()
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def step(model: HumanOmni, ref: HumanOmni, options: Options, naive: bool, clock: dict) -> Completions:
    """One step up to the gradients; `clock` takes the seconds of its parts."""
    G, N = options.group, options.new_tokens
    repeats, group = (G, 1) if naive else (1, G)
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        synchronize(options.device)
        clock[name] = clock.get(name, 0.0) + time.perf_counter() - last
        last = time.perf_counter()

    def clip_features():
        if naive or not seen:
            seen[:] = features(model, options, repeats)
            lap("towers")
        return tuple(seen)

    def logps(policy: HumanOmni):
        prompts = prompts_of(policy, clip_features())
        if naive:
            return naive_logps(policy, prompts, completions.ids)
        return completion_logps(policy, prompts, completions, with_entropy=True)[0]

    seen = []
    with torch.no_grad():
        prompts = prompts_of(model, clip_features())
        noise = sampling_noise(0, 0, list(range(repeats)), group, N)
        completions = rollout(model, prompts, group, N, -1, noise)
        lap("rollout")
        del prompts
        ref_logps = logps(ref)
        lap("reference")
    advantages = group_advantages(torch.arange(G, dtype=torch.float32, device=options.device), G)
    own = logps(model)
    loss = grpo_loss(own, own.detach(), ref_logps, advantages, completions.mask, 0.04, 0.2)
    lap("forward")
    loss.backward()
    lap("backward")
    return completions


def measure(options: Options) -> Iterator[dict]:
    ceiling, config = ceilings(options), options.config
    c, G, N, P = config.text, options.group, options.new_tokens, prompt_tokens(config)
    if options.versus == "transformers":
        yield theirs_row(options)
    model = build(options)
    towers = (model.model.vision_tower, model.model.audio_tower)
    ref = copy.deepcopy(model, {id(tower): tower for tower in towers}).requires_grad_(False)
    trained = freeze_except(model, TRAINABLE["grpo"])
    gradients = sum(p.nbytes for _, p in trained)
    weights = sum(p.nbytes for p in {*model.parameters(), *ref.parameters()})  # the towers are one for both
    head = 2.0 * c.vocab_size * c.hidden_size

    def run(naive: bool) -> dict:
        repeats = G if naive else 1
        for _, p in trained:
            p.grad = None
        clock = {}
        with Peak(options.device) as peak:
            started = time.perf_counter()
            step(model, ref, options, naive, clock)
            seconds = time.perf_counter() - started
        one = language_flops(c, repeats, P, 0) + language_flops(c, G, N, P) + head * G * N  # a forward pass
        passes = 1 + 1 + 3 + options.recompute  # rollout, reference; forward, twice that for backward
        flops = passes * one + tower_flops(config, repeats) * (3 if naive else 1)
        traffic = (N + passes) * (linear_weights(c) + head / 2) * 4
        return {"variant": "naive" if naive else "ours", "seconds": seconds, "tokens_per_s": G * N / seconds,
                "peak_bytes": peak.bytes, "beyond_gradients": peak.bytes - gradients, "total_bytes": peak.total,
                "weight_bytes": weights, "gradient_bytes": gradients, "flops": flops, "bytes": traffic,
                "ceiling_fraction": fraction(seconds, flops, traffic, ceiling),
                **{f"{name}_seconds": value for name, value in clock.items()}}

    if options.rounds > 1:
        run(False)  # to warm up
    ours = run(False)
    if options.versus == "naive":
        naive = run(True)
        ours |= ratios(ours, naive, "beyond_gradients")
        yield naive
    yield ours


def theirs_row(options: Options) -> dict:
    """transformers' share of a step: `generate`, and a forward and backward of the language model alone."""
    from benches import theirs
    model = theirs.qwen2(options)
    prompt = torch.arange(prompt_tokens(options.config), device=options.device)[None] % options.config.text.vocab_size
    completions = torch.ones(options.group, options.new_tokens, dtype=torch.long, device=options.device)
    with Peak(options.device) as peak:
        started = time.perf_counter()
        theirs.sample(model.eval(), prompt, options)
        sampled = time.perf_counter() - started
        if options.recompute:
            model.gradient_checkpointing_enable()
        theirs.train_step(model.train(), prompt, completions)
        synchronize(options.device)
        seconds = time.perf_counter() - started
    gradients = sum(p.nbytes for p in model.parameters())
    return {"variant": "transformers (language model alone, no reference)", "seconds": seconds,
            "tokens_per_s": completions.numel() / seconds, "peak_bytes": peak.bytes,
            "beyond_gradients": peak.bytes - gradients, "rollout_seconds": sampled, "train_seconds": seconds - sampled}
