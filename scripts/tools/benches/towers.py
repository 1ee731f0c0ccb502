"""Towers once per clip, against once for each of G completions in each of a step's three passes."""

from collections.abc import Iterator

import torch

from benches.common import Options, build, ceilings, fraction, random_clip, ratios, timed, tower_flops


@torch.no_grad()
def measure(options: Options) -> Iterator[dict]:
    model, ceiling = build(options), ceilings(options)

    def run(clips: int) -> None:
        video, audio = random_clip(options, clips)
        model.vision_features(video)
        model.audio_features(audio)

    weights = sum(p.nbytes for tower in (model.siglip, model.whisper) for p in tower.parameters())
    config = options.config
    tokens = config.video_tokens + config.audio_tokens
    seconds, peak = timed(lambda: run(1), options)
    flops = tower_flops(config)
    ours = {"variant": "ours", "seconds": seconds, "tokens_per_s": tokens / seconds, "peak_bytes": peak.bytes,
            "flops": flops, "bytes": weights, "ceiling_fraction": fraction(seconds, flops, weights, ceiling)}
    if options.versus == "naive":
        seconds, peak = timed(lambda: [run(options.group) for _ in range(3)], options)
        flops = 3 * tower_flops(config, options.group)
        naive = {"variant": "naive", "seconds": seconds, "tokens_per_s": 3 * options.group * tokens / seconds,
                 "peak_bytes": peak.bytes, "flops": flops, "bytes": 3 * weights,
                 "ceiling_fraction": fraction(seconds, flops, 3 * weights, ceiling)}
        ours |= ratios(ours, naive)
        yield naive
    yield ours
