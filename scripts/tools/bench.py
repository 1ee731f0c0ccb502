"""Time, memory and their bounds, piece by piece: `python scripts/tools/bench.py BENCH [BENCH ...] [options]`

  towers   vision and audio tower of a clip              rollout  G completions of one prompt
  step     a GRPO step without its optimizer             logps    the head on G completions of --tokens tokens
  erv      the verifier's sentences per second           data     the loader, and how long the model waits for it
  fsdp     sharding by hand beside PyTorch's own         all      all of these

Random weights of the dimensions `--size`, prompts as long as a clip of that size makes them (950 tokens at 0.5B). The
bounds are measured in the same run: FLOP/s of a matrix product, bytes/s of a copy (read and write counted).
`ceiling_fraction` is the least time these allow over the time it took; of sampling, for a decode step.
`--versus naive` adds the same work in our own code, with towers and prompt repeated for each completion, three times,
and full logits; `--versus transformers` theirs, where it is installed. ratio_time is how many times faster ours is,
ratio_memory how many times smaller its peak (above weights; `step`: above weights and gradients).
On CPUs bfloat16 may be emulated. The first run of a process is its warm-up: --rounds 3 takes the median after one.
"""

import argparse
import importlib
import json
import re
import sys
from dataclasses import asdict, fields

import torch

from benches.common import Options, ceilings, resident
from erv_min.base.errors import ErvMinError, SettingsError
from erv_min.base.processes import exact_float32

BENCHES = ("towers", "rollout", "step", "logps", "erv", "data", "fsdp")


def size_in_bytes(text: str) -> int:
    """"22G", "512M" or bytes; G is 2**30."""
    found = re.fullmatch(r"([\d.]+)([GM]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 22G or 512M")
    return int(float(found[1]) * {"G": 2**30, "M": 2**20, "": 1}[found[2]])


def show(row: dict) -> str:
    """A row for people."""
    def of(name: str, form: str, scale: float = 1.0) -> str:
        return form.format(row[name] / scale) if row.get(name) is not None else ""

    parts = [f"{row['bench']:<8}{row['variant']:<14}",
             of("seconds", "{:9.3f} s"), of("tokens_per_s", "{:11.1f} tokens/s"),
             of("sentences_per_s", "{:9.1f} sentences/s"), of("peak_bytes", "{:8.3f} GiB", 2**30),
             of("ceiling_fraction", "{:7.1%} of the bound"), of("ratio_time", "  {:.2f}x the speed"),
             of("ratio_memory", "  1/{:.2f} of the memory"), of("step_seconds", "  {:.4f} s a decode step"),
             of("step_bytes_per_s", " ({:.1f} GB/s)", 1e9), of("stall", "  stall {:.2%}"),
             of("loader_clips_per_s", "  loader {:.1f} clips/s"), of("inline_clips_per_s", " (inline {:.1f})")]
    return "".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*BENCHES, "all")
    parser.add_argument("bench", nargs="+", choices=names, metavar="BENCH", help=", ".join(names))
    parser.add_argument("--size", default="toy", help="toy, 0.5b, 7b, or the language model's hidden,intermediate,"
                                                      "layers,heads,kv_heads,vocabulary with the toy's towers")
    parser.add_argument("--group", type=int, default=8, help="G, completions per prompt; erv: completions")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a completion, logps")
    parser.add_argument("--clips", type=int, default=8, help="clips, data")
    parser.add_argument("--prompts", type=int, default=1, help="of --group completions of five sentences each, erv")
    parser.add_argument("--repeats", type=float, default=0.3, help="share of sentences that stand twice in a group, erv")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--versus", default="", choices=("", "naive", "transformers"))
    parser.add_argument("--rounds", type=int, default=1, help="runs; the median counts, after one more to warm up")
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True, help="in the backward pass")
    parser.add_argument("--memory-limit", type=size_in_bytes, metavar="22G",
                        help="fail above it: CUDA's allocator refuses more, on a CPU the peak is checked")
    parser.add_argument("--json", action="store_true", help="one object a line")
    settings = vars(parser.parse_args(argv))
    options = Options(**{f.name: settings[f.name] for f in fields(Options) if f.name in settings})
    limit = settings["memory_limit"]
    try:
        _ = options.config  # named where it is wrong, before anything runs
        exact_float32()
        if options.device.startswith("cuda"):
            index = torch.device(options.device).index or 0
            torch.cuda.set_device(index)  # whose memory and time the benches ask for
            if limit:
                whole = torch.cuda.get_device_properties(index).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), index)
        best = ceilings(options)
        if not settings["json"]:
            print(f"{options.size}, {options.dtype}, {options.device}, {torch.get_num_threads()} threads; bounds: "
                  f"matrix product {best['flops'] / 1e9:.0f} GFLOP/s (torch.matmul {best['matmul_flops'] / 1e9:.0f}), "
                  f"copy {best['bytes'] / 1e9:.1f} GB/s", flush=True)
        for name in BENCHES if "all" in settings["bench"] else settings["bench"]:
            for row in importlib.import_module(f"benches.{name}").measure(options):
                row = {"bench": name, "variant": "ours", "ratio_time": None, "ratio_memory": None} | row
                machine = {"matmul_limit": best["flops"], "copy_limit": best["bytes"], "torch": torch.__version__,
                           "threads": torch.get_num_threads()}
                print(json.dumps(asdict(options) | machine | row) if settings["json"] else show(row), flush=True)
                total = row.get("total_bytes") or (0 if options.device.startswith("cuda") else resident("VmHWM"))
                if limit and row["variant"] == "ours" and total > limit:
                    raise SettingsError(f"{name} needed {total / 2**30:.2f} GiB, --memory-limit is {limit / 2**30:.2f}")
    except torch.OutOfMemoryError as error:
        print(f"does not fit --memory-limit: {error}", file=sys.stderr)
        return 1
    except ErvMinError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
