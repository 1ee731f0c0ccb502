"""The paper's tables 1, 2 and 4 in miniature, over several seeds: `python scripts/reproduce.py [--seeds 4] [--out DIR]`

Each seed is a world of its own: clips, base model, verifiers, SFT, then GRPO without R_E (Baseline), with it (Ours),
and with each part of table 2 left out; each system answers the same 400 held-out clips, and two judges read its
explanations (toy/lexicon.py). Two rows more: the base model as it is, and a policy that answers without explaining.
`--rows table-1` leaves table 2 out (then `--rows tables` adds it to some of the seeds); `--rows objective` compares
Ours with each named variant of Eq. 3. Every stage is a command that a user could type, printed as it starts; --jobs run
side by side, one thread each, so that figures repeat to the last bit. A stopped run goes on with what is missing.
Settings are chosen on --split tune of other seeds. Leaves in OUT: seed-N/ROW, seed-N/log, results.json, tables.txt.
Differences of two rows are paired by seed, with intervals over seeds (Student's t): trained models differ by more than
the clips that they answer, so that an interval over clips would promise too much.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from erv_min.base.errors import SettingsError
from erv_min.base.files import atomic_write, read_json, read_jsonl, write_json
from erv_min.base.options import OneLineParser, positive
from erv_min.base.processes import run_script
from erv_min.base.progress import Progress
from erv_min.metrics import COLUMNS
from erv_min.toy.chain import movement

SCRIPTS = Path(__file__).parent
JUDGES = ("lexicon", "paraphrases")


class Row(NamedTuple):
    """A row of the tables; of GRPO's, all but "ours" say how their command differs from that of "ours"."""

    name: str
    paper: tuple[float | None, ...] = ()  # table 1 or 2 on MAFW: EEA, FCR, EPC, WAR, UAR, 100 FCR / WAR
    words: str = ""
    erv: str = "erv"  # the verifier of R_E; "": no R_E
    model: str = "sft"  # what GRPO starts from


ROWS = {
    "base": Row("Zero-shot (base model)", (None, None, None, 20.18, 13.52)),
    "sft": Row("SFT", (33.06, 29.67, 70.66, 38.95, 25.21, 76.17)),
    "baseline": Row("Baseline (GRPO without R_E)", (32.41, 27.27, 40.98, 56.83, 38.66, 47.99), erv=""),
    "ours": Row("Ours", (48.93, 43.57, 68.58, 57.49, 39.12, 75.79)),
    "no-augmentation": Row("w/o data augmentation", (46.88, 42.62, 65.46, 56.78, 38.60, 75.06), erv="erv-human"),
    "no-filtering": Row("w/o neutral filtering", (46.28, 42.13, 64.70, 57.16, 38.67, 73.71),
                        "--ablate neutral-filtering"),
    "no-sentences": Row("w/o sentence-level", (47.54, 43.17, 68.36, 56.78, 38.66, 76.03), "--ablate sentence-level"),
    "answers": Row("Answers without explaining", erv="", model="sft-answers"),
    "a-dr-grpo": Row("A_i not divided by std", words="--advantages dr-grpo"),
    "l-dapo": Row("loss per token (DAPO)", words="--loss-type dapo"),
    "l-dr-grpo": Row("loss by a constant length", words="--loss-type dr-grpo"),
    "k2": Row("KL as k2", words="--kl k2"),
    "masked": Row("cut completions masked", words="--mask-truncated"),
}
GROUPS = {"table-1": list(ROWS)[:4], "tables": list(ROWS)[:8], "objective": ["sft", "ours", *list(ROWS)[8:]]}


class Job(NamedTuple):
    before: tuple[str, ...]  # names of the jobs of its seed that it builds on
    product: Path  # the file that says it is done
    command: list[str]  # words after `python`


def plan(folder: Path, seed: int, rows: list[str], split: str, clips: int, steps: int) -> dict[str, Job]:
    """The jobs of one seed that the evaluation of `rows` needs, by name, each after those that it builds on."""
    world = folder / "world"
    made = ["-m", "erv_min.toy", str(world), "--seed", str(seed), f"--{split}", str(clips)]
    jobs = {"world": Job((), world / "base" / "model.safetensors", made + (["--test", "0"] if split == "tune" else []))}

    def add(script: str, name: str, *words: str, before: tuple[str, ...] = ("world",)) -> None:
        command = [str(SCRIPTS / f"{script}.py"), "--world", str(world), "--seed", str(seed), "--device", "cpu",
                   "--resume", "--out", str(folder / name), *words]
        jobs[name] = Job(before, folder / name / "model.safetensors", command)

    add("erv", "erv")
    add("erv", "erv-human", "--sources", "human", "--steps", "250")
    add("sft", "sft")
    add("sft", "sft-answers", "--answers-only")
    for name, row in ROWS.items():
        if name not in ("base", "sft"):
            reward = ["--erv", str(folder / row.erv)] if row.erv else ["--w-explanation", "0"]
            add("grpo", name, "--model", str(folder / row.model), *reward, "--eval-clips", "-1", "--watch-every", "0",
                "--steps", str(steps), *row.words.split(), before=(row.model, *([row.erv] if row.erv else [])))
        model, out = world / "base" if name == "base" else folder / name, folder / "evaluation" / name
        jobs[f"evaluate {name}"] = Job(("world" if name == "base" else name,), out / "metrics.json", [
            str(SCRIPTS / "evaluate.py"), "--model", str(model), "--data", f"toy:{world}", "--split", split,
            "--judge", ",".join(JUDGES), "--max-new-tokens", "72", "--batch-size", "64", "--workers", "0",
            "--bootstrap", "0", "--device", "cpu", "--resume", "--out", str(out)])

    wanted = {f"evaluate {row}" for row in rows}
    for name in reversed(jobs):
        wanted.update(jobs[name].before if name in wanted else ())
    return {name: job for name, job in jobs.items() if name in wanted}


