"""The paper's tables 1, 2 and 4 in miniature, over several seeds: `python scripts/reproduce.py [--seeds 4] [--out DIR]`

Each seed is a world of its own: clips, base model, two verifiers, SFT, then GRPO without R_E (Baseline), with it
(Ours), and with each part of table 2 left out; each system answers the same 400 held-out clips, and two judges read
its explanations (toy/lexicon.py: one knows the world's whole grammar, one learnt from paraphrases). Two rows more: the
base model as it is, and a policy that answers without explaining. Every stage is a command that a user could type,
printed as it starts; --jobs run side by side, one thread each, so that the figures repeat to the last bit. GRPO takes
half of the main command's steps, which is what fits beside so many rows. A stopped run goes on with what is missing.
Leaves in OUT: seed-N/ROW (run folders), seed-N/log, results.json, tables.txt. The settings were chosen on the tune
split of seeds that are not reported.
`--rows remedies` and `--rows objective` compare Ours with each remedy of erv_min/remedies.py and with each named
variant of Eq. 3: R_E by the row's own verifier and by one that no run saw, trained on another world's text, beside EEA.
Differences of two rows are paired by seed, and their intervals are over seeds (Student's t): each seed trains anew, and
trained models differ by more than the clips that they answer, so an interval over clips would promise too much.
"""

import argparse
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from erv_min.base.errors import SettingsError
from erv_min.base.files import atomic_write, read_json, read_jsonl, write_json
from erv_min.base.processes import run_script
from erv_min.metrics import COLUMNS
from erv_min.toy.text import count_sentences

SCRIPTS = Path(__file__).parent
JUDGES = ("lexicon", "paraphrases")
# Row -> (name, the paper's MAFW figures: table 1 or 2, as EEA, FCR, EPC, WAR, UAR).
ROWS = {
    "base": ("Zero-shot (base model)", (None, None, None, 20.18, 13.52)),
    "sft": ("SFT", (33.06, 29.67, 70.66, 38.95, 25.21)),
    "baseline": ("Baseline (GRPO without R_E)", (32.41, 27.27, 40.98, 56.83, 38.66)),
    "ours": ("Ours", (48.93, 43.57, 68.58, 57.49, 39.12)),
    "no-augmentation": ("w/o data augmentation", (46.88, 42.62, 65.46, 56.78, 38.60)),
    "no-filtering": ("w/o neutral filtering", (46.28, 42.13, 64.70, 57.16, 38.67)),
    "no-sentences": ("w/o sentence-level", (47.54, 43.17, 68.36, 56.78, 38.66)),
    "answers": ("AnswerSettings without explaining", (None,) * 5),
}
TABLES = tuple(ROWS)  # 1, 2 and 4
# Row -> (name, verifiers, the words of grpo.py in which it differs from "ours").
REMEDIES = {
    "minimum": ("two verifiers, minimum", "erv,erv-2", ""),
    "variance": ("two verifiers, mean - variance", "erv,erv-2", "--variance-weight 1"),
    "hardened": ("hardened verifier", "erv-hard", ""),
    "floor": ("likelihood floor -1.5", "erv", "--likelihood-floor -1.5"),
    "calm": ("calm claims count", "erv", "--count-calm"),
    "care": ("GRPO-CARE's bonus, 0.5", "erv", "--care-bonus 0.5"),
    "gate": ("gate on the answer", "erv", "--gate-on-answer"),
    "phase-in": ("R_E phased in over 25 steps", "erv", "--phase-in-steps 25"),
    "length": ("at least 16 words", "erv", "--length-target 16"),
    "repeats": ("repeated sentences earn 0", "erv", "--repeat-discount 1"),
}
OBJECTIVE = {
    "a-dr-grpo": ("A_i not divided by std", "erv", "--advantages dr-grpo"),
    "a-gdpo": ("A_i of each reward (GDPO)", "erv", "--advantages gdpo"),
    "l-dapo": ("loss per token (DAPO)", "erv", "--loss-type dapo"),
    "l-dr-grpo": ("loss by a constant length", "erv", "--loss-type dr-grpo"),
    "k2": ("KL as k2", "erv", "--kl k2"),
    "masked": ("cut completions masked", "erv", "--mask-truncated"),
}
VARIANTS = REMEDIES | OBJECTIVE
ROWS |= {row: (name, (None,) * 5) for row, (name, *_) in VARIANTS.items()}
GROUPS = {"tables": TABLES, "remedies": ("sft", "baseline", "ours", *REMEDIES),
          "objective": ("sft", "ours", *OBJECTIVE)}


