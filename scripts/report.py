"""One page that shows what runs did: `scripts/report.py RUN [RUN ...] [--out report.html]`

RUN is a folder of scripts/grpo.py (or sft.py, erv.py) or of scripts/evaluate.py, or NAME=FOLDER. Several are overlaid. The
page holds the metrics with 95% bootstrap intervals and paired differences, confusion matrices, the curves, held-out clips
with each system's explanation (as figures 8 to 11), completions over the training, settings and versions. Each sentence
stands with its verifier's labels beside it, each completion with R_E. The page is one file, asks no network, and goes
dark with the reader's system. What a run does not hold is named on it; a damaged file is an error.

Its size is bounded, however long the runs: 8 runs; 12 steps and 2 completions of each; 6 held-out clips; 4 frames a clip; a
clip of up to 1 MB has a player, until 16 MB are used (--clip-mb, --media-mb); 400 points a curve. Needs matplotlib
(`pip install -e ".[report]"`).
"""

import argparse
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import report_parts as parts
from pages import ClipMedia, clip_media, fill, read_objects, text

from erv_min.data import load_examples
from erv_min.emotions import ERV_LABELS, normalize
from erv_min.errors import DataError, ErvMinError, SettingsError
from erv_min.erv import Verifier
from erv_min.files import atomic_write, read_json
from erv_min.metrics import bootstrap, paired, read_prediction, score
from erv_min.rewards import RewardSettings, score_completions

RUNS, STEPS, COMPLETIONS, CLIPS, RESAMPLES = 8, 12, 2, 6, 1000
NUMBER = (int, float)


@dataclass
class Run:
    """What one folder holds."""

    name: str
    folder: Path
    config: dict = field(default_factory=dict)  # {"settings", "versions", "git_commit", "command"}
    metrics: list[dict] = field(default_factory=list)  # a row a step
    sampled: dict[int, list[dict]] = field(default_factory=dict)  # step -> the group of completions
    systems: list = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict:
        return self.config.get("settings") or {}


@dataclass
class System:
    """One system's scores on one data set, and its predictions where they were kept."""

    name: str
    dataset: str
    score: dict
    rows: list[dict] | None = None


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_run(argument: str) -> Run:
    """A folder, or NAME=FOLDER. Raises DataError for no such folder, one without a run, and damaged files."""
    name, equals, folder = argument.partition("=")
    if not equals or Path(argument).exists():
        name, folder = Path(argument).resolve().name, argument
    run = Run(name, Path(folder))
    has = {x: (run.folder / x).exists() for x in ("config.json", "metrics.jsonl", "completions.jsonl", "metrics.json",
                                                  "evaluation.json")}
    if not any(has.values()):
        raise DataError(f"{folder}: no run in it: expected {', '.join(has)} of scripts/grpo.py or scripts/evaluate.py")
    if has["config.json"]:
        config = read_json(run.folder / "config.json")
        run.config = config.get("erv_min", {}) if isinstance(config, dict) else None
        if not isinstance(run.config, dict) or not isinstance(run.settings, dict):
            raise DataError(f"{run.folder / 'config.json'}: expected an object with erv_min.settings; was it edited?")
    if has["metrics.jsonl"]:
        rows = {row["step"]: row for row in read_objects(run.folder / "metrics.jsonl", {"step": int})}
        run.metrics = [rows[step] for step in sorted(rows)]
        for row in run.metrics:
            for key, value in row.items():
                if value is not None and not isinstance(value, NUMBER):
                    raise DataError(f"{run.folder / 'metrics.jsonl'}, step {row['step']}: {key} is {value!r}, no number")
    if has["completions.jsonl"]:
        last = None
        for row in read_objects(run.folder / "completions.jsonl", {
                "step": int, "video_id": str, "ground_truth": str, "completion": str, "sentences": list, "labels": list,
                "reward_format": NUMBER, "reward_answer": NUMBER, "reward_explanation": NUMBER}):
            if row["step"] != last:  # a resumed run samples some steps again: the later group stands
                run.sampled[last := row["step"]] = []
            run.sampled[last].append(row)
    if has["metrics.json"]:
        read_evaluation(run)
    read_systems(run)
    for file, there, what in (("config.json", run.config or has["metrics.json"], "no settings and versions"),
                              ("metrics.jsonl", run.metrics, "no curves"),
                              ("completions.jsonl", run.sampled, "no completions over training"),
                              ("evaluation.json", run.systems, "no metric table and confusion matrix (--eval-clips -1, or "
                                                              "the run has not ended? scripts/evaluate.py makes one)")):
        if not there and not (has["metrics.json"] and file != "evaluation.json"):
            run.missing.append(f"{run.name}: {file} is {'empty' if has.get(file) else 'not there'}: {what}")
    return run