def run_all(plans: dict[int, dict[str, Job]], out: Path, workers: int) -> None:
    """Runs every job whose product is not there, `workers` at a time, each after those it builds on.

    Raises SettingsError with the end of a failed job's log; the others that run are ended, what is done stays done.
    """
    todo = {(seed, name): job for seed, jobs in plans.items() for name, job in jobs.items() if not job.product.exists()}
    total, started, running = len(todo), time.time(), {}  # running: (seed, name) -> process, its log, its start
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    try:
        while todo or running:
            unfinished = {*todo, *running}
            ready = [(seed, name) for (seed, name), job in todo.items()
                     if unfinished.isdisjoint((seed, before) for before in job.before)]
            for seed, name in ready[: workers - len(running)]:
                command = todo.pop((seed, name)).command
                print("$ OMP_NUM_THREADS=1 python", *command, flush=True)
                log = out / f"seed-{seed}" / "log" / f"{name.replace(' ', '-')}.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                with open(log, "a") as file:
                    process = subprocess.Popen([sys.executable, *command], env=environment, stdout=file, stderr=file)
                running[seed, name] = process, log, time.time()
            time.sleep(0.1)
            for (seed, name), (process, log, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[seed, name]
                if process.returncode:
                    end = "\n".join(log.read_text().splitlines()[-8:])
                    raise SettingsError(f"seed {seed}, {name}: status {process.returncode}; {log} ends with\n{end}\n"
                                        "what is done is kept: run the same command again to go on")
                print(f"  seed {seed}: {name} done in {time.time() - began:.0f} s ({total - len(todo) - len(running)}/"
                      f"{total}, {(time.time() - started) / 60:.1f} min)", flush=True)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()


FIGURES = (*COLUMNS, "FCR/WAR")
# What stands beside them: a key of metrics.jsonl -> its name in the table, and what it is multiplied by.
LOGGED = {"reward_explanation": ("R_E", 100), "sentences": ("sentences", 1), "neutral_share": ("neutral", 100),
          "kl": ("100 KL", 100), "completion_length": ("tokens", 1)}
BESIDE = ("worst", "formed", "true", *(name for name, _ in LOGGED.values()))
COMPARED = (*FIGURES, "true", "100 KL", "tokens")
SECOND = tuple(f"{name} again" for name in COLUMNS[:3])  # by the second judge


def collect(folder: Path, row: str) -> dict[str, float | None]:
    """FIGURES, BESIDE and SECOND of one row in the folder of one seed; None: there is none.

    worst: the lowest recall of a class; formed, true: sentences of the grammar in the right person, and cues that are
    true of their clip, in percent. The others: means over the last tenth of GRPO's steps.
    """
    answered, log = read_json(folder / "evaluation" / row / "metrics.json"), folder / row / "metrics.jsonl"
    scores, again = (answered["judges"][judge]["dfew"] for judge in JUDGES)
    found = {name: scores[name] for name in FIGURES} | {name: again[name.split()[0]] for name in SECOND}
    found["worst"] = min(recall for recall in scores["recall"].values() if recall is not None)
    n, steps = answered["sentences"], read_jsonl(log) if log.exists() else []
    for name, whole in (("formed", "sentences"), ("true", "cues")):
        found[name] = 100 * n[name] / n[whole] if n[whole] else None
    for key, (name, scale) in LOGGED.items():
        last = [step[key] for step in steps[-max(1, len(steps) // 10):] if step.get(key) is not None]
        found[name] = scale * float(np.mean(last)) if last else None
    return found


# Student's t, two-sided 95%, by degrees of freedom 1 to 30; the last one serves for more.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
     2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def interval(values: list[float]) -> tuple[float, float]:
    """The 95% interval of the mean of `values`, one per seed; of a single seed everything."""
    n = len(values)
    half = T[min(n - 1, len(T)) - 1] * np.std(values, ddof=1) / n**0.5 if n > 1 else np.inf
    return np.mean(values) - half, np.mean(values) + half


def difference(ours: list[float], other: list[float]) -> str:
    """Ours minus another row, paired by seed: mean (interval) [lowest, highest]; * if the interval excludes 0."""
    gaps = [a - b for a, b in zip(ours, other)]
    low, high = interval(gaps)
    return (f"{np.mean(gaps):+.1f}{'*' if low > 0 or high < 0 else ' '} ({low:+.1f} to {high:+.1f}) "
            f"[{min(gaps):+.1f}, {max(gaps):+.1f}]")


def cell(column: list[float | None]) -> str:
    """Mean ± standard deviation over seeds; "-" if no seed has a figure."""
    values = [value for value in column if value is not None]
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{f'{np.mean(values):.1f} ±{deviation:4.1f}' if values else '-':>13}"


def tables(out: Path, seeds: list[int], rows: list[str], split: str, clips: int) -> str:
    """Tables 1 and 2 with means, spreads and the paper's figures, paired differences, what stands beside, table 4."""
    results = {}
    for row in rows:
        of_seeds = [collect(out / f"seed-{seed}", row) for seed in seeds]
        results[row] = {name: [found[name] for found in of_seeds] for name in of_seeds[0]}
    write_json(out / "results.json", {"seeds": seeds, "split": split, "clips": clips, "rows": results})
    width = max(len(ROWS[row].name) for row in rows)

    def block(title: str, names: tuple[str, ...]) -> list[str]:
        lines = [f"{ROWS[row].name:{width}}" + "".join(cell(results[row][name]) for name in names) for row in rows]
        return [title, " " * width + "".join(f"{name:>13}" for name in names), *lines]

    lines = block(f"Tables 1 and 2 in miniature: {len(seeds)} seeds x {clips} {split} clips, judged by {JUDGES[0]}; "
                  "percent, mean ± standard deviation over seeds; what FCR/WAR lacks of 100 are right answers whose "
                  "explanation says something else", FIGURES)
    lines.append("\nThe paper on MAFW")
    for name, paper, *_ in [ROWS[row] for row in rows if ROWS[row].paper]:
        lines.append(f"{name:{width}}" + "".join(f"{f'{x:.2f}' if x else '-':>13}" for x in paper))
    lines.append("\nOne row minus another, paired by seed; (95% interval over seeds, * if it excludes 0); "
                 "[lowest, highest seed]")
    for one, other in [("baseline", "sft"), *(("ours", row) for row in rows if row != "ours")]:
        if {one, other} <= results.keys():
            pairs = {name: (results[one][name], results[other][name]) for name in COMPARED}
            lines.append(f"  {ROWS[one].name} minus {ROWS[other].name}: " + "; ".join(
                f"{name} {difference(a, b)}" for name, (a, b) in pairs.items() if None not in a + b))
    if {"sft", "baseline", "ours"} <= results.keys():
        lines.append("\nSFT -> Baseline -> Ours, and whether it is the paper's movement (`movement` in toy/chain.py)")
        for i, seed in enumerate(seeds):
            three = [{name: results[row][name][i] for name in COLUMNS[:4]} for row in ("sft", "baseline", "ours")]
            moves = [f"{name} " + " -> ".join(f"{row[name]:.1f}" for row in three) for name in COLUMNS[:4]]
            lines.append(f"  seed {seed}: " + "; ".join([*moves, "yes" if movement(*three)[1] else "no"]))
    lines += block("\nPercent: recall of the worst class; sentences of the grammar and in the right person; true claims "
                   "about face and voice. GRPO, mean of the last tenth of the steps: R_E in percent, sentences per "
                   "explanation, percent of them only neutral, KL in hundredths of a nat per token, tokens per "
                   "completion", BESIDE)
    lines += block(f"\nTable 4 in miniature: judged again, by {JUDGES[1]}", SECOND)
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of everything")
    parser.add_argument("--seeds", type=positive, default=4, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--rows", default="tables", help=f"{', '.join(GROUPS)}, or some of {', '.join(ROWS)}; commas")
    parser.add_argument("--clips", type=positive, default=400, help="held-out clips per seed")
    parser.add_argument("--split", default="test", choices=("test", "tune"), help="tune is for choosing settings")
    parser.add_argument("--steps", type=positive, default=100, help="GRPO steps (the main command: 100)")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="commands at a time, of one thread")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: run_all ends its commands on the way out
    named = {row for word in given.rows.split(",") for row in GROUPS.get(word, [word])}
    if unknown := named - ROWS.keys():
        raise SettingsError(f"--rows {', '.join(sorted(unknown))}: there are {', '.join([*GROUPS, *ROWS])}")
    rows = [row for row in ROWS if row in named]
    seeds = list(range(given.first_seed, given.first_seed + given.seeds))
    about = {"clips": given.clips, "split": given.split, "steps": given.steps}
    kept = given.out / "reproduce.json"
    if kept.exists() and read_json(kept) != about:
        raise SettingsError(f"{kept} holds a run of other settings ({read_json(kept)}): give another --out")
    write_json(kept, about)
    started = time.time()
    plans = {seed: plan(given.out / f"seed-{seed}", seed, rows, **about) for seed in seeds}
    with Progress("stages run"):
        run_all(plans, given.out, given.jobs)
    text = tables(given.out, seeds, rows, given.split, given.clips)
    atomic_write(given.out / "tables.txt", text)
    print(f"\n{text}\n{(time.time() - started) / 60:.1f} minutes; files: {given.out}/tables.txt, results.json")


if __name__ == "__main__":
    run_script(main)