# Another world's pairs for a verifier that no run sees: its text alone, without clips.
TEXT = ("from pathlib import Path; from erv_min.toy.world import WorldSettings, sample_clips, write_annotations\n"
        "world, out = WorldSettings(seed={}), Path({!r})\n"
        "out.mkdir(exist_ok=True); write_annotations(out, sample_clips(world), world)")


def plan(folder: Path, seed: int, split: str, clips: int, steps: int, exploitable: bool) -> dict[str, tuple]:
    """The commands of one seed: name -> (commands before it, the file that says it is done, the command's words)."""
    world = folder / "world"

    def stage(script: str, name: str, *words: str, before: tuple = ("world",), command: tuple = ()) -> tuple:
        features = ["--cache-features", str(world / "features")] if script != "erv" else []
        return before, folder / name / "model.safetensors", [
            str(SCRIPTS / f"{script}.py"), *command, "--world", str(world), "--seed", str(seed), "--device", "cpu",
            "--resume", *features, "--out", str(folder / name), *words]

    def grpo(name: str, *more: str, model: str = "sft", erv: str = "erv") -> tuple:
        verifiers = erv.split(",") if erv else []
        words = ["--erv", ",".join(str(folder / x) for x in verifiers)] if erv else ["--w-explanation", "0"]
        return stage("grpo", name, "--model", str(folder / model), *words, "--eval-clips", "-1", "--watch-every", "0",
                     "--sample-every", "1", "--steps", str(steps), *more, before=(model, *verifiers))

    jobs = {
        "world": ((), world / "base" / "model.safetensors", [
            "-m", "erv_min.toy", str(world), "--seed", str(seed), f"--{split}", str(clips),
            *(["--test", "0"] if split == "tune" else []), *(["--exploitable"] if exploitable else [])]),
        "erv": stage("erv", "erv"),
        "erv-2": stage("erv", "erv-2", "--seed", str(seed + 1000)),
        "erv-hard": stage("erv", "erv-hard", "--init", str(folder / "erv"), "--second", str(folder / "erv-2"),
                          "--predictions", str(folder / "ours" / "completions.jsonl"), command=("harden",),
                          before=("erv", "erv-2", "ours")),
        "text": ((), folder / "text" / "erv_valid.jsonl", ["-c", TEXT.format(seed + 1000, str(folder / "text"))]),
        "erv-unseen": stage("erv", "erv-unseen", "--data", str(folder / "text" / "erv_train.jsonl"), "--valid",
                            str(folder / "text" / "erv_valid.jsonl"), "--tokenizer", str(world / "tokenizers" / "erv"),
                            before=("world", "text")),
        "erv-human": stage("erv", "erv-human", "--sources", "human", "--steps", "250"),
        "sft": stage("sft", "sft"),
        "sft-answers": stage("sft", "sft-answers", "--answers-only"),
        "ours": grpo("ours"),
        "baseline": grpo("baseline", erv=""),
        "no-augmentation": grpo("no-augmentation", erv="erv-human"),
        "no-filtering": grpo("no-filtering", "--ablate", "neutral-filtering"),
        "no-sentences": grpo("no-sentences", "--ablate", "sentence-level"),
        "answers": grpo("answers", model="sft-answers", erv=""),
        **{row: grpo(row, *words.split(), erv=erv) for row, (_, erv, words) in VARIANTS.items()},
    }
    for row in ROWS:
        model, out = world / "base" if row == "base" else folder / row, folder / "evaluation" / row
        jobs[f"evaluate {row}"] = ("world" if row == "base" else row,), out / "metrics.json", [
            str(SCRIPTS / "evaluate.py"), "--model", str(model), "--data", f"toy:{world}", "--split", split,
            *(word for judge in JUDGES for word in ("--judge", judge)), "--max-new-tokens", "72", "--batch-size", "64",
            "--workers", "0", "--bootstrap", "0", "--device", "cpu", "--resume", "--out", str(out)]
        own = VARIANTS.get(row, ("", "erv"))[1].split(",")[0]
        jobs[f"score {row}"] = (f"evaluate {row}", own, "erv-unseen"), out / "R_E.json", [
            str(SCRIPTS / "tools" / "audit.py"), "score", "--limit", "0", "--erv",
            f"{folder / own},{folder / 'erv-unseen'}", "--predictions", str(out / "predictions.jsonl"), "--out",
            str(out / "R_E.json")]
    return jobs


