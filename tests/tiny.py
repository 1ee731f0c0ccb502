"""A HumanOmni of tiny dimensions with random weights, and prompts for it, and the plain form of sampling:
shared by the tests of model, log-probs and sampling."""

from dataclasses import replace

import torch

import erv_min.generate as generation
from erv_min.base.onednn import use_onednn
from erv_min.config import humanomni
from erv_min.logps import Completions, shared_prefix_hidden
from erv_min.model.humanomni import HumanOmni, Prompts
from erv_min.model.parameters import init_weights


def tiny_model(seed: int = 0, dtype=torch.float32, **text) -> HumanOmni:
    """The toy preset's class; weights ten times larger than usual, so that distributions are not flat."""
    config = humanomni("toy")
    config = replace(config, text=replace(config.text, **text))
    model = HumanOmni(config)
    init_weights(model, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and ("layers" in name or "embed" in name or "lm_head" in name):
                p.mul_(5)
    return use_onednn(model.to(dtype)).eval()


def tiny_prompts(model: HumanOmni, lengths=(7, 7), seed: int = 1) -> Prompts:
    """Random prompts of these lengths, right-padded with rubbish that nothing may read."""
    width = model.model.embed_tokens.embedding_dim
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(len(lengths), max(lengths), width, generator=generator).to(model.head_weight.dtype)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    embeds = embeds.masked_fill(~mask[..., None], 1e3)
    return Prompts(embeds, mask)


@torch.no_grad()
def plain_rollout(model, prompts, group_size, max_new_tokens, eos_token_id, noise=None, temperature=1.0) -> Completions:
    """What `rollout` is tested against: no cache, each step from the start, every row to the end.

    It looks `sample_token` up in its module, where a test may change it for both."""
    total = prompts.embeds.shape[0] * group_size
    ids = torch.full((total, max_new_tokens), eos_token_id)
    done = torch.zeros(total, dtype=torch.bool)
    for t in range(max_new_tokens):
        first, rest = shared_prefix_hidden(model, prompts, ids[:, : t + 1], torch.ones(total, t + 1, dtype=torch.bool))
        logits = (rest.view(total, t, -1)[:, -1] if t else first) @ model.head_weight.T
        token = generation.sample_token(logits, None if noise is None else noise[:, t], temperature)
        ids[:, t] = torch.where(done, eos_token_id, token)
        done |= ids[:, t] == eos_token_id
        if done.all():
            break
    ids = ids[:, : t + 1]
    return Completions(ids, (ids == eos_token_id).int().cumsum(1) - (ids == eos_token_id).int() == 0)


def close(got, expected, tolerance):
    assert got.shape == expected.shape
    assert (got - expected).abs().max().item() <= tolerance
