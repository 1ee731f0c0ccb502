"""One page that shows what runs did: `scripts/tools/report.py RUN [RUN ...] [--out report.html]`

RUN is a folder of scripts/grpo.py (or sft.py, erv.py) or of scripts/evaluate.py, or NAME=FOLDER. Several are overlaid.
The page holds the metrics with 95% bootstrap intervals and paired differences, confusion matrices, the curves, held-out
clips with each system's explanation (as figures 8 to 11), completions over the training, settings and versions. Each
sentence stands with its verifier's labels beside it, each completion with R_E. The page is one file, asks no network,
and goes dark with the reader's system. What a run does not hold is named on it; a damaged file is an error.

Its size is bounded, however long the runs: 8 runs; 12 steps and 2 completions of each; 6 held-out clips; 4 frames per
clip; a clip of up to 1 MB has a player, until 16 MB of the page are used (--clip-mb, --media-mb); 400 points per curve.
Needs matplotlib (`pip install -e ".[report]"`).
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

import report_parts as parts
from pages import ClipMedia, clip_media, fill, text
from report_runs import RESAMPLES, Run, System, all_systems, read_run

from erv_min.base.errors import DataError, SettingsError
from erv_min.base.files import atomic_write
from erv_min.base.processes import run_script
from erv_min.data.examples import load_examples
from erv_min.emotions import ERV_LABELS, normalize
from erv_min.erv import Verifier
from erv_min.metrics import paired, read_prediction
from erv_min.rewards import RewardSettings, explanation_reward, extract_answer, select_labels, sentences_of

RUNS, STEPS, COMPLETIONS, CLIPS = 8, 12, 2, 6


# ---- clips and labels ------------------------------------------------------------------------------------------------


class Clips:
    """Paths of a run's clips by their id, and what the page embeds of them, until the room is used up."""

    def __init__(self, runs: list[Run], data: str, clip_mb: float, media_mb: float):
        self.paths, self.made, self.missing = {}, {}, []
        self.clip_bytes, self.room = int(clip_mb * 1e6), int(media_mb * 1e6)
        runs = [run for run in runs if run.sampled or any(system.rows for system in run.systems)]
        for run in runs:
            worlds = [Path(run.settings.get("world") or run.folder / "world"), run.folder.parent / "world"]
            world = next((w for w in worlds if (w / "world.json").exists()), None)
            spec = data or run.settings.get("data") or (f"toy:{world}" if world else "")
            for split in ("train", "test"):
                try:
                    found = load_examples(spec, split) if spec else []
                except DataError as error:
                    found, _ = [], self.missing.append(f"{run.name}: no {split} clips ({error})")
                for example in found:
                    self.paths.setdefault((split, example.video_id), example.path)
        if runs and not self.paths:
            self.missing.append("No clips were found: no frames and players. --data dfew:/path says where they are")

    def media(self, split: str, video_id: str) -> ClipMedia | None:
        path = self.paths.get((split, video_id))
        if path is None:
            return ClipMedia(note=f"clip {video_id} is not in the data") if self.paths else None
        if path not in self.made:
            self.made[path] = clip_media(path, max_bytes=self.clip_bytes)
        made = self.made[path]
        if made.player and len(made.player) > self.room:
            return replace(made, player="", note="frames only: the page holds no more clips (--media-mb)")
        self.room -= len(made.player)
        return made


def find_verifier(runs: list[Run], given: str) -> tuple[Verifier | None, RewardSettings, str]:
    """The verifier that a run was trained with (a local folder), its settings, and a note where there is none."""
    names = {f.name for f in fields(RewardSettings)}
    for run in [run for run in runs if run.settings.get("erv") or given] or runs[:1]:
        rules = RewardSettings(**{k: v for k, v in run.settings.items() if k in names})
        folder = given or (run.settings.get("erv") or "").split(",")[0]
        if given or (folder and Path(folder, "config.json").exists()):
            return Verifier.load(folder), rules, ""
        note = f"The verifier {folder} is not there" if folder else "No run names a verifier"
    return None, rules, note + ": sentences that were not labelled in training have no labels. --erv FOLDER gives one"


def labelled(output: str, e_gt: str, verifier: Verifier | None, rules: RewardSettings):
    """(sentences, labels, R_E or None) of an output that carries no labels of its own."""
    if verifier is None:
        return [], [], None
    sentences = sentences_of(output, rules)
    sets = select_labels(verifier.probabilities(sentences), verifier.labels, rules.tau, rules.k) if sentences else []
    return sentences, sets, explanation_reward(sets, e_gt, rules.neutral_rule, rules.neutral_filter)


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


# ---- sections --------------------------------------------------------------------------------------------------------


