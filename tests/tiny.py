"""A HumanOmni of tiny dimensions with random weights, and prompts for it: shared by the tests of policy and sampling."""

from dataclasses import replace

import torch

from erv_min.config import humanomni
from erv_min.model.humanomni import HumanOmni, init_weights
from erv_min.logps import Prompts
from erv_min.run.onednn import use_onednn


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
