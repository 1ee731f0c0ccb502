"""One page that shows what runs did: `scripts/tools/report.py RUN [RUN ...] [--out report.html]`

RUN is a folder of scripts/grpo.py (or sft.py, erv.py) or of scripts/evaluate.py, or NAME=FOLDER. Several are overlaid.
The page holds metrics with 95% bootstrap intervals, confusion matrices, curves, held-out clips with each system's
explanation (as figures 8 to 11), completions over the training with their sentences' labels and R_E, settings and
versions. It is one file and asks no network. What a run does not hold is named on it; a damaged file is an error. Its
size is bounded, however long the runs.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import report_parts as parts
from pages import fill, text

from erv_min.base.errors import DataError, SettingsError
from erv_min.base.files import atomic_write, read_json, read_jsonl
from erv_min.base.options import OneLineParser
from erv_min.base.processes import run_script
from erv_min.base.progress import Progress
from erv_min.data.examples import load_examples
from erv_min.data.results import read_predictions
from erv_min.emotions import normalize
from erv_min.metrics import bootstrap, read_prediction, score
from erv_min.rewards import extract_answer

RUNS, STEPS, COMPLETIONS, CLIPS, CLIP_BYTES = 8, 12, 2, 6, 1_000_000  # the last: of a held-out clip with a player
FILES = {"config.json": "no settings and versions", "metrics.jsonl": "no curves",
         "completions.jsonl": "no completions over training",
         "evaluation.json": "no metrics (a toy run writes it at its end; scripts/evaluate.py makes them, too)"}

# ---- what the folders hold -------------------------------------------------------------------------------------------


@dataclass
class Run:
    name: str
    folder: Path
    about: dict = field(default_factory=dict)  # {"settings"[, "versions", "git_commit", "command"]}
    metrics: list[dict] = field(default_factory=list)  # a row per step
    sampled: dict[int, list[dict]] = field(default_factory=dict)  # step -> the group of completions
    systems: list["System"] = field(default_factory=list)
    paths: dict[tuple[str, str, str], Path] = field(default_factory=dict)  # (split, data set, id) -> clip
    missing: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict:
        return self.about.get("settings", {})


@dataclass
class System:
    run: Run
    name: str
    dataset: str
    rows: list[dict]
    score: dict
    intervals: dict


def read_run(argument: str) -> Run:
    """A folder, or NAME=FOLDER. Raises DataError for no such folder, one without a run, and damaged files."""
    name, equals, folder = argument.partition("=")
    if not equals or Path(argument).exists():
        name, folder = Path(argument).resolve().name, argument
    run = Run(name, Path(folder))
    there = {file: run.folder / file for file in (*FILES, "metrics.json") if (run.folder / file).exists()}
    if not there:
        raise DataError(f"{folder}: no run in it: expected {', '.join(FILES)} of scripts/grpo.py, or metrics.json of "
                        "scripts/evaluate.py")
    if "metrics.json" in there:  # of scripts/evaluate.py, with a file for each judge
        path = there["metrics.json"]
        run.about = checked(read_json(path), path, judges=dict, settings=dict)
        judges = run.about["judges"]
        for number, judge in enumerate(judges, 1):
            system = str(run.about.get("system") or run.name) + (f", {judge}" if len(judges) > 1 else "")
            add_systems(run, system, f"judged-{number}.jsonl", run.settings.get("rule", "paper"))
        return run
    if "config.json" in there:
        run.about = checked(read_json(there["config.json"]), there["config.json"], erv_min=dict)["erv_min"]
    if "metrics.jsonl" in there:
        run.metrics = read_rows(there["metrics.jsonl"], step=int)
    if "completions.jsonl" in there:
        run.sampled = read_completions(there["completions.jsonl"])
    if "evaluation.json" in there:
        for system in checked(read_json(there["evaluation.json"]), there["evaluation.json"]):
            add_systems(run, system, f"predictions-{system.replace(' ', '-')}.jsonl")
    run.missing += [f"{name}: {file} is not there: {what}" for file, what in FILES.items() if file not in there]
    return run


def checked(value, where: str | Path, **fields: type | tuple) -> dict:
    """`value`, an object of a JSON file that has these fields of these types. Raises DataError."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {str(value)[:60]}")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise DataError(f"{where}: field {name!r} is {str(value.get(name))[:60]!r}; was it edited?")
    return value


def read_rows(path: Path, **fields: type | tuple) -> list[dict]:
    return [checked(row, f"{path}, row {number}", **fields) for number, row in enumerate(read_jsonl(path, log=True), 1)]


def read_completions(path: Path) -> dict[int, list[dict]]:
    """Step -> the group that was sampled."""
    sampled, number = {}, (int, float)
    for row in read_rows(path, step=int, video_id=str, dataset=str, ground_truth=str, completion=str, sentences=list,
                         labels=list, reward_format=number, reward_answer=number, reward_explanation=number):
        sampled.setdefault(row["step"], []).append(row)
    return sampled


def add_systems(run: Run, name: str, file: str, rule: str = "paper") -> None:
    """The predictions of one system in the run's folder -> a System per data set."""
    path = run.folder / file
    if not path.exists():
        run.missing.append(f"{run.name}: {file} is not there: nothing of {name}")
        return
    rows, _ = read_predictions(str(path), [])
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = [row for row in rows if row["dataset"] == dataset]
        found = score(own, dataset, rule), bootstrap(own, dataset, rule=rule)
        run.systems.append(System(run, name, dataset, own, *found))


