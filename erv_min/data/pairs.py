"""The verifier's training pairs (section 3.2): descriptions with their emotions, as table 5 counts them; and how well a
verifier reads the held-out ones, of which the paper says nothing.

    JSONL of scripts/augment.py -> read_rows -> split_rows -> targets -> erv.erv_loss (scripts/erv.py)
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from erv_min.base.errors import DataError
from erv_min.base.files import read_jsonl
from erv_min.data.readers import cell
from erv_min.emotions import ERV_LABELS, GOEMOTIONS, GOEMOTIONS_INDEX, to_erv
from erv_min.rewards import select_labels


@dataclass(frozen=True)
class Row:
    """One training pair: a description and its emotions (names of ERV_LABELS)."""

    text: str
    labels: tuple[str, ...]
    source: str
    key: str  # its clip, else its text: decides its side of the split
    truth: tuple[str, ...]  # what a held-out row is measured against: its field "truth" (checked labels), else `labels`


def read_rows(paths: list[str | Path]) -> list[Row]:
    """JSONL files of {"text", "labels": [...], "source"[, "clip", "truth": [...]]} -> rows; labels are of any data set.
    Raises DataError naming file and row."""
    rows = []
    for path in paths:
        for number, raw in enumerate(read_jsonl(path), 1):
            where = f"{path}, row {number}"
            text = cell(raw["text"]) if isinstance(raw.get("text"), str) else ""
            lists = [raw.get("labels"), raw.get("truth", raw.get("labels"))]
            if not text or not all(isinstance(names, list) and names for names in lists):
                raise DataError(f"{where}: expected text in field 'text', and emotions in the list 'labels' (and "
                                "'truth', if it is there)")
            try:
                labels, truth = (tuple(dict.fromkeys(to_erv(str(x)) for x in names)) for names in lists)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            source, key = cell(raw.get("source")) or Path(path).stem, cell(raw.get("clip")) or text
            rows.append(Row(text, labels, source, key, truth))
    if not rows:
        raise DataError(f"{', '.join(map(str, paths)) or 'no file'}: no training pair found")
    return rows


def split_rows(rows: list[Row], fraction: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(training, held-out): a hash of a row's key decides, so that a clip is on one side only."""
    sides = ([], [])
    for row in rows:
        digest = hashlib.blake2b(f"{seed}:{row.key}".encode(), digest_size=8).digest()
        sides[int.from_bytes(digest, "big") < fraction * 2**64].append(row)
    return sides


def counts_table(rows: list[Row]) -> str:
    """Table 5 of these rows, as text: per source its rows, and how many carry each emotion; one may carry two."""
    lines = [["source", "rows", *ERV_LABELS]]
    for source in (*dict.fromkeys(row.source for row in rows), "all"):
        part = [row for row in rows if source in ("all", row.source)]
        counts = Counter(label for row in part for label in row.labels)
        lines.append([source, str(len(part)), *(str(counts[x] or "-") for x in ERV_LABELS)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths)) for line in lines)


def targets(label_lists: list[tuple[str, ...]], head: int = len(ERV_LABELS)) -> Tensor:
    """Names of ERV_LABELS, a list per row -> multi-hot targets [N, head] in {0, 1}; a 28-way head's other 17 are 0."""
    columns = GOEMOTIONS_INDEX if head == len(GOEMOTIONS) else {label: i for i, label in enumerate(ERV_LABELS)}
    out = torch.zeros(len(label_lists), head)
    for i, names in enumerate(label_lists):
        out[i, [columns[x] for x in names]] = 1
    return out


def verifier_report(probs: Tensor, truth: list[tuple[str, ...]], tau: float = 0.5, k: int = 2) -> dict:
    """How well a verifier reads held-out texts: probs float [S, 11] in ERV_LABELS' order; truth: each one's emotions.

    "at_tau" is of the labels that the reward would select: micro F1, macro F1 (over classes with support), and per
    class precision, recall, F1, support."""
    chosen, wanted = targets(select_labels(probs, ERV_LABELS, tau, k)), targets(truth)  # [S, 11] each
    hit, guessed, there = (x.double().sum(0) for x in (chosen * wanted, chosen, wanted))  # [11] each
    columns = {"precision": hit / guessed.clamp(min=1), "recall": hit / there.clamp(min=1),
               "f1": 2 * hit / (guessed + there).clamp(min=1), "support": there.long()}
    at_tau = {"micro_f1": (2 * hit.sum() / (guessed.sum() + there.sum())).item(),
              "macro_f1": columns["f1"][there > 0].mean().item(),
              "per_class": {label: {name: x[i].item() for name, x in columns.items()}
                            for i, label in enumerate(ERV_LABELS)}}
    return {"sentences": len(probs), "tau": tau, "k": k, "at_tau": at_tau,
            "loss": F.binary_cross_entropy(probs.clamp(1e-7, 1 - 1e-7), wanted).item()}
