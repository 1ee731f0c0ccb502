"""Sampling o ~ pi_theta(. | x) (Eq. 1, right half): one prefill for a group of G completions, then a KV cache.

The noise of a token is a function of (seed, step, prompt, sample, position) alone, so that the number of processes, the
batch and a resume do not change what is sampled. Left out: beam search, repetition penalties (nobody here uses them).
"""

import numpy as np
import torch
from torch import Tensor

from erv_min.errors import SettingsError
from erv_min.model.humanomni import HumanOmni
from erv_min.model.qwen2 import GroupCache
from erv_min.policy import Completions, Prompts, shared_prefix_hidden


def sampling_noise(seed: int, step: int, prompts: list[int], group_size: int, length: int) -> Tensor:
    """Uniforms in [0, 1), float64 [len(prompts) * group_size, length], keyed by (seed, step, prompt, sample).

    Counter-based (Philox, SC'11): no state, so nothing to save and nothing that depends on the order of calls.
    """
    rows = [np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, prompt, sample])).random(length)
            for prompt in prompts for sample in range(group_size)]
    return torch.from_numpy(np.stack(rows))


def sample_token(logits: Tensor, noise: Tensor | None, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token a row from logits [R, V] by inverting the cumulative distribution at `noise` [R]; ids [R] int64.

    Temperature 0 is greedy. top_k and top_p cut the distribution first (0 and 1.0: off).
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


@torch.no_grad()
def rollout(model: HumanOmni, prompts: Prompts, group_size: int, max_new_tokens: int, eos_token_id: int,
            noise: Tensor | None = None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
            use_cache: bool = True, on_token=None) -> Completions:
    """Samples `group_size` completions for each of B prompts; stops as soon as every row has met `eos_token_id`.

    noise: [B * G, max_new_tokens] from `sampling_noise` (None is allowed at temperature 0). `use_cache=False`
    computes each step from the start: the same tokens, slowly; it is there to test the cache against.
    `on_token(ids [B * G])` is called after each step. Returns ids and mask [B * G, T], T <= max_new_tokens; what
    follows a row's EOS is EOS and masked out.
    """
    if temperature > 0 and noise is None:
        raise SettingsError("sampling at a temperature above 0 needs noise: pass sampling_noise(...), or temperature=0")
    batch, device = prompts.embeds.shape[0], prompts.embeds.device
    rows = batch * group_size
    ids = torch.full((rows, max_new_tokens), eos_token_id, dtype=torch.long, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    noise = None if noise is None else noise.to(device)
    lengths = prompts.lengths.repeat_interleave(group_size)[:, None]  # [R, 1]
    cache = None
    for t in range(max_new_tokens):
        if t == 0:
            hidden, kv = model.model(prompts.embeds, keep_kv=True)
            hidden = hidden[torch.arange(batch, device=device), prompts.lengths - 1].repeat_interleave(group_size, 0)
            if use_cache:
                cache = GroupCache.start(kv, prompts.mask, group_size, max_new_tokens)
        elif use_cache:
            embeds = model.model.embed_tokens(ids[:, t - 1 : t])
            hidden = model.model.decode(embeds, lengths + (t - 1), cache)[:, 0]
        else:
            hidden = shared_prefix_hidden(model, prompts, ids[:, : t + 1])[:, -1]
        token = sample_token(hidden @ model.head_weight.T, None if noise is None else noise[:, t], temperature, top_k,
                             top_p)
        ids[:, t] = torch.where(done, eos_token_id, token)
        done = done | (token == eos_token_id)
        if on_token is not None:
            on_token(ids[:, t])
        if bool(done.all()):
            break
    ids = ids[:, : t + 1]
    ended = (ids == eos_token_id).int().cumsum(1)
    return Completions(ids, (ended - (ids == eos_token_id).int()) == 0)


@torch.no_grad()
def generate(model: HumanOmni, input_ids: Tensor, video: Tensor | None = None, audio: Tensor | None = None,
             gate_ids: Tensor | None = None, gate_mask: Tensor | None = None, group_size: int = 1,
             max_new_tokens: int = 512, temperature: float = 0.3, eos_token_id: int | None = None, seed: int = 0,
             use_cache: bool = True, on_token=None) -> Tensor:
    """Completions of one prompt: ids [group_size, <= max_new_tokens], right-filled with EOS. Eq. 1.

    input_ids [L] with -201 / -202 where the clip's tokens go; video [T, 3, S, S] or [1, T, 3, S, S]; audio [mels, F]
    or [1, mels, F]; gate_ids, gate_mask [Q] or [1, Q] (the text gate's BERT input). Temperature 0 is greedy.
    """
    input_ids, gate_ids, gate_mask = (None if x is None else torch.as_tensor(x).reshape(1, -1)
                                      for x in (input_ids, gate_ids, gate_mask))
    embeds, mask = model.prompt_embeds(input_ids, video=video, audio=audio, gate_ids=gate_ids, gate_mask=gate_mask)
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    noise = sampling_noise(seed, 0, [0], group_size, max_new_tokens) if temperature > 0 else None
    return rollout(model, Prompts(embeds, mask), group_size, max_new_tokens, eos, noise, temperature,
                   use_cache=use_cache, on_token=on_token).ids