def wanted(jobs: dict[str, tuple], rows: list[str]) -> dict[str, tuple]:
    """The jobs that the evaluation of `rows` needs, and where variants are compared their R_E by two verifiers."""
    todo, found = [f"evaluate {row}" for row in rows], {}
    todo += [f"score {row}" for row in rows if VARIANTS.keys() & {*rows}]
    while todo:
        name = todo.pop()
        found[name] = jobs[name]
        todo += jobs[name][0]
    return {name: job for name, job in jobs.items() if name in found}


def run_all(plans: dict[int, dict], out: Path, workers: int) -> None:
    """Runs every job whose product is not there, `workers` at a time, each after those it builds on.

    Raises SettingsError with the end of a failed job's log; what is done stays done.
    """
    done = {(seed, name) for seed, jobs in plans.items() for name, (_, product, _) in jobs.items() if product.exists()}
    todo = [(seed, name) for seed, jobs in plans.items() for name in jobs if (seed, name) not in done]
    total, started, stop = len(todo), time.time(), threading.Event()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    running: dict = {}

    def run(seed: int, name: str) -> None:
        log = out / f"seed-{seed}" / "log" / f"{name.replace(' ', '-')}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *plans[seed][name][2]]
        with open(log, "a") as f:
            process = subprocess.Popen(command, env=environment, stdout=f, stderr=subprocess.STDOUT)
            while process.poll() is None and not stop.wait(0.2):
                pass
            process.terminate()
            if process.wait():
                end = "\n".join(log.read_text().splitlines()[-8:])
                raise SettingsError(f"seed {seed}, {name}: status {process.returncode}; {log} ends with\n{end}\n"
                                    "what is done is kept: run the same command again to go on")

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            while todo or running:
                ready = [job for job in todo if all((job[0], b) in done for b in plans[job[0]][job[1]][0])]
                for seed, name in ready[: workers - len(running)]:
                    todo.remove((seed, name))
                    print("$ OMP_NUM_THREADS=1 python", *plans[seed][name][2], flush=True)
                    running[pool.submit(run, seed, name)] = (seed, name, time.time())
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                    seed, name, began = running.pop(future)
                    future.result()
                    done.add((seed, name))
                    count, minutes = total - len(todo) - len(running), (time.time() - started) / 60
                    print(f"  seed {seed}: {name} done in {time.time() - began:.0f} s ({count}/{total}, "
                          f"{minutes:.1f} min, about {minutes / count * (total - count):.0f} min left)", flush=True)
        finally:
            stop.set()


def collect(out: Path, seeds: list[int], rows: list[str]) -> dict:
    """results.json: row -> judge -> metric -> [a figure per seed], percent."""
    results: dict = {}
    for row in rows:
        for judge in JUDGES:
            scores = [read_json(out / f"seed-{seed}" / "evaluation" / row / "metrics.json")["judges"][judge]["dfew"]
                      for seed in seeds]
            results.setdefault(row, {})[judge] = {m: [s[m] for s in scores] for m in (*COLUMNS, "FCR/WAR")}
    return results


# Student's t, two-sided 95%, by degrees of freedom 1 to 30; the last one serves for more.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
     2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def interval(values: list[float]) -> tuple[float, float]:
    """The 95% interval of the mean of `values`, one per seed; of a single seed everything."""
    if len(values) < 2:
        return -np.inf, np.inf
    half = T[min(len(values) - 1, len(T)) - 1] * np.std(values, ddof=1) / len(values) ** 0.5
    return np.mean(values) - half, np.mean(values) + half


def difference(ours: list[float], other: list[float]) -> str:
    """Ours minus another row, paired by seed: mean (interval) [lowest, highest]; * where the interval excludes 0."""
    gaps = [a - b for a, b in zip(ours, other)]
    low, high = interval(gaps)
    return (f"{np.mean(gaps):+.1f}{'*' if low > 0 or high < 0 else ' '} ({low:+.1f} to {high:+.1f}) "
            f"[{min(gaps):+.1f}, {max(gaps):+.1f}]")


def sentences(out: Path, seeds: list[int], row: str) -> dict[str, list[float | None]]:
    """Per seed, in percent: sentences of the grammar in the right person, and cues that are true of their clip."""
    found: dict = {"formed": [], "true": []}
    for seed in seeds:
        folder = out / f"seed-{seed}"
        n = count_sentences(read_jsonl(folder / "evaluation" / row / "judged-1.jsonl"), folder / "world")
        for part, whole in (("formed", "sentences"), ("true", "cues")):
            found[part].append(100 * n[part] / n[whole] if n[whole] else None)
    return found


