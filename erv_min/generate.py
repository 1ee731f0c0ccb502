"""Sampling o ~ pi_theta(. | x) (Eq. 1, right half): one prefill for a group of G completions, then a KV cache.

The noise of a token is a function of (seed, step, prompt, sample, position) alone, so that the number of processes, the
batch and a resume do not change what is sampled. Rows that are done are dropped on the way. Left out: beam search,
repetition penalties.
"""

import contextlib

import numpy as np
import torch
from torch import Tensor

from erv_min.base.errors import SettingsError
from erv_min.base.graphs import Replay
from erv_min.base.onednn import linear
from erv_min.config import Qwen2Config
from erv_min.logps import Completions
from erv_min.model.humanomni import HumanOmni, Prompts
from erv_min.model.qwen2 import GroupCache

WINDOW = 64  # steps after which a decode step's shapes change on CUDA for the first time


def sampling_noise(seed: int, step: int, prompts: list[int], group_size: int, length: int) -> Tensor:
    """Uniforms in [0, 1), float64 [len(prompts) * group_size, length], keyed by (seed, step, prompt, sample).

    Counter-based (Philox, SC'11): no state, so nothing to save and nothing that depends on the order of calls.
    """
    rows = [np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, prompt, sample])).random(length)
            for prompt in prompts for sample in range(group_size)]
    return torch.from_numpy(np.stack(rows))