def check_score(value, where: str) -> dict:
    shape = ("n", "labels", "confusion", "recall")
    if not isinstance(value, dict) or any(key not in value for key in shape):
        raise DataError(f"{where}: expected a score with {', '.join(shape)}, as erv_min.metrics.score gives it")
    return value


def predictions(path: Path) -> list[dict]:
    return read_objects(path, {"video_id": str, "output": str, "ground_truth": str, "dataset": str})


def read_systems(run: Run) -> None:
    """evaluation.json and predictions-NAME.jsonl of scripts/grpo.py -> systems, with intervals where rows were kept."""
    path = run.folder / "evaluation.json"
    if not path.exists():
        return
    scores = read_json(path)
    if not isinstance(scores, dict):
        raise DataError(f"{path}: expected {{system: score}}")
    for name, value in scores.items():
        value, rows, dataset = check_score(value, f"{path}, {name}"), None, "held out"
        file = run.folder / f"predictions-{name.replace(' ', '-')}.jsonl"
        if file.exists() and (rows := predictions(file)):
            dataset = rows[0]["dataset"]
            value = {**score(rows, dataset), "intervals": bootstrap(rows, dataset, RESAMPLES)}
        else:
            run.missing.append(f"{run.name}: {file.name} is {'empty' if file.exists() else 'not there'}: no intervals, no "
                               f"comparison and no held-out clips for {name}")
        run.systems.append(System(name, dataset, value, rows))


def read_evaluation(run: Run) -> None:
    """metrics.json and judged-*.jsonl of scripts/evaluate.py -> systems, one a judge and data set."""
    path = run.folder / "metrics.json"
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("judges"), dict):
        raise DataError(f"{path}: expected the metrics.json of scripts/evaluate.py, with 'judges'")
    run.config = run.config or {"settings": found.get("settings") or {}}
    for number, (judge, results) in enumerate(found["judges"].items(), 1):
        file = run.folder / f"judged-{number}.jsonl"
        rows = predictions(file) if file.exists() else []
        if not rows:
            run.missing.append(f"{run.name}: {file.name} is not there: no comparison and no held-out clips")
        for dataset, value in results.items():
            name = f"{found.get('system') or run.name}" + (f", {judge}" if len(found["judges"]) > 1 else "")
            run.systems.append(System(name, dataset, check_score(value, f"{path}, {judge}, {dataset}"),
                                      [row for row in rows if row["dataset"] == dataset] or None))


def all_systems(runs: list[Run]) -> list[System]:
    """Every run's systems, under names of their own; the same predictions of two runs (their common SFT) stand once."""
    kept = []
    for run in runs:
        for system in run.systems:
            if not any(system.rows and system.rows == other.rows for _, other in kept):
                kept.append((run, system))
    names = [(system.name, system.dataset) for _, system in kept]
    for (run, system), name in zip(kept, names):
        if names.count(name) > 1:
            system.name = f"{run.name}: {system.name}"
    return [system for _, system in kept]


# ---- clips and labels ------------------------------------------------------------------------------------------------


