"""Will it fit? `python scripts/tools/plan.py --preset paper-7b --gpu a100-80 --gpus 8 [--stage grpo|sft] [settings]`

Prints the bytes that one GPU holds with --sharding hand, and whether they fit: the step itself runs on fake tensors
(erv_min/plan.py), so neither a GPU nor weights are needed. Where they do not fit, it names the switches that help.
"""

import argparse
import sys

from erv_min.config import humanomni
from erv_min.run.errors import ErvMinError
from erv_min.plan import GPUS, RESERVE, TARGET_TOKENS, TEXT_TOKENS, Plan, plan, remedies
from erv_min.run.settings import DIMENSIONS, PRESETS, GRPOSettings, SFTSettings, parse

KINDS = {"sft": SFTSettings, "grpo": GRPOSettings}
ROWS = (("what stays", "stays"), ("  parameter shards, float32", "shards"), ("  reference shards", "reference"),
        ("  optimizer shards", "optimizer"), ("  verifier, whole", "verifier"),
        ("while it samples", "rollout"), ("  policy, whole", "rollout_copy"), ("  KV cache", "kv_cache"),
        ("while it updates", None), ("  gradient shards", "gradients"), ("  gathered units, gradients", "gathered"),
        ("  a chunk of logits", "logits"), ("  activations and the rest", None), ("peak", "peak"))


def show(p: Plan, gpu: str, gpus: int) -> str:
    """The table, and the verdict."""
    lines = []
    for title, name in ROWS:
        if name is None:
            value = p.update if title.startswith("while") else p.update - p.gradients - p.gathered - p.logits
        else:
            value = getattr(p, name)
        if value:
            lines.append(f"{title:<34}{value / 2**30:8.2f} GiB")
    room = (GPUS[gpu] - RESERVE[0]) * (1 - RESERVE[1])
    lines.append(f"{'room on ' + gpu:<34}{room / 2**30:8.2f} GiB, after {RESERVE[0] / 2**30:g} GiB for CUDA and "
                 f"{RESERVE[1]:.0%} for fragmentation")
    lines.append(f"{'FITS' if p.fits(GPUS[gpu]) else 'DOES NOT FIT'} on {gpus} x {gpu}")
    others = {other: "fits" if p.fits(memory) else "does not fit" for other, memory in GPUS.items() if other != gpu}
    lines.append(f"on {gpus} of another kind: " + ", ".join(f"{other} {verdict}" for other, verdict in others.items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=KINDS, default="grpo")
    parser.add_argument("--gpu", choices=GPUS, default="a100-80")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs")
    own, rest = parser.parse_known_args(argv)
    if "--preset" not in " ".join(rest):
        rest += ["--preset", "paper-7b"]
    if own.gpus < 1:
        parser.error(f"--gpus must be at least 1, not {own.gpus}")
    settings = parse(KINDS[own.stage], PRESETS[own.stage], __doc__, rest)
    config = humanomni(DIMENSIONS[settings.preset])
    prompt = config.video_tokens + config.audio_tokens + TEXT_TOKENS
    rows = f"G {settings.group_size} of {settings.max_new_tokens}" if own.stage == "grpo" else f"targets of {TARGET_TOKENS}"
    print(f"{settings.preset} {own.stage} on {own.gpus} x {own.gpu}: micro batch {settings.micro_batch}, prompts of "
          f"{prompt} tokens, {rows}, {settings.dtype}, recomputation {'on' if settings.recompute else 'off'}")
    first = plan(config, own.stage, settings, own.gpus)
    print(show(first, own.gpu, own.gpus))
    if first.fits(GPUS[own.gpu]):
        return 0
    print("what helps, one after the other (logits are in chunks already):")
    for name, gpus, p in remedies(config, own.stage, settings, own.gpus):
        fits = p.fits(GPUS[own.gpu])
        print(f"  {name}: peak {p.peak / 2**30:.2f} GiB{', fits' if fits else ''}", flush=True)
        if fits:
            break
    else:
        print("  with all of these it does not fit" + (", since the policy stands whole on each GPU while it samples: take one "
                                                       "with more memory" if p.rollout > p.update else ""))
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ErvMinError as error:
        sys.exit(f"{type(error).__name__}: {error}")
