"""Answers of a model for clips: `<think>..</think><answer>..</answer>` rows, for evaluation, augmentation and inference."""

import time

import torch

from erv_min.data import Example
from erv_min.errors import ClipError
from erv_min.generate import rollout, sampling_noise
from erv_min.inputs import PromptBuilder, clip_inputs
from erv_min.train import World, gather_lists


@torch.no_grad()
def predict(builder: PromptBuilder, examples: list[Example], world: World, max_new_tokens: int = 512,
            temperature: float = 0.3, top_p: float = 1.0, seed: int = 0, batch_size: int = 8, num_frames: int = 8,
            geometry: str = "pad", workers: int = 2, progress: str = "") -> tuple[list[dict], list[ClipError]]:
    """One output for each example, in the order of `examples`, whatever the number of processes and the batch size.

    Returns rows {"video_id", "output", "ground_truth", "dataset"} and the errors of clips that could not be decoded.
    Temperature 0.3 is section 4.3's; 0 is greedy, as the release unless asked (divergence 9).
    """
    model, tokenizer = builder.model, builder.tokenizer
    model.eval()
    mine = list(range(world.rank, len(examples), world.size))
    stream = clip_inputs([examples[i] for i in mine], model, builder.cache, builder.modality, num_frames, geometry,
                         workers)
    rows, errors, started = [], [], time.time()
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        pairs = [(i, next(stream)) for i in indices]
        errors += [x for _, x in pairs if isinstance(x, ClipError)]
        pairs = [(i, x) for i, x in pairs if not isinstance(x, ClipError)]
        if not pairs:
            continue
        noise = sampling_noise(seed, 0, [i for i, _ in pairs], 1, max_new_tokens) if temperature > 0 else None
        completions = rollout(model, builder.prompts([x for _, x in pairs]), 1, max_new_tokens, tokenizer.eos_id, noise,
                              temperature, top_p=top_p)
        for (i, x), ids, mask in zip(pairs, completions.ids, completions.mask):
            rows.append((i, {"video_id": x.example.video_id, "output": tokenizer.decode(ids[mask].tolist(), skip_special=True),
                             "ground_truth": x.example.label, "dataset": x.example.dataset}))
        if progress and world.main:
            rate = len(rows) / (time.time() - started)
            print(f"{progress}: {start + len(indices)}/{len(mine)} clips, {rate:.1f} clips/s, "
                  f"{(len(mine) - start - len(indices)) / rate:.0f} s left", flush=True)
    rows = sorted(gather_lists(rows, world), key=lambda pair: pair[0])
    return [row for _, row in rows], gather_lists(errors, world)
