"""The loader: clips per second inline and with two processes, and the share of a run that it lets the model wait.

The clips are rendered here: 48 pixels and one second at toy size, else 75 frames of 320 x 240 with 3 s of sound, which
the model sees at its own size (224 at 0.5B). The run is a GRPO step per clip at toy size, else the towers alone, which is
the least that a step does between two clips.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benches import step as grpo
from benches.common import Options, Peak, build, ceilings, fraction, synchronize, tower_flops
from erv_min.data.loader import clip_inputs
from erv_min.inputs import Example
from erv_min.model.humanomni import freeze_except
from erv_min.toy.render import RATE, encode

WARM = 2  # clips before the clock starts: the workers' own start


def render(folder: Path, count: int, small: bool) -> list[Example]:
    """`count` clips of moving gradients with a tone."""
    length, height, width = (12, 48, 48) if small else (75, 240, 320)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    tone = 0.1 * np.sin(np.arange(RATE * (1 if small else 3)) * 0.08).astype(np.float32)
    examples = []
    for i in range(count):
        frames = np.stack([np.stack([x + 5 * t, y + 3 * i, x + y + 2 * t], -1) % 256 for t in range(length)])
        path = folder / f"{i}.mp4"
        path.write_bytes(encode(frames.astype(np.uint8), tone))
        examples.append(Example(video_id=str(i), path=path, label="happy", dataset="dfew"))
    return examples


def measure(options: Options) -> Iterator[dict]:
    ceiling, small = ceilings(options), options.size == "toy"
    model = build(options)
    freeze_except(model, "language_model")

    def consume(x) -> None:
        if small:
            grpo.step(model, model, options, False, {})
        else:
            with torch.no_grad():
                model.vision_features(x.clip.video[None])
                model.audio_features(x.clip.audio[None])
        synchronize(options.device)

    with tempfile.TemporaryDirectory() as folder, Peak(options.device) as peak:
        examples = render(Path(folder), options.clips + WARM, small)

        def run(workers: int, work=None) -> tuple[float, float]:
            """(seconds, of these spent waiting for the next clip)."""
            stream = clip_inputs(examples, model.config, None, num_frames=options.config.num_frames, workers=workers)
            for _ in range(WARM):
                x = next(stream)
                if work:
                    work(x)
            started, waited = time.perf_counter(), 0.0
            for _ in range(options.clips):
                before = time.perf_counter()
                x = next(stream)
                waited += time.perf_counter() - before
                if work:
                    work(x)
            seconds = time.perf_counter() - started
            stream.close()
            return seconds, waited

        inline, loader, (seconds, waited) = run(0)[0], run(2)[0], run(2, consume)
    config = options.config
    size = 4 * (config.num_frames * 3 * config.vision.image_size**2
                + config.audio.num_mel_bins * 2 * config.audio.max_source_positions)
    flops = tower_flops(config, options.clips)
    yield {"variant": "ours", "seconds": seconds, "tokens_per_s": None, "peak_bytes": peak.bytes, "flops": flops,
           "bytes": size * options.clips, "ceiling_fraction": fraction(seconds, flops, 0, ceiling),
           "clips_per_s": options.clips / seconds, "stall": waited / seconds,
           "inline_clips_per_s": options.clips / inline, "loader_clips_per_s": options.clips / loader,
           "ratio_time": inline / loader}