def find_clips(run: Run, data: str) -> None:
    spec = data or run.settings.get("data") or f"toy:{run.settings.get('world') or run.folder / 'world'}"
    for split in ("train", "test") if run.sampled or run.systems else ():
        try:
            run.paths |= {(split, clip.dataset, clip.video_id): clip.path for clip in load_examples(spec, split)}
        except DataError as error:
            run.missing.append(f"{run.name}: no frames of its {split} clips; --data says where they are ({error})")


def clip_of(run: Run, split: str, row: dict, max_bytes: int = 0) -> str:
    if not run.paths:
        return ""
    path = run.paths.get((split, row["dataset"], row["video_id"]))
    return parts.clip(path, max_bytes) if path else parts.note(f"clip {row['video_id']} is not in the {split} data")


# ---- sections --------------------------------------------------------------------------------------------------------


def held_out_section(systems: list[System]) -> str:
    """Clips that every system answered, of the first one's data set."""
    run, dataset, out = systems[0].run, systems[0].dataset, ""
    tables = {system.name: {(row["video_id"], row["ground_truth"]): row for row in system.rows}
              for system in systems if system.dataset == dataset}
    shared = sorted(set.intersection(*map(set, tables.values())))
    shown = parts.spread(shared, CLIPS)
    for video_id, e_gt in shown:
        columns = []
        for name, table in tables.items():
            row, facts = table[video_id, e_gt], []
            if "judged_emotion" in row:
                judged = str(row["judged_emotion"] or "none")
                facts.append(("Explanation", judged, normalize(judged, dataset) == e_gt))
            predicted = read_prediction(row["output"], dataset)[0]
            facts.append(("Answer", predicted or "none", predicted == e_gt))
            columns.append(parts.completion(name, row["output"], e_gt, [], [], facts))
        media = clip_of(run, "test", row, CLIP_BYTES)
        out += parts.case({"Clip": video_id, "truth": e_gt}, media, columns)
    return (f'<p class="note">{len(shown)} of the {len(shared)} held-out clips of {text(dataset)}, evenly spaced, not '
            f"selected by content. “Explanation” is the emotion that the judge reads in it.</p>{out}")


def training_section(runs: list[Run]) -> str:
    out = ('<p class="note">The first completions of the group that was sampled at a step, not selected by content. A '
           "sentence stands with its verifier's labels; ✓ marks the ones that count for the true emotion in "
           "R<sub>E</sub>.</p>")
    for number, run in enumerate(runs):
        rewarded = run.settings.get("w_explanation", 1)  # without R_E (Baseline) no verifier was asked
        for step in parts.spread(sorted(run.sampled), STEPS):
            group, columns = run.sampled[step], []
            for at, row in enumerate(group[:COMPLETIONS], 1):
                facts = [("R_E", f"{row['reward_explanation']:.2f}" if rewarded else "not rewarded", None),
                         ("Answer", extract_answer(row["completion"]) or "none", row["reward_answer"] > 0),
                         ("Format", "kept" if row["reward_format"] else "broken", row["reward_format"] > 0)]
                columns.append(parts.completion(f"{run.name}, {at} of {len(group)} sampled", row["completion"],
                                                row["ground_truth"], row["sentences"], row["labels"], facts, number))
            about = {"Step": step + 1, "clip": group[0]["video_id"], "truth": group[0]["ground_truth"]}
            out += parts.case(about, clip_of(run, "train", group[0]), columns)
    return out


def build(runs: list[Run]) -> str:
    systems = []
    for system in (system for run in runs for system in run.systems):
        if all(system.rows != other.rows for other in systems):  # the SFT that two runs share stands once
            name = system.name if len(runs) == 1 else f"{system.run.name}: {system.name}"
            systems.append(replace(system, name=name))
    sections = {  # (id, heading) -> HTML
        ("results", "Held-out results"): systems and parts.score_table(systems) + parts.matrices(systems),
        ("curves", "Training"): any(run.metrics for run in runs) and parts.curves(runs),
        ("clips", "What each system says"): systems and held_out_section(systems),
        ("completions", "Completions over the training"): any(run.sampled for run in runs) and training_section(runs),
        ("settings", "Settings and versions"): any(run.about for run in runs) and parts.settings_table(runs)}
    sections = {head: content for head, content in sections.items() if content}
    names, about = ", ".join(run.name for run in runs), [text(f"{run.name}: {run.folder}") for run in runs]
    missing = "".join(f"<li>{text(line)}</li>" for run in runs for line in run.missing)
    return fill("report.html", title=text(names), heading=text(names), subtitle=" · ".join(about),
                css=fill("page.css") + fill("report.css"),
                nav="".join(f'<a href="#{name}">{heading}</a>' for name, heading in sections),
                sections="\n".join(f'<section id="{name}"><h2>{heading}</h2>{content}</section>'
                                   for (name, heading), content in sections.items()),
                missing=f'<div class="missing"><b>Not on this page</b><ul>{missing}</ul></div>' if missing else "")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or of an evaluation, or NAME=FOLDER")
    parser.add_argument("--out", default="report.html", help="the page")
    parser.add_argument("--data", default="", help="where the clips are, 'dfew:/path' (default: as in the run)")
    args = parser.parse_args(argv)
    if len(args.runs) > RUNS:
        raise SettingsError(f"{len(args.runs)} runs: a page holds at most {RUNS}")
    with Progress("the runs are read"):
        runs = [read_run(argument) for argument in args.runs]
        for run in runs:
            if sum(other.name == run.name for other in runs) > 1:
                run.name = f"{run.folder.resolve().parent.name}/{run.name}"
            find_clips(run, args.data)
        page = build(runs)
    atomic_write(args.out, page)
    print(f"{args.out}: {len(page.encode()) / 1e6:.1f} MB, {len(runs)} runs")
    for line in (line for run in runs for line in run.missing):
        print(f"  not on the page: {line}")


if __name__ == "__main__":
    run_script(main)
