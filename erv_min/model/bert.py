"""BERT and RoBERTa: one encoder that serves the text gate (section 3.1) and the ERV (section 3.2).

BERT numbers positions 0, 1, 2, ...; RoBERTa counts them over non-padding tokens only, starting after pad_token_id. Both
are post-norm with exact GELU. Left out: cross attention, decoding, LM heads, a second token type.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min.config import BertConfig
from erv_min.model.towers import multi_head


class Layer(nn.Module):
    """Attention, then MLP, each followed by dropout, residual and layer norm (post-norm)."""

    def __init__(self, config: BertConfig, dropout: nn.Dropout):
        super().__init__()
        self.heads, self.dropout, width = config.num_attention_heads, dropout, config.hidden_size

        def output(inputs: int) -> nn.ModuleDict:
            return nn.ModuleDict({"dense": nn.Linear(inputs, width),
                                  "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps)})

        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": output(width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.intermediate_size)})
        self.output = output(config.intermediate_size)

    def add_norm(self, output: nn.ModuleDict, x: Tensor, residual: Tensor) -> Tensor:
        return output["LayerNorm"](self.dropout(output["dense"](x)) + residual)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (project(x) for project in self.attention["self"].values())  # [B, L, D]
        attended = multi_head(q, k, v, self.heads, mask, self.dropout.p if self.training else 0.0)
        x = self.add_norm(self.attention["output"], attended, x)
        return self.add_norm(self.output, F.gelu(self.intermediate["dense"](x)), x)


class BertEncoder(nn.Module):
    """BERT or, with `config.roberta`, RoBERTa, without a head."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.dropout = nn.Dropout(0.0)  # the whole network's: fine-tuning sets `p`
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id),
            "position_embeddings": nn.Embedding(config.max_position_embeddings, width),
            "token_type_embeddings": nn.Embedding(config.type_vocab_size, width),
            "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps)})
        layers = (Layer(config, self.dropout) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        if not config.roberta:  # no forward pass uses it: kept so that checkpoints go through unchanged
            self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Words, positions and the first token type, summed and normed: [B, L] -> [B, L, D]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # [1, L]
        if self.config.roberta:
            real = (input_ids != self.config.pad_token_id).long()
            positions = real.cumsum(1) * real + self.config.pad_token_id  # [B, L]; padding sits at pad_token_id
        words, places, types, norm = self.embeddings.values()
        return self.dropout(norm(words(input_ids) + types(torch.zeros_like(input_ids)) + places(positions)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [B, L] int64, attention_mask [B, L] (1 = real; None = all real) -> last hidden state [B, L, D]."""
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()  # [B, 1, 1, L]
        x = self.embed(input_ids)
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        return x


class RobertaClassifier(nn.Module):
    """RoBERTa with a sentence classifier on its first token ([CLS], written <s>): the ERV's network (section 3.2)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config, self.roberta, width = config, BertEncoder(config), config.hidden_size
        self.classifier = nn.ModuleDict({"dense": nn.Linear(width, width),
                                         "out_proj": nn.Linear(width, config.num_labels)})
        self.classifier.apply(BertEncoder._init)
        self.dropout = self.roberta.dropout

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids, attention_mask [S, L] -> logits [S, labels]; the sigmoid is the caller's."""
        cls = self.roberta(input_ids, attention_mask)[:, 0]  # [S, D]
        hidden = torch.tanh(self.classifier["dense"](self.dropout(cls)))
        return self.classifier["out_proj"](self.dropout(hidden))  # [S, labels]
