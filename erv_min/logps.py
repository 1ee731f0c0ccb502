"""log pi_theta(y_t | x, y_<t) of G completions on a shared prompt: what Eq. 2 and Eq. 3 are made of.

What the released step repeats or pads is done once here, with the same gradient:
* the prompt is prefilled once per group and its G completions attend to its keys (Prefix Grouper, arXiv 2506.05433);
* completions of unequal length stand one after the other: no layer but attention sees padding;
* only positions that predict a completion token meet the head, in chunks that the backward pass computes again, so that
  no [B, T, V] tensor exists;
* log-softmax, temperature and entropy come out of the same pass, in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from erv_min.model.humanomni import HumanOmni
from erv_min.run.onednn import linear
from erv_min.model.qwen2 import Packing

CHUNK_LOGITS = 2**24  # logits that exist at once: 64 MiB in float32
# On CUDA so many times as many. A chunk of 110 rows (0.5B) multiplies for 0.5 ms of an A100 (0.09 TFLOP), but then
# rewrites the head's float32 gradient [V, D] for 1 ms (1.6 GB with the product that is added); 441 rows do so a quarter
# as often. Their memory, 14 bytes a logit (float32, its temporaries, the products' type), is 0.9 GiB.
ON_CUDA = 4


@dataclass
class Prompts:
    """B prompts as embeddings, right-padded: `embeds` [B, P, D] and `mask` [B, P] bool (True at real positions)."""

    embeds: Tensor
    mask: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)  # [B]

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(self.embeds[rows], self.mask[rows])


@dataclass
class Completions:
    """R = B * G completions, the G of a prompt one after the other: `ids` [R, T] int64, `mask` [R, T] bool, True up to
    and with EOS, and where they were sampled `logps` [R, T] float32, the sampler's own log-probs (0 outside the mask)."""

    ids: Tensor
    mask: Tensor
    logps: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Completions":
        """Some rows, without the padding that others need."""
        width = int(self.mask[rows].sum(1).max())
        logps = None if self.logps is None else self.logps[rows, :width]
        return Completions(self.ids[rows, :width], self.mask[rows, :width], logps)

    @classmethod
    def cat(cls, parts: "list[Completions]", pad_id: int) -> "Completions":
        """Several rollouts as one, padded to the longest."""
        width = max(part.ids.shape[1] for part in parts)

        def stacked(tensors: list[Tensor], value) -> Tensor:
            return torch.cat([pad(x, (0, width - x.shape[1]), value=value) for x in tensors])

        return cls(stacked([x.ids for x in parts], pad_id), stacked([x.mask for x in parts], False),
                   None if parts[0].logps is None else stacked([x.logps for x in parts], 0.0))


def pad_targets(targets: list[list[int]], pad_id: int, device: torch.device) -> Completions:
    """Target ids of several lengths as one batch, right-padded with `pad_id`; the mask is True at the targets."""
    width = max(map(len, targets))
    ids = torch.tensor([t + [pad_id] * (width - len(t)) for t in targets], device=device)
    lengths = torch.tensor([len(t) for t in targets], device=device)
    return Completions(ids, torch.arange(width, device=device) < lengths[:, None])


def completion_mask(prompt_mask: Tensor, group_size: int, length: int) -> Tensor:
    """Where `length` completion inputs may look: all of their prompt, and themselves causally.

    Returns bool [1 or B * G, 1, T, P + T]; one row serves all where no prompt is padded.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=prompt_mask.device).tril()
    if bool(prompt_mask.all()):
        prompt_mask = prompt_mask[:1]
    else:
        prompt_mask = prompt_mask.repeat_interleave(group_size, 0)
    rows = prompt_mask.shape[0]
    on_prompt = prompt_mask[:, None, None].expand(rows, 1, length, -1)
    return torch.cat([on_prompt, causal.expand(rows, 1, length, length)], -1)


def shared_prefix_hidden(model: HumanOmni, prompts: Prompts, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict each completion token, each prompt computed once and no padding of the completions.

    ids, mask [R, T] -> first [R, D], which the prompt's last token gives, and rest [N, D], where `mask[:, 1:]` is True,
    row by row: completion token t - 1 predicts the t-th.
    """
    batch, rows, length = prompts.embeds.shape[0], *ids.shape
    group = rows // batch
    last = prompts.lengths - 1  # [B]
    hidden, kv = model.model(prompts.embeds, keep_kv=True)
    first = hidden[torch.arange(batch, device=ids.device), last].repeat_interleave(group, 0)  # [R, D]
    packing = Packing.of(mask[:, 1:])  # of no token at all where every completion has one: the layers still run
    positions = (last.repeat_interleave(group)[:, None] + torch.arange(1, length, device=ids.device)).flatten()
    embeds = model.model.embed_tokens(ids[:, :-1].flatten()[packing.places][None])
    rest, _ = model.model(embeds, positions[packing.places][None], past=kv,
                          mask=completion_mask(prompts.mask, group, length - 1), packing=packing)
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
        grad = grad / ctx.temperature
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
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
    """log pi(o_t | x, o_<t) at each completion token, and the entropy where asked for: float32 [R, T], 0 outside the mask."""
    ids, mask = completions.ids, completions.mask
    first, rest = shared_prefix_hidden(model, prompts, ids, mask)
    found = token_logps(torch.cat([first, rest]), model.head_weight, torch.cat([ids[:, 0], ids[:, 1:][mask[:, 1:]]]),
                        temperature, with_entropy)

    def padded(values: Tensor) -> Tensor:  # [R + N] -> [R, T]
        empty = values.new_zeros(len(ids), ids.shape[1] - 1)
        on_rest = empty.masked_scatter(mask[:, 1:], values[len(ids):])
        return torch.cat([values[: len(ids), None], on_rest], 1).masked_fill(~mask, 0)

    return padded(found[0]), padded(found[1]) if with_entropy else None