def tables(out: Path, seeds: list[int], rows: list[str], split: str, clips: int) -> str:
    """Tables 1 and 2 with means, spreads and the paper's figures, paired differences, sentences, table 4."""
    results, columns = collect(out, seeds, rows), (*COLUMNS, "FCR/WAR")
    width = max(len(ROWS[row][0]) for row in rows)

    def cells(values) -> str:
        shown = [np.array([v for v in x if v is not None], dtype=float) for x in values]
        return "".join(f"{f'{x.mean():.1f} ±{x.std(ddof=min(1, len(x) - 1)):4.1f}' if len(x) else '-':>13}"
                       for x in shown)

    lines = [f"Tables 1 and 2 in miniature: {len(seeds)} seeds x {clips} {split} clips, judged by {JUDGES[0]}; "
             "percent, mean ± standard deviation over seeds; (the paper on MAFW); what FCR/WAR lacks of 100 are right "
             "answers whose explanation says something else",
             f"{'':{width}}" + "".join(f"{c:>13}" for c in columns)]
    for row in rows:
        name, paper = ROWS[row]
        lines.append(f"{name:{width}}" + cells(results[row][JUDGES[0]].values()))
        if any(paper):
            ratio = 100 * paper[1] / paper[3] if paper[1] else None
            lines.append(f"{'':{width}}" + "".join(f"{f'({x:.2f})' if x else '':>13}" for x in (*paper, ratio)))
    if "ours" in rows:
        lines.append("\nOurs minus another row, points, paired by seed; (95% interval over seeds, * where it excludes "
                     "0); [lowest, highest seed]")
        ours = results["ours"][JUDGES[0]]
        for row in [r for r in rows if r != "ours"]:
            lines.append(f"  {ROWS[row][0]}: "
                         + "; ".join(f"{m} {difference(ours[m], results[row][JUDGES[0]][m])}" for m in COLUMNS))
    lines.append("\nSentences, percent: of the grammar and in the right person; true claims about face and voice\n"
                 + f"{'':{width}}{'formed':>13}{'true':>13}")
    for row in rows:
        results[row]["sentences"] = sentences(out, seeds, row)
        lines.append(f"{ROWS[row][0]:{width}}" + cells(results[row]["sentences"].values()))
    lines += over_training(out, seeds, rows)
    if scored := [row for row in rows if VARIANTS.keys() & {*rows}]:
        measured = {row: variant(out, seeds, row, results[row]) for row in scored}
        lines += variants(measured)
        for row in scored:
            results[row]["variant"] = measured[row]
    lines.append("\nTable 4 in miniature: a second judge\n" + f"{'':{width}}{'judge':>13}"
                 + "".join(f"{c:>13}" for c in COLUMNS[:3]))
    for row in [r for r in ("baseline", "ours") if r in rows]:
        for judge in JUDGES:
            lines.append(f"{ROWS[row][0]:{width}}{judge:>13}" + cells(results[row][judge][m] for m in COLUMNS[:3]))
    write_json(out / "results.json", {"seeds": seeds, "split": split, "clips": clips, "rows": results})
    return "\n".join(lines) + "\n"


WATCHED = {"reward_explanation": "R_E", "sentences": "sentences", "distinct_sentence_rate": "distinct",
           "neutral_share": "only neutral", "kl": "KL"}


