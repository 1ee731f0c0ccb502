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

SCORES = (1, 2, 3, 4, 5)  # figure 5


def read_raters(key: dict, files: list[str]) -> tuple[dict[str, dict], list[str]]:
    """rater -> {(item, question): value}, and the problems found. Questions: emotion, left, right."""
    raters, problems = {}, []
    for file in files:
        where = Path(file).name
        try:
            content = read_json(file)
            if not isinstance(content, dict) or not isinstance(content.get("answers"), dict):
                raise DataError(f"{where}: not an export of the survey page")
            if content.get("survey") != key["survey"]:
                raise DataError(f"{where}: answers survey {content.get('survey')!r}, the key is of {key['survey']!r}")
            rater = str(content.get("rater") or where)
            if rater in raters:
                raise DataError(f"{where}: rater {rater!r} has answered in another file already")
        except DataError as error:
            problems.append(f"{error}: the file is left out")
            continue
        raters[rater] = {}
        problems += [f"{rater}, question {item!r}: not in this survey: left out" for item in content["answers"]
                     if item not in key["items"]]
        for item in key["items"]:
            given = content["answers"].get(item)
            for question, choices in (("emotion", key["choices"][item]), ("left", SCORES), ("right", SCORES)):
                value = given.get(question) if isinstance(given, dict) else None
                if value in choices:
                    raters[rater][item, question] = value
                else:
                    problems.append(f"{rater}, {item} {question}: " + (
                        "not answered" if value is None else f"{value!r} is not among the choices: left out"))
    return raters, problems


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
    key = read_json(key_file)
    try:
        return _score(key, *read_raters(key, files))
    except (AttributeError, KeyError, TypeError, ValueError):  # every value of the raters' files is checked
        raise DataError(f"{key_file}: not the key that survey.py make wrote, or edited since") from None


def _score(key: dict, raters: dict[str, dict], problems: list[str]) -> dict:
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
    for name, scores, others in zip(systems, (first, second), (second, first)):
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
    first, second = (result[name] for name in systems)
    spreads = [f"{s['mean']:.2f} ± " + ("-" if s["sd"] is None else f"{s['sd']:.2f}") for s in (first, second)]
    agreed = [[group, f"{a['top 1']:.1f}%", f"{a['top 2']:.1f}%", f"{a['clips']} clips", ""]
              for group, a in result["agreement"].items()]
    rows = [
        ["Table 3", *systems, "paper: Ours", "R1-Omni"],
        ["Win rate", f"{first['win rate']:.1f}%", f"{second['win rate']:.1f}%", "53.6%", "46.4%"],
        ["Assessment score", f"{first['mean']:.2f}", f"{second['mean']:.2f}", "3.52", "3.42"],
        ["Table 6: over clips", *spreads, "3.52 ± 0.41", "3.42 ± 0.34"],
        ["Judge and raters", "top 1", "top 2", "", ""], *agreed, ["paper, Ours", "92.9%", "96.4%", "", ""]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"survey {result['survey']}: {result['clips']} clips, {len(result['raters'])} raters, "
             f"{result['answers']} of {result['expected']} answers; {result['ties']} clips tied: half a win for each",
             *("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)]
    if not agreed:
        lines.append("the predictions carry no judged_emotion: give make the judged-1.jsonl of scripts/evaluate.py")
    if result["problems"]:
        lines += [f"{len(result['problems'])} problems:", *(f"  {line}" for line in result["problems"])]
    return "\n".join(lines)
