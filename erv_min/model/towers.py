"""The two towers of Eq. 1 under their released tensor names: SigLIP's image encoder (arXiv 2303.15343) and Whisper's
(arXiv 2212.04356). Both are pre-norm encoders over all positions.

HumanOmni reads SigLIP's *second-to-last* hidden state: the last layer, the post layer norm and the pooling head are
never run, but kept as parameters, so that a checkpoint goes through unchanged. Left out: positions of another image
size, Whisper's decoder, its layer drop and float16 clamping.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min.config import SiglipConfig, WhisperConfig


def multi_head(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(C / H)) v in each of H heads; q, k, v [B, N, C] -> [B, N, C], mask [B, 1, 1, N] bool."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, C / H]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, key_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=key_bias)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(multi_head(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))  # [B, N, C]


def mlp(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc1=nn.Linear(width, inner), activation=nn.GELU(approximate="tanh"),
                                     fc2=nn.Linear(inner, width)))


class SiglipLayer(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        width = config.hidden_size
        self.self_attn = SelfAttention(width, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = mlp(width, config.intermediate_size)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipVision(nn.Module):
    """SigLIP's image encoder up to its hidden state `select_layer` (Hugging Face's numbering: -1 is the last)."""

    def __init__(self, config: SiglipConfig, select_layer: int):
        super().__init__()
        layers, width = config.num_hidden_layers, config.hidden_size
        self.layers_run = layers + 1 + select_layer  # hidden state 0 are the embeddings
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size),
            "position_embedding": nn.Embedding(config.grid**2, width)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(SiglipLayer(config) for _ in range(layers))})
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.ModuleDict({"attention": nn.MultiheadAttention(width, config.num_attention_heads),
                                   "layernorm": nn.LayerNorm(width, eps=config.layer_norm_eps),
                                   "mlp": mlp(width, config.intermediate_size)})
        self.head.probe = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] in [-1, 1] -> [B, N, C], all patches in row-major order."""
        x = self.embeddings["patch_embedding"](pixels).flatten(2).transpose(1, 2)  # [B, N, C]
        x = x + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"][: self.layers_run]:
            x = layer(x)
        return x


class WhisperLayer(nn.Module):
    def __init__(self, config: WhisperConfig):
        super().__init__()
        width = config.d_model
        self.self_attn = SelfAttention(width, config.encoder_attention_heads, key_bias=False)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(nn.Module):
    """Log-mel -> one vector per 20 ms, with the encoder's final layer norm."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        width = config.d_model
        self.conv1 = nn.Conv1d(config.num_mel_bins, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, width)
        self.layers = nn.ModuleList(WhisperLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, mel: Tensor) -> Tensor:
        """mel [B, mels, F], F <= 2 * max_source_positions (released: exactly that) -> [B, F / 2, C]."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)  # [B, F / 2, C]
        x = x + self.embed_positions.weight[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's fixed positions: sine in the first half of the channels, cosine in the second. [length, width]."""
    half = width // 2
    scales = torch.exp(-math.log(10000) / max(half - 1, 1) * torch.arange(half))
    angles = torch.arange(length)[:, None] * scales
    return torch.cat([angles.sin(), angles.cos()], 1)
