"""How good a verifier is, whether it agrees with a judge, and what the reward made from it pays for.

The paper reports none of this for its ERV. Held-out quality (`verifier_report`) uses the selection of algorithm 1, so
that F1 is of what the reward reads. `cheat` writes the completions that a policy could earn R_E with dishonestly, and
`audit` pays them under the paper's settings and under each optional remedy (REMEDIES, off by default everywhere).
Left out: what a policy does with the remedies over a training run (scripts/grpo.py has them as options).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from erv_min.emotions import ERV_LABELS, to_erv
from erv_min.run.errors import SettingsError
from erv_min.erv import Verifier, erv_columns, explanation_statistics
from erv_min.prompts import QUESTION, sft_target
from erv_min.rewards import RewardSettings, extract_explanation, score_completions, select_labels, split_sentences

# ---- held-out quality ------------------------------------------------------------------------------------------------


def selected(probs: Tensor, tau: float = 0.5, k: int = 2) -> Tensor:
    """`rewards.select_labels` as a matrix: [S, K] -> bool [S, K]. The k best of those over tau, else the best."""
    best = probs.argsort(dim=1, stable=True).flip(1)[:, :k]  # [S, k]
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, best, probs.gather(1, best) > tau)
    return chosen.scatter_(1, best[:, :1], True)


def f1_report(predicted: Tensor, truth: Tensor, labels: tuple[str, ...]) -> dict:
    """bool [S, K] each -> micro F1, macro F1 (over classes with support), per class precision, recall, F1, support."""
    hit, guessed, there = (x.sum(0).double() for x in (predicted & truth, predicted, truth))
    precision, recall = hit / guessed.clamp(min=1), hit / there.clamp(min=1)
    f1 = 2 * hit / (guessed + there).clamp(min=1)
    present = there > 0
    per_class = {label: {"precision": precision[i].item(), "recall": recall[i].item(), "f1": f1[i].item(),
                         "support": int(there[i])} for i, label in enumerate(labels)}
    return {"micro_f1": (2 * hit.sum() / (guessed.sum() + there.sum()).clamp(min=1)).item(),
            "macro_f1": f1[present].mean().item() if present.any() else 0.0, "per_class": per_class}


def best_tau(probs: Tensor, truth: Tensor, k: int = 2) -> tuple[float, float]:
    """The threshold of 0.05, 0.10, ... 0.95 with the best macro F1 (the one nearest 0.5 of equals), and that F1."""
    grid = [round(0.05 * i, 2) for i in range(1, 20)]
    scores = {tau: f1_report(selected(probs, tau, k), truth, tuple(map(str, range(truth.shape[1]))))["macro_f1"]
              for tau in grid}
    tau = max(grid, key=lambda t: (scores[t], -abs(t - 0.5)))
    return tau, scores[tau]


def calibration(probs: Tensor, truth: Tensor, bins: int = 10) -> tuple[float, list[dict]]:
    """Probabilities and outcomes of one shape -> expected calibration error and the reliability table (equal bins).

    ECE = sum over bins of (share of cases) * |mean probability - share of true cases| (Guo et al. 2017)."""
    p, y = probs.flatten().double(), truth.flatten().double()
    place = (p * bins).long().clamp(max=bins - 1)
    table, error = [], 0.0
    for b in range(bins):
        inside = place == b
        if inside.any():
            mean, share = p[inside].mean().item(), y[inside].mean().item()
            error += inside.double().mean().item() * abs(mean - share)
            table.append({"from": b / bins, "to": (b + 1) / bins, "count": int(inside.sum()), "probability": mean,
                          "true": share})
    return error, table


def verifier_report(probs: Tensor, truth: Tensor, tau: float = 0.5, k: int = 2) -> dict:
    """Held-out quality: probs float [S, 11] in ERV_LABELS order, truth bool [S, 11].

    "at_tau" counts what the reward would select (at most k, at least one); "threshold_only" plain p > tau."""
    tau_best, f1_best = best_tau(probs, truth, k)
    error, table = calibration(probs, truth)
    top, place = probs.max(1)
    top_error, top_table = calibration(top, truth.gather(1, place[:, None])[:, 0])
    plain = f1_report(probs > tau, truth, tuple(ERV_LABELS))
    return {"sentences": len(probs), "tau": tau, "k": k, "at_tau": f1_report(selected(probs, tau, k), truth,
                                                                              tuple(ERV_LABELS)),
            "threshold_only": {name: plain[name] for name in ("micro_f1", "macro_f1")},
            "best_tau": tau_best, "macro_f1_at_best_tau": f1_best,
            "loss": F.binary_cross_entropy(probs.clamp(1e-7, 1 - 1e-7), truth.float()).item(),
            "ece": error, "reliability": table, "ece_top1": top_error, "reliability_top1": top_table}


# ---- agreement with a judge ------------------------------------------------------------------------------------------


def agreement(verifier: list[str], judge: list[str | None], labels: tuple[str, ...]) -> dict:
    """One emotion a sentence from each -> accuracy, Cohen's kappa, and per class precision and recall with the judge
    as truth. Sentences that the judge left without an emotion (None) are counted apart and left out.

    Kappa = (p_o - p_e) / (1 - p_e); None where both always say the same one emotion (p_e = 1)."""
    pairs = [(v, j) for v, j in zip(verifier, judge, strict=True) if j is not None]
    n = len(pairs)
    if not n:
        raise SettingsError("the judge gave no emotion for any sentence: nothing to compare the verifier with")
    said = {x: sum(v == x for v, _ in pairs) for x in labels}
    judged = {x: sum(j == x for _, j in pairs) for x in labels}
    both = {x: sum(v == j == x for v, j in pairs) for x in labels}
    observed = sum(v == j for v, j in pairs) / n
    expected = sum(said[x] * judged[x] for x in labels) / n**2
    per_class = {x: {"precision": both[x] / said[x] if said[x] else None,
                     "recall": both[x] / judged[x] if judged[x] else None, "support": judged[x]} for x in labels}
    return {"sentences": n, "unanswered": len(judge) - n, "accuracy": observed,
            "kappa": None if expected == 1 else (observed - expected) / (1 - expected), "per_class": per_class}


def best_label(verifier: Verifier, sentences: list[str], labels: tuple[str, ...]) -> list[str]:
    """The verifier's best emotion of each sentence among `labels` (a data set's names: what a judge can answer)."""
    columns = dict(zip(ERV_LABELS, erv_columns(verifier.labels)))
    probs = verifier.probabilities(sentences)[:, [columns[to_erv(x)] for x in labels]]  # [S, len(labels)]
    return [labels[i] for i in probs.argmax(1).tolist()]


# ---- ways to cheat, and remedies -------------------------------------------------------------------------------------

CHEATS = ("repeat one sentence", "stuff label words", "drop neutral sentences", "one sentence only",
          "name the emotion in each", "two emotions in each", "claim calm around one", "copy the question",
          "another language", "wrong answer")
SPANISH = dict(zip(ERV_LABELS, ("enojo", "asco", "miedo", "felicidad", "calma", "tristeza", "sorpresa", "desprecio",
                                "ansiedad", "impotencia", "decepción")))


def cheat(way: str, sentences: list[str], e_gt: str, p_gt: list[float], neutral: list[bool]) -> list[str]:
    """An honest explanation's sentences, rewritten to earn R_E in one of CHEATS; it keeps the number where it can.

    p_gt: the verifier's probability of e_gt for each sentence; neutral: whether the reward leaves it out. A policy
    under R_E finds both by trying, so the cheat may use them."""
    best = sentences[max(range(len(sentences)), key=p_gt.__getitem__)]
    word, n = to_erv(e_gt), len(sentences)
    if way == "repeat one sentence":
        return [best] * n
    if way == "stuff label words":
        return [f"{word}, {word}, {word}.".capitalize()] * n
    if way == "drop neutral sentences":  # for a neutral e_gt they are the matches: nothing to gain
        return [s for s, out in zip(sentences, neutral) if not out or word == "neutral"] or [best]
    if way == "one sentence only":
        return [best]
    if way == "name the emotion in each":
        return [f"{s.rstrip('.!? ')}, which shows {word}." for s in sentences]
    if way == "two emotions in each":
        other = "fear" if word == "happiness" else "happiness"
        return [f"{s.rstrip('.!? ')}, which shows {word} or {other}." for s in sentences]
    if way == "claim calm around one":  # the filter leaves out what contradicts: found by a policy in the toy
        return ["The face is calm and neutral.", best, "The person is neutral."]
    if way == "copy the question":
        return split_sentences(QUESTION)
    if way == "another language":
        x = SPANISH[word]
        return [f"La persona del vídeo muestra {x}.", f"Su voz transmite {x}.", f"En conjunto, siente {x}."]
    if way == "wrong answer":
        return sentences
    raise SettingsError(f"way to cheat {way!r} is unknown; there are {', '.join(CHEATS)}")


@dataclass(frozen=True)
class Remedy:
    """A named change of RewardSettings, and the training step it is looked at (the phase-in depends on it)."""

    name: str
    changes: dict
    step: int | None = None


def remedies(honest_words: int) -> list[Remedy]:
    """The paper's settings, then each optional remedy alone (sources: RewardSettings): R_E only where format and answer
    are right; half-way through the phase-in; as many words as an honest explanation; repeated sentences do not count;
    and table 2's row without neutral filtering, where a calm sentence lowers R_E as any other does."""
    return [Remedy("paper", {}), Remedy("gate_on_answer", {"gate_on_answer": True}),
            Remedy("phase_in_steps", {"phase_in_steps": 100}, step=50),
            Remedy("length_target", {"length_target": honest_words}),
            Remedy("repeat_discount", {"repeat_discount": 1.0}), Remedy("no neutral filter", {"neutral_filter": False})]


