"""EEA, FCR, EPC, WAR and UAR (section 4.2) of judged predictions, in percent, with intervals over clips.

    row: {"video_id", "output", "ground_truth"[, "judged_emotion", "judge_status"]}  ->  Scored arrays  ->  metrics

EEA: judged = truth. EPC: judged = predicted. FCR: all three agree. WAR: accuracy. UAR: mean recall. A metric is a
weighted count of rows: a bootstrap draw is other weights. Rule "paper" or "released": divergences 14-16 and 18.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from erv_min.base.errors import DataError
from erv_min.emotions import labels, normalize

COLUMNS = ("EEA", "FCR", "EPC", "WAR", "UAR")  # table 1's order
METRICS = (*COLUMNS, "EEA_answered", "FCR/WAR")


@dataclass
class Scored:
    """A prediction file as label numbers, int64 [N]; C, the number of labels, means "none of them"."""

    labels: tuple[str, ...]
    truth: np.ndarray
    predicted: np.ndarray  # for WAR and UAR, tags or not
    answered: np.ndarray  # for EPC and FCR: what stands in <answer>; C if there is none
    judged: np.ndarray | None  # None if no row has a judged_emotion
    counted: np.ndarray  # bool [N], for UAR: the release on MAFW leaves unknown predictions out (divergence 16)
    outside: int  # judge answers outside the label list
    errors: int  # rows that it could not answer
    released: bool  # the rule: EEA wants an answer; a class without rows counts 0 in UAR (divergences 15, 16)


def read_prediction(output: str, dataset: str, rule: str = "paper") -> tuple[str | None, str | None]:
    """(predicted, answered): the label for WAR and UAR, and the one in the first <answer>, closed or not, for the rest.
    The first is all that follows the last </think>: "paper" reads it so if there is no <answer>, "released" always."""
    said = output.rpartition("</think>")[2].replace("<answer>", "").replace("</answer>", "").strip()
    _, opened, rest = output.partition("<answer>")
    answer = rest.partition("</answer>")[0].strip() if opened else ""
    answered = normalize(answer, dataset, rule)
    return answered if opened and rule == "paper" else normalize(said, dataset, rule), answered


def read_rows(rows: list[dict], dataset: str, rule: str = "paper") -> Scored:
    """Prediction rows -> Scored. A judge's answer outside the list, or none, is no emotion; "released": it is neutral.
    Raises DataError (no rows, a missing field, a truth that is no label of `dataset`), SettingsError (unknown rule)."""
    names = labels(dataset)
    number = {name: i for i, name in enumerate(names)}
    if not rows:
        raise DataError("no prediction to score: the file is empty")
    numbers, outside, errors = [], 0, 0
    for i, row in enumerate(rows):
        truth = normalize(str(row.get("ground_truth")), dataset, rule)
        if truth not in number or not isinstance(row.get("output"), str):
            raise DataError(f"prediction {i + 1} (video_id {row.get('video_id')!r}): expected text in 'output', and a "
                            f"label of {dataset} in field 'ground_truth', which is {row.get('ground_truth')!r}")
        judged, status = row.get("judged_emotion"), row.get("judge_status", "ok")
        word = normalize(judged.strip(), dataset, rule) if isinstance(judged, str) and status == "ok" else None
        if word not in number:
            failed = status == "error" or (not isinstance(judged, str) and status != "outside")
            errors, outside = errors + failed, outside + (not failed)
            word = "neutral" if rule == "released" else None
        said = read_prediction(row["output"], dataset, rule)
        numbers.append([number.get(x, len(names)) for x in (truth, *said, word)])
    truth, predicted, answered, judged = np.array(numbers).T
    known, released = predicted < len(names), rule == "released"
    counted = known if released and names == labels("mafw") else np.ones_like(known)
    if not any("judged_emotion" in row for row in rows):
        judged, outside, errors = None, 0, 0
    return Scored(names, truth, predicted, answered, judged, counted, outside, errors, released)


def weighted(s: Scored, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics in percent under `weights` [n, N], how often each row counts: name -> float [n]."""
    C, total = len(s.labels), weights.sum(1)

    def percent(hits: np.ndarray) -> np.ndarray:  # bool [N] -> [n]
        return 100 * (weights @ hits) / total

    right, of_class = s.predicted == s.truth, np.eye(C)[s.truth]  # [N], [N, C]
    there = weights @ (of_class * s.counted[:, None])  # [n, C]
    recall = 100 * (weights @ (of_class * right[:, None])) / np.maximum(there, 1)
    classes = C if s.released else np.maximum((there > 0).sum(1), 1)
    values = {"WAR": percent(right), "UAR": recall.sum(1) / classes}
    if s.judged is not None:
        eea = s.judged == s.truth
        values["EEA_answered"] = percent(eea & (s.answered < C))
        values["EEA"] = values["EEA_answered"] if s.released else percent(eea)
        values["EPC"] = percent((s.judged < C) & (s.judged == s.answered))
        values["FCR"] = percent(eea & (s.answered == s.truth))
        with np.errstate(divide="ignore", invalid="ignore"):
            values["FCR/WAR"] = 100 * values["FCR"] / values["WAR"]  # section 6: coherence among the right ones
    return values


