"""Predictions -> judge -> EEA, FCR, EPC, WAR, UAR (section 4.2, tables 1 and 4): `scripts/evaluate.py --out DIR ...`

  a model             --model FOLDER_OR_REPO --data dfew:/path --judge openai:gpt-4.1-mini   (torchrun shares the clips)
  another system      --predictions FILE[,FILE] --data dfew:/path --judge ...
                      our JSONL, the released `clip|output` text, the released judged JSON, or the last two together
  table 4             give --judge twice: each judge's figures and their agreement
  masked modality     --without audio (or video): the same clips mute (or black)
  faithfulness        --think cut (or exchange): the answers written again after no explanation (or another clip's),
                      and how many move (arXiv 2307.13702)

Leaves in OUT: predictions.jsonl, judged-*.jsonl, metrics.json, table.txt, think.jsonl, judge-cache.jsonl (a stopped run
asks nothing twice). Hosted judges take their key from OPENAI_API_KEY or GEMINI_API_KEY; ERV_JUDGE_BASE_URL sends
openai: to another server.
"""

from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import erv_min.toy.judges  # noqa: F401  registers them: lexicon, paraphrases
from erv_min.base.errors import SettingsError
from erv_min.base.files import atomic_write, write_json, write_jsonl
from erv_min.base.options import checked, option, parser_for
from erv_min.base.processes import join_processes, part, run_script
from erv_min.data.examples import load_examples, too_many
from erv_min.data.results import read_predictions
from erv_min.judge import judge_rows, make_judge
from erv_min.metrics import COLUMNS, agreement, bootstrap, read_prediction, score, table
from erv_min.rewards import extract_explanation
from erv_min.toy.text import count_sentences
from erv_min.train.answers import answers_after, predict_to_file
from erv_min.train.settings import PredictionSettings
from erv_min.train.start import check_names, clips_there


@dataclass
class EvaluateSettings(PredictionSettings):
    predictions: str = option("", "evaluate these predictions instead of a model's")
    name: str = option("", "the system's name in the table (default: the model's or file's)")
    split: str = option("test", "which split of --data", ("test", "train", "tune"))
    think: str = option("", "write the answers again, greedily, after an explanation that is cut, or exchanged for "
                             "that of the next clip with another answer", ("", "cut", "exchange"))
    rule: str = option("paper", "how answers are read and UAR is averaged (divergences 15, 16, 18)",
                        ("paper", "released"))
    bootstrap: int = option(1000, "resamples of the clips for the 95% intervals; 0: none", least=0)
    judge_cache: str = option("", "file of the judge's answers (default: OUT/judge-cache.jsonl)")
    concurrency: int = option(8, "requests to a hosted judge at once", least=1)
    reply_tokens: int = option(0, "longest reply of a hosted judge in tokens, a reasoning model's thoughts included; "
                                   "0: 16", least=0)


def predictions_of(settings: EvaluateSettings, processes) -> tuple[list[dict], dict]:
    """Rows to judge, and what is told beside the figures: clips that are "missing", "unknown" or "failed"; of a model
    its "towers" and, with --think, its answers_again, "think"."""
    examples = load_examples(settings.data, settings.split)[: settings.limit or None] if settings.data else []
    if settings.predictions:
        rows, lost = read_predictions(settings.predictions, examples)
        too_many(len(lost["missing"]), len(examples), settings.allow_missing, "".join(lost["missing"][:1]),
                 "have no prediction (of the same --split?)")
        return rows, lost | {"failed": []}
    found, out = clips_there(examples, settings, processes), Path(settings.out)
    rows, failed, policy = predict_to_file(found, processes, settings)
    there = {example.path for example in found}
    missing = [example.video_id for example in examples if example.path not in there]
    too_many(len(missing) + len(failed), len(examples), settings.allow_missing, "".join(failed[:1]),
             f"are missing or cannot be decoded ({len(failed)}: {out}/failed_clips.jsonl; --resume goes on)")
    beside = {"missing": missing, "unknown": [], "failed": failed, "towers": policy.model.tower_source}
    if settings.think:
        beside["think"] = answers_again(policy, found, rows, processes, settings)
    return rows, beside


