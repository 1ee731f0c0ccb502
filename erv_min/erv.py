"""The Emotional Rationale Verifier (section 3.2): a RoBERTa that reads a sentence and gives a probability per emotion.

Here are the verifier as the reward uses it (`Verifier`), its training data (`read_rows`) and its loss (`erv_loss`:
multi-label binary cross entropy on [CLS]; the paper gives no equation). The training loop is scripts/erv.py; what is
measured of a verifier and of the reward made from it is in audit.py.
Left out: distillation of the labelling LLM's probabilities (the paper trains on its label words alone).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min import checkpoint, config
from erv_min.emotions import ALIASES, ERV_LABELS, GOEMOTIONS, GOEMOTIONS_INDEX, to_erv
from erv_min.run.errors import CheckpointError, DataError
from erv_min.run.files import read_json, read_jsonl
from erv_min.run.onednn import use_onednn
from erv_min.model.bert import RobertaClassifier
from erv_min.tokenizer import EncoderTokenizer

# ---- the verifier ----------------------------------------------------------------------------------------------------


class Verifier:
    """Sentences -> probabilities. One per run: GRPO scores all sentences of all completions of a step in one call."""

    def __init__(self, model: RobertaClassifier, tokenizer: EncoderTokenizer, labels: tuple[str, ...],
                 device: str | torch.device = "cpu", token_budget: int = 0):
        """token_budget: padded tokens a forward pass; 0: what keeps a CPU's activations in its cache, or a GPU busy."""
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.labels, self.device = tokenizer, tuple(labels), device
        self.token_budget = token_budget or (1024 if torch.device(device).type == "cpu" else 16384)

    @classmethod
    def load(cls, folder_or_repo: str | Path, device: str | torch.device = "cpu", revision: str | None = None,
             token_budget: int = 0) -> "Verifier":
        """Reads weights, config.json, tokenizer.json of a head of 11 or 28; raises CheckpointError on another."""
        folder = checkpoint.resolve(folder_or_repo, revision)
        model = checkpoint.load_erv(folder)
        labels = head_labels(read_json(folder / "config.json"), folder)
        return cls(model, EncoderTokenizer(folder, max_length=max_tokens(model)), labels, device, token_budget)

    def probabilities(self, sentences: list[str]) -> Tensor:
        """[S] sentences -> float32 [S, K] on the CPU, columns as `labels`. A repeated sentence is scored once.

        Sentences longer than the encoder reads (512 tokens in RoBERTa base) are cut at its length.
        """
        unique = list(dict.fromkeys(sentences))
        if not unique:
            return torch.zeros(0, len(self.labels))
        ids, mask = self.tokenizer.encode_batch(unique)  # [U, L] each
        probs = torch.empty(len(unique), len(self.labels))
        with torch.inference_mode():
            for rows, length in length_batches(mask.sum(1), self.token_budget):
                batch = (x[rows, :length].to(self.device) for x in (ids, mask))
                probs[rows] = torch.sigmoid(self.model(*batch).float()).cpu()
        place = {sentence: i for i, sentence in enumerate(unique)}
        return probs[[place[s] for s in sentences]]


def length_batches(lengths: Tensor, token_budget: int) -> Iterator[tuple[Tensor, int]]:
    """lengths [U] -> (row numbers, longest length) of batches of similar length, <= token_budget padded tokens each."""
    order = lengths.argsort(stable=True)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and int(lengths[order[stop]]) * (stop + 1 - start) <= token_budget:
            stop += 1
        yield order[start:stop], int(lengths[order[stop - 1]])
        start = stop


def max_tokens(model: RobertaClassifier) -> int:
    """Tokens the encoder can read: RoBERTa's first position is pad_token_id + 1."""
    c = model.config
    return c.max_position_embeddings - (c.pad_token_id + 1 if c.roberta else 0)


