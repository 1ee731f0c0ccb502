"""EEA, FCR, EPC, WAR and UAR (section 4.2) of judged predictions, in percent, with intervals over clips.

    row: {"video_id", "output", "ground_truth"[, "judged_emotion", "judge_status"]}  ->  Scored arrays  ->  metrics

EEA: judged = truth. EPC: judged = predicted. FCR: all three agree. WAR: accuracy. UAR: mean recall. Each row is read
once into arrays of label numbers; a metric is then a weighted count of rows, so that a bootstrap draw is another vector
of weights. Divergences 14-16 and 18 are what separates rule "paper" from "released". The judge is judge.py's.
"""

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
    outside: int  # judge answers outside the label list
    errors: int  # rows that the judge could not answer
    released: bool  # the rule: EEA wants an answer; a class without rows counts 0 in UAR (divergences 15, 16)

    @property
    def counted(self) -> np.ndarray:
        """bool [N]: rows of UAR. The release on MAFW leaves unknown predictions out of their class (divergence 16)."""
        known = self.predicted < len(self.labels)
        return known if self.released and self.labels == labels("mafw") else np.ones_like(known)


def read_prediction(output: str, dataset: str, rule: str = "paper") -> tuple[str | None, str | None]:
    """(predicted, answered): the label for WAR and UAR, and the one in the first <answer>, closed or not, for the rest.

    The first counts an answer without tags too: all that follows the last </think>. "paper" reads it so if there is no
    tag, "released" always, which turns `so <answer>sad</answer>` into an unknown label."""
    said = output.rpartition("</think>")[2].replace("<answer>", "").replace("</answer>", "").strip()
    _, opened, rest = output.partition("<answer>")
    answer = rest.partition("</answer>")[0].strip() if opened else ""
    answered = normalize(answer, dataset, rule)
    return answered if opened and rule == "paper" else normalize(said, dataset, rule), answered


def read_rows(rows: list[dict], dataset: str, rule: str = "paper") -> Scored:
    """Prediction rows -> Scored. Raises DataError (no rows, a missing field, a truth that is no label of `dataset`)
    and SettingsError (unknown rule).

    "paper": a judge's answer outside the list, or none, is no emotion (divergence 14); "released": it is neutral."""
    names = labels(dataset)
    number = {name: i for i, name in enumerate(names)}
    if not rows:
        raise DataError("no prediction to score: the file is empty")
    numbers, outside, errors = [], 0, 0
    for i, row in enumerate(rows):
        where = f"prediction {i + 1} (video_id {row.get('video_id')!r})"
        if not isinstance(row.get("output"), str) or not isinstance(row.get("ground_truth"), str):
            raise DataError(f"{where}: fields 'output' and 'ground_truth' must be text")
        truth = normalize(row["ground_truth"], dataset, rule)
        if truth not in number:
            raise DataError(f"{where}: ground_truth {row['ground_truth']!r} is not a label of {dataset}: {names}")
        judged, status = row.get("judged_emotion"), row.get("judge_status", "ok")
        word = normalize(judged.strip(), dataset, rule) if isinstance(judged, str) and status == "ok" else None
        if word not in number:
            failed = status == "error" or (not isinstance(judged, str) and status != "outside")
            errors, outside = errors + failed, outside + (not failed)
            word = "neutral" if rule == "released" else None
        said = read_prediction(row["output"], dataset, rule)
        numbers.append([number.get(x, len(names)) for x in (truth, *said, word)])
    truth, predicted, answered, judged = np.array(numbers).T
    if not any("judged_emotion" in row for row in rows):
        judged, outside, errors = None, 0, 0
    return Scored(names, truth, predicted, answered, judged, outside, errors, rule == "released")


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

    -> {"EEA", "FCR", "EPC", "WAR", "UAR"} in percent over all rows; "EEA_answered" (a row without a readable answer is
    wrong: divergence 15's other way, and the released EEA); "FCR/WAR" (section 6; None if WAR is 0); "n"; "unparsed"
    (no known label in <answer>); "unknown_labels" (no known prediction for WAR); "judge_outside", "judge_errors";
    "labels"; "confusion" (rows: true labels, columns: predictions, the last unknown); "recall" (label -> percent,
    None for an absent class); "per_class" ([right, counted] for UAR). None: not judged.
    """
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
    """metric -> (low, high), percent: the 95% percentile interval over n resamples of the clips. Raises as score.

    It holds for this one trained model on other clips; another training seed's model moves the figures as well, often
    further, and only runs over several seeds show by how much."""
    s, rng = read_rows(rows, dataset, rule), np.random.default_rng(seed)
    N, parts = len(s.truth), []
    for start in range(0, n, 256):  # draws of N clips with replacement, 256 at a time
        counts = rng.multinomial(N, np.full(N, 1 / N), size=min(256, n - start)).astype(float)  # [<= 256, N]
        parts.append(weighted(s, counts))
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: tuple(np.nanquantile(drawn[name], [(1 - 0.95) / 2, (1 + 0.95) / 2]).tolist())
            for name in METRICS if name in drawn and np.isfinite(drawn[name]).any()}


def table(named_scores: dict[str, dict]) -> str:
    """Systems and their `score`s as plain text in table 1's columns, percent."""
    width = max([6, *map(len, named_scores)])
    lines = [f"{'System':{width}}" + "".join(f"{name:>8}" for name in COLUMNS)]
    for name, s in named_scores.items():
        lines.append(f"{name:{width}}" + "".join(f"{'-':>8}" if s.get(x) is None else f"{s[x]:8.2f}" for x in COLUMNS))
    return "\n".join(lines)
