"""The language model psi of Eq. 1: a Qwen2 decoder (arXiv 2407.10671) under its released tensor names.

Grouped-query attention with bias on q, k, v and none on o; rotary positions in the half-split form; RMSNorm; SwiGLU.
A layer has one forward pass; what its queries look at is a function that it is given, for speed one of three:

* `attend_causal`, whole sequences: needs no mask (padding stands on the right), so that the fastest kernels take it;
* `GroupCache.attend`, one token of each of G completions per prompt: sampling;
* `PackedGroups.attend`, G whole completions per prompt, with gradients: training (Prefix Grouper, arXiv 2506.05433).

Left out: sliding windows, attention dropout, rope scaling (no released checkpoint uses them).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from erv_min.config import Qwen2Config


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rotary(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, L, head_dim] for positions [B, L] (RoPE, arXiv 2104.09864), computed in float32."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim)
    angles = position_ids[:, None, :, None].float() * inverse  # [B, 1, L, head_dim / 2]
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates [B, H, L, head_dim] in the half-split form: dimension i pairs with i + head_dim / 2."""
    cos, sin = rope
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position looks at itself and those before it: q [B, H, L, d], k and v [B, KV, L, d] -> [B, H, L, d]."""
    fold = q.shape[1] // k.shape[1]
    # No float32 kernel on CUDA takes grouped heads: enable_gqa would write down all scores, [B, H, L, L]
    # (pytorch#181528). Under autocast v has the kernel's type already, q and k do not.
    if fold > 1 and v.is_cuda and v.dtype == torch.float32:
        k, v = (x.repeat_interleave(fold, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])


class GroupCache:
    """Keys and values while G completions of each of B prompts are sampled; the prompt's are held once, not G times.

    Shapes are the same at each step (how far it is filled is a tensor), so that a step can be replayed as a graph.
    """

    def __init__(self, prefix: list, prefix_mask: Tensor | None, group_size: int, max_new_tokens: int):
        """Empty, for N = `max_new_tokens`. `prefix`: keys and values of a prefill, per layer k, v: [B, KV, P, d];
        prefix_mask [B, P] bool, False at padding, None where no row is padded."""
        batch, heads, _, width = prefix[0][0].shape
        shape = (batch, heads, group_size, max_new_tokens, width)  # [B, KV, G, N, d]
        self.own = [(k.new_zeros(shape), v.new_zeros(shape)) for k, v in prefix]  # zeros, since 0 * NaN is NaN
        self.prefix_mask = None if prefix_mask is None or bool(prefix_mask.all()) else prefix_mask
        self.prefix = [(k.contiguous(), v.contiguous()) for k, v in prefix]
        self.length = torch.zeros(1, dtype=torch.long, device=prefix[0][0].device)  # `own` is filled so far
        self.window = max_new_tokens  # a step looks at so much of `own`, and masks what is not filled

    def keep(self, prompts: Tensor, rows: Tensor) -> None:
        """Goes on with these prompts [B'] and rows [B' * G'] alone: G' rows of each, one prompt after the other."""
        if len(prompts) < len(self.prefix[0][0]):
            self.prefix = [(k[prompts], v[prompts]) for k, v in self.prefix]
            self.prefix_mask = None if self.prefix_mask is None else self.prefix_mask[prompts]
        _, heads, group_size, _, _ = self.own[0][0].shape
        columns = rows.view(len(prompts), 1, -1) % group_size
        at = (prompts[:, None, None], torch.arange(heads, device=rows.device)[:, None], columns)  # [B', KV, G']
        self.own = [(k[at], v[at]) for k, v in self.own]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One query per row, q [B * G, H, 1, d], against prompt and own keys: one softmax over both parts.

        The H / KV query heads of a key head stand together; on the prompt's keys those of all G rows do, so that these
        keys are read once.
        """
        batch, heads, group_size, _, width = self.own[layer][0].shape
        q, k, v = (x.view(batch, group_size, heads, -1, width).transpose(1, 2) for x in (q, k, v))  # [B, KV, G, _, d]
        for store, new in zip(self.own[layer], (k, v)):
            store.index_copy_(3, self.length, new)
        prefix_k, prefix_v = self.prefix[layer]  # [B, KV, P, d]
        own_k, own_v = (x[:, :, :, : self.window] for x in self.own[layer])  # [B, KV, G, W, d]

        q = q * width**-0.5
        on_prefix = (q.flatten(2, 3) @ prefix_k.mT).unflatten(2, q.shape[2:4])  # [B, KV, G, H / KV, P]
        if self.prefix_mask is not None:
            on_prefix = on_prefix.masked_fill(~self.prefix_mask[:, None, None, None], float("-inf"))
        on_own = (q @ own_k.mT).masked_fill(torch.arange(self.window, device=q.device) > self.length, float("-inf"))
        weights = torch.cat([on_prefix, on_own], -1).softmax(-1, dtype=torch.float32).to(v.dtype)
        on_prefix, on_own = weights.split([prefix_k.shape[2], self.window], -1)
        out = (on_prefix.flatten(2, 3) @ prefix_v).view_as(q) + on_own @ own_v
        return out.transpose(1, 2).reshape(batch * group_size, -1, 1, width)


@dataclass
class PackedGroups:
    """R = B * G completions in training, on the keys of their prompts, which are held once and get the sum of their
    gradients. Their N tokens stand one after the other, without padding: all but attention works on that form."""

    prompt: list[tuple[Tensor, Tensor]]  # per layer k, v: [B, KV, P, d]
    visible: Tensor  # [1 or R, 1, T, P + T] bool, True where a query may look; one row where no prompt is padded
    rows: int  # R
    places: Tensor  # [N] int64: where each token stands among R * T

    @classmethod
    def of(cls, prompt: list[tuple[Tensor, Tensor]], prompt_mask: Tensor, mask: Tensor) -> "PackedGroups":
        """prompt_mask [B, P] and mask [R, T], bool, True at the tokens that are there."""
        (rows, length), whole = mask.shape, bool(prompt_mask.all())
        groups = prompt_mask[:1] if whole else prompt_mask.repeat_interleave(rows // len(prompt_mask), 0)
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        visible = [groups[:, None, None].expand(-1, 1, length, -1), causal.expand(len(groups), 1, -1, -1)]
        return cls(prompt, torch.cat(visible, -1), rows, mask.flatten().nonzero()[:, 0])

    def unpack(self, x: Tensor) -> Tensor:
        """[1, H, N, d] -> [R, H, T, d], 0 at padding."""
        _, heads, _, width = x.shape
        length = self.visible.shape[2]
        padded = x.new_zeros(self.rows * length, heads, width).index_copy(0, self.places, x[0].transpose(0, 1))
        return padded.view(self.rows, length, heads, width).transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """[R, H, T, d] -> [1, H, N, d]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places).transpose(0, 1)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Packed queries, q [1, H, N, d], look at their prompt's keys and at their own. N and T may be 0.

        The H / KV query heads of a key head are folded into the query's length, so that no key is repeated for them.
        """
        q, k, v = map(self.unpack, (q, k, v))  # [R, H, T, d], [R, KV, T, d] twice
        k, v = (torch.cat([p.repeat_interleave(self.rows // len(p), 0), own], 2)
                for p, own in zip(self.prompt[layer], (k, v)))
        fold = q.shape[1] // k.shape[1]
        folded = q.reshape(self.rows, k.shape[1], fold * q.shape[2], q.shape[3])
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=self.visible.repeat(1, 1, fold, 1))
        return self.pack(out.reshape(q.shape))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rope, attend: Callable) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] -> output [B, L, D] and this layer's k, v [B, KV, L, d]."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for f in (self.q_proj, self.k_proj, self.v_proj))  # [B, H, L, d], [B, KV, L, d] twice
        q, k = rotate(q, rope), rotate(k, rope)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2)), k, v


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm block: attention, then MLP, each on a residual."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope, attend: Callable) -> tuple[Tensor, Tensor, Tensor]:
        attended, k, v = self.self_attn(self.input_layernorm(x), rope, attend)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class Qwen2(nn.Module):
    """Embeddings, decoder layers and the final norm; the head belongs to the model around it. What another one must
    have to take its place: README.md, "Another language model"."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope_theta = config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False  # recompute each layer in the backward pass in place of keeping its activations

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor | None = None, past: PackedGroups | None = None,
                keep_kv: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """[B, L, D] -> hidden states after the final norm [B, L, D], and per layer (k, v) [B, KV, L, d] if `keep_kv`.

        position_ids [B, L] default to 0..L-1. With `past` embeddings, positions and result are packed, [1, N, D].
        """
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        rope = rotary(position_ids, self.head_dim, self.rope_theta, inputs_embeds.dtype)
        x, kv = inputs_embeds, []
        for i, layer in enumerate(self.layers):
            attend = attend_causal if past is None else partial(past.attend, i)
            if self.recompute and torch.is_grad_enabled():
                x, k, v = checkpoint(layer, x, rope, attend, use_reentrant=False)
            else:
                x, k, v = layer(x, rope, attend)
            if keep_kv:
                kv.append((k, v))
        return self.norm(x), kv

    def decode(self, inputs_embeds: Tensor, position_ids: Tensor, cache: GroupCache) -> Tensor:
        """One step: embeddings [R, 1, D] at positions [R, 1] -> hidden [R, 1, D]; the cache grows by one."""
        rope = rotary(position_ids, self.head_dim, self.rope_theta, inputs_embeds.dtype)
        x = inputs_embeds
        for i, layer in enumerate(self.layers):  # layer.forward: FSDP's hooks cannot be captured in a CUDA graph
            x, _, _ = layer.forward(x, rope, partial(cache.attend, i))
        cache.length += 1
        return self.norm(x)
