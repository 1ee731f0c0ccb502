"""The vision tower of Eq. 1: SigLIP's image encoder (arXiv 2303.15343) under its released tensor names.

HumanOmni reads the *second-to-last* hidden state: the last layer, the post layer norm and the pooling head are never
run. They are kept as parameters all the same, so that a checkpoint goes through unchanged (`leftovers`).
Left out: interpolation of the positions to another image size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min.config import SiglipConfig
from erv_min.run.onednn import Linear


class SelfAttention(nn.Module):
    """Multi-head attention over all positions; Whisper's has no bias on k."""

    def __init__(self, width: int, heads: int, key_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.k_proj = Linear(width, width, bias=key_bias)
        self.v_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in projections)
        out = F.scaled_dot_product_attention(q, k, v)  # [B, H, N, C / H]
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [B, N, C]


class MLP(nn.Module):
    """Two layers with the tanh form of GELU."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Patches -> vectors, plus a learned position each."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, kernel_size=size, stride=size)
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, N, C]
        return patches + self.position_embedding.weight


class PoolingHead(nn.Module):
    """Parameters of SigLIP's attention pooling. A leftover: HumanOmni has no forward pass through it."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        width = config.hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(config)


class SiglipVision(nn.Module):
    """SigLIP's image encoder up to its hidden state `select_layer` (Hugging Face's numbering: -1 is the last)."""

    def __init__(self, config: SiglipConfig, select_layer: int = -2):
        super().__init__()
        self.config = config
        layers = config.num_hidden_layers
        self.layers_run = select_layer if select_layer >= 0 else layers + 1 + select_layer  # hidden state 0: embeddings
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(EncoderLayer(config) for _ in range(layers))})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = PoolingHead(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] in [-1, 1] -> [B, N, C], all patches in row-major order."""
        x = self.embeddings(pixels)
        for layer in self.encoder["layers"][: self.layers_run]:
            x = layer(x)
        return x

    def leftovers(self) -> list[str]:
        """Names of the parameters that no forward pass reads."""
        unused = [f"encoder.layers.{i}." for i in range(self.layers_run, self.config.num_hidden_layers)]
        return [name for name, _ in self.named_parameters() if name.startswith((*unused, "post_layernorm.", "head."))]
