"""One page that shows what runs did: `scripts/tools/report.py RUN [RUN ...] [--out report.html]`

RUN is a folder of scripts/grpo.py (or sft.py, erv.py) or of scripts/evaluate.py, or NAME=FOLDER. Several are overlaid.
The page holds the metrics with 95% bootstrap intervals, confusion matrices, the curves, held-out
clips with each system's explanation (as figures 8 to 11), completions over the training with the
labels of their sentences and R_E, settings and versions. The page is one file, asks no network,
and goes dark with the reader's system. What a run does not hold is named on it; a damaged file is an error.

Its size is bounded, however long the runs: 8 runs; 12 steps and 2 completions of each; 6 held-out clips; 4 frames per
clip; a clip of up to 1 MB has a player, until 16 MB of the page are used; 400 points per curve.
"""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path

import report_parts as parts
from pages import ClipMedia, clip_media, fill, read_objects, text

from erv_min.base.errors import DataError, SettingsError
from erv_min.base.files import atomic_write, read_json
from erv_min.base.processes import run_script
from erv_min.data.examples import load_examples
from erv_min.emotions import ERV_LABELS, normalize
from erv_min.metrics import bootstrap, read_prediction, score
from erv_min.rewards import extract_answer

RUNS, STEPS, COMPLETIONS, CLIPS = 8, 12, 2, 6
CLIP_BYTES, MEDIA_BYTES = 1_000_000, 16_000_000  # of a clip that gets a player; of all players together
RESAMPLES = 1000  # of the bootstrap
NUMBER = (int, float)
FILES = {"config.json": "no settings and versions", "metrics.jsonl": "no curves",
         "completions.jsonl": "no completions over training", "evaluation.json": "no metric table and no confusion "
         "matrix (has the run ended, without --eval-clips -1? scripts/evaluate.py makes them, too)"}


# ---- what the folders hold -------------------------------------------------------------------------------------------


@dataclass
class System:
    """One system's predictions on one data set, and their scores."""

    name: str
    dataset: str
    rows: list[dict]
    score: dict
    intervals: dict


@dataclass
class Run:
    """What one folder holds."""

    name: str
    folder: Path
    config: dict = field(default_factory=dict)  # {"settings", "versions", "git_commit", "command"}
    metrics: list[dict] = field(default_factory=list)  # a row per step
    sampled: dict[int, list[dict]] = field(default_factory=dict)  # step -> the group of completions
    systems: list[System] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict:
        return self.config.get("settings") or {}


def read_run(argument: str) -> Run:
    """A folder, or NAME=FOLDER. Raises DataError for no such folder, one without a run, and damaged files."""
    name, equals, folder = argument.partition("=")
    if not equals or Path(argument).exists():
        name, folder = Path(argument).resolve().name, argument
    run = Run(name, Path(folder))
    there = [file for file in (*FILES, "metrics.json") if (run.folder / file).exists()]
    if not there:
        raise DataError(f"{folder}: no run in it: expected {', '.join(FILES)} of scripts/grpo.py, or metrics.json of "
                        "scripts/evaluate.py")
    if "config.json" in there:
        config = read_dict(run.folder / "config.json")
        run.config = config.get("erv_min", {})
        if not isinstance(run.config, dict) or not isinstance(run.settings, dict):
            raise DataError(f"{run.folder / 'config.json'}: expected an object with erv_min.settings; was it edited?")
    if "metrics.json" in there:
        read_evaluation(run)
        return run
    if "metrics.jsonl" in there:
        run.metrics = read_metrics(run.folder / "metrics.jsonl")
    if "completions.jsonl" in there:
        run.sampled = read_completions(run.folder / "completions.jsonl")
    if "evaluation.json" in there:
        for system in read_dict(run.folder / "evaluation.json"):
            add_systems(run, system, f"predictions-{system.replace(' ', '-')}.jsonl")
    run.missing += [f"{name}: {file} is not there: {what}" for file, what in FILES.items() if file not in there]
    return run


