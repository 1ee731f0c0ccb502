"""What report.py reads: the folders of scripts/grpo.py (sft.py, erv.py) and scripts/evaluate.py, field by field."""

from dataclasses import dataclass, field
from pathlib import Path

from pages import read_objects

from erv_min.base.errors import DataError
from erv_min.base.files import read_json
from erv_min.metrics import COLUMNS, bootstrap, score

RESAMPLES = 1000  # of the bootstrap
NUMBER = (int, float)


@dataclass
class Run:
    """What one folder holds."""

    name: str
    folder: Path
    config: dict = field(default_factory=dict)  # {"settings", "versions", "git_commit", "command"}
    metrics: list[dict] = field(default_factory=list)  # a row per step
    sampled: dict[int, list[dict]] = field(default_factory=dict)  # step -> the group of completions
    systems: list = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict:
        found = self.config.get("settings") or {}
        return {k: v for k, v in found.items() if k != "rewards"} | found["rewards"] if "rewards" in found else found


@dataclass
class System:
    """One system's scores on one data set, and its predictions where they were kept."""

    name: str
    dataset: str
    score: dict
    rows: list[dict] | None = None


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
                    where = f"{run.folder / 'metrics.jsonl'}, step {row['step']}"
                    raise DataError(f"{where}: {key} is {str(value)[:60]!r}, no number")
    if has["completions.jsonl"]:
        last = None
        for row in read_objects(run.folder / "completions.jsonl", {
                "step": int, "video_id": str, "ground_truth": str, "completion": str, "sentences": list, "labels": list,
                "reward_format": NUMBER, "reward_answer": NUMBER, "reward_explanation": NUMBER}):
            if row["step"] != last:  # a resumed run samples some steps again: the later group stands
                run.sampled[last := row["step"]] = []
            if len(row["sentences"]) != len(row["labels"]) or not all(isinstance(x, list) for x in row["labels"]):
                raise DataError(f"{run.folder / 'completions.jsonl'}, step {row['step']}: {len(row['sentences'])} "
                                f"sentences and {str(row['labels'])[:60]} as their labels; expected a list for each")
            run.sampled[last].append(row)
    if has["metrics.json"]:
        read_evaluation(run)
    read_systems(run)
    if not has["metrics.json"]:
        for file, there, what in (("config.json", run.config, "no settings and versions"),
                                  ("metrics.jsonl", run.metrics, "no curves"),
                                  ("completions.jsonl", run.sampled, "no completions over training"),
                                  ("evaluation.json", run.systems, "no metric table and no confusion matrix (has the "
                                   "run ended, without --eval-clips -1? scripts/evaluate.py makes them, too)")):
            if not there:
                run.missing.append(f"{run.name}: {file} is {'empty' if has[file] else 'not there'}: {what}")
    return run


def check_score(value, where: str) -> dict:
    """A score as erv_min.metrics.score gives it: numbers or None, confusion matrix [C, C + 1]. Raises DataError."""
    kinds = {"n": int, "labels": list, "confusion": list, "recall": dict}
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        raise DataError(f"{where}: expected a score with {', '.join(kinds)}, as erv_min.metrics.score gives it")
    C, rows = len(value["labels"]), value["confusion"]
    square = len(rows) == C and all(isinstance(row, list) and len(row) == C + 1 for row in rows)
    if not square or not all(isinstance(count, int) for row in rows for count in row):
        raise DataError(f"{where}: the confusion matrix does not have {C} rows of {C + 1} counts")
    numbers = {**{name: value.get(name) for name in COLUMNS}, **value["recall"]}
    for name, number in numbers.items():
        if number is not None and not isinstance(number, NUMBER):
            raise DataError(f"{where}: {name} is {str(number)[:60]!r}, no number")
    return value


def predictions(path: Path) -> list[dict]:
    """Rows of a predictions file, each clip of a data set once. Raises DataError."""
    rows, seen = read_objects(path, {"video_id": str, "output": str, "ground_truth": str, "dataset": str}), set()
    for row in rows:
        key = row["dataset"], row["video_id"]
        if key in seen:
            raise DataError(f"{path}: clip {row['video_id']} of {row['dataset']} is there twice")
        seen.add(key)
    return rows


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
            run.missing.append(f"{run.name}: {file.name} is {'empty' if file.exists() else 'not there'}: no intervals, "
                               f"no comparison and no held-out clips for {name}")
        run.systems.append(System(name, dataset, value, rows))


def read_evaluation(run: Run) -> None:
    """metrics.json and judged-*.jsonl of scripts/evaluate.py -> systems, one per judge and data set."""
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