@dataclass(frozen=True)
class AuditRow:
    """A way to cheat: what R_E pays (mean) under each remedy, share judged as e_gt, and what the logs would show."""

    way: str
    rewards: dict[str, float]
    judged: float | None
    statistics: dict[str, float | None]


def audit(verifier: Verifier, explanations: list[str], e_gt: list[str], dataset: str, labels: tuple[str, ...],
          judge: Callable[[list[str]], list[str | None]] | None = None,
          settings: RewardSettings = RewardSettings()) -> list[AuditRow]:
    """Honest explanations and their e_gt -> a row a way to cheat, "honest" first; the answer is right but in the last.

    labels: the data set's; judge: explanations -> emotions. Raises SettingsError where no sentence is found."""
    split = [split_sentences(text, settings.sentence_rule) for text in explanations]
    kept = [i for i, sentences in enumerate(split) if sentences]
    if not kept:
        raise SettingsError("the audit needs explanations with at least one sentence")
    column = dict(zip(ERV_LABELS, erv_columns(verifier.labels)))
    truths, ways = [e_gt[i] for i in kept], {way: [] for way in ("honest", *CHEATS)}
    for i in kept:
        probs = verifier.probabilities(split[i])  # [N_i, K]
        neutral = [EL == ["neutral"] for EL in select_labels(probs, verifier.labels, settings.tau, settings.k)]
        p_gt = probs[:, column[to_erv(e_gt[i])]].tolist()
        for way, texts in ways.items():
            sentences = split[i] if way == "honest" else cheat(way, split[i], e_gt[i], p_gt, neutral)
            answer = next(x for x in labels if x != e_gt[i]) if way == "wrong answer" else e_gt[i]
            texts.append(sft_target(" ".join(sentences), answer))
    words = round(sum(len(s.split()) for i in kept for s in split[i]) / len(kept))
    rows = []
    for way, texts in ways.items():
        means = {}
        for remedy in remedies(words):
            scored = score_completions(texts, truths, dataset, verifier.probabilities, verifier.labels,
                                       replace(settings, **remedy.changes), step=remedy.step)
            paid = [r.total - settings.w_format * r.format - settings.w_answer * r.answer for r in scored]
            means[remedy.name] = sum(paid) / len(paid)
            if remedy.name == "paper":
                statistics = explanation_statistics(scored)
        said = judge([extract_explanation(text) for text in texts]) if judge else None
        judged = sum(j == e for j, e in zip(said, truths)) / len(said) if said else None
        rows.append(AuditRow(way, means, judged, statistics))
    return rows


def audit_table(rows: list[AuditRow]) -> str:
    """The rows as a Markdown table; R_E in percent, the judge's column is EEA on the same explanations."""
    def cell(x: float | None, scale: float = 1) -> str:
        return "-" if x is None else f"{x * scale:.1f}"

    names = list(rows[0].rewards)
    head = ["explanation", *(f"R_E, {x}" for x in names), "judge", "sentences", "neutral", "label words", "distinct",
            "words"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        s = row.statistics
        lines.append([row.way, *(cell(row.rewards[x], 100) for x in names), cell(row.judged, 100), cell(s["sentences"]),
                      *(cell(s[x], 100) for x in ("neutral_share", "label_word_rate", "distinct_sentence_rate")),
                      cell(s["explanation_words"])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