def results_section(systems: list[System]) -> str:
    out = parts.score_table(systems)
    spans = any(system.score.get("intervals") for system in systems)
    out += ('<p class="note">' + "Under each figure its 95% interval (percentile bootstrap over clips). " * spans
            + "EEA: the judge reads the true emotion in the explanation; FCR: explanation, answer and truth agree; "
            "EPC: explanation and answer agree; WAR: accuracy; UAR: mean recall; FCR/WAR: coherence among the right "
            "answers.</p>")
    differences, first = [], {}
    for system in systems:
        if system.rows is None:
            continue
        base = first.setdefault(system.dataset, system)
        ids = [{row["video_id"] for row in s.rows} for s in (base, system)]
        if base is not system and ids[0] == ids[1]:
            values = paired(base.rows, system.rows, system.dataset, RESAMPLES)
            differences.append((f"{system.name} − {base.name}", values))
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
            sentences, sets, R_E = labelled(row["output"], e_gt, verifier, rules)
            labels.update(x for EL in sets for x in EL)
            predicted = read_prediction(row["output"], dataset)[0]
            facts = [("R_E", f"{R_E:.2f}", None)] if R_E is not None else []
            if "judged_emotion" in row:
                judged = str(row["judged_emotion"] or "none")
                facts.append(("Explanation", judged, normalize(judged, dataset) == e_gt))
            facts.append(("Answer", predicted or "none", predicted == e_gt))
            columns.append(parts.completion(system.name, row["output"], e_gt, sentences, sets, facts))
        out.append(parts.case(f"<span>Clip <b>{text(video_id)}</b></span><span>truth <b>{text(e_gt)}</b></span>",
                              clips.media("test", video_id), columns))
    how = f"{len(out)} of {len(shared)}, evenly spaced in the file, not selected by content"
    how = "as asked for (--show)" if chosen else how
    return (f'<p class="note">Held-out clips of {text(systems[0].dataset)}, {how}. “Explanation” is the '
            "emotion that the judge reads in it. A sentence stands with its verifier's labels; ✓ marks the ones that "
            "count for the true emotion in R<sub>E</sub>.</p>" + "".join(out))


def sampled_completion(run: Run, number: int, row: dict, group: str, verifier, rules, labels: set) -> str:
    """One row of completions.jsonl; where its run had no verifier (Baseline), labels and R_E of another run's."""
    sentences, sets, R_E = row["sentences"], row["labels"], row["reward_explanation"]
    rewarded = bool(run.settings.get("w_explanation", 1))
    if not sentences:
        sentences, sets, measured = labelled(row["completion"], row["ground_truth"], verifier, rules)
        R_E = R_E if rewarded else measured
    labels.update(x for EL in sets for x in EL)
    facts = [("R_E" if rewarded else "R_E (not rewarded)", "–" if R_E is None else f"{R_E:.2f}", None),
             ("Answer", extract_answer(row["completion"]) or "none", row["reward_answer"] > 0),
             ("Format", "kept" if row["reward_format"] else "broken", row["reward_format"] > 0)]
    title, truth = f"{run.name}, {group}", row["ground_truth"]
    return parts.completion(title, row["completion"], truth, sentences, sets, facts, number)


def training_section(runs: list[Run], clips: Clips, verifier, rules, labels: set) -> str:
    out = []
    for step in spread(sorted({step for run in runs for step in run.sampled}), STEPS):
        by_clip = {}  # runs of one seed sample the same clip at a step: they stand side by side
        for number, run in enumerate(runs):
            if rows := run.sampled.get(step):
                by_clip.setdefault(rows[0]["video_id"], []).append((number, run, rows))
        for video_id, entries in by_clip.items():
            count = COMPLETIONS if len(entries) == 1 else 1
            columns = [sampled_completion(run, number, row, f"{at} of {len(rows)} sampled", verifier, rules, labels)
                       for number, run, rows in entries for at, row in enumerate(rows[:count], 1)]
            truth = entries[0][2][0]["ground_truth"]
            out.append(parts.case(f"<span>Step <b>{step + 1}</b></span><span>clip <b>{text(video_id)}</b></span>"
                                  f"<span>truth <b>{text(truth)}</b></span>", clips.media("train", video_id), columns))
    return ('<p class="note">The first completions of the group that was sampled at a step, not selected by content.'
            "</p>" + "".join(out))


def build(runs: list[Run], clips: Clips, erv: str = "", chosen: list[str] = ()) -> str:
    """The page as text."""
    verifier, rules, note = find_verifier(runs, erv)
    systems, missing = all_systems(runs), [line for run in runs for line in run.missing] + clips.missing
    rows = [row for run in runs for group in run.sampled.values() for row in group]
    if note and (any(s.rows for s in systems) or not all(row["sentences"] for row in rows)):
        missing.append(note)
    labels, sections = set(), []
    if systems:
        sections.append(("results", "Held-out results", results_section(systems)))
    if any(run.metrics for run in runs):
        sections.append(("curves", "Training", parts.curves(runs)))
    if any(s.rows for s in systems):
        content = held_out_section(systems, clips, verifier, rules, chosen, labels)
        sections.append(("clips", "What each system says", content))
    if rows:
        content = training_section(runs, clips, verifier, rules, labels)
        sections.append(("completions", "Completions over the training", content))
    if any(run.config for run in runs):
        sections.append(("settings", "Settings and versions", parts.settings_tables(runs)))
    legend, body = parts.label_legend(labels) if labels else "", ""
    for name, heading, content in sections:
        above = legend if name in ("clips", "completions") else ""
        body += f'<section id="{name}"><h2>{heading}</h2>{above}{content}</section>\n'
    listed, names = "".join(f"<li>{text(line)}</li>" for line in missing), ", ".join(run.name for run in runs)
    about = []
    for run in runs:
        steps = f"{run.metrics[-1]['step'] + 1} steps, " if run.metrics else ""
        preset = f"preset {run.settings['preset']}, " if run.settings.get("preset") else ""
        about.append(text(f"{run.name}: {steps}{preset}{run.folder}"))
    return fill("report.html", title=text(names), heading=parts.math(names), subtitle=" · ".join(about), sections=body,
                css=fill("page.css") + fill("report.css"),
                nav="".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections),
                missing=f'<div class="missing"><b>Not on this page</b><ul>{listed}</ul></div>' if missing else "",
                footer="Made by scripts/tools/report.py of erv-min. The verifier's labels: "
                + text(", ".join(verifier.labels if verifier else ERV_LABELS)) + ".")


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
    parts.need_matplotlib()  # before anything is read
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
    run_script(main)
