"""How fast, beside others? `python scripts/tools/bench.py BENCH [BENCH ...] [--size 0.5b] [--device cuda] ...`

  rollout  G completions of one prompt, beside transformers' `generate`
  step     a GRPO step without its optimizer (Eq. 3): towers, sampling, reference, policy, backward; beside the language
           model alone in transformers: `generate`, a pass for the reference, a training pass, the prompt repeated
  logps    log-probs of G x T tokens from hidden states, forward and backward, beside transformers' loss on whole logits
  fsdp     a training step on two processes (on CUDA: one per GPU), sharded by hand, beside PyTorch's fully_shard; at
           toy size the language model has 6 layers of width 384, 20 M parameters

Weights are random, a prompt is as long as a clip makes it (950 tokens at 0.5B). Each way runs once to warm up and once
to count its memory, the most that it holds beside what was there before (CUDA's allocator; on a CPU live.py); then they
take turns, so that whatever else the machine does meets both, and the median of --repeats runs counts.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from live import Live
from torch import Tensor

from erv_min.base.errors import SettingsError
from erv_min.base.options import OneLineParser, positive
from erv_min.base.processes import barrier, exact_kernels, leave, run_script
from erv_min.config import AUDIO, VIDEO, humanomni
from erv_min.generate import rollout, sampling_noise
from erv_min.grpo import group_advantages, grpo_loss
from erv_min.logps import Completions, completion_logps, token_logps
from erv_min.model.humanomni import HumanOmni, Prompts
from erv_min.model.parameters import freeze_except, random_humanomni
from erv_min.train.settings import TRAINABLE
from erv_min.train.sharding import shard

TEXT_TOKENS = 58  # of a prompt beside its clip

Ways = dict[str, Callable[[], object]]  # "ours" and what it stands beside: each does the work once
Found = dict[str, tuple[float, int]]  # way -> (median seconds, peak bytes)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    barrier()


def peak_of(work: Callable[[], object], device: str) -> int:
    """Runs `work` twice; the most bytes that the second run holds beside what was there before it."""
    if device.startswith("cuda"):
        work()
        synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        work()
        before = live.peak = live.now
        work()
    return live.peak - before


def measure(ways: Ways, options: argparse.Namespace) -> Found:
    peaks, seconds = {way: peak_of(work, options.device) for way, work in ways.items()}, {way: [] for way in ways}
    for turn in range(options.repeats):
        for way in ways if turn % 2 == 0 else reversed(ways):
            synchronize(options.device)
            started = time.perf_counter()
            ways[way]()
            synchronize(options.device)
            seconds[way].append(time.perf_counter() - started)
    return {way: (statistics.median(seconds[way]), peaks[way]) for way in ways}


def build(options: argparse.Namespace) -> tuple[HumanOmni, Tensor, Tensor]:
    """A model that recomputes activations, and a clip of noise: video [1, T, 3, S, S], audio [1, mels, F]."""
    c, placed = humanomni(options.size), {"device": options.device, "dtype": options.dtype}
    model = random_humanomni(c, **placed)
    model.model.recompute = True
    video = torch.randn(1, c.num_frames, 3, c.vision.image_size, c.vision.image_size, **placed)
    audio = torch.randn(1, c.audio.num_mel_bins, 2 * c.audio.max_source_positions, **placed)
    return model, video, audio


def prompt_of(model: HumanOmni, features: tuple[Tensor, Tensor]) -> Prompts:
    """X_m of Eq. 1 for one clip's tower features."""
    device = features[0].device
    words = torch.ones(TEXT_TOKENS, dtype=torch.long, device=device)
    ids = torch.cat([words[:10], torch.tensor([VIDEO, AUDIO], device=device), words[10:]])
    return model.prompt_embeds(ids[None], *features, words[None, :20])


