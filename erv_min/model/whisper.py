"""The audio tower of Eq. 1: Whisper's encoder (arXiv 2212.04356) under its released tensor names.

The released checkpoints store it inside a Whisper *classifier*, whose projector and classifier are never run, but kept
(humanomni.py), so that a checkpoint goes through unchanged. Left out: the decoder, layer drop, float16 clamping.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min.config import WhisperConfig
from erv_min.model.siglip import SelfAttention


class EncoderLayer(nn.Module):
    """Pre-norm block with exact GELU."""

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
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
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
