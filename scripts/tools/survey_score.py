"""Raters' answers -> tables 3 and 6, agreement with the judge (appendix A.1) and Krippendorff's alpha.

What the paper leaves open, and what is done here: a clip's score is the mean over its raters; a system wins a clip with
the higher score, a tie is half a win for each; table 6's deviation is the sample deviation of the clips' scores. Top 1:
the judge's emotion is the one that most raters chose in question 1; top 2: it is among the two chosen most; of emotions
chosen equally often at the cut each counts with its share. Nothing is dropped in silence: `problems` names rater and
question, and what can be read of a partial file is used.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from erv_min.base.errors import DataError
from erv_min.base.files import read_json
from erv_min.emotions import normalize

PAPER = {"win rate": (53.6, 46.4), "mean": (3.52, 3.42), "sd": (0.41, 0.34), "top 1": 92.9, "top 2": 96.4}


def krippendorff_alpha(units: list[list], metric: str = "nominal") -> float | None:
    """alpha = 1 - D_o / D_e (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011).

    units: for each item the values that raters gave (missing ones left out; numbers for "ordinal" and "interval").
    An item with fewer than two values says nothing about agreement and is left out. None where nothing is left, or
    where all values are one: then there is no disagreement to expect.
    """
    units = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in units for value in unit})
    place = {value: i for i, value in enumerate(values)}
    o = np.zeros((len(values), len(values)))  # coincidences of ordered pairs within units
    for unit in units:
        counts = np.bincount([place[value] for value in unit], minlength=len(values)).astype(float)
        o += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    n = o.sum(0)
    if metric == "nominal":
        delta = 1.0 - np.eye(len(values))
    elif metric == "ordinal":  # (sum of n_g from c to k, the ends by half)^2
        middle = np.cumsum(n) - n / 2
        delta = (middle[:, None] - middle) ** 2
    else:
        numbers = np.array(values, float)
        delta = (numbers[:, None] - numbers) ** 2
    expected = (np.outer(n, n) * delta).sum()
    return float(1 - (n.sum() - 1) * (o * delta).sum() / expected) if expected else None


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_key(path: str) -> dict:
    key = read_json(path)
    wanted = {"video_id", "dataset", "left", "right", "emotion_of", "judged"}
    if not isinstance(key, dict) or not all(k in key for k in ("survey", "systems", "items", "choices")) or any(
            not wanted <= set(entry) or item not in key["choices"] for item, entry in key["items"].items()):
        raise DataError(f"{path}: not the key that survey.py make wrote, or edited since")
    return key


def read_raters(key: dict, files: list[str]) -> tuple[dict[str, dict], list[str]]:
    """rater -> {(item, question): value}, and the problems found. Questions: emotion, left, right."""
    raters, problems = {}, []
    for file in files:
        try:
            content = read_json(file)
        except DataError as error:
            problems.append(f"{error}: the file is left out")
            continue
        where = Path(file).name
        if not isinstance(content, dict) or not isinstance(content.get("answers"), dict):
            problems.append(f"{where}: not an export of the survey page: the file is left out")
            continue
        if content.get("survey") != key["survey"]:
            problems.append(f"{where}: answers survey {content.get('survey')!r}, the key is of {key['survey']!r}: the "
                            "file is left out")
            continue
        rater = str(content.get("rater") or "").strip()
        if not rater:
            rater = where
            problems.append(f"{where}: names no rater; counted as {where!r}")
        if rater in raters:
            problems.append(f"{where}: rater {rater!r} has answered in another file already: the file is left out")
            continue
        raters[rater] = {}
        for item in content["answers"]:
            if item not in key["items"]:
                problems.append(f"{rater}, question {item!r}: not in this survey: left out")
        for item in key["items"]:
            given = content["answers"].get(item)
            given = given if isinstance(given, dict) else {}
            for question in ("emotion", "left", "right"):
                value = given.get(question)
                if value is None:
                    problems.append(f"{rater}, {item} {question}: not answered")
                elif question == "emotion" and value not in key["choices"][item]:
                    problems.append(f"{rater}, {item} {question}: {value!r} is not among the choices: left out")
                elif question != "emotion" and not (type(value) is int and 1 <= value <= 5):
                    problems.append(f"{rater}, {item} {question}: {value!r} is not a score from 1 to 5: left out")
                else:
                    raters[rater][item, question] = value
    return raters, problems


# ---- scoring ---------------------------------------------------------------------------------------------------------


def top_share(votes: list[str], emotion: str, top: int) -> float:
    """Whether `emotion` is among the `top` most chosen: the chance of it where ties at the cut are broken at random."""
    counts = Counter(votes)
    if emotion not in counts:
        return 0.0
    above = sum(count > counts[emotion] for count in counts.values())
    level = sum(count == counts[emotion] for count in counts.values())
    return min(1.0, max(0, top - above) / level)


def score(key_file: str, files: list[str], resamples: int = 2000) -> dict:
    """All figures of a study as a dictionary, with "problems". Raises DataError where no answer is left."""
    key = read_key(key_file)
    raters, problems = read_raters(key, files)
    systems, items = key["systems"], key["items"]
    result = {"survey": key["survey"], "systems": systems, "raters": sorted(raters), "clips": len(items),
              "answers": sum(map(len, raters.values())), "expected": 3 * len(items) * len(raters), "problems": problems}
    ratings = {name: {} for name in systems}  # system -> item -> scores
    votes = {}  # item -> emotions
    pairwise = []  # (first's score, second's score) of a rater on a clip
    for answers in raters.values():
        for item, entry in items.items():
            pair = {entry[side]: answers.get((item, side)) for side in ("left", "right")}
            for name, value in pair.items():
                if value is not None:
                    ratings[name].setdefault(item, []).append(value)
            if None not in pair.values():
                pairwise.append([pair[name] for name in systems])
            if (item, "emotion") in answers:
                votes.setdefault(item, []).append(answers[item, "emotion"])
    means = {name: {item: float(np.mean(values)) for item, values in ratings[name].items()} for name in systems}
    both = [item for item in items if all(item in means[name] for name in systems)]
    if not both:
        raise DataError("no clip has a score for both systems: " + ("; ".join(problems[:3]) or "no answers were given"))

    table = np.array([[means[name][item] for name in systems] for item in both])  # [clips, 2]
    wins = np.stack([(table[:, i] > table[:, 1 - i]) + 0.5 * (table[:, 0] == table[:, 1]) for i in (0, 1)], 1)
    draws = np.random.default_rng(0).integers(0, len(both), (resamples, len(both)))
    for i, name in enumerate(systems):
        result[name] = {"win rate": 100 * wins[:, i].mean(), "mean": table[:, i].mean(),
                        "sd": table[:, i].std(ddof=1) if len(both) > 1 else None,
                        "sd of single scores": float(np.std([v for x in ratings[name].values() for v in x], ddof=1))
                        if sum(map(len, ratings[name].values())) > 1 else None}
    low, high = np.quantile((table[:, 0] - table[:, 1])[draws].mean(1), [0.025, 0.975])
    result["ties"] = int((table[:, 0] == table[:, 1]).sum())
    result["difference"] = [table[:, 0].mean() - table[:, 1].mean(), low, high]
    result["single comparisons"] = {"first": sum(a > b for a, b in pairwise), "second": sum(a < b for a, b in pairwise),
                                    "ties": sum(a == b for a, b in pairwise)}
    units = [values for name in systems for values in ratings[name].values()]
    result["alpha"] = {"emotion, nominal": krippendorff_alpha(list(votes.values())),
                       **{f"scores, {m}": krippendorff_alpha(units, m) for m in ("ordinal", "interval")}}
    result["agreement"] = agreement(systems, items, votes)
    return _plain(result)


def agreement(systems: list[str], items: dict, votes: dict[str, list[str]]) -> dict[str, dict]:
    """Whose explanations question 1 showed -> how often raters and judge read the same emotion, percent of clips."""
    result = {}
    for group in (*systems, "both"):
        pairs = []  # (votes, the judge's emotion)
        for item, entry in items.items():
            judged = entry["judged"].get(entry["emotion_of"])
            if item in votes and judged and group in ("both", entry["emotion_of"]):
                pairs.append((votes[item], normalize(judged, entry["dataset"]) or judged))
        if pairs:
            top1, top2 = (100 * np.mean([top_share(v, judged, top) for v, judged in pairs]) for top in (1, 2))
            single = 100 * np.mean([vote == judged for v, judged in pairs for vote in v])
            result[group] = {"clips": len(pairs), "top 1": top1, "top 2": top2, "single answers": single}
    return result


def _plain(value):
    """numpy's numbers as Python's, for JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def report(result: dict) -> str:
    """Tables 3 and 6 as text, beside the paper's figures, then agreement, alpha and every problem."""
    systems = result["systems"]
    width = max(18, *map(len, systems))
    scores = [result[name] for name in systems]

    def number(value, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [f"survey {result['survey']}: {result['clips']} clips, {len(result['raters'])} raters, "
             f"{result['answers']} of {result['expected']} answers", "",
             f"{'Table 3':22}{systems[0]:>{width}}{systems[1]:>{width}}{'paper: Ours':>16}{'R1-Omni':>10}",
             f"{'Win rate':22}" + "".join(f"{s['win rate']:>{width - 1}.1f}%" for s in scores)
             + f"{PAPER['win rate'][0]:>15}%{PAPER['win rate'][1]:>9}%",
             f"{'Assessment score':22}" + "".join(f"{s['mean']:>{width}.2f}" for s in scores)
             + f"{PAPER['mean'][0]:>16}{PAPER['mean'][1]:>10}", "",
             f"{'Table 6':22}{'mean and deviation over clips':>30}{'of single scores':>20}{'paper':>16}"]
    for name, s, mean, sd in zip(systems, scores, PAPER["mean"], PAPER["sd"]):
        spread = f"{s['mean']:.2f} ± {number(s['sd'], '.2f')}"
        lines.append(f"{name:22}{spread:>30}{number(s['sd of single scores'], '.2f'):>20}{f'{mean} ± {sd}':>16}")
    d, single = result["difference"], result["single comparisons"]
    lines += ["", f"{systems[0]} - {systems[1]}: {d[0]:+.2f} (95% over clips {d[1]:+.2f} to {d[2]:+.2f}); "
              f"{result['ties']} clips tied",
              f"single comparisons: {systems[0]} higher {single['first']}, {systems[1]} higher {single['second']}, "
              f"equal {single['ties']}", ""]
    lines.append(f"{'Judge and raters':22}{'clips':>7}{'top 1':>9}{'top 2':>9}{'single answers':>17}   (paper, Ours: "
                 f"{PAPER['top 1']}, {PAPER['top 2']})")
    for group, a in result["agreement"].items():
        lines.append(f"{group:22}{a['clips']:>7}{a['top 1']:>8.1f}%{a['top 2']:>8.1f}%{a['single answers']:>16.1f}%")
    if not result["agreement"]:
        lines.append("  the predictions carry no judged_emotion: give make the judged-1.jsonl of scripts/evaluate.py")
    lines += ["", "Krippendorff's alpha: " + ", ".join(f"{k} {number(v, '.3f')}" for k, v in result["alpha"].items())]
    if result["problems"]:
        lines += ["", f"{len(result['problems'])} problems:", *(f"  {line}" for line in result["problems"])]
    return "\n".join(lines)