def answers_again(policy, examples: list, rows: list[dict], processes, settings: EvaluateSettings) -> dict[str, dict]:
    """Data set -> {"n", "moved"[, "followed"], "left_out"}: the shares (None of none) of the answers after a changed
    explanation that differ from those after the own one (arXiv 2307.13702), and that are the one whose explanation it
    got; both are written again. An explanation is exchanged for the next one in the order (after the last comes the
    first) with another answer. Left out: clips without explanation or readable answer, or if no other answer is there.
    """
    results, kept, cut = {}, [], settings.think == "cut"
    clips = {(example.dataset, example.video_id): example for example in examples}
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        of_set = [row for row in rows if row["dataset"] == dataset]
        said = [(clips[dataset, row["video_id"]], extract_explanation(row["output"]),
                 read_prediction(row["output"], dataset, settings.rule)[1]) for row in of_set]
        said = [(clip, explanation, answer) for clip, explanation, answer in said if explanation and answer]
        others = [next((x for x in said[i + 1 :] + said[:i] if x[2] != own[2]), None) for i, own in enumerate(said)]
        pairs = [(own, other) for own, other in zip(said, others) if cut or other]
        given = [own[1] for own, _ in pairs] + ["" if cut else other[1] for _, other in pairs]
        outputs = answers_after(policy, 2 * [own[0] for own, _ in pairs], given, processes, settings)
        answers = [read_prediction(output, dataset, settings.rule)[1] for output in outputs]
        before, after = answers[: len(pairs)], answers[len(pairs) :]
        found = {"moved": [a != b for a, b in zip(before, after)]}
        if not cut:
            found["followed"] = [b == other[2] for b, (_, other) in zip(after, pairs)]
        shares = {name: sum(hits) / len(hits) if hits else None for name, hits in found.items()}
        results[dataset] = {"n": len(pairs), **shares, "left_out": len(of_set) - len(pairs)}
        kept += [{"video_id": own[0].video_id, "dataset": dataset, "answer": first, "answer_after_change": second,
                  "explanation_of": None if cut else other[0].video_id}
                 for (own, other), first, second in zip(pairs, before, after)]
    if processes.main:
        write_jsonl(Path(settings.out, "think.jsonl"), kept)
    return results


def judged_by(judges: dict, rows: list[dict]) -> dict[str, list[dict]]:
    """Judge -> rows with its emotions. Without a judge: the emotions that the predictions bring, or none."""
    if not judges:
        return {"as in the file" if any("judged_emotion" in row for row in rows) else "no judge": rows}
    result = {name: [dict(row) for row in rows] for name in judges}
    for name, judge in judges.items():
        judge_rows(result[name], judge)
    return result


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def confusion_text(result: dict) -> str:
    """A row per true label, a column per prediction, and the row's recall in percent."""
    names = [*result["labels"], "unknown"]
    width = max(map(len, names)) + 1
    lines = [" " * width + "".join(f"{name[:7]:>8}" for name in [*names, "recall"])]
    for name, row in zip(names, result["confusion"]):
        lines.append(f"{name:{width}}" + "".join(f"{count:8d}" for count in row)
                     + f"{shown(result['recall'][name], '.2f'):>8}")
    return "\n".join(lines)


def beside_the_figures(result: dict) -> str:
    spans = ["{} {:.1f} to {:.1f}".format(x, *span) for x, span in result.get("intervals", {}).items() if x in COLUMNS]
    parts = ["95% intervals over clips " + ", ".join(spans)] if spans else []
    if result["FCR/WAR"] is not None:
        parts.append(f"right answers with an incoherent explanation (1 - FCR/WAR) {100 - result['FCR/WAR']:.2f}")
    return "; ".join([*parts, f"{result['unparsed']} without a readable answer, {result['judge_outside']} judged "
                              f"outside the list, {result['judge_errors']} judge errors"])


