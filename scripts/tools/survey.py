"""The human study of section 5.3 and appendix A: `survey.py make` writes its page, `survey.py score` reads the answers.

  make    two systems' predictions of the same clips -> DIR/survey.html (send DIR to the raters) and, outside of DIR,
          DIR-key.json, which unblinds it and stays with you
  score   the raters' exported files -> tables 3 and 6: win rate, scores; agreement with the judge

A clip takes three questions (figures 4 and 5): which emotion one explanation represents, read without the clip; then,
with the clip, how well each of the two explanations reflects the emotion, 1 to 5. Clips are drawn as in section 5.3
among those that both systems answered right (A.2: and whose explanations the judge read so); which they are, their
order, the sides, and whose explanation the first question shows (each system's in half of the clips) come from --seed.

What the paper leaves open: a clip's score is the mean over its raters; a system wins a clip with the higher score, a
tie is half a win for each; table 6's deviation is the sample deviation of the clips' scores. Top 1: the judge's emotion
is the one that most raters chose in question 1; top 2: it is among the two chosen most; of emotions chosen equally
often at the cut each counts with its share. What can be read of a partial file is used; `problems` names the rest.
"""

import hashlib
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

from pages import PLAYABLE, data_uri, fill, text

from erv_min.base.errors import DataError, SettingsError
from erv_min.base.files import atomic_write, read_json, write_json
from erv_min.base.options import OneLineParser, positive
from erv_min.base.processes import run_script
from erv_min.data.examples import load_examples
from erv_min.data.results import read_predictions
from erv_min.emotions import labels, normalize
from erv_min.metrics import read_prediction
from erv_min.rewards import extract_explanation

# ---- make ------------------------------------------------------------------------------------------------------------


def eligible(first: list[dict], second: list[dict], any_answer: bool) -> list[tuple[dict, dict]]:
    """Pairs of rows of one clip that may be shown: explanations in both, and, unless any_answer, both answers right and
    (if they were judged) both explanations judged so."""
    other, pairs = {(row["dataset"], row["video_id"]): row for row in second}, []
    for a in first:
        b = other.get((a["dataset"], a["video_id"]))
        if b is None:
            continue
        if a["ground_truth"] != b["ground_truth"]:
            raise DataError(f"clip {a['video_id']} of {a['dataset']}: the two files disagree about its label")
        said = []
        for row in (a, b):
            said += [read_prediction(row["output"], row["dataset"])[0],
                     normalize(row.get("judged_emotion", row["ground_truth"]) or "", row["dataset"])]
        right = set(said) == {normalize(a["ground_truth"], a["dataset"])}
        if all(extract_explanation(row["output"]) for row in (a, b)) and (any_answer or right):
            pairs.append((a, b))
    return pairs


def draw(pairs: list[tuple[dict, dict]], count: int, seed: int, names: list[str]) -> tuple[list[dict], dict]:
    """(items for the page, what the key says of each)"""
    rng = random.Random(seed)
    chosen = rng.sample(pairs, count)
    half = [i % 2 for i in range(count)]  # 0: the first system
    left, asked = rng.sample(half, count), rng.sample(half, count)
    items, key = [], {}
    for number, (pair, l, q) in enumerate(zip(chosen, left, asked), 1):
        a = pair[0]
        explanations = [extract_explanation(row["output"]) for row in pair]
        name = f"q{number:02d}"
        items.append({"id": name, "emotion_text": explanations[q], "left": explanations[l],
                      "right": explanations[1 - l], "choices": list(labels(a["dataset"]))})
        key[name] = {"video_id": a["video_id"], "dataset": a["dataset"], "ground_truth": a["ground_truth"],
                     "left": names[l], "right": names[1 - l], "emotion_of": names[q],
                     "judged": {n: row.get("judged_emotion") for n, row in zip(names, pair)}}
    return items, key