class Clips:
    """Paths of a run's clips by their id, and what the page embeds of them, until the room is used up."""

    def __init__(self, runs: list[Run], data: str, clip_mb: float, media_mb: float):
        self.paths, self.made, self.missing = {}, {}, []
        self.clip_bytes, self.room = int(clip_mb * 1e6), int(media_mb * 1e6)
        for run in runs:
            worlds = [Path(run.settings["world"])] if run.settings.get("world") else [run.folder / "world", run.folder.parent / "world"]
            world = next((w for w in worlds if (w / "world.json").exists()), None)
            spec = data or run.settings.get("data") or (f"toy:{world}" if world else "")
            for split in ("train", "test"):
                try:
                    found = load_examples(spec, split) if spec else []
                except DataError as error:
                    found, _ = [], self.missing.append(f"{run.name}: no {split} clips ({error})")
                for example in found:
                    self.paths.setdefault((split, example.video_id), example.path)
        if not self.paths:
            self.missing.append("No clips were found: no frames and players. --data says where they are (dfew:/path, toy:/world)")

    def media(self, split: str, video_id: str) -> ClipMedia | None:
        path = self.paths.get((split, video_id))
        if path is None:
            return ClipMedia(note=f"clip {video_id} is not in the data") if self.paths else None
        if path not in self.made:
            made = clip_media(path, max_bytes=min(self.clip_bytes, self.room))
            self.room -= path.stat().st_size if made.player else 0
            self.made[path] = made
        return self.made[path]


def find_verifier(runs: list[Run], given: str) -> tuple[Verifier | None, RewardSettings, str]:
    """The verifier that a run was trained with (a local folder), its settings, and a note where there is none."""
    names = {f.name for f in fields(RewardSettings)}
    for run in [run for run in runs if run.settings.get("erv") or given] or runs[:1]:
        rules = RewardSettings(**{k: v for k, v in run.settings.items() if k in names})
        folder = given or run.settings.get("erv") or ""
        if given or (folder and Path(folder, "config.json").exists()):
            return Verifier.load(folder), rules, ""
        note = f"The verifier {folder} is not there" if folder else "No run names a verifier"
    return None, rules, note + ": sentences that were not labelled in training have no labels. --erv FOLDER gives one"


def labelled(output: str, e_gt: str, dataset: str, verifier: Verifier | None, rules: RewardSettings):
    """(sentences, labels, R_E or None) of an output that carries no labels of its own."""
    if verifier is None:
        return [], [], None
    reward = score_completions([output], [e_gt], dataset, verifier.probabilities, verifier.labels, rules)[0]
    return reward.sentences, reward.label_sets, reward.explanation


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


# ---- sections --------------------------------------------------------------------------------------------------------


def results_section(systems: list[System]) -> str:
    out = parts.score_table(systems)
    out += ('<p class="note">Under each figure its 95% interval (percentile bootstrap over clips). EEA: the judge reads the true '
            "emotion in the explanation; FCR: explanation, answer and truth agree; EPC: explanation and answer agree; WAR: "
            "accuracy; UAR: mean recall; FCR/WAR: coherence among the right answers.</p>")
    differences, first = [], {}
    for system in systems:
        if system.rows is None:
            continue
        base = first.setdefault(system.dataset, system)
        ids = [{row["video_id"] for row in s.rows} for s in (base, system)]
        if base is not system and ids[0] == ids[1]:
            differences.append((f"{system.name} − {base.name}", paired(base.rows, system.rows, system.dataset, RESAMPLES)))
    if differences:
        out += f"<h3>Paired differences on the same clips</h3>{parts.paired_table(differences)}"
        out += '<p class="note">With 95% intervals; bold where the interval leaves out 0.</p>'
    return out + f'<h3>Confusion matrices</h3><div class="matrices">{"".join(map(parts.confusion, systems))}</div>' + (
        '<p class="note">A row a true label, a column an answer; the shade is the share of the row.</p>')


