"""What the queries of a decoder layer look at. One formula, softmax(q k^T / sqrt(d)) v, in three forms for speed:

* `attend_causal`, whole sequences: needs no mask (padding stands on the right), so that the fastest kernels take it;
* `GroupCache.attend`, one token of each of G completions per prompt: sampling;
* `PackedGroups.attend`, G whole completions per prompt, with gradients: training (Prefix Grouper, arXiv 2506.05433).

Attention is grouped-query (arXiv 2305.13245): each of the KV key heads serves H / KV query heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position looks at itself and those before it: q [B, H, L, d], k and v [B, KV, L, d] -> [B, H, L, d]."""
    fold = q.shape[1] // k.shape[1]
    # No float32 kernel on CUDA takes grouped heads: enable_gqa would write down all scores, [B, H, L, L]
    # (pytorch#181528). Under autocast v has the kernel's type already, q and k do not.
    if fold > 1 and v.is_cuda and v.dtype == torch.float32:
        k, v = (x.repeat_interleave(fold, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, [B, M, K] and [B, K, N], summed in the type of `out`: float32 for bfloat16 scores."""
    if a.dtype == out.dtype:
        out.copy_(a @ b)
    elif a.is_cuda and "dtype_out" in torch.ops.aten.bmm.overloads():  # from torch 2.8 on
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out)


class GroupCache:
    """Keys and values while G completions of each of B prompts are sampled, the prompt's held once, not G times.
    Shapes are the same at each step (how far it is filled is a tensor), so that a step can be replayed as a graph."""

    def __init__(self, prefix: list, prefix_mask: Tensor, group_size: int, max_new_tokens: int):
        """Empty, for N = `max_new_tokens`. `prefix`: of a prefill, per layer k, v: [B, KV, P, d]; prefix_mask [B, P]
        bool, False at padding."""
        batch, heads, _, width = prefix[0][0].shape
        shape = (batch, heads, group_size, max_new_tokens, width)  # [B, KV, G, N, d]
        self.own = [(v.new_zeros(shape), v.new_zeros(shape)) for _, v in prefix]  # zeros, since 0 * NaN is NaN
        self.prefix = [(k.to(v.dtype).contiguous(), v.contiguous()) for k, v in prefix]  # autocast leaves k float32
        self.prefix_mask = prefix_mask
        self.length = torch.zeros(1, dtype=torch.long, device=prefix_mask.device)  # `own` is filled so far
        self.window = max_new_tokens  # a step looks at so much of `own`, and masks what is not filled

    def keep(self, prompts: Tensor, rows: Tensor) -> None:
        """Goes on with these prompts [B'] and rows [B' * G'] alone: G' rows of each, one prompt after the other."""
        if len(prompts) < len(self.prefix[0][0]):
            self.prefix = [(k[prompts], v[prompts]) for k, v in self.prefix]
            self.prefix_mask = self.prefix_mask[prompts]
        _, heads, group_size, _, _ = self.own[0][0].shape
        columns = rows.view(len(prompts), 1, -1) % group_size
        at = (prompts[:, None, None], torch.arange(heads, device=rows.device)[:, None], columns)  # [B', KV, G']
        self.own = [(k[at], v[at]) for k, v in self.own]

    def mask_of_step(self) -> Tensor:
        """What the queries of a step may not look at, as a term of their scores, 0 or -inf: [B, 1, 1, P + W]."""
        own = torch.arange(self.window, device=self.length.device) <= self.length
        seen = torch.cat([self.prefix_mask, own.expand(len(self.prefix_mask), -1)], 1)
        dtype = torch.promote_types(self.own[0][0].dtype, torch.float32)
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, float("-inf"))[:, None, None]

    def attend(self, layer: int, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One query per row, q [B * G, H, 1, d], against prompt and own keys: one softmax over both parts, in the type
        of `mask`, mask_of_step(). The query heads of a key head stand together; on the prompt's keys those of all G
        rows do, so that these keys are read once."""
        batch, heads, group_size, _, width = self.own[layer][0].shape
        q, k, v = (x.to(v.dtype).view(batch, group_size, heads, -1, width).transpose(1, 2) for x in (q, k, v))
        for store, new in zip(self.own[layer], (k, v)):
            store.index_copy_(3, self.length, new)
        prefix_k, prefix_v = (x.flatten(0, 1) for x in self.prefix[layer])  # [B * KV, P, d]
        own_k, own_v = (x.flatten(0, 2)[:, : self.window] for x in self.own[layer])  # [B * KV * G, W, d]
        q, length = q.reshape(batch * heads, -1, width), prefix_k.shape[1]  # [B * KV, G * H / KV, d]
        scores = torch.empty(*q.shape[:2], mask.shape[-1], dtype=mask.dtype, device=q.device)

        def by_row(x: Tensor) -> Tensor:  # [B * KV, G * H / KV, _] -> [B * KV * G, H / KV, _]
            return x.view(len(own_k), -1, x.shape[-1])

        product(q, prefix_k.mT, scores[..., :length])
        product(by_row(q), own_k.mT, by_row(scores)[..., length:])
        scores = torch.add(mask, scores.unflatten(0, (batch, heads)), alpha=width**-0.5)
        weights = scores.softmax(-1).to(v.dtype).flatten(0, 1)
        out = by_row(weights[..., :length] @ prefix_v).baddbmm_(by_row(weights)[..., length:], own_v)
        return out.view(batch, heads, group_size, -1, width).transpose(1, 2).reshape(batch * group_size, -1, 1, width)


@dataclass
class PackedGroups:
    """R = B * G completions in training, on the keys of their prompts, which are held once. Their N tokens stand one
    after the other, without padding: all but attention works on that form. A token sees its prompt, itself and what its
    completion has before it:

        two completions of 2 and 3 tokens on a prompt of P = 3, packed: a1 a2 b1 b2 b3
                    a1: P P P a1          a2: P P P a1 a2
                    b1: P P P b1          b2: P P P b1 b2          b3: P P P b1 b2 b3
    """

    prompt: list[tuple[Tensor, Tensor]]  # per layer k, v: [B, KV, P, d]
    mask: Tensor  # [1 or R, 1, H / KV * T, P + T], a term of the scores: 0 or -inf; one row if no prompt is padded
    shape: tuple[int, int]  # R, T
    places: Tensor  # [N] int64: which of the R * T tokens each packed one is

    @classmethod
    def of(cls, prompt: list[tuple[Tensor, Tensor]], prompt_mask: Tensor, mask: Tensor, fold: int) -> "PackedGroups":
        """prompt_mask [B, P] and mask [R, T], bool, True at the tokens that are there; `fold` is H / KV."""
        (rows, length), (batch, width) = mask.shape, prompt_mask.shape
        on_prompt = prompt_mask[:1] if prompt_mask.all() else prompt_mask.repeat_interleave(rows // batch, 0)
        on_own = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        # In the type of v, which is the kernel's, and with rows of a multiple of 16: CUDA would copy others every time.
        shape = (len(on_prompt), 1, fold * length, -(-(width + length) // 16) * 16)
        term = torch.zeros(shape, dtype=prompt[0][1].dtype, device=mask.device)[..., : width + length]
        term[..., :width].masked_fill_(~on_prompt[:, None, None], float("-inf"))
        term[..., width:].masked_fill_(~on_own.repeat(fold, 1), float("-inf"))
        return cls(prompt, term, mask.shape, mask.flatten().nonzero()[:, 0])

    def pack(self, x: Tensor) -> Tensor:
        """[R, T, ...] -> [1, N, ...], without padding."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, N, ...] -> [R, T, ...], 0 at padding."""
        rows, length = self.shape
        return x.new_zeros(rows * length, *x.shape[2:]).index_copy(0, self.places, x[0]).unflatten(0, self.shape)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Packed queries, q [1, H, N, d], look at their prompt's keys and at their own. N and T may be 0. The query
        heads of a key head are folded into the query's length, so that no key is repeated for them."""
        def on_prompt(prompt: Tensor, own: Tensor) -> Tensor:  # [B, KV, P, d], [R, KV, T, d] -> [R, KV, P + T, d]
            own = own.unflatten(0, (len(prompt), -1))
            return torch.cat([prompt[:, None].expand(-1, own.shape[1], -1, -1, -1), own], 3).flatten(0, 1)

        q, k, v = (self.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))  # [R, H or KV, T, d]
        k, v = map(on_prompt, self.prompt[layer], (k, v))
        folded = q.reshape(len(q), k.shape[1], self.mask.shape[2], q.shape[3])  # [R, KV, H / KV * T, d]
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=self.mask)
        return self.pack(out.reshape(q.shape).transpose(1, 2)).transpose(1, 2)