def policy_loss(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Eq. 3's loss of [G, T] on made-up rewards, as in the first update of a batch."""
    rewards = torch.arange(len(logps), dtype=torch.float32, device=logps.device)
    everywhere = torch.ones_like(logps, dtype=torch.bool)
    return grpo_loss(logps, logps.detach(), ref_logps, group_advantages(rewards, len(logps)), everywhere)


def their_model(options: argparse.Namespace):
    """transformers' Qwen2 of the same dimensions with random weights, and a prompt: ids [1, P]."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    c = humanomni(options.size)
    torch.manual_seed(0)
    nothing_special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = Qwen2ForCausalLM(Qwen2Config(**asdict(c.text), **nothing_special))
    prompt = torch.ones(1, c.video_tokens + c.audio_tokens + TEXT_TOKENS, dtype=torch.long)
    return model.to(options.device, options.dtype).eval(), prompt.to(options.device)


def their_rollout(model, prompt: Tensor, options: argparse.Namespace) -> Tensor:
    """`generate` as a user calls it: completions [G, T] of one prompt [1, P]."""
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        num_return_sequences=options.group, max_new_tokens=options.tokens, min_new_tokens=options.tokens,
        pad_token_id=0)
    return ids[:, prompt.shape[1]:]


def their_logps(model, prompt: Tensor, completions: Tensor) -> Tensor:
    """[G, T] as GRPO trainers compute them: the prompt repeated per completion, whole logits at its positions."""
    ids = torch.cat([prompt.expand(len(completions), -1), completions], 1)
    logits = model(ids, logits_to_keep=completions.shape[1] + 1).logits[:, :-1]  # [G, T, V]
    return logits.float().log_softmax(-1).gather(-1, completions[..., None])[..., 0]


def rollout_ways(options: argparse.Namespace) -> Ways:
    model, video, audio = build(options)
    with torch.no_grad():
        prompts = prompt_of(model, (model.vision_features(video), model.audio_features(audio)))
    noise = sampling_noise(0, 0, [0], options.group, options.tokens)
    other, their_prompt = their_model(options)
    return {"ours": lambda: rollout(model, prompts, options.group, options.tokens, -1, noise).ids,
            "transformers": lambda: their_rollout(other, their_prompt, options)}


def step_ways(options: argparse.Namespace) -> Ways:
    model, video, audio = build(options)
    towers = (model.model.vision_tower, model.model.audio_tower)
    reference = copy.deepcopy(model, {id(tower): tower for tower in towers}).requires_grad_(False)
    freeze_except(model, TRAINABLE["grpo"])
    noise = sampling_noise(0, 0, [0], options.group, options.tokens)
    other, their_prompt = their_model(options)
    other.gradient_checkpointing_enable()  # in train mode alone

    def ours() -> None:
        features = model.vision_features(video), model.audio_features(audio)  # frozen
        with torch.no_grad():
            completions = rollout(model, prompt_of(model, features), options.group, options.tokens, -1, noise)
            ref_logps, _ = completion_logps(reference, prompt_of(reference, features), completions)
        logps, _ = completion_logps(model, prompt_of(model, features), completions, with_entropy=True)
        policy_loss(logps, ref_logps).backward()
        model.zero_grad(set_to_none=True)

    def theirs() -> None:
        completions = their_rollout(other.eval(), their_prompt, options)
        with torch.no_grad():
            ref_logps = their_logps(other, their_prompt, completions)
        policy_loss(their_logps(other.train(), their_prompt, completions), ref_logps).backward()
        other.zero_grad(set_to_none=True)

    return {"ours": ours, "transformers": theirs}


def logps_ways(options: argparse.Namespace) -> Ways:
    from transformers.loss.loss_utils import ForCausalLMLoss
    c, count = humanomni(options.size).text, options.group * options.tokens
    placed = {"device": options.device, "dtype": options.dtype}
    hidden = torch.randn(count, c.hidden_size, **placed).requires_grad_()
    weight = (torch.randn(c.vocab_size, c.hidden_size, **placed) * c.hidden_size**-0.5).requires_grad_()
    ids = torch.arange(count, device=options.device) % c.vocab_size

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])

    return {"ours": lambda: backward(-token_logps(hidden, weight, ids)[0].mean()),
            "transformers": lambda: backward(ForCausalLMLoss(hidden @ weight.T, None, c.vocab_size, shift_labels=ids))}


def fsdp_ways(options: argparse.Namespace, rank: int) -> Ways:
    """The policy's half of a step on one clip of this process: log-probs of G targets on a shared prompt of 64
    tokens, backward, clipping, AdamW. Units, types and recomputation are the same in both ways."""
    config = humanomni(options.size)
    if options.size == "toy":
        wider = replace(config.text, hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
        config = replace(config, text=wider)
    draw = torch.Generator().manual_seed(rank)
    embeds = torch.randn(1, 64, config.text.hidden_size, generator=draw).to(options.device, options.dtype)
    prompts = Prompts(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool, device=options.device))
    ids = torch.randint(config.text.vocab_size, (options.group, options.tokens), generator=draw).to(options.device)
    targets = Completions(ids, torch.ones_like(ids, dtype=torch.bool))

    def sharded(how: str) -> Callable[[], float]:
        model = random_humanomni(config)
        model.model.recompute = True
        freeze_except(model, ["language_model"])
        run = shard(model, how, options.device, options.dtype)
        optimizer = torch.optim.AdamW(run.named_parameters().values(), lr=1e-4)

        def step() -> float:
            with run.forward_pass():
                loss = -completion_logps(run.model, prompts, targets)[0].mean()
            loss.backward()
            run.clip_gradients(1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    return {"ours": sharded("hand"), "fully_shard": sharded("torch")}


def fsdp_process(rank: int, folder: str, results, options: argparse.Namespace, processes: int) -> None:
    """One of the processes of `fsdp`; the first hands over what it found."""
    torch.set_num_threads(1)
    backend = "gloo"
    if options.device.startswith("cuda"):
        options.device, backend = f"cuda:{rank}", "nccl"
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"file://{folder}/meet", rank=rank, world_size=processes)
    found = measure(fsdp_ways(options, rank), options)
    if rank == 0:
        results.put(found)
    leave()


def fsdp(options: argparse.Namespace) -> Found:
    processes = torch.cuda.device_count() if options.device.startswith("cuda") else 2
    if processes < 2:
        raise SettingsError("fsdp needs two GPUs; --device cpu measures two processes on gloo")
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(fsdp_process, (folder, results, options, processes), nprocs=processes)
    return results.get()


BENCHES = {"rollout": rollout_ways, "step": step_ways, "logps": logps_ways, "fsdp": fsdp}


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("bench", nargs="+", choices=BENCHES, metavar="BENCH", help=", ".join(BENCHES))
    parser.add_argument("--size", default="toy", choices=("toy", "0.5b", "7b"), help="dimensions of the model")
    parser.add_argument("--group", type=positive, default=8, help="G, completions of a prompt")
    parser.add_argument("--tokens", type=positive, default=48, help="T, tokens of a completion")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=positive, default=3, help="timed runs of each way")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args(argv)
    settings = vars(options) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    options.dtype = getattr(torch, options.dtype)
    if {*options.bench} - {"fsdp"} and not importlib.util.find_spec("transformers"):
        raise SettingsError("there is no transformers to stand beside: pip install transformers (fsdp needs none)")
    exact_kernels()
    if options.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(options.device).index or 0)
    for name in options.bench:
        found = fsdp(options) if name == "fsdp" else measure(BENCHES[name](options), options)
        for way, (seconds, peak) in found.items():
            ratios = {"ratio_time": seconds / found["ours"][0], "ratio_memory": peak / max(1, found["ours"][1])}
            row = settings | {"bench": name, "way": way, "seconds": seconds, "peak_bytes": peak} | ratios
            print(json.dumps(row) if options.json else
                  "{bench:<9}{way:<13}{seconds:9.3f} s, {ratio_time:6.2f} of ours; {gib:8.3f} GiB, {ratio_memory:6.2f} "
                  "of ours".format(**row, gib=peak / 2**30), flush=True)


if __name__ == "__main__":
    run_script(main)