def read_dict(path: Path) -> dict:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected an object, found {str(value)[:60]}")
    return value


def read_metrics(path: Path) -> list[dict]:
    """A row per step, each value a number or None; of a step that a resumed run did again the later row."""
    rows = {row["step"]: row for row in read_objects(path, {"step": int})}
    for step, row in rows.items():
        for key, value in row.items():
            if value is not None and not isinstance(value, NUMBER):
                raise DataError(f"{path}, step {step}: {key} is {str(value)[:60]!r}, no number")
    return [rows[step] for step in sorted(rows)]


def read_completions(path: Path) -> dict[int, list[dict]]:
    """Step -> the group that was sampled; of a step that a resumed run did again the later group."""
    sampled, last = {}, None
    for row in read_objects(path, {
            "step": int, "video_id": str, "ground_truth": str, "completion": str, "sentences": list, "labels": list,
            "reward_format": NUMBER, "reward_answer": NUMBER, "reward_explanation": NUMBER}):
        if row["step"] != last:
            last = row["step"]
            sampled[last] = []
        if len(row["sentences"]) != len(row["labels"]) or not all(isinstance(x, list) for x in row["labels"]):
            raise DataError(f"{path}, step {last}: {len(row['sentences'])} sentences and {str(row['labels'])[:60]} as "
                            "their labels; expected a list for each")
        sampled[last].append(row)
    return sampled


def add_systems(run: Run, name: str, file: str, rule: str = "paper") -> None:
    """The predictions of one system in the run's folder -> a System per data set."""
    path = run.folder / file
    if not path.exists():
        run.missing.append(f"{run.name}: {file} is not there: nothing of {name}")
        return
    of_set = {}  # data set -> video_id -> row
    for row in read_objects(path, {"video_id": str, "output": str, "ground_truth": str, "dataset": str}):
        rows = of_set.setdefault(row["dataset"], {})
        if row["video_id"] in rows:
            raise DataError(f"{path}: clip {row['video_id']} of {row['dataset']} is there twice")
        rows[row["video_id"]] = row
    for dataset, rows in of_set.items():
        own = list(rows.values())
        run.systems.append(System(name, dataset, own, score(own, dataset, rule),
                                  bootstrap(own, dataset, RESAMPLES, rule=rule)))


def read_evaluation(run: Run) -> None:
    """metrics.json and judged-*.jsonl of scripts/evaluate.py -> systems, one per judge and data set."""
    path = run.folder / "metrics.json"
    found = read_dict(path)
    if not isinstance(found.get("judges"), dict) or not isinstance(found.get("settings", {}), dict):
        raise DataError(f"{path}: expected the metrics.json of scripts/evaluate.py, with 'judges'")
    run.config = run.config or {"settings": found.get("settings", {})}
    for number, judge in enumerate(found["judges"], 1):
        name = f"{found.get('system') or run.name}" + (f", {judge}" if len(found["judges"]) > 1 else "")
        add_systems(run, name, f"judged-{number}.jsonl", run.settings.get("rule", "paper"))


def all_systems(runs: list[Run]) -> list[System]:
    """Every run's systems, under names of their own; the same predictions of two runs (their common SFT) stand once."""
    kept = []
    for run in runs:
        for system in run.systems:
            if all(system.rows != other.rows for other in kept):
                name = system.name if len(runs) == 1 else f"{run.name}: {system.name}"
                kept.append(replace(system, name=name))
    return kept


# ---- clips and labels ------------------------------------------------------------------------------------------------


