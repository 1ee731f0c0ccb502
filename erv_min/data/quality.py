"""The verifier's quality on held-out descriptions, of which the paper says nothing: F1 of the labels that the reward
would read, and on texts that were not in training."""

import torch
import torch.nn.functional as F
from torch import Tensor

from erv_min.emotions import ERV_LABELS
from erv_min.rewards import select_labels


def selected(probs: Tensor, tau: float = 0.5, k: int = 2) -> Tensor:
    """`rewards.select_labels` as a matrix: [S, K] -> bool [S, K], so that F1 is of what the reward reads."""
    chosen = torch.zeros_like(probs, dtype=torch.bool)
    for row, columns in zip(chosen, select_labels(probs, range(probs.shape[1]), tau, k)):
        row[columns] = True
    return chosen


def f1_report(predicted: Tensor, truth: Tensor) -> dict:
    """bool [S, 11] each -> micro F1, macro F1 (over classes with support), per class precision, recall, F1, support."""
    hit, guessed, there = (x.sum(0).double() for x in (predicted & truth, predicted, truth))
    columns = {"precision": hit / guessed.clamp(min=1), "recall": hit / there.clamp(min=1),
               "f1": 2 * hit / (guessed + there).clamp(min=1), "support": there.long()}
    present = there > 0
    return {"micro_f1": (2 * hit.sum() / (guessed.sum() + there.sum()).clamp(min=1)).item(),
            "macro_f1": columns["f1"][present].mean().item() if present.any() else 0.0,
            "per_class": {label: {name: x[i].item() for name, x in columns.items()}
                          for i, label in enumerate(ERV_LABELS[:len(there)])}}


def verifier_report(probs: Tensor, truth: Tensor, tau: float = 0.5, k: int = 2, seen: Tensor | None = None) -> dict:
    """Held-out quality: probs float [S, 11] in ERV_LABELS order, truth bool [S, 11].

    "at_tau" counts what the reward would select (at most k, at least one). "unseen": number and macro F1 (None without
    any) of the texts not word for word in training; seen bool [S]: which are.
    """
    chosen = selected(probs, tau, k)
    new = torch.ones(len(probs), dtype=torch.bool) if seen is None else ~seen
    return {"sentences": len(probs), "tau": tau, "k": k, "at_tau": f1_report(chosen, truth),
            "unseen": {"sentences": int(new.sum()),
                       "macro_f1": f1_report(chosen[new], truth[new])["macro_f1"] if new.any() else None},
            "loss": F.binary_cross_entropy(probs.clamp(1e-7, 1 - 1e-7), truth.float()).item()}


def print_report(report: dict) -> None:
    """`verifier_report` for people; a class that the data does not have is left out."""
    at_tau, unseen = report["at_tau"], report["unseen"]
    print(f"{'':>14}  precision  recall     F1  support   (tau {report['tau']}, at most {report['k']} labels)")
    for name, x in at_tau["per_class"].items():
        if x["support"] or x["precision"]:
            print(f"{name:>14}  {x['precision']:9.3f}  {x['recall']:6.3f}  {x['f1']:5.3f}  {x['support']:7d}")
    print(f"macro F1 {at_tau['macro_f1']:.3f}, micro F1 {at_tau['micro_f1']:.3f}; "
          f"{report['sentences']} held-out rows")
    print(f"{unseen['sentences']} of these texts are not in training"
          + (f": macro F1 {unseen['macro_f1']:.3f} on them" if unseen["sentences"] else ""))