def report(found: dict) -> str:
    """What metrics.json holds, as text."""
    judges, parts = found["judges"], []
    for dataset in next(iter(judges.values())):
        scores = {f"{found['system']}, {judge}" if len(judges) > 1 else found["system"]: result[dataset]
                  for judge, result in judges.items()}
        first = next(iter(scores.values()))
        parts.append(f"{dataset}, {first['n']} clips (percent; judged by {', '.join(judges)})\n{table(scores)}")
        parts += [f"{system}: {beside_the_figures(result)}" for system, result in scores.items()]
        parts.append(confusion_text(first))
        parts += [f"{pair}: the judges agree on {shown(x['accuracy'], '.1%')} of {x['n']} explanations, kappa "
                  f"{shown(x['kappa'], '.3f')} ({x['left_out']} left out)"
                  for pair, x in found["agreement"].get(dataset, {}).items()]
        if "think" in found:
            x = found["think"][dataset]
            after = (f"another clip's explanation ({shown(x['followed'], '.1%')} to its answer)" if "followed" in x else
                     "no explanation")
            parts.append(f"{shown(x['moved'], '.1%')} of {x['n']} answers move after {after}; {x['left_out']} clips "
                         "left out")
    if found["sentences"]:
        parts.append("per explanation {:.2f} sentences, {:.2f} of the grammar in the right person; {:.2f} about "
                     "face or voice, {:.2f} true of the clip".format(*found["sentences"].values()))
    return "\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = parser_for(EvaluateSettings, __doc__)
    parser.add_argument("--judge", action="append", default=[], metavar="JUDGE",
                        help="openai:MODEL, gemini:MODEL, hf:ORG/MODEL, erv:FOLDER, lexicon, paraphrases; repeatable")
    given = vars(parser.parse_args(argv))
    specs = [spec.strip() for value in given.pop("judge") for spec in value.split(",")]
    settings = checked(parser, EvaluateSettings, {"out": "runs/evaluate", **given})
    if bool(settings.model) == bool(settings.predictions) or settings.model and not settings.data:
        raise SettingsError("give either --model with --data (dfew:/path, toy:/world), or --predictions")
    if settings.predictions and (settings.without or settings.think):
        raise SettingsError("--without and --think need --model: given predictions are as they are")
    if not specs and settings.data.startswith("toy:"):
        specs = ["lexicon"]
    processes, out, judges = join_processes(settings.device), Path(settings.out), {}
    check_names(settings)

    def make_judges() -> None:
        cache = settings.judge_cache or out / "judge-cache.jsonl"
        judges.update({spec: make_judge(spec, cache, processes.device, concurrency=settings.concurrency,
                                        reply_tokens=settings.reply_tokens) for spec in specs})

    processes.from_main(make_judges)  # an unknown judge, or a missing key, is told before the predictions begin

    rows, lost = predictions_of(settings, processes)
    part()  # a judge may take hours, in which nobody else waits
    if not processes.main:
        return
    judged = judged_by(judges, rows)
    found = {"system": settings.name or Path((settings.model or settings.predictions).rstrip("/")).name,
             "settings": asdict(settings), "judges": {judge: {} for judge in judged}, "agreement": {}, "sentences": {},
             **lost}
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        of_set = {judge: [row for row in of if row["dataset"] == dataset] for judge, of in judged.items()}
        for judge, some in of_set.items():
            result = found["judges"][judge][dataset] = score(some, dataset, settings.rule)
            if settings.bootstrap:
                result["intervals"] = bootstrap(some, dataset, settings.bootstrap, settings.seed, settings.rule)
        said = {judge: [row.get("judged_emotion") for row in some] for judge, some in of_set.items()}
        for a, b in combinations(said, 2):
            found["agreement"].setdefault(dataset, {})[f"{a} and {b}"] = agreement(said[a], said[b])
    world = Path(settings.data.removeprefix("toy:"))
    if settings.data.startswith("toy:") and (world / "params.jsonl").exists():  # one embedded world
        counts = count_sentences(rows, world)
        found["sentences"] = {name: counts[name] / len(rows) for name in ("sentences", "formed", "cues", "true")}
    for path in out.glob("judged-*.jsonl"):  # of an evaluation before this one, maybe with more judges
        path.unlink()
    for number, judged_rows in enumerate(judged.values(), 1):
        write_jsonl(out / f"judged-{number}.jsonl", judged_rows)
    write_json(out / "metrics.json", found)
    text = report(found)
    atomic_write(out / "table.txt", text)
    print(text, end="")
    for kind in ("missing", "unknown", "failed"):
        if lost[kind]:
            print(f"{len(lost[kind])} clips {kind}, e.g. {lost[kind][0]}")
    print(f"files: {out}/metrics.json, table.txt, judged-*.jsonl")


if __name__ == "__main__":
    run_script(main)