class Clips:
    """Paths of the runs' clips by split and id, and what the page embeds of them, until the room is used up."""

    def __init__(self, runs: list[Run], data: str = ""):
        self.paths, self.made, self.missing, self.room = {}, {}, [], MEDIA_BYTES
        runs = [run for run in runs if run.sampled or run.systems]
        for run in runs:
            worlds = [Path(run.settings.get("world") or run.folder / "world"), run.folder.parent / "world"]
            world = next((w for w in worlds if (w / "world.json").exists()), None)
            spec = data or run.settings.get("data") or (f"toy:{world}" if world else "")
            for split in ("train", "test"):
                try:
                    found = load_examples(spec, split) if spec else []
                except DataError as error:
                    self.missing.append(f"{run.name}: no {split} clips ({error})")
                    continue
                for example in found:
                    self.paths.setdefault((split, example.video_id), example.path)
        if runs and not self.paths:
            self.missing.append("No clips were found: no frames and players. --data dfew:/path says where they are")

    def media(self, split: str, video_id: str) -> ClipMedia | None:
        path = self.paths.get((split, video_id))
        if path is None:
            return ClipMedia(note=f"clip {video_id} is not in the data") if self.paths else None
        if path not in self.made:
            self.made[path] = clip_media(path, max_bytes=CLIP_BYTES)
        made = self.made[path]
        if len(made.player) > self.room:
            return replace(made, player="", note="frames only: the page holds no more clips")
        self.room -= len(made.player)
        return made


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


# ---- sections --------------------------------------------------------------------------------------------------------


def results_section(systems: list[System]) -> str:
    out = parts.score_table(systems)
    out += ('<p class="note">Under each figure its 95% interval (percentile bootstrap over clips). EEA: the judge '
            "reads the true emotion in the explanation; FCR: explanation, answer and truth agree; EPC: explanation and "
            "answer agree; WAR: accuracy; UAR: mean recall; FCR/WAR: coherence among the right answers.</p>")
    matrices = "".join(parts.confusion(system) for system in systems)
    return (f'{out}<h3>Confusion matrices</h3><div class="matrices">{matrices}</div><p class="note">A row per true '
            "label, a column per answer; the shade is the share of the row.</p>")


def held_out_section(systems: list[System], clips: Clips, chosen: list[str]) -> str:
    systems = [system for system in systems if system.dataset == systems[0].dataset]
    tables = [{row["video_id"]: row for row in system.rows} for system in systems]
    shared = [i for i in tables[0] if all(i in table for table in tables)]
    if absent := [i for i in chosen if i not in shared]:
        raise SettingsError(f"--show {absent[0]}: not among the {len(shared)} clips that every system answered")
    shown, out = chosen or spread(shared, CLIPS), ""
    for video_id in shown:
        columns = []
        for system, table in zip(systems, tables):
            row = table[video_id]
            e_gt, dataset = row["ground_truth"], row["dataset"]
            facts = []
            if "judged_emotion" in row:
                judged = str(row["judged_emotion"] or "none")
                facts.append(("Explanation", judged, normalize(judged, dataset) == e_gt))
            predicted = read_prediction(row["output"], dataset)[0]
            facts.append(("Answer", predicted or "none", predicted == e_gt))
            columns.append(parts.completion(system.name, row["output"], e_gt, [], [], facts))
        out += parts.case(f"<span>Clip <b>{text(video_id)}</b></span><span>truth <b>{text(e_gt)}</b></span>",
                          clips.media("test", video_id), columns)
    how = "as asked for (--show)" if chosen else (f"{len(shown)} of {len(shared)}, evenly spaced in the file, not "
                                                  "selected by content")
    return (f'<p class="note">Held-out clips of {text(systems[0].dataset)}, {how}. “Explanation” is the '
            f"emotion that the judge reads in it.</p>{out}")


def sampled_completion(run: Run, number: int, row: dict, title: str) -> str:
    """One row of completions.jsonl. A run without R_E (Baseline) asked no verifier: it has no labels."""
    rewarded = bool(run.settings.get("w_explanation", 1))
    facts = [("R_E", f"{row['reward_explanation']:.2f}" if rewarded else "not rewarded", None),
             ("Answer", extract_answer(row["completion"]) or "none", row["reward_answer"] > 0),
             ("Format", "kept" if row["reward_format"] else "broken", row["reward_format"] > 0)]
    return parts.completion(title, row["completion"], row["ground_truth"], row["sentences"], row["labels"], facts,
                            number)


