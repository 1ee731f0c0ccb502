"""Raters' answers -> tables 3 and 6, and agreement with the judge (appendix A.1).

What the paper leaves open, and what is done here: a clip's score is the mean over its raters; a system wins a clip with
the higher score, a tie is half a win for each; table 6's deviation is the sample deviation of the clips' scores. Top 1:
the judge's emotion is the one that most raters chose in question 1; top 2: it is among the two chosen most; of emotions
chosen equally often at the cut each counts with its share. Nothing is dropped in silence: `problems` names rater and
question, and what can be read of a partial file is used.
"""

from collections import Counter
from pathlib import Path
from statistics import mean, stdev

from erv_min.base.errors import DataError
from erv_min.base.files import read_json
from erv_min.emotions import normalize

PAPER = {"win rate": (53.6, 46.4), "mean": (3.52, 3.42), "sd": (0.41, 0.34), "top 1": 92.9, "top 2": 96.4}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_key(path: str) -> dict:
    key = read_json(path)
    try:
        first, second = key["systems"]
        whole = bool(key["survey"])
        for item, entry in key["items"].items():
            emotions = [*key["choices"][item], *(entry["judged"][name] or "" for name in (first, second))]
            whole &= {entry["left"], entry["right"]} == {first, second} and entry["emotion_of"] in (first, second)
            whole &= all(isinstance(x, str) for x in (entry["video_id"], entry["dataset"], *emotions))
    except (TypeError, KeyError, ValueError, AttributeError):
        whole = False
    if not whole:
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


def score(key_file: str, files: list[str]) -> dict:
    """All figures of a study as a dictionary, with "problems". Raises DataError where no answer is left."""
    key = read_key(key_file)
    raters, problems = read_raters(key, files)
    systems, items = key["systems"], key["items"]
    ratings = {name: {item: [] for item in items} for name in systems}
    votes = {item: [] for item in items}
    for answers in raters.values():
        for (item, question), value in answers.items():
            if question == "emotion":
                votes[item].append(value)
            else:
                ratings[items[item][question]][item].append(value)
    both = [item for item in items if all(ratings[name][item] for name in systems)]
    if not both:
        raise DataError("no clip has a score for both systems: " + ("; ".join(problems[:3]) or "no answers were given"))

    first, second = ([mean(ratings[name][item]) for item in both] for name in systems)
    ties = sum(a == b for a, b in zip(first, second))
    result = {"survey": key["survey"], "systems": systems, "raters": sorted(raters), "clips": len(items), "ties": ties,
              "answers": sum(map(len, raters.values())), "expected": 3 * len(items) * len(raters), "problems": problems}
    for name, scores, others in ((systems[0], first, second), (systems[1], second, first)):
        wins = sum(a > b for a, b in zip(scores, others)) + ties / 2
        result[name] = {"win rate": 100 * wins / len(both), "mean": mean(scores),
                        "sd": stdev(scores) if len(both) > 1 else None}
    result["agreement"] = agreement(systems, items, votes)
    return result


def agreement(systems: list[str], items: dict, votes: dict[str, list[str]]) -> dict[str, dict]:
    """Whose explanations question 1 showed -> how often raters and judge read the same emotion, percent of clips."""
    result = {}
    for group in (*systems, "both"):
        pairs = []  # (votes, the judge's emotion)
        for item, entry in items.items():
            judged = entry["judged"].get(entry["emotion_of"])
            if votes[item] and judged and group in ("both", entry["emotion_of"]):
                pairs.append((votes[item], normalize(judged, entry["dataset"]) or judged))
        if pairs:
            top1, top2 = (100 * mean(top_share(v, judged, top) for v, judged in pairs) for top in (1, 2))
            result[group] = {"clips": len(pairs), "top 1": top1, "top 2": top2}
    return result


def report(result: dict) -> str:
    """Tables 3 and 6 as text, beside the paper's figures, then the agreement and every problem."""
    systems = result["systems"]
    width = max(18, *map(len, systems))
    scores = [result[name] for name in systems]
    lines = [f"survey {result['survey']}: {result['clips']} clips, {len(result['raters'])} raters, "
             f"{result['answers']} of {result['expected']} answers", "",
             f"{'Table 3':22}{systems[0]:>{width}}{systems[1]:>{width}}{'paper: Ours':>16}{'R1-Omni':>10}",
             f"{'Win rate':22}" + "".join(f"{s['win rate']:>{width - 1}.1f}%" for s in scores)
             + f"{PAPER['win rate'][0]:>15}%{PAPER['win rate'][1]:>9}%",
             f"{'Assessment score':22}" + "".join(f"{s['mean']:>{width}.2f}" for s in scores)
             + f"{PAPER['mean'][0]:>16}{PAPER['mean'][1]:>10}",
             f"{result['ties']} clips tied: half a win for each", "",
             f"{'Table 6':22}{'mean and deviation over clips':>30}{'paper':>16}"]
    for name, s, paper_mean, paper_sd in zip(systems, scores, PAPER["mean"], PAPER["sd"]):
        spread = f"{s['mean']:.2f} ± " + ("-" if s["sd"] is None else f"{s['sd']:.2f}")
        lines.append(f"{name:22}{spread:>30}{f'{paper_mean} ± {paper_sd}':>16}")
    lines += ["", f"{'Judge and raters':22}{'clips':>7}{'top 1':>9}{'top 2':>9}   (paper, Ours: {PAPER['top 1']}, "
                  f"{PAPER['top 2']})"]
    for group, a in result["agreement"].items():
        lines.append(f"{group:22}{a['clips']:>7}{a['top 1']:>8.1f}%{a['top 2']:>8.1f}%")
    if not result["agreement"]:
        lines.append("  the predictions carry no judged_emotion: give make the judged-1.jsonl of scripts/evaluate.py")
    if result["problems"]:
        lines += ["", f"{len(result['problems'])} problems:", *(f"  {line}" for line in result["problems"])]
    return "\n".join(lines)