def sample_token(logits: Tensor, noise: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token per row from logits [R, V] by inverting the cumulative distribution at `noise` [R]; ids [R] int64.

    Temperature 0 is greedy. top_k and top_p cut the distribution first (0 and 1.0: off). Sums are float64: in float32
    tokens of probability under 6e-8 would never be drawn.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_k and top_k < probs.shape[-1]:
        probs = probs.masked_fill(probs < probs.topk(top_k).values[:, -1:], 0)
    if top_p < 1:
        ordered = probs.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered  # mass that stands before each token: the set that first reaches top_p
        least = ordered.masked_fill(before >= top_p, float("inf")).amin(-1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    picked = torch.searchsorted(cumulative, noise.to(cumulative)[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return picked.clamp_max(probs.shape[-1] - 1)


class DecodeStep:
    """Last tokens of the rows that are left -> logits of the next: one call per step, with the cache growing by one.

    A step looks at what is filled of the cache. On CUDA, where a step is replayed as a graph, it looks at the first
    WINDOW places, then at twice as many, and so on, so that its shapes stay the same for long.
    """

    def __init__(self, model: HumanOmni, cache: GroupCache, lengths: Tensor):
        self.model, self.cache, self.lengths = model, cache, lengths  # [R, 1], tokens of each row's prompt
        self.replay = Replay()

    def run(self, last: Tensor) -> Tensor:
        language, cache = self.model.model, self.cache
        hidden = language.decode(language.embed_tokens(last[:, None]), self.lengths + cache.length, cache)
        return linear(hidden[:, 0], self.model.head_weight)

    def __call__(self, last: Tensor, step: int) -> Tensor:
        """last [R] -> logits [R, V], the `step`-th (from 1 on)."""
        cache, most = self.cache, self.cache.own[0][0].shape[3]
        cache.window = min(most, WINDOW << ((step - 1) // WINDOW).bit_length() if last.is_cuda else step)
        return self.replay(self.run, last, shape=(len(last), cache.window), left=most - step)

    def keep(self, prompts: Tensor, rows: Tensor) -> None:
        """Goes on with these prompts and rows alone."""
        self.cache.keep(prompts, rows)
        self.lengths = self.lengths[rows]


def unfinished(done: Tensor) -> tuple[Tensor, Tensor]:
    """done [B, G] -> the prompts [B'] and rows [B' * G'] to go on with, where something is left.

    G' is the most that a prompt has left; where another has fewer, finished rows fill up.
    """
    left = (~done).sum(1)
    prompts, group = left.nonzero()[:, 0], int(left.max())
    columns = done[prompts].int().argsort(dim=1, stable=True)[:, :group]
    return prompts, (prompts[:, None] * done.shape[1] + columns).flatten()


@contextlib.contextmanager
def any_kernels():
    """Lifts --deterministic: no forward kernel here adds by atomics, but CUDA's cumsum would be refused (torch 2.13 and
    before), and the cache's index_copy_ would sort in every layer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@any_kernels()
@torch.no_grad()
def rollout(model: HumanOmni, prompts: Prompts, group_size: int, max_new_tokens: int, eos_token_id: int,
            noise: Tensor | None = None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
            on_token=None) -> Completions:
    """Samples `group_size` completions for each of B prompts; stops as soon as every row has met `eos_token_id`.

    noise: [B * G, max_new_tokens] from `sampling_noise` (None is allowed at temperature 0). `on_token(ids [B * G])` is
    called after each step. Returns ids, mask and logps [B * G, T], T <= max_new_tokens. What follows a row's EOS is EOS
    and masked out. The log-probs are at that temperature, before top_k and top_p cut it; 0 for greedy tokens.
    """
    if temperature > 0 and noise is None:
        raise SettingsError("sampling at a temperature above 0 needs noise: pass sampling_noise(...), or temperature=0")
    device, total = prompts.embeds.device, len(prompts.embeds) * group_size
    ids = torch.full((total, max_new_tokens), eos_token_id, dtype=torch.long, device=device)
    logps = torch.zeros(total, max_new_tokens, device=device)
    noise = (torch.zeros_like(logps) if noise is None else noise).to(device)
    done = torch.zeros(total, dtype=torch.bool, device=device)
    rows = torch.arange(total, device=device)  # which completion each row of the cache is

    logits, step = prefill(model, prompts, group_size, max_new_tokens)  # [R, V]
    for t in range(max_new_tokens):
        if t:
            logits = step(ids[rows, t - 1], t)
        token = sample_token(logits, noise[rows, t], temperature, top_k, top_p)
        if temperature > 0:
            logps[rows, t] = (logits.float() / temperature).log_softmax(-1).gather(-1, token[:, None])[:, 0]
        ids[rows, t] = torch.where(done[rows], eos_token_id, token)
        done = done | (ids[:, t] == eos_token_id)
        if on_token is not None:
            on_token(ids[:, t])
        left = total - int(done.sum())
        if not left:
            break
        if 2 * left <= len(rows):  # half of the rows are finished: go on without them, where whole prompts allow it
            prompts_left, rows_left = unfinished(done[rows].view(-1, group_size))
            if 2 * len(rows_left) <= len(rows):
                step.keep(prompts_left, rows_left)
                rows, group_size = rows[rows_left], len(rows_left) // len(prompts_left)

    ids, ended = ids[:, : t + 1], (ids[:, : t + 1] == eos_token_id).int()
    mask = ended.cumsum(1) == ended  # no EOS before this token
    return Completions(ids, mask, logps[:, : t + 1].masked_fill(~mask, 0))


def prefill(model: HumanOmni, prompts: Prompts, group_size: int, max_new_tokens: int) -> tuple[Tensor, DecodeStep]:
    """Each prompt once: logits [B * G, V] of the first token, and the step that gives those of the next."""
    hidden, kv = model.model(prompts.embeds, keep_kv=True)
    last = hidden[torch.arange(len(hidden), device=hidden.device), prompts.lengths - 1]  # [B, D]
    logits = linear(last, model.head_weight).repeat_interleave(group_size, 0)
    cache = GroupCache(kv, prompts.mask, group_size, max_new_tokens)
    return logits, DecodeStep(model, cache, prompts.lengths.repeat_interleave(group_size)[:, None])


def prompt_bytes(c: Qwen2Config, length: int, group_size: int, max_new_tokens: int, itemsize: int) -> int:
    """Bytes that a `rollout` needs at most for each of its prompts, of `length` tokens, beside the weights.

    Keys and values: the prompt's twice while the cache starts, the completions' one and a half times while rows are
    dropped. Activations: the widest of a layer in the prefill, the scores of a decode step, and G rows of logits, with
    those of the step before, probabilities in float32 and their sums in float64.
    """
    position = 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * itemsize
    cached = position * (2 * length + group_size * max_new_tokens * 3 // 2)
    prefilled = length * (4 * c.intermediate_size + 8 * c.hidden_size) * itemsize
    scored = 16 * group_size * c.num_attention_heads * (length + max_new_tokens)
    return cached + max(prefilled, scored + 32 * group_size * c.vocab_size)


def prompts_at_once(model: HumanOmni, prompts: Prompts, group_size: int, max_new_tokens: int) -> int:
    """How many of `prompts` one rollout may take: on CUDA as many as 90% of the free memory holds, or 1; else all.

    A decode step of a small model takes as long for many rows as for one, on a GPU: the launches of its kernels.
    """
    embeds = prompts.embeds
    if not embeds.is_cuda:
        return len(embeds)
    free = torch.cuda.mem_get_info(embeds.device)[0] + (  # what the allocator holds without using it counts as free
        torch.cuda.memory_reserved(embeds.device) - torch.cuda.memory_allocated(embeds.device))
    needed = prompt_bytes(model.config.text, embeds.shape[1], group_size, max_new_tokens, embeds.itemsize)
    return max(1, min(len(embeds), int(0.9 * free) // needed))


@torch.no_grad()
def generate(model: HumanOmni, input_ids: Tensor, video: Tensor | None = None, audio: Tensor | None = None,
             gate_ids: Tensor | None = None, gate_mask: Tensor | None = None, group_size: int = 1,
             max_new_tokens: int = 512, temperature: float = 0.3, eos_token_id: int | None = None,
             seed: int = 0) -> Tensor:
    """Completions of one prompt: ids [group_size, <= max_new_tokens], right-filled with EOS. Eq. 1.

    input_ids [L] with -201 / -202 where the clip's tokens go; video [T, 3, S, S] or [1, T, 3, S, S]; audio [mels, F]
    or [1, mels, F]; gate_ids, gate_mask [Q] or [1, Q] (the text gate's BERT input). Temperature 0 is greedy.
    """
    input_ids, gate_ids, gate_mask = (None if x is None else torch.as_tensor(x).reshape(1, -1)
                                      for x in (input_ids, gate_ids, gate_mask))
    vision = None if video is None else model.vision_features(video)
    audio = None if audio is None else model.audio_features(audio)
    prompts = model.prompt_embeds(input_ids, vision, audio, gate_ids, gate_mask)
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    noise = sampling_noise(seed, 0, [0], group_size, max_new_tokens)
    return rollout(model, prompts, group_size, max_new_tokens, eos, noise, temperature).ids