def make(args) -> None:
    out, key_file = Path(args.out), Path(f"{args.out.rstrip('/')}-key.json")
    if key_file.exists() or (out / "survey.html").exists():
        raise SettingsError(f"{out}: a survey is there already; answers belong to its key. Take another --out")
    names = [name.strip() for name in args.names.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise SettingsError(f"--names {args.names!r}: expected two different names joined by a comma")
    examples = load_examples(args.data, args.split)
    (first, _), (second, _) = (read_predictions(file, examples) for file in (args.first, args.second))
    pairs = eligible(first, second, args.any_answer)
    if len(pairs) < args.clips:
        right = "" if args.any_answer else " with the right answer and emotion (--any-answer lifts this)"
        raise SettingsError(f"--clips {args.clips}: {len(pairs)} clips have an explanation of both systems{right}")
    items, key = draw(pairs, args.clips, args.seed, names)
    paths = {(example.dataset, example.video_id): example.path for example in examples}
    files = [paths[entry["dataset"], entry["video_id"]] for entry in key.values()]
    if unplayable := [path for path in files if path.suffix.lower() not in PLAYABLE]:
        raise DataError(f"{unplayable[0]}: browsers do not play it; first: ffmpeg -i IN -c:v libx264 OUT.mp4")
    embed = sum(path.stat().st_size for path in files) <= args.embed_mb * 1e6
    for item, path in zip(items, files):
        item["clip"] = (data_uri(PLAYABLE[path.suffix.lower()], path.read_bytes()) if embed else
                        f"clips/{item['id']}{path.suffix.lower()}")
    survey = hashlib.sha256(json.dumps([items, key, args.seed], sort_keys=True).encode()).hexdigest()[:12]
    data = json.dumps({"survey": survey, "items": items}).replace("<", "\\u003c")  # no text closes the script
    page = fill("survey.html", css=fill("page.css") + fill("survey.css"), script=fill("survey.js"),
                title=text(args.title), data=data)
    if not embed:
        (out / "clips").mkdir(parents=True, exist_ok=True)
        for item, path in zip(items, files):
            shutil.copyfile(path, out / item["clip"])
    write_json(key_file, {"survey": survey, "seed": args.seed, "systems": names, "files": [args.first, args.second],
                          "choices": {item["id"]: item["choices"] for item in items}, "items": key})
    atomic_write(out / "survey.html", page)
    print(f"{out}/survey.html: survey {survey}, {len(items)} of {len(pairs)} clips, {3 * len(items)} questions, "
          + (f"clips inside, {len(page) / 1e6:.1f} MB" if embed else "clips beside it: send the whole folder")
          + f"\n{key_file}: which system is which; keep it from the raters")


# ---- score -----------------------------------------------------------------------------------------------------------

SCORES = (1, 2, 3, 4, 5)  # figure 5


def read_raters(key: dict, files: list[str]) -> tuple[dict[str, dict], list[str]]:
    """rater -> {(item, question): value}, and the problems found. Questions: emotion, left, right."""
    raters, problems = {}, []
    for file in files:
        where = Path(file).name
        try:
            content = read_json(file, dict)
            if not isinstance(content.get("answers"), dict):
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
    """Whether `emotion` is among the `top` most chosen: the chance of it if ties at the cut are broken at random."""
    counts = Counter(votes)
    if emotion not in counts:
        return 0.0
    above = sum(count > counts[emotion] for count in counts.values())
    level = sum(count == counts[emotion] for count in counts.values())
    return min(1.0, max(0, top - above) / level)


def score(key_file: str, files: list[str]) -> dict:
    """All figures of a study, with "problems". Raises DataError."""
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
    result["agreement"] = {}  # whose explanations question 1 showed -> do raters and judge read the same, % of clips
    for group in (*systems, "both"):
        pairs = []  # (votes, the judge's emotion)
        for item, entry in items.items():
            judged = entry["judged"].get(entry["emotion_of"])
            if votes[item] and judged and group in ("both", entry["emotion_of"]):
                pairs.append((votes[item], normalize(judged, entry["dataset"]) or judged))
        if pairs:
            top1, top2 = (100 * mean(top_share(v, judged, top) for v, judged in pairs) for top in (1, 2))
            result["agreement"][group] = {"clips": len(pairs), "top 1": top1, "top 2": top2}
    return result


def report(result: dict) -> str:
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


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("make", help="write the survey page and its key").add_argument
    add("--first", required=True, help="predictions of the first system (of table 3's first column)")
    add("--second", required=True, help="predictions of the second")
    add("--names", default="Ours,Baseline", help="their names in the tables; the page does not show them")
    add("--data", required=True, help="the clips, 'mafw:/path', 'toy:/world'")
    add("--split", default="test", choices=("test", "train"), help="split of --data")
    add("--out", required=True, help="folder of the page")
    add("--clips", type=positive, default=28, help="clips to ask about (the paper: 28 comparisons)")
    add("--any-answer", action="store_true", help="also clips with a wrong answer or emotion")
    add("--seed", type=int, default=0, help="seed of choice, order and sides")
    add("--title", default="How well do these explanations fit the video?", help="heading of the page")
    add("--embed-mb", type=float, default=32, help="clips inside the page up to so much; 0: always beside it")
    add = commands.add_parser("score", help="read the raters' files").add_argument
    add("answers", nargs="+", help="JSON files that raters exported")
    add("--key", required=True, help="the key that make wrote")
    add("--out", default="", help="also write all figures as JSON")
    args = parser.parse_args(argv)
    if args.command == "make":
        return make(args)
    result = score(args.key, args.answers)
    print(report(result))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    run_script(main)
