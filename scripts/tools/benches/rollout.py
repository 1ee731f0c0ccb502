"""Sampling G completions of one prompt, against a prefill for each of them and against transformers' `generate`."""

import time
from collections.abc import Iterator

import torch

from benches.common import (Options, build, ceilings, fraction, language_flops, linear_weights, prompt_tokens,
                            prompts_of, random_clip, ratios, synchronize, timed)
from erv_min.generate import rollout, sampling_noise
from erv_min.logps import Prompts


@torch.no_grad()
def measure(options: Options) -> Iterator[dict]:
    ceiling, config = ceilings(options), options.config
    c, G, N, P = config.text, options.group, options.new_tokens, prompt_tokens(config)
    item = torch.empty(0, dtype=options.torch_dtype).element_size()
    weights = item * (linear_weights(c) + c.vocab_size * c.hidden_size)  # what a decode step reads
    kv = item * 2 * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    head = 2.0 * c.vocab_size * c.hidden_size
    steps = N - 1

    def row(variant: str, prefills: int, peak, seconds: float, times: list[float], started: float) -> dict:
        flops = language_flops(c, prefills, P, 0) + language_flops(c, G, steps, P) + head * (prefills + G * steps)
        context = kv * (P * prefills + G * N / 2)
        step = (times[-1] - times[0]) / max(1, steps)
        step_flops = language_flops(c, G, 1, P) + head * G
        return {"variant": variant, "seconds": seconds, "tokens_per_s": G * N / seconds, "peak_bytes": peak.bytes,
                "flops": flops, "bytes": weights * N + context * steps, "prefill_seconds": times[0] - started,
                "step_seconds": step, "step_bytes_per_s": (weights + context) / step if step else None,
                "ceiling_fraction": fraction(step, step_flops, weights + context, ceiling) if step else None}

    def ours(variant: str, rows: int, group: int) -> dict:
        times, start = [], [0.0]
        noise = sampling_noise(0, 0, list(range(rows)), group, N)

        def work() -> None:
            times.clear()
            start[0] = time.perf_counter()
            rollout(model, Prompts(prompts.embeds.expand(rows, -1, -1), prompts.mask.expand(rows, -1)), group, N, -1,
                    noise, on_token=lambda _: (synchronize(options.device), times.append(time.perf_counter())))

        seconds, peak = timed(work, options)
        return row(variant, rows, peak, seconds, times, start[0])

    if options.versus == "transformers":  # first, and gone before ours is there
        from benches import theirs
        model = theirs.qwen2(options)
        prompt, times, start = torch.arange(P, device=options.device)[None] % c.vocab_size, [], [0.0]

        def work() -> None:
            start[0] = time.perf_counter()
            times[:] = theirs.sample(model, prompt, options)

        seconds, peak = timed(work, options)
        other = row("transformers", G, peak, seconds, times, start[0])
        del model
        yield other
    model = build(options)
    video, audio = random_clip(options)
    prompts = prompts_of(model, (model.vision_features(video), model.audio_features(audio)))
    if options.versus == "naive":
        other = ours("naive", G, 1)
        yield other
    mine = ours("ours", 1, G)
    yield mine | (ratios(mine, other) if options.versus else {})