def training_section(runs: list[Run], clips: Clips) -> str:
    out = ('<p class="note">The first completions of the group that was sampled at a step, not selected by content. A '
           "sentence stands with its verifier's labels; ✓ marks the ones that count for the true emotion in "
           "R<sub>E</sub>.</p>")
    for number, run in enumerate(runs):
        for step in spread(sorted(run.sampled), STEPS):
            group = run.sampled[step]
            columns = []
            for at, row in enumerate(group[:COMPLETIONS], 1):
                title = f"{run.name}, {at} of {len(group)} sampled"
                columns.append(sampled_completion(run, number, row, title))
            heading = (f"<span>Step <b>{step + 1}</b></span><span>clip <b>{text(group[0]['video_id'])}</b></span>"
                       f"<span>truth <b>{text(group[0]['ground_truth'])}</b></span>")
            out += parts.case(heading, clips.media("train", group[0]["video_id"]), columns)
    return out


def build(runs: list[Run], clips: Clips, chosen: list[str] = ()) -> str:
    """The page as text."""
    systems, missing = all_systems(runs), [line for run in runs for line in run.missing] + clips.missing
    rows = [row for run in runs for group in run.sampled.values() for row in group]
    sections = {}
    if systems:
        sections["results", "Held-out results"] = results_section(systems)
    if any(run.metrics for run in runs):
        sections["curves", "Training"] = parts.curves(runs)
    if systems:
        sections["clips", "What each system says"] = held_out_section(systems, clips, chosen)
    if rows:
        sections["completions", "Completions over the training"] = training_section(runs, clips)
    if any(run.config for run in runs):
        sections["settings", "Settings and versions"] = parts.settings_table(runs)
    about = []
    for run in runs:
        steps = f"{run.metrics[-1]['step'] + 1} steps, " if run.metrics else ""
        preset = f"preset {run.settings['preset']}, " if run.settings.get("preset") else ""
        about.append(text(f"{run.name}: {steps}{preset}{run.folder}"))
    listed, names = "".join(f"<li>{text(line)}</li>" for line in missing), ", ".join(run.name for run in runs)
    return fill("report.html", title=text(names), heading=parts.symbols(names), subtitle=" · ".join(about),
                css=fill("page.css") + fill("report.css"),
                nav="".join(f'<a href="#{name}">{heading}</a>' for name, heading in sections),
                sections="\n".join(f'<section id="{name}"><h2>{heading}</h2>{content}</section>'
                                   for (name, heading), content in sections.items()),
                missing=f'<div class="missing"><b>Not on this page</b><ul>{listed}</ul></div>' if missing else "",
                footer="Made by scripts/tools/report.py of erv-min. The verifier's labels: "
                + text(", ".join(ERV_LABELS)) + ".")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run or of an evaluation, or NAME=FOLDER")
    add("--out", default="report.html", help="the page")
    add("--data", default="", help="where the clips are, 'dfew:/path' (default: as the run's settings say)")
    add("--show", default="", metavar="ID,ID", help="held-out clips to show (default: evenly spaced ones)")
    args = parser.parse_args(argv)
    if len(args.runs) > RUNS:
        raise SettingsError(f"{len(args.runs)} runs: a page holds at most {RUNS}")
    runs = [read_run(argument) for argument in args.runs]
    for run in runs:
        if sum(other.name == run.name for other in runs) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    clips = Clips(runs, args.data)
    page = build(runs, clips, [x.strip() for x in args.show.split(",") if x.strip()])
    atomic_write(args.out, page)
    print(f"{args.out}: {len(page.encode()) / 1e6:.1f} MB, {len(runs)} runs")
    for line in [line for run in runs for line in run.missing] + clips.missing:
        print(f"  not on the page: {line}")


if __name__ == "__main__":
    run_script(main)
