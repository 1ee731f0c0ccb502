"""What the benches share: options, timing, peak memory, the machine's ceilings, models of random weights."""

import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from erv_min.base.errors import SettingsError
from erv_min.base.onednn import linear
from erv_min.config import HumanOmniConfig, Qwen2Config, humanomni
from erv_min.logps import Prompts
from erv_min.model.humanomni import AUDIO, VIDEO, HumanOmni, random_humanomni

TEXT_TOKENS = 58  # of a prompt beside its clip: with it a prompt has 950 tokens at 0.5B and 2,126 at 7B


@dataclass
class Options:
    """The command line of scripts/tools/bench.py."""

    size: str = "toy"
    group: int = 8
    new_tokens: int = 48
    dtype: str = "float32"
    device: str = "cpu"
    versus: str = ""
    rounds: int = 1
    recompute: bool = True
    tokens: int = 512  # of a completion, logps
    clips: int = 8  # data
    prompts: int = 1  # of `group` completions of five sentences each, erv
    repeats: float = 0.3  # share of sentences that repeat one of their group, erv

    @property
    def config(self) -> HumanOmniConfig:
        """Named, or the language model's sizes: hidden,intermediate,layers,heads,kv heads,vocabulary."""
        if "," not in self.size:
            return humanomni(self.size)
        try:
            hidden, intermediate, layers, heads, kv_heads, vocabulary = map(int, self.size.split(","))
        except ValueError:
            raise SettingsError(f"--size {self.size}: toy, 0.5b, 7b, or six integers hidden,intermediate,layers,heads,"
                                "kv_heads,vocabulary") from None
        text = Qwen2Config(vocabulary, hidden, intermediate, layers, heads, kv_heads)
        return replace(humanomni("toy"), text=text)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Peak:
    """The most memory held inside the block above what was held at its start: `bytes`, and as a whole `total`.

    CUDA: the allocator's count. Linux: resident memory, its high-water mark set back at the start; elsewhere the mark
    of the whole process, which is exact only for the largest variant.
    """

    def __init__(self, device: str = "cpu"):
        self.cuda = device.startswith("cuda")

    def __enter__(self) -> "Peak":
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory otherwise
            if trim:
                trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        self.start = resident()
        return self

    def __exit__(self, *_) -> None:
        self.total = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        self.bytes = self.total - self.start


def resident(field: str = "VmRSS") -> int:
    """Resident bytes of this process: now, or at most since the mark was set back ("VmHWM")."""
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)


def timed(work: Callable, options: Options, warm: bool = True) -> tuple[float, Peak]:
    """Median seconds of `rounds` runs, after one to warm up where there are several; the peak is that of the last."""
    times = []
    for i in range(options.rounds + (warm and options.rounds > 1)):
        with Peak(options.device) as peak:
            synchronize(options.device)
            started = time.perf_counter()
            work()
            synchronize(options.device)
            times.append(time.perf_counter() - started)
    return statistics.median(times[-options.rounds :]), peak


def ceilings(options: Options) -> dict[str, float]:
    """What this machine does at best, measured now: FLOP/s of a square matrix product (through the model's own
    `linear`, the faster of the libraries), bytes/s of a copy (read and write counted)."""
    side, count = (2048, 2**26) if options.size in ("0.5b", "7b") else (1024, 2**24)
    if options.device.startswith("cuda"):
        side, count = 8192, 2**28
    kwargs = dict(device=options.device, dtype=options.torch_dtype)
    a, b = torch.randn(side, side, **kwargs), torch.randn(side, side, **kwargs)
    x, y = torch.zeros(count, **kwargs), torch.zeros(count, **kwargs)
    best = {}
    with torch.no_grad():
        for name, work in (("matmul", lambda: a @ b), ("linear", lambda: linear(a, b)), ("copy", lambda: y.copy_(x))):
            seconds = []
            for _ in range(6):
                synchronize(options.device)
                started = time.perf_counter()
                work()
                synchronize(options.device)
                seconds.append(time.perf_counter() - started)
            best[name] = min(seconds)
    return {"flops": 2 * side**3 / min(best["matmul"], best["linear"]), "bytes": 2 * x.nbytes / best["copy"],
            "matmul_flops": 2 * side**3 / best["matmul"]}


def ratios(ours: dict, other: dict, memory: str = "peak_bytes") -> dict:
    """What `ours` gains on `other`: times faster, times smaller."""
    return {"ratio_time": other["seconds"] / ours["seconds"], "ratio_memory": other[memory] / max(1, ours[memory])}


def fraction(seconds: float, flops: float, traffic: float, ceiling: dict) -> float:
    """The least time that the ceilings allow for this work, as a share of the time it took."""
    return max(flops / ceiling["flops"], traffic / ceiling["bytes"]) / seconds


# ---- a model, a clip, a prompt ---------------------------------------------------------------------------------------


def build(options: Options) -> HumanOmni:
    model = random_humanomni(options.config, dtype=options.torch_dtype, device=options.device)
    model.model.recompute = options.recompute
    return model


def random_clip(options: Options, clips: int = 1) -> tuple[Tensor, Tensor]:
    """video [clips, T, 3, S, S] and audio [clips, mels, F] of noise, each clip the same."""
    c, g = options.config, torch.Generator().manual_seed(0)
    video = torch.randn(c.num_frames, 3, c.vision.image_size, c.vision.image_size, generator=g)
    audio = torch.randn(c.audio.num_mel_bins, 2 * c.audio.max_source_positions, generator=g)
    return tuple(x.to(options.device, options.torch_dtype).expand(clips, *x.shape) for x in (video, audio))


def prompt_tokens(config: HumanOmniConfig) -> int:
    return config.video_tokens + config.audio_tokens + TEXT_TOKENS


def prompts_of(model: HumanOmni, features: tuple[Tensor, Tensor]) -> Prompts:
    """X_m of Eq. 1 for clips of these tower features [clips, ...], TEXT_TOKENS words of text around each."""
    clips, device = len(features[0]), features[0].device
    words = torch.arange(1, TEXT_TOKENS + 1) % model.config.text.vocab_size
    ids = torch.cat([words[:10], torch.tensor([VIDEO, AUDIO]), words[10:]]).expand(clips, -1)
    gate = torch.ones(1, 20, dtype=torch.long, device=device)
    return model.prompt_embeds(ids.to(device), *features, gate)


def language_flops(config: Qwen2Config, rows: int, length: int, context: int) -> float:
    """Of a forward pass of `rows` x `length` new positions, each after `context` earlier ones and its causal past."""
    matrices = linear_weights(config)
    looked_at = context + (length + 1) / 2
    return 2.0 * rows * length * (matrices + 2 * config.num_hidden_layers * config.hidden_size * looked_at)


def linear_weights(config: Qwen2Config) -> int:
    """Elements of the decoder layers' matrices."""
    kv = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    layer = config.hidden_size * (2 * config.hidden_size + 2 * kv + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer


def tower_flops(config: HumanOmniConfig, clips: int = 1) -> float:
    """Of both towers' matrices and attention, convolutions left out."""
    v, a = config.vision, config.audio
    positions, frames = v.grid**2, clips * config.num_frames

    def encoder(layers, width, inner, length):
        return layers * length * (2 * (4 * width * width + 2 * width * inner) + 4 * width * length)

    return (frames * encoder(v.num_hidden_layers - 1, v.hidden_size, v.intermediate_size, positions)
            + clips * encoder(a.encoder_layers, a.d_model, a.encoder_ffn_dim, a.max_source_positions))
