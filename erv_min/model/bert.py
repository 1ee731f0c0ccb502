"""BERT and RoBERTa: one encoder that serves the text gate (section 3.1) and the ERV (section 3.2).

What differs between the two is in the embeddings and the head. BERT numbers positions 0, 1, 2, ...; RoBERTa counts them
over non-padding tokens only, starting after pad_token_id. Both are post-norm with exact GELU. Module names follow the
released checkpoints. Left out: cross attention, decoding, LM heads, a second token type.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min.config import BertConfig
from erv_min.model.siglip import multi_head


class Dropout(nn.Dropout):
    """Dropout of some rows of a batch that lies on several processes: the masks of all rows are drawn on each of them,
    from the same seed, so that a row's mask does not depend on how many processes there are. One serves the whole
    network: off (p = 0) until fine-tuning sets `p` and, before each pass, `count` and `rows`."""

    count, rows = 0, slice(None)  # of the whole batch, and which of them a pass has

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        drawn = torch.rand(self.count, *x.shape[1:], device=x.device)[self.rows]
        return x * (drawn >= self.p) / (1 - self.p)


class Embeddings(nn.Module):
    """Words, positions and the first token type, summed and normed."""

    def __init__(self, config: BertConfig, dropout: Dropout):
        super().__init__()
        self.dropout = dropout
        self.roberta, self.pad_id = config.roberta, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.roberta:
            real = (input_ids != self.pad_id).long()
            positions = real.cumsum(1) * real + self.pad_id  # [B, L]; padding sits at pad_id
        else:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # [1, L]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(torch.zeros_like(input_ids))
        return self.dropout(self.LayerNorm(x + self.position_embeddings(positions)))  # [B, L, D]


class SelfAttention(nn.Module):
    def __init__(self, config: BertConfig, dropout: Dropout):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)  # [B, L, D]
        if not self.dropout.active:
            return multi_head(q, k, v, self.heads, mask)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, H, L, D / H]
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [B, H, L, L], written out: `Dropout` draws per row
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        return (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """Linear, dropout, residual, layer norm: the end of both halves of a layer (post-norm)."""

    def __init__(self, width: int, config: BertConfig, dropout: Dropout):
        super().__init__()
        self.dropout = dropout
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    def __init__(self, config: BertConfig, dropout: Dropout):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config, dropout),
                                        "output": AddNorm(config.hidden_size, config, dropout)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = AddNorm(config.intermediate_size, config, dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertEncoder(nn.Module):
    """BERT or, with `config.roberta`, RoBERTa, without a head."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config, self.dropout = config, Dropout(0.0)
        self.embeddings = Embeddings(config, self.dropout)
        layers = (Layer(config, self.dropout) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        if not config.roberta:  # no forward pass uses it: kept so that checkpoints go through unchanged
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [B, L] int64, attention_mask [B, L] (1 = real; None = all real) -> last hidden state [B, L, D]."""
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()  # [B, 1, 1, L]
        x = self.embeddings(input_ids)
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        return x


class RobertaClassifier(nn.Module):
    """RoBERTa with a sentence classifier on its first token ([CLS], written <s>): the ERV's network (section 3.2)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.roberta = BertEncoder(config)
        self.classifier = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size),
                                         "out_proj": nn.Linear(config.hidden_size, config.num_labels)})
        self.classifier.apply(BertEncoder._init)
        self.dropout = self.roberta.dropout

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids, attention_mask [S, L] -> logits [S, labels]; the sigmoid is the caller's."""
        cls = self.roberta(input_ids, attention_mask)[:, 0]  # [S, D]
        hidden = torch.tanh(self.classifier["dense"](self.dropout(cls)))
        return self.classifier["out_proj"](self.dropout(hidden))  # [S, labels]
