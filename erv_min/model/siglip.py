"""The vision tower of Eq. 1: SigLIP's image encoder (arXiv 2303.15343) under its released tensor names.

HumanOmni reads the *second-to-last* hidden state: the last layer, the post layer norm and the pooling head are never
run, but kept as parameters, so that a checkpoint goes through unchanged. Left out: positions of another image size.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min.config import SiglipConfig


def multi_head(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C / H)) v in each of H heads; q, k, v [B, N, C] -> [B, N, C], mask [B, 1, 1, N] bool."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, C / H]
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head attention over all positions; Whisper's has no bias on k."""

    def __init__(self, width: int, heads: int, key_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=key_bias)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(multi_head(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))  # [B, N, C]


def mlp(config: SiglipConfig) -> nn.Sequential:
    """Two layers with the tanh form of GELU."""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(config.hidden_size, config.intermediate_size),
                                     activation=nn.GELU(approximate="tanh"),
                                     fc2=nn.Linear(config.intermediate_size, config.hidden_size)))


class EncoderLayer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class PoolingHead(nn.Module):
    """Parameters of SigLIP's attention pooling, unused."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        width = config.hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = mlp(config)


class SiglipVision(nn.Module):
    """SigLIP's image encoder up to its hidden state `select_layer` (Hugging Face's numbering: -1 is the last)."""

    def __init__(self, config: SiglipConfig, select_layer: int = -2):
        super().__init__()
        layers = config.num_hidden_layers
        self.layers_run = select_layer if select_layer >= 0 else layers + 1 + select_layer  # hidden state 0: embeddings
        patches = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.embeddings = nn.ModuleDict({
            "patch_embedding": patches, "position_embedding": nn.Embedding(config.grid**2, config.hidden_size)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(EncoderLayer(config) for _ in range(layers))})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = PoolingHead(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] in [-1, 1] -> [B, N, C], all patches in row-major order."""
        x = self.embeddings["patch_embedding"](pixels).flatten(2).transpose(1, 2)  # [B, N, C]
        x = x + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"][: self.layers_run]:
            x = layer(x)
        return x