def score(rows: list[dict], dataset: str, rule: str = "paper") -> dict:
    """Table 1's five metrics of prediction rows, and what stands behind them. Raises as read_rows.

    -> {"EEA", "FCR", "EPC", "WAR", "UAR"} in percent over all rows, None if not judged; "EEA_answered" (without a
    readable answer a row is wrong, divergence 15); "FCR/WAR" (section 6; None if WAR is 0); "n"; "unparsed" (no known
    label in <answer>); "unknown_labels" (no known prediction for WAR); "judge_outside", "judge_errors"; "labels";
    "confusion" (rows: true labels, columns: predictions, the last unknown); "recall" (label -> percent, None for an
    absent class); "per_class" ([right, counted] for UAR)."""
    s = read_rows(rows, dataset, rule)
    n, C = len(rows), len(s.labels)
    values = {name: value[0].item() for name, value in weighted(s, np.ones((1, n))).items()}
    confusion = np.zeros((C, C + 1), dtype=int)
    np.add.at(confusion, (s.truth, s.predicted), 1)
    counted = np.bincount(s.truth[s.counted], minlength=C).tolist()
    right = confusion.diagonal().tolist()
    return {**{name: values[name] if np.isfinite(values.get(name, np.nan)) else None for name in METRICS}, "n": n,
            "unparsed": int((s.answered == C).sum()), "unknown_labels": int((s.predicted == C).sum()),
            "judge_outside": s.outside, "judge_errors": s.errors, "labels": list(s.labels),
            "confusion": confusion.tolist(), "per_class": [list(pair) for pair in zip(right, counted)],
            "recall": {name: 100 * r / c if c else None for name, r, c in zip(s.labels, right, counted)}}


def bootstrap(rows: list[dict], dataset: str, n: int = 1000, seed: int = 0,
              rule: str = "paper") -> dict[str, tuple[float, float]]:
    """metric -> (low, high), percent: the 95% percentile interval over n resamples of the clips, of this one trained
    model. Raises as score."""
    s, N = read_rows(rows, dataset, rule), len(rows)
    counts = np.random.default_rng(seed).multinomial(N, np.full(N, 1 / N), size=n)  # [n, N]: drawn with replacement
    drawn = weighted(s, counts.astype(float))
    return {name: tuple(np.nanquantile(drawn[name], [(1 - 0.95) / 2, (1 + 0.95) / 2]).tolist())
            for name in METRICS if name in drawn and np.isfinite(drawn[name]).any()}


def table(named_scores: dict[str, dict]) -> str:
    """Systems and their `score`s as plain text in table 1's columns, percent."""
    width = max([6, *map(len, named_scores)])
    lines = [f"{'System':{width}}" + "".join(f"{name:>8}" for name in COLUMNS)]
    for name, s in named_scores.items():
        lines.append(f"{name:{width}}" + "".join(f"{'-':>8}" if s.get(x) is None else f"{s[x]:8.2f}" for x in COLUMNS))
    return "\n".join(lines)


def agreement(judged_a: list[str | None], judged_b: list[str | None]) -> dict:
    """Two judges on the same explanations -> {"n", "left_out", "accuracy", "kappa"}; shares, not percent.

    Rows for which either gave no emotion (None) are left out and counted. Cohen's kappa = (p_o - p_e) / (1 - p_e).
    None: there is no row, or, for kappa, p_e = 1 (both always say the same one word)."""
    pairs = [(a, b) for a, b in zip(judged_a, judged_b, strict=True) if a is not None and b is not None]
    n, said_a, said_b = len(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    p_o = sum(a == b for a, b in pairs) / n if n else None
    p_e = sum(said_a[x] * said_b[x] for x in said_a) / n**2 if n else 1
    return {"n": n, "left_out": len(judged_a) - n, "accuracy": p_o,
            "kappa": None if p_e == 1 else (p_o - p_e) / (1 - p_e)}