def held_out_section(systems, clips: Clips, verifier, rules, chosen: list[str], labels: set) -> str:
    systems = [system for system in systems if system.rows]
    systems = [s for s in systems if s.dataset == systems[0].dataset]
    tables = [{row["video_id"]: row for row in system.rows} for system in systems]
    shared = [i for i in tables[0] if all(i in table for table in tables)]
    if absent := [i for i in chosen if i not in shared]:
        raise SettingsError(f"--show {absent[0]}: not among the {len(shared)} clips that every system answered")
    out = []
    for video_id in chosen or spread(shared, CLIPS):
        columns = []
        for system, table in zip(systems, tables):
            row = table[video_id]
            e_gt, dataset = row["ground_truth"], row["dataset"]
            sentences, sets, R_E = labelled(row["output"], e_gt, dataset, verifier, rules)
            labels.update(x for EL in sets for x in EL)
            predicted = read_prediction(row["output"], dataset)[0]
            facts = [("R_E", f"{R_E:.2f}", None)] if R_E is not None else []
            if "judged_emotion" in row:
                judged = row["judged_emotion"]
                facts.append(("Explanation", judged or "none", isinstance(judged, str) and normalize(judged, dataset) == e_gt))
            facts.append(("Answer", predicted or "none", predicted == e_gt))
            columns.append(parts.completion(system.name, row["output"], e_gt, sentences, sets, facts))
        out.append(parts.case(f"<span>Clip <b>{text(video_id)}</b></span><span>truth <b>{text(e_gt)}</b></span>",
                              clips.media("test", video_id), columns))
    how = "as asked for (--show)" if chosen else f"{len(out)} of {len(shared)}, evenly spaced in the file, not selected by content"
    return (f'<p class="note">Held-out clips, {how}. “Explanation” is the emotion that the judge reads in it. A sentence stands '
            f"with its verifier's labels; ✓ marks the ones that count for the true emotion in R<sub>E</sub>.</p>" + "".join(out))


def training_section(runs: list[Run], clips: Clips, verifier, rules, labels: set) -> str:
    steps = spread(sorted({step for run in runs for step in run.sampled}), STEPS)
    out = []
    for step in steps:
        groups = [(number, run, run.sampled[step]) for number, run in enumerate(runs) if run.sampled.get(step)]
        by_clip = {}
        for entry in groups:
            by_clip.setdefault(entry[2][0]["video_id"], []).append(entry)
        for video_id, entries in by_clip.items():
            columns = []
            for number, run, rows in entries:
                for at, row in enumerate(rows[: COMPLETIONS if len(entries) == 1 else 1], 1):
                    sentences, sets, R_E = row["sentences"], row["labels"], row["reward_explanation"]
                    if not sentences:
                        dataset = "dfew" if normalize(row["ground_truth"], "dfew") else "mafw"
                        sentences, sets, measured = labelled(row["completion"], row["ground_truth"], dataset, verifier, rules)
                        R_E = R_E if measured is None or run.settings.get("w_explanation", 1) else measured
                    labels.update(x for EL in sets for x in EL)
                    unpaid = "" if run.settings.get("w_explanation", 1) else " (not rewarded)"
                    answer = parts.extract_answer(row["completion"])
                    facts = [("R_E" + unpaid, f"{R_E:.2f}", None), ("Answer", answer or "none", row["reward_answer"] > 0),
                             ("Format", "kept" if row["reward_format"] else "broken", row["reward_format"] > 0)]
                    group = f", {at} of {len(rows)} sampled"
                    columns.append(parts.completion(run.name + group, row["completion"], row["ground_truth"], sentences,
                                                    sets, facts, number))
            out.append(parts.case(f"<span>Step <b>{step + 1}</b></span><span>clip <b>{text(video_id)}</b></span><span>truth "
                                  f"<b>{text(entries[0][2][0]['ground_truth'])}</b></span>", clips.media("train", video_id), columns))
    return ('<p class="note">The first completions of the group that was sampled at each step, not selected by content.</p>'
            + "".join(out))


