"""Sampling o ~ pi_theta(. | x) (Eq. 1, right half): one prefill for a group of G completions, then token by token.

The noise of a token is a function of (seed, step, prompt, sample, position) alone, so that the number of processes, the
batch and a resume do not change what is sampled. What makes a step fast is in decoding.py. Left out: beam search,
repetition penalties.
"""

import numpy as np
import torch
from torch import Tensor

from erv_min.base.errors import SettingsError
from erv_min.base.onednn import linear
from erv_min.base.processes import any_kernels
from erv_min.decoding import Decoder
from erv_min.logps import Completions
from erv_min.model.humanomni import HumanOmni, Prompts

LOOKS = {"cuda": 8}  # tokens between two looks at which rows are done: for each the GPU must wait for the host


def sampling_noise(seed: int, step: int, prompts: list[int], group_size: int, length: int) -> Tensor:
    """Uniforms in [0, 1), float64 [len(prompts) * group_size, length], keyed by (seed, step, prompt, sample): Philox
    (SC'11) has no state to save."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, prompt, sample])).random(length)
            for prompt in prompts for sample in range(group_size)]
    return torch.from_numpy(np.stack(rows))


def sample_token(logits: Tensor, noise: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token per row from logits [R, V] by inverting the cumulative distribution at `noise` [R]; ids [R] int64.

    Temperature 0 is greedy. top_k, then top_p, cut the distribution first (0 and 1.0: off), to the same tokens as in
    transformers. Sums are float64: in float32 tokens of probability under 6e-8 would never be drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / temperature
    if top_k and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(-1)
        cut = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        cut[:, -1] = False  # the best token stays
        scores = scores.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
    probs = scores.softmax(-1)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    picked = torch.searchsorted(cumulative, noise.to(cumulative)[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return picked.clamp_max(probs.shape[-1] - 1)


def prefill(model: HumanOmni, prompts: Prompts, group_size: int, max_new_tokens: int) -> tuple[Tensor, Decoder]:
    """Each prompt once: logits [B * G, V] of the first token, and the decoder that gives those of the next."""
    hidden, kv = model.language_model(prompts.embeds, keep_kv=True)
    last = hidden[torch.arange(len(hidden), device=hidden.device), prompts.lengths - 1]  # [B, D]
    logits = linear(last, model.head_weight).repeat_interleave(group_size, 0)
    return logits, Decoder(model, prompts, kv, group_size, max_new_tokens)


@any_kernels()
@torch.no_grad()
def rollout(model: HumanOmni, prompts: Prompts, group_size: int, max_new_tokens: int, eos_token_id: int,
            noise: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, on_token=None) -> Completions:
    """Samples `group_size` completions for each of B prompts; stops as soon as every row has met `eos_token_id`.

    noise: [B * G, max_new_tokens] from `sampling_noise`. `on_token(ids [B * G])` is called after each step. -> ids,
    mask, logps [B * G, T], T <= max_new_tokens. What follows a row's EOS is EOS and masked out. The log-probs are at
    that temperature, before top_k and top_p cut it; 0 for greedy tokens."""
    device, total = prompts.embeds.device, len(prompts.embeds) * group_size
    ids = torch.full((total, max_new_tokens), eos_token_id, dtype=torch.long, device=device)
    logps = torch.zeros(total, max_new_tokens, device=device)
    noise, done = noise.to(device), torch.zeros(total, dtype=torch.bool, device=device)
    logits, decoder = prefill(model, prompts, group_size, max_new_tokens)  # [R, V]
    for t in range(max_new_tokens):
        rows = decoder.rows  # the completions that are still sampled
        if t:
            logits = decoder.next_logits(ids[rows, t - 1], t)
        token = sample_token(logits, noise[rows, t], temperature, top_k, top_p)
        if temperature > 0:
            logps[rows, t] = (logits.float() / temperature).log_softmax(-1).gather(-1, token[:, None])[:, 0]
        ids[rows, t] = torch.where(done[rows], eos_token_id, token)
        done = done | (ids[:, t] == eos_token_id)
        if on_token is not None:
            on_token(ids[:, t])
        if (t + 1) % LOOKS.get(device.type, 1) == 0:
            left = total - int(done.sum())
            if not left:
                break
            decoder.drop_finished(done, left)

    ended = (ids == eos_token_id).int()
    mask = ended.cumsum(1) == ended  # no EOS before this token
    return Completions(ids, mask, logps.masked_fill(~mask, 0))[:]  # as wide as the longest


@torch.no_grad()
def generate(model: HumanOmni, input_ids: Tensor, video: Tensor | None = None, audio: Tensor | None = None,
             gate_ids: Tensor | None = None, gate_mask: Tensor | None = None, group_size: int = 1,
             max_new_tokens: int = 512, temperature: float = 0.3, eos_token_id: int | None = None,
             seed: int = 0) -> Tensor:
    """Completions of one prompt: ids [group_size, <= max_new_tokens], right-filled with EOS. Eq. 1.

    input_ids [L] with -201 / -202 in the clip's place; video [T, 3, S, S] or [1, T, 3, S, S]; audio [mels, F] or
    [1, mels, F]; gate_ids, gate_mask [Q] or [1, Q] (the text gate's BERT input). Temperature 0 is greedy.
    eos_token_id: by default that of the model's config.json; raises SettingsError if it has none."""
    if eos_token_id is None:
        eos_token_id = model.config.extra.get("eos_token_id")
    if not isinstance(eos_token_id, int):
        raise SettingsError("generate needs eos_token_id, the id that ends a completion (Tokenizer.eos_id): in the "
                            f"model's config.json it is {eos_token_id!r}")
    input_ids, gate_ids, gate_mask = (None if x is None else torch.as_tensor(x).reshape(1, -1)
                                      for x in (input_ids, gate_ids, gate_mask))
    vision = None if video is None else model.vision_features(video)
    audio = None if audio is None else model.audio_features(audio)
    prompts = model.prompt_embeds(input_ids, vision, audio, gate_ids, gate_mask)
    noise = sampling_noise(seed, 0, [0], group_size, max_new_tokens)
    return rollout(model, prompts, group_size, max_new_tokens, eos_token_id, noise, temperature).ids
