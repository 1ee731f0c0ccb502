"""The Emotional Rationale Verifier (section 3.2): a RoBERTa that reads a sentence and gives a probability per emotion.

Its training data is in data/pairs.py, the loop in scripts/erv.py, ways to cheat it in scripts/tools/audit.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min import checkpoint, config
from erv_min.base.errors import CheckpointError
from erv_min.base.files import read_json
from erv_min.base.onednn import use_onednn
from erv_min.emotions import ERV_LABELS, GOEMOTIONS, GOEMOTIONS_INDEX
from erv_min.model.bert import RobertaClassifier
from erv_min.tokenizer import EncoderTokenizer


class Verifier:
    """Sentences -> probabilities. One per run: GRPO scores all sentences of all completions of a step in one call."""

    def __init__(self, model: RobertaClassifier, tokenizer: EncoderTokenizer, labels: tuple[str, ...],
                 device: str | torch.device = "cpu"):
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.labels, self.device = tokenizer, tuple(labels), device
        # padded tokens per forward pass: what fits a CPU's cache, or keeps a GPU busy
        self.token_budget = 1024 if torch.device(device).type == "cpu" else 16384

    @classmethod
    def load(cls, folder_or_repo: str | Path, device: str | torch.device = "cpu") -> "Verifier":
        """Reads weights, config.json, tokenizer.json of a head of 11 or 28; raises CheckpointError on another."""
        folder = checkpoint.resolve(folder_or_repo)
        labels, model = head_labels(read_json(folder / "config.json"), folder), checkpoint.load_erv(folder)
        return cls(model, EncoderTokenizer(folder, max_tokens(model), model.config.vocab_size), labels, device)

    @torch.no_grad()
    def probabilities(self, sentences: list[str]) -> Tensor:
        """[S] sentences -> float32 [S, K] on the CPU, columns as `labels`. A repeated sentence is scored once; one that
        is longer than the encoder reads (512 tokens in RoBERTa base) is cut."""
        place = {sentence: i for i, sentence in enumerate(dict.fromkeys(sentences))}
        probs = torch.empty(len(place), len(self.labels))
        ids, mask = self.tokenizer.encode_batch(list(place))  # [U, L] each
        for rows, length in length_batches(mask.sum(1), self.token_budget):
            batch = (x[rows, :length].to(self.device) for x in (ids, mask))
            probs[rows] = torch.sigmoid(self.model(*batch).float()).cpu()
        return probs[[place[s] for s in sentences]]


def length_batches(lengths: Tensor, token_budget: int) -> Iterator[tuple[Tensor, int]]:
    """lengths [U] -> (row numbers, longest length) of batches of similar length, <= token_budget padded tokens each."""
    order, start = lengths.argsort(stable=True), 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or int(lengths[order[stop]]) * (stop + 1 - start) > token_budget:
            yield order[start:stop], int(lengths[order[stop - 1]])
            start = stop


def max_tokens(model: RobertaClassifier) -> int:
    """Tokens the encoder can read: RoBERTa's first position is pad_token_id + 1."""
    return model.config.max_position_embeddings - (model.config.pad_token_id + 1)


def head_labels(raw: dict, where: str | Path) -> tuple[str, ...]:
    """The head's class names from a Hugging Face config.json; names left at LABEL_i mean our order of 11 or 28. Raises
    CheckpointError on other names, and on a head that was not trained with a sigmoid per class, as algorithm 1 has."""
    if (kind := raw.get("problem_type")) != "multi_label_classification":
        raise CheckpointError(f"{where}/config.json: problem_type is {kind!r}; a verifier gives a probability per "
                              "class by itself: if it was trained so, write \"multi_label_classification\" there")
    named = raw.get("id2label") or {}
    names = tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(len(named)))
    if sorted(names) == sorted(ERV_LABELS):  # maybe in another order
        return names
    for known in (ERV_LABELS, GOEMOTIONS):
        if names in (known, tuple(f"LABEL_{i}" for i in range(len(known)))):
            return known
    raise CheckpointError(f"{where}/config.json: id2label has {len(names)} classes ({', '.join(names[:4])}, ...); a "
                          f"verifier has the {len(ERV_LABELS)} of emotions.ERV_LABELS or GoEmotions' {len(GOEMOTIONS)}")


def erv_columns(labels: tuple[str, ...]) -> dict[str, int]:
    """Where each of ERV_LABELS, in their order, stands among a head's classes (28-way: divergence 4)."""
    return GOEMOTIONS_INDEX if labels == GOEMOTIONS else {label: labels.index(label) for label in ERV_LABELS}


def fresh_head(model: RobertaClassifier, num_labels: int) -> RobertaClassifier:
    """The same network with a new, randomly drawn output layer of `num_labels` classes."""
    new = RobertaClassifier(replace(model.config, num_labels=num_labels))
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier.out_proj.")}
    new.load_state_dict(kept, strict=False)
    return use_onednn(new)


def scratch(name: str, vocab_size: int, num_labels: int) -> RobertaClassifier:
    """A RoBERTa with random weights: "toy" or "base" (config.roberta), its vocabulary the tokenizer's.

    Matrices are drawn with deviation 1 / sqrt(inputs): BERT's 0.02 leaves a narrow network on a long plateau."""
    model = RobertaClassifier(replace(config.roberta(name, num_labels), vocab_size=vocab_size))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return use_onednn(model)


def erv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Multi-label binary cross entropy, mean over sentences and classes; logits, targets [S, K]. The paper gives no
    equation."""
    return F.binary_cross_entropy_with_logits(logits, targets)
