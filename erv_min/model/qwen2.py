"""The language model psi of Eq. 1: a Qwen2 decoder (arXiv 2407.10671) under its released tensor names.

Grouped-query attention with bias on q, k, v and none on o; rotary positions (arXiv 2104.09864); RMSNorm (arXiv
1910.07467); SwiGLU. What a layer's queries look at is a function that it is given, one of the three of attention.py.
Left out: sliding windows, attention dropout, rope scaling (no released checkpoint uses them).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from erv_min.config import Qwen2Config
from erv_min.model.attention import GroupCache, PackedGroups, attend_causal


def rotary(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, and sin with its first half negated, [B, 1, L, head_dim] for positions [B, L], computed in float32."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim)
    angles = position_ids[:, None, :, None].float() * inverse  # [B, 1, L, head_dim / 2]
    angles = torch.cat([-angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rope, attend: Callable) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] -> output [B, L, D] and this layer's k, v [B, KV, L, d]."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for f in (self.q_proj, self.k_proj, self.v_proj))  # [B, H, L, d], [B, KV, L, d] twice
        (cos, sin), x = rope, torch.cat([q, k], 1)
        x = torch.addcmul(x * cos, x.roll(self.head_dim // 2, -1), sin)  # half-split: i pairs with i + head_dim / 2
        q, k = x.split([q.shape[1], k.shape[1]], 1)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2)), k, v


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm block: attention, then MLP, each on a residual."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope, attend: Callable) -> tuple[Tensor, Tensor, Tensor]:
        attended, k, v = self.self_attn(self.input_layernorm(x), rope, attend)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class Qwen2(nn.Module):
    """Embeddings, decoder layers, final norm. Another model in its place: erv_min/README.md."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False  # recompute each layer in the backward pass in place of keeping its activations

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor | None = None, past: PackedGroups | None = None,
                keep_kv: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """[B, L, D] -> hidden states after the final norm [B, L, D], and per layer (k, v) [B, KV, L, d] if `keep_kv`.
        position_ids [B, L] default to 0..L-1. With `past` embeddings, positions and result are packed, [1, N, D]."""
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        rope = rotary(position_ids, self.head_dim, self.rope_theta, inputs_embeds.dtype)
        x, kv = inputs_embeds, []
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
            x, k, v = layer(x, rope, attend_causal if past is None else partial(past.attend, i))
            if keep_kv:
                kv.append((k.clone(), v))  # k is a view of what holds the rotated q, too
        return self.norm(x), kv

    def decode(self, inputs_embeds: Tensor, position_ids: Tensor, cache: GroupCache) -> Tensor:
        """One step: embeddings [R, 1, D] at positions [R, 1] -> hidden [R, 1, D]; the cache grows by one."""
        rope = rotary(position_ids, self.head_dim, self.rope_theta, inputs_embeds.dtype)
        x, mask = inputs_embeds, cache.mask_of_step()
        for i, layer in enumerate(self.layers):  # layer.forward: FSDP's hooks cannot be captured in a CUDA graph
            x, _, _ = layer.forward(x, rope, partial(cache.attend, i, mask))
        cache.length += 1
        return self.norm(x)