def head_labels(raw: dict, where: str | Path) -> tuple[str, ...]:
    """The head's class names from a Hugging Face config.json; names left at LABEL_i mean our order of 11 or 28."""
    named = raw.get("id2label") or {}
    names = tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(len(named)))
    known = {len(ERV_LABELS): tuple(ERV_LABELS), len(GOEMOTIONS): tuple(GOEMOTIONS)}.get(len(names))
    if known and (names == tuple(f"LABEL_{i}" for i in range(len(names))) or names == known):
        return known
    if sorted(names) == sorted(ERV_LABELS):  # another order of the 11: by name
        return names
    raise CheckpointError(f"{where}/config.json: id2label has {len(names)} classes ({', '.join(names[:4])}, ...); a "
                          f"verifier has the {len(ERV_LABELS)} of emotions.ERV_LABELS or GoEmotions' {len(GOEMOTIONS)}")


def erv_columns(labels: tuple[str, ...]) -> list[int]:
    """Where each of ERV_LABELS stands among a head's classes (11-way: by name; 28-way: GOEMOTIONS_INDEX, row 4)."""
    if set(labels) == set(ERV_LABELS):
        return [labels.index(label) for label in ERV_LABELS]
    return [GOEMOTIONS_INDEX[label] for label in ERV_LABELS]


def fresh_head(model: RobertaClassifier, num_labels: int) -> RobertaClassifier:
    """The same network with a new, randomly drawn output layer of `num_labels` classes."""
    new = RobertaClassifier(replace(model.config, num_labels=num_labels))
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier.out_proj.")}
    new.load_state_dict(new.state_dict() | kept)
    return use_onednn(new)


def scratch(name: str, vocab_size: int, num_labels: int) -> RobertaClassifier:
    """A RoBERTa with random weights: "toy" or "base" (config.roberta), its vocabulary the tokenizer's.

    Matrices are drawn with deviation 1 / sqrt(inputs): BERT's 0.02 leaves a narrow network on a long plateau."""
    model = RobertaClassifier(replace(config.roberta(name, num_labels), vocab_size=vocab_size))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return use_onednn(model)


# ---- training data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One training pair: a description and its emotions (names of ERV_LABELS). `key` decides its side of the split.

    `truth` is what a held-out row is measured against: its field "truth" (checked labels), else `labels`.
    """

    text: str
    labels: tuple[str, ...]
    source: str
    key: str
    truth: tuple[str, ...]


def read_rows(paths: list[str | Path]) -> list[Row]:
    """JSONL files of {"text", "labels": [...], "source"[, "clip", "truth": [...]]} -> rows. Label names of any data set
    are accepted. Raises DataError naming file, row and field."""
    rows = []
    for path in paths:
        for number, raw in enumerate(read_jsonl(path), 1):
            where = f"{path}, row {number}"
            if not isinstance(raw, dict) or not isinstance(raw.get("text"), str) or not raw["text"].strip():
                raise DataError(f"{where}: field 'text' must be a non-empty string")
            text, labels = raw["text"].strip(), emotion_names(raw, "labels", where)
            truth = emotion_names(raw, "truth", where) if "truth" in raw else labels
            source, key = str(raw.get("source") or Path(path).stem), str(raw.get("clip") or text)
            rows.append(Row(text, labels, source, key, truth))
    if not rows:
        raise DataError(f"{', '.join(map(str, paths)) or 'no file'}: no training pair found")
    return rows


def emotion_names(raw: dict, field: str, where: str) -> tuple[str, ...]:
    """The emotions that a row's field lists, as names of ERV_LABELS, each once."""
    names = raw.get(field)
    if not isinstance(names, list) or not names or not all(isinstance(x, str) for x in names):
        raise DataError(f"{where}: field {field!r} must be a non-empty list of emotion names, is {names!r}")
    try:
        return tuple(dict.fromkeys(to_erv(x) for x in names))
    except DataError as error:
        raise DataError(f"{where}: field {field!r}: {error}") from None


