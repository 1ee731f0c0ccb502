"""log pi_theta(y_t | x, y_<t) of G completions on a shared prompt: what Eq. 2 and Eq. 3 are made of.

What the released step repeats or pads is done once here, with the same gradient:
* the prompt is prefilled once per group and its G completions attend to its keys (Prefix Grouper, arXiv 2506.05433),
  without padding (qwen2.PackedGroups);
* only positions that predict a completion token meet the head, in chunks that the backward pass computes again, so that
  no [B, T, V] tensor exists;
* log-softmax, temperature and entropy come out of the same pass, in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from erv_min.base.onednn import linear
from erv_min.model.humanomni import HumanOmni, Prompts
from erv_min.model.qwen2 import PackedGroups

CHUNK_LOGITS = 2**24  # logits that exist at once: 64 MiB in float32
# On CUDA so many times as many. By arithmetic, not measured: a chunk of 110 rows (0.5B) multiplies for 0.5 ms of an
# A100 (0.09 TFLOP), then rewrites the head's float32 gradient [V, D] for 1 ms (1.6 GB with the product that is added). 441
# rows do so a quarter as often, in 0.9 GiB: 14 bytes per logit (float32, its temporaries, the products' type).
ON_CUDA = 4


@dataclass
class Completions:
    """R = B * G completions, the G of a prompt one after the other."""

    ids: Tensor  # [R, T] int64
    mask: Tensor  # [R, T] bool, True up to and with EOS
    logps: Tensor | None = None  # [R, T] float32, the sampler's own log-probs, where they were sampled

    def __getitem__(self, rows: slice) -> "Completions":
        """Some rows, without the padding that others need."""
        width = int(self.mask[rows].sum(1).max())
        return Completions(*(None if x is None else x[rows, :width] for x in (self.ids, self.mask, self.logps)))

    @classmethod
    def cat(cls, parts: "list[Completions]", pad_id: int) -> "Completions":
        """Several rollouts as one, padded to the longest."""
        width = max(part.ids.shape[1] for part in parts)
        columns = zip(*((part.ids, part.mask, part.logps) for part in parts))
        return cls(*(torch.cat([pad(x, (0, width - x.shape[1]), value=value) for x in column])
                     for column, value in zip(columns, (pad_id, False, 0.0))))


def shared_prefix_hidden(model: HumanOmni, prompts: Prompts, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict each completion token, each prompt computed once and no padding of the completions.

    ids, mask [R, T] -> first [R, D], which the prompt's last token gives, and rest [N, D], where `mask[:, 1:]` is True,
    row by row: completion token t - 1 predicts the t-th.
    """
    batch, (rows, length) = len(prompts.embeds), ids.shape
    last = prompts.lengths - 1  # [B]
    hidden, kv = model.model(prompts.embeds, keep_kv=True)
    first = hidden[torch.arange(batch, device=ids.device), last].repeat_interleave(rows // batch, 0)  # [R, D]
    past = PackedGroups.of(kv, prompts.mask, mask[:, 1:])  # of no token at all where each has one: the layers still run
    positions = last.repeat_interleave(rows // batch)[:, None] + torch.arange(1, length, device=ids.device)
    embeds = model.model.embed_tokens(ids[:, :-1].flatten()[past.places][None])
    rest, _ = model.model(embeds, positions.flatten()[past.places][None], past)
    return first, rest[0]


class TokenLogps(torch.autograd.Function):
    """`token_logps`, a chunk of logits at a time in both directions: the backward pass computes them again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, with_entropy: bool):
        size = max(1, CHUNK_LOGITS * (ON_CUDA if weight.is_cuda else 1) // weight.shape[0])
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logps, normaliser, entropy = (hidden.new_empty(len(ids), dtype=dtype) for _ in range(3))
        for at in range(0, len(ids), size):
            part = slice(at, at + size)
            logits = linear(hidden[part], weight).to(dtype).div_(temperature)  # [n, V]
            normaliser[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, ids[part, None])[:, 0] - normaliser[part]
            if with_entropy:  # of p = exp(l - z): z - sum of p l
                probs = (logits - normaliser[part, None]).exp_()
                entropy[part] = normaliser[part] - torch.linalg.vecdot(probs, logits)
        ctx.save_for_backward(hidden, weight, ids, normaliser)
        ctx.temperature, ctx.size = temperature, size
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        hidden, weight, ids, normaliser = ctx.saved_tensors
        grad, grad_hidden, grad_weight = grad / ctx.temperature, torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:  # one buffer for all chunks, in float32: in bfloat16 later chunks would be lost
            grad_weight = torch.zeros(weight.shape, dtype=normaliser.dtype, device=weight.device)
        for at in range(0, len(ids), ctx.size):
            part = slice(at, at + ctx.size)
            logits = linear(hidden[part], weight).to(normaliser.dtype)
            probs = logits.div_(ctx.temperature).sub_(normaliser[part, None]).exp_()
            # d logp / d logits = onehot - probs
            d = probs.mul_(-grad[part, None]).scatter_add_(1, ids[part, None], grad[part, None]).to(hidden.dtype)
            grad_hidden[part] = d @ weight
            if grad_weight is not None and d.dtype == grad_weight.dtype:
                grad_weight.addmm_(d.T, hidden[part])
            elif grad_weight is not None:
                grad_weight += d.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def token_logps(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0,
                with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[ids] and the entropy in nats, without [N, V]: float32 [N] each.

    hidden [N, D], weight [V, D], ids [N]. The entropy is computed where asked for, and carries no gradient. Under
    autocast the products are in its type; float64 stays float64.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # a Function's backward runs outside of autocast
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    with torch.autocast(device, enabled=False):  # which would take the entropy's sum in its type
        logps, entropy = TokenLogps.apply(hidden, weight, ids, temperature, with_entropy)
    return logps, entropy if with_entropy else None


def completion_logps(model: HumanOmni, prompts: Prompts, completions: Completions, temperature: float = 1.0,
                     with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """log pi(o_t | x, o_<t) at each completion token, and the entropy where asked for: float32 [R, T], 0 outside the
    mask."""
    ids, mask = completions.ids, completions.mask
    first, rest = shared_prefix_hidden(model, prompts, ids, mask)
    tokens = torch.cat([ids[:, 0], ids[:, 1:][mask[:, 1:]]])  # [R + N]
    found = token_logps(torch.cat([first, rest]), model.head_weight, tokens, temperature, with_entropy)

    def padded(values: Tensor) -> Tensor:  # [R + N] -> [R, T]
        on_rest = values.new_zeros(mask[:, 1:].shape).masked_scatter(mask[:, 1:], values[len(ids):])
        return torch.cat([values[: len(ids), None], on_rest], 1).masked_fill(~mask, 0)

    return padded(found[0]), padded(found[1]) if with_entropy else None