def build(runs: list[Run], clips: Clips, erv: str = "", chosen: list[str] = ()) -> str:
    """The page as text."""
    verifier, rules, note = find_verifier(runs, erv)
    systems, missing = all_systems(runs), [line for run in runs for line in run.missing] + clips.missing
    rows, sampled = any(s.rows for s in systems), any(run.sampled for run in runs)
    if note and (rows or any(not r["sentences"] for run in runs for group in run.sampled.values() for r in group)):
        missing.append(note)
    labels, sections = set(), []
    if systems:
        sections.append(("results", "Held-out results", results_section(systems)))
    if any(run.metrics for run in runs):
        sections.append(("curves", "Training", parts.curves(runs)))
    if rows:
        sections.append(("clips", "What each system says", held_out_section(systems, clips, verifier, rules, chosen, labels)))
    if sampled:
        sections.append(("completions", "Completions over the training", training_section(runs, clips, verifier, rules, labels)))
    if any(run.config for run in runs):
        sections.append(("settings", "Settings and versions", parts.settings_tables(runs)))
    legend, body = parts.label_legend(labels) if labels else "", ""
    for name, heading, content in sections:
        body += f'<section id="{name}"><h2>{heading}</h2>{legend if name in ("clips", "completions") else ""}{content}</section>\n'
    listed = "".join(f"<li>{text(line)}</li>" for line in missing)
    facts = [f"{run.name}: " + ", ".join([*([f"{run.metrics[-1]['step'] + 1} steps"] if run.metrics else []),
             *([f"preset {run.settings['preset']}"] if run.settings.get("preset") else []), str(run.folder)]) for run in runs]
    names = ", ".join(run.name for run in runs)
    return fill("report.html", title=text(names), heading=parts.math(names), subtitle=" · ".join(map(text, facts)),
                css=fill("page.css") + fill("report.css"), nav="".join(f'<a href="#{n}">{h}</a>' for n, h, _ in sections),
                missing=f'<div class="missing"><b>Not on this page</b><ul>{listed}</ul></div>' if missing else "",
                sections=body, footer="Made by scripts/report.py of erv-min from the folders named above. The verifier's "
                f"labels: {text(', '.join(verifier.labels if verifier else ERV_LABELS))}.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run or of an evaluation, or NAME=FOLDER")
    add("--out", default="report.html", help="the page")
    add("--data", default="", help="where the clips are, 'dfew:/path' (default: as the run's settings say)")
    add("--erv", default="", help="verifier for outputs without labels (default: the run's)")
    add("--show", default="", metavar="ID,ID", help="held-out clips to show (default: evenly spaced ones)")
    add("--clip-mb", type=float, default=1.0, help="largest clip that gets a player")
    add("--media-mb", type=float, default=16.0, help="all players together")
    args = parser.parse_args(argv)
    if len(args.runs) > RUNS:
        raise SettingsError(f"{len(args.runs)} runs: a page holds at most {RUNS}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SettingsError('the curves need matplotlib: pip install -e ".[report]"') from None
    runs = [read_run(argument) for argument in args.runs]
    for run in runs:
        if sum(other.name == run.name for other in runs) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    clips = Clips(runs, args.data, args.clip_mb, args.media_mb)
    page = build(runs, clips, args.erv, [x.strip() for x in args.show.split(",") if x.strip()])
    atomic_write(args.out, page)
    print(f"{args.out}: {len(page.encode()) / 1e6:.1f} MB, {len(runs)} runs")
    for line in [line for run in runs for line in run.missing] + clips.missing:
        print(f"  not on the page: {line}")


if __name__ == "__main__":
    try:
        main()
    except ErvMinError as error:
        sys.exit(f"{type(error).__name__}: {error}")