def split_rows(rows: list[Row], fraction: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(training, held-out): a hash of a row's key (its clip, else its text) decides, so a clip is on one side only."""
    sides = ([], [])
    for row in rows:
        digest = hashlib.blake2b(f"{seed}:{row.key}".encode(), digest_size=8).digest()
        sides[int.from_bytes(digest, "big") < fraction * 2**64].append(row)
    return sides


def class_counts(rows: list[Row]) -> dict[str, Counter]:
    """Source -> emotion -> number of rows that carry it (table 5: a row with two labels counts in two columns)."""
    counts: dict[str, Counter] = {}
    for row in rows:
        counts.setdefault(row.source, Counter()).update(row.labels)
    return counts


def counts_table(rows: list[Row]) -> str:
    """Table 5 of these rows, as text: one line a source, the number of rows and the number of labels of each class."""
    counts, sizes = class_counts(rows), Counter(row.source for row in rows)
    lines = [["source", "rows", *ERV_LABELS]]
    for source, per_class in counts.items():
        lines.append([source, str(sizes[source]), *(str(per_class[x] or "-") for x in ERV_LABELS)])
    lines.append(["all", str(len(rows)), *(str(sum(c[x] for c in counts.values()) or "-") for x in ERV_LABELS)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths)) for line in lines)


def targets(label_lists: list[tuple[str, ...]], head: int = len(ERV_LABELS)) -> Tensor:
    """Names of ERV_LABELS, a list a row -> multi-hot targets [N, head] in {0, 1}.

    A 28-way head's other 17 columns are 0: the labeller chose among the 11 (figure 6)."""
    columns = dict(zip(ERV_LABELS, erv_columns(tuple(GOEMOTIONS) if head == len(GOEMOTIONS) else tuple(ERV_LABELS))))
    out = torch.zeros(len(label_lists), head)
    for i, names in enumerate(label_lists):
        out[i, [columns[x] for x in names]] = 1
    return out


# ---- loss, and the option against class imbalance --------------------------------------------------------------------


def erv_loss(logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Multi-label binary cross entropy, mean over sentences and classes; logits, targets [S, K], pos_weight [K]."""
    return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight)


def positive_weights(targets: Tensor, most: float = 20.0) -> Tensor:
    """--balance weight: [N, K] -> negatives / positives of each class [K], at most `most`; 1 for an absent class."""
    positives = targets.sum(0)
    weights = ((len(targets) - positives) / positives.clamp(min=1)).clamp(max=most)
    return torch.where(positives > 0, weights, torch.ones_like(weights))


def sampling_weights(targets: Tensor) -> Tensor:
    """--balance resample: [N, K] -> each row's weight [N], 1 / size of the rarest class it carries."""
    return (targets / targets.sum(0).clamp(min=1)).max(1).values


# ---- watched while the reward is in use ------------------------------------------------------------------------------


def explanation_statistics(rewards: list) -> dict[str, float | None]:
    """What a policy that cheats R_E would move, as means over completions; stands beside R_E in metrics.jsonl.

    rewards: `rewards.Reward`s of a step. Sentences of an explanation; share of sentences whose only label is neutral
    (None where no label was predicted); share of sentences that contain an emotion's name; distinct sentences over
    all; words of the explanation.
    """
    split = [r.sentences for r in rewards]
    judged = [label_set for r in rewards for label_set in (r.label_sets or [])]
    neutral = sum(list(x) == ["neutral"] for x in judged) / len(judged) if judged else None
    total, n = sum(map(len, split)), max(1, len(rewards))
    named = sum(bool(label_words(sentence)) for sentences in split for sentence in sentences)
    distinct = [len(set(sentences)) / len(sentences) for sentences in split if sentences]
    return {"sentences": total / n, "neutral_share": neutral, "label_word_rate": named / max(1, total),
            "distinct_sentence_rate": sum(distinct) / len(distinct) if distinct else None,
            "explanation_words": sum(len(s.split()) for sentences in split for s in sentences) / n}


LABEL_WORDS = frozenset(ERV_LABELS) | frozenset(ALIASES)


def label_words(sentence: str) -> list[str]:
    """The emotion names (labels and their aliases) that stand in a sentence as whole words."""
    return [word for word in re.findall(r"[a-z]+", sentence.lower()) if word in LABEL_WORDS]