def over_training(out: Path, seeds: list[int], rows: list[str]) -> list[str]:
    """What GRPO with R_E moved: means over seeds of the first tenth of its steps and of the last."""
    lines = ["\nGRPO with R_E, first tenth of the steps -> last: R_E, sentences per explanation, share of distinct "
             "ones, share of sentences that are only neutral, KL"]
    for row in rows:
        runs = [read_jsonl(path) for seed in seeds if (path := out / f"seed-{seed}" / row / "metrics.jsonl").exists()]
        if runs and any(step.get("reward_explanation") for step in runs[0]):
            tenth = max(1, len(runs[0]) // 10)
            ends = [[np.nanmean([np.nan if step[key] is None else step[key] for run in runs for step in run[part]])
                     for key in WATCHED]  # None: a step without a single sentence
                    for part in (slice(tenth), slice(-tenth, None))]
            lines.append(f"  {ROWS[row][0]}: " + "; ".join(
                f"{name} {first:.2f} -> {last:.2f}" for name, first, last in zip(WATCHED.values(), *ends)))
    return lines if len(lines) > 1 else []


def variant(out: Path, seeds: list[int], row: str, result: dict) -> dict[str, list[float | None]]:
    """Per seed: R_E by the row's own verifier and by one that no run saw, both as printed, in percent, and what stands
    beside it. KL and length: means of the last tenth of the steps, None of a row without GRPO."""
    found = {"R_E own": [], "R_E unseen": [], **{m: result[JUDGES[0]][m] for m in ("EEA", "FCR", "WAR")},
             "true": result["sentences"]["true"], "formed": result["sentences"]["formed"], "sentences": [], "words": [],
             "100 KL": [], "length": []}
    for seed in seeds:
        own, unseen = read_json(out / f"seed-{seed}" / "evaluation" / row / "R_E.json").values()
        found["R_E own"].append(100 * own["reward_explanation"])
        found["R_E unseen"].append(100 * unseen["reward_explanation"])
        found["sentences"].append(own["sentences"])
        found["words"].append(own["explanation_words"])
        log = out / f"seed-{seed}" / row / "metrics.jsonl"
        steps = [step for step in (read_jsonl(log) if log.exists() else []) if "kl" in step]
        for name, key, scale in (("100 KL", "kl", 100), ("length", "completion_length", 1)):
            last = [scale * step[key] for step in steps[-max(1, len(steps) // 10):]]
            found[name].append(np.mean(last) if last else None)
    return found | {"R_E - EEA": [r - e for r, e in zip(found["R_E own"], found["EEA"])]}


def variants(measured: dict[str, dict]) -> list[str]:
    """The table of remedies or of variants of Eq. 3: means and intervals over seeds, the widest gap, and what each row
    gains over Ours, paired by seed."""
    width = max(len(ROWS[row][0]) for row in measured)
    lines = ["\nRemedies and variants: mean ± half of the 95% interval over seeds; R_E by its own verifier and by one "
             "that no run saw (percent), true claims and sentences of the grammar (percent), sentences and words per "
             "explanation, KL and tokens per completion at the end of training",
             " " * width + "".join(f"{name:>14}" for name in next(iter(measured.values())))]
    for row, found in measured.items():
        cells = [f"{np.mean(x):.2f} ±{(interval(x)[1] - interval(x)[0]) / 2:5.2f}" if None not in x else "-"
                 for x in found.values()]
        lines.append(f"{ROWS[row][0]:{width}}" + "".join(f"{cell:>14}" for cell in cells))
    lines.append("\nWidest gap R_E own - EEA over the seeds, and each row minus Ours, paired by seed (as above)")
    for row, found in measured.items():
        gains = [f"{m} {difference(found[m], measured['ours'][m])}" for m in (
            "R_E own", "R_E unseen", "EEA", "FCR", "WAR", "true", "words", "100 KL", "length")
                 if "ours" in measured and row != "ours" and None not in (*found[m], *measured["ours"][m])]
        lines.append(f"  {ROWS[row][0]}: " + "; ".join([f"widest gap {max(found['R_E - EEA']):.1f}", *gains]))
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of everything")
    parser.add_argument("--seeds", type=int, default=4, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--rows", default="tables", help=f"{', '.join(GROUPS)}, or rows separated by commas, of "
                        + ", ".join(ROWS))
    parser.add_argument("--clips", type=int, default=400, help="held-out clips per seed")
    parser.add_argument("--split", default="test", choices=("test", "tune"), help="tune is for choosing settings")
    parser.add_argument("--steps", type=int, default=50, help="GRPO steps (the main command: 100)")
    parser.add_argument("--exploitable", action="store_true", help="a world whose cues are true of two emotions")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="commands at a time, one thread each")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: run_all ends its commands on the way out
    named = [row for word in arguments.rows.split(",") for row in GROUPS.get(word, (word,))]
    rows = [row for row in ROWS if row in named]
    if unknown := set(named) - set(ROWS):
        raise SettingsError(f"--rows {', '.join(sorted(unknown))}: there are {', '.join(ROWS)}")
    seeds = list(range(arguments.first_seed, arguments.first_seed + arguments.seeds))
    about = {k: v for k, v in vars(arguments).items() if k in ("clips", "split", "steps", "exploitable")}
    kept = arguments.out / "reproduce.json"
    if kept.exists() and read_json(kept) != about:
        raise SettingsError(f"{kept} holds a run of other settings ({json.dumps(read_json(kept))}): give another --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(kept, about)
    started = time.time()
    plans = {seed: wanted(plan(arguments.out / f"seed-{seed}", seed, arguments.split, arguments.clips, arguments.steps,
                               arguments.exploitable), rows) for seed in seeds}
    run_all(plans, arguments.out, arguments.jobs)
    text = tables(arguments.out, seeds, rows, arguments.split, arguments.clips)
    atomic_write(arguments.out / "tables.txt", text)
    print(f"\n{text}\n{(time.time() - started) / 60:.1f} minutes; files: {arguments.out}/tables.txt, results.json")


if __name__ == "__main__":
    run_script(main)
