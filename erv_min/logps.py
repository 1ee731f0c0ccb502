"""log pi_theta(y_t | x, y_<t) of G completions on a shared prompt: what Eq. 2 and Eq. 3 are made of.

What the released step repeats or pads is done once here, with the same gradient:
* the prompt is prefilled once per group and its G completions attend to its keys (Prefix Grouper, arXiv 2506.05433),
  without padding (model/attention.py, PackedGroups);
* only positions that predict a completion token meet the head, in chunks that the backward pass computes again, so that
  no [B, T, V] tensor exists;
* log-softmax, temperature and entropy come out of the same pass, in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from erv_min.base.onednn import linear
from erv_min.model.attention import PackedGroups
from erv_min.model.humanomni import HumanOmni, Prompts

CHUNK_LOGITS = 2**24  # logits that exist at once: 64 MiB in float32
# On CUDA so many times as many. By arithmetic, not measured: a chunk of 110 rows (0.5B) multiplies for 0.5 ms of an
# A100, then rewrites the head's float32 gradient [V, D] for 1 ms; 441 rows do so a quarter as often, in 0.7 GiB.
ON_CUDA = 4


@dataclass
class Completions:
    """R = B * G completions, the G of a prompt one after the other."""

    ids: Tensor  # [R, T] int64
    mask: Tensor  # [R, T] bool, True up to and with EOS
    logps: Tensor | None = None  # [R, T] float32, the sampler's own log-probs, if they were sampled

    def __getitem__(self, rows: slice) -> "Completions":
        """Some rows, without the padding that others need."""
        width = int(self.mask[rows].sum(1).max())
        logps = None if self.logps is None else self.logps[rows, :width]
        return Completions(self.ids[rows, :width], self.mask[rows, :width], logps)

    @classmethod
    def cat(cls, parts: "list[Completions]", pad_id: int) -> "Completions":
        """Several rollouts as one, padded to the longest."""
        def joined(name: str, padding: float) -> Tensor:
            rows = [row for part in parts for row in getattr(part, name)]
            return pad_sequence(rows, batch_first=True, padding_value=padding)

        return cls(joined("ids", pad_id), joined("mask", False), joined("logps", 0))


def completion_logps(model: HumanOmni, prompts: Prompts, completions: Completions, temperature: float = 1.0,
                     with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """log pi(o_t | x, o_<t) at each completion token, and the entropy if asked for: float32 [R, T], 0 outside the
    mask."""
    ids, mask = completions.ids, completions.mask
    first, rest = shared_prefix_hidden(model, prompts, ids, mask)
    tokens = torch.cat([ids[:, 0], ids[:, 1:][mask[:, 1:]]])  # [R + N]
    logps, entropy = token_logps(torch.cat([first, rest]), model.head_weight, tokens, temperature, with_entropy)

    def padded(values: Tensor) -> Tensor:  # [R + N] -> [R, T]
        on_rest = values.new_zeros(mask[:, 1:].shape).masked_scatter(mask[:, 1:], values[len(ids):])
        return torch.cat([values[: len(ids), None], on_rest], 1).masked_fill(~mask, 0)

    return padded(logps), padded(entropy) if with_entropy else None


def shared_prefix_hidden(model: HumanOmni, prompts: Prompts, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict each completion token, each prompt computed once and no padding of the completions.

    ids, mask [R, T] -> first [R, D], which the prompt's last token gives, and rest [N, D], one for each True of
    `mask[:, 1:]`, row by row: completion token t - 1 predicts the t-th.
    """
    language, (rows, length) = model.language_model, ids.shape
    batch, last = len(prompts.embeds), prompts.lengths - 1  # [B]
    hidden, kv = language(prompts.embeds, keep_kv=True)
    first = hidden[torch.arange(batch, device=ids.device), last].repeat_interleave(rows // batch, 0)  # [R, D]
    fold = model.config.text.num_attention_heads // model.config.text.num_key_value_heads
    past = PackedGroups.of(kv, prompts.mask, mask[:, 1:], fold)  # N = 0 if each has one token: the layers still run
    positions = last.repeat_interleave(rows // batch)[:, None] + torch.arange(1, length, device=ids.device)
    rest, _ = language(language.embed_tokens(past.pack(ids[:, :-1])), past.pack(positions), past)
    return first, rest[0]


def token_logps(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0,
                with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[ids] and the entropy in nats, without [N, V]: float32 [N] each.

    hidden [N, D], weight [V, D], ids [N]. The entropy is computed if asked for, and carries no gradient. Under autocast
    the products are in its type; float64 stays float64.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # a Function's backward runs outside of autocast
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    with torch.autocast(device, enabled=False):  # which would take the entropy's sum in its type
        logps, entropy = TokenLogps.apply(hidden, weight, ids, temperature, with_entropy)
    return logps, entropy if with_entropy else None


class TokenLogps(torch.autograd.Function):
    """`token_logps` in chunks of rows, whose logits the backward pass computes again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, with_entropy: bool):
        size = max(1, CHUNK_LOGITS * (ON_CUDA if weight.is_cuda else 1) // weight.shape[0])
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logps, entropy = (hidden.new_empty(len(ids), dtype=dtype) for _ in range(2))
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            log_probs = scaled_logits(hidden[part], weight, temperature).log_softmax(-1, dtype)  # [n, V]
            logps[part] = log_probs.gather(-1, ids[part, None])[:, 0]
            if with_entropy:  # - sum of p log p
                entropy[part] = -log_probs.exp().mul_(log_probs).sum(-1)
            del log_probs  # else it lives while the next chunk's is made
        ctx.save_for_backward(hidden, weight, ids)
        ctx.temperature, ctx.size = temperature, size
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        hidden, weight, ids = ctx.saved_tensors
        grad, grad_hidden, grad_weight = grad / ctx.temperature, torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:  # one buffer for all chunks, in float32: in bfloat16 later chunks would be lost
            grad_weight = torch.zeros(weight.shape, dtype=grad.dtype, device=weight.device)
        minus_one = grad.new_full((len(ids), 1), -1)
        for start in range(0, len(ids), ctx.size):
            part = slice(start, start + ctx.size)
            probs = scaled_logits(hidden[part], weight, ctx.temperature).softmax(-1, grad.dtype)
            # d logp / d logits = -(probs - onehot), in the type of the products
            probs.scatter_add_(1, ids[part, None], minus_one[part])
            grad_logits = torch.mul(probs, -grad[part, None], out=torch.empty_like(probs, dtype=hidden.dtype))
            grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.T, hidden[part])
            del probs, grad_logits
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """hidden @ weight.T / temperature: [n, D], [V, D] -> [n, V]; divided in float32."""
    logits = linear(hidden, weight)
    return logits if temperature == 1 else logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the type of `total`: [M, K], [K, N] -> [M, N]."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():  # from torch 2.8 on
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
