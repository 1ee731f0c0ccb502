"""log pi_theta(y_t | x, y_<t) of G completions on a shared prompt: what Eq. 2 and Eq. 3 are made of.

What the released step repeats or pads is done once here, with the same gradient:
* the prompt is prefilled once per group and its G completions attend to its keys (Prefix Grouper, arXiv 2506.05433),
  without padding (model/attention.py, PackedGroups);
* only positions that predict a completion token meet the head, in chunks that the backward pass computes again, so that
  no [B, T, V] tensor exists (base/chunked.py);
* log-softmax, temperature and entropy come out of the same pass, in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from erv_min.base.chunked import TokenLogps
from erv_min.model.attention import PackedGroups
from erv_min.model.humanomni import HumanOmni, Prompts


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
    `mask[:, 1:]`, row by row: completion token t - 1 predicts the t-th."""
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
    the products are in its type; float64 stays float64."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # a Function's backward runs outside of autocast
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    with torch.autocast(device, enabled=False):  # which would take the entropy's sum in its type
        logps, entropy = TokenLogps.apply(hidden, weight, ids, temperature, with_entropy)
    return logps, entropy if with_entropy else None
