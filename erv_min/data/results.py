"""Files of predictions, in the forms in which systems keep them: `read_predictions`.

Ours: JSONL rows {"video_id", "output", "ground_truth", "dataset"}. The release's: text `<clip>|<output>`, where an
output may run over lines, and judged results, a JSON list of {clip: {"reason", "gpt_response"}}. The last two name
neither label nor data set: they are joined with the data's examples by clip.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from erv_min.data.readers import Example, check_label, read_text
from erv_min.emotions import labels
from erv_min.judge import read_answer
from erv_min.run.errors import DataError
from erv_min.run.files import read_jsonl


def clip_key(name: str) -> str:
    """A clip's name however a system writes it: without folders, suffix and leading zeros."""
    stem = PurePosixPath(str(name).strip().replace("\\", "/")).name
    stem = re.sub(r"\.(mp4|avi|mkv|webm|mov|wav|flac)$", "", stem, flags=re.IGNORECASE)
    return stem.lstrip("0") or "0" if stem.isdecimal() else stem


def by_clip(examples: list[Example]) -> dict[tuple[str, str], Example]:
    """(data set, clip_key) -> example. Raises DataError where two clips of one data set share a name."""
    found: dict[tuple[str, str], Example] = {}
    for example in examples:
        other = found.setdefault((example.dataset.lower(), clip_key(example.video_id)), example)
        if other.path != example.path:
            raise DataError(f"{other.path} and {example.path} have one name: their predictions cannot be told apart")
    return found


def read_predictions(files: str, examples: list[Example]) -> tuple[list[dict], dict]:
    """Rows from one or several (comma-separated) files, joined by data set and clip: outputs from one, judgements from
    another.

    examples: the evaluated split; may be empty for JSONL rows that carry their ground truth. Returns the rows in the
    order of the examples, and {"missing": [...], "unknown": [...]} clips. A released judged file alone gives rows whose
    output is its reason, without an answer. Raises DataError naming file, line and field, on a second output of one
    clip, and on a clip of several data sets in a row that names none.
    """
    truth, datasets = by_clip(examples), defaultdict(list)  # datasets: clip_key -> where it is
    for dataset, clip in truth:
        datasets[clip].append(dataset)
    rows, first, unknown = {}, {}, []
    for path in map(Path, map(str.strip, files.split(","))):
        for where, row in _rows(path, datasets):
            clip, dataset = clip_key(row["video_id"]), row.get("dataset", "").lower()
            if truth:
                if not dataset and len(datasets.get(clip, ())) > 1:
                    raise DataError(f"{where}: clip {row['video_id']} is in {' and '.join(datasets[clip])}, and the "
                                    "file does not say which: give --data one data set at a time")
                key = dataset or next(iter(datasets.get(clip, ())), ""), clip
                if key not in truth:
                    unknown.append(row["video_id"])
                    continue
                example = truth[key]
                row |= {"video_id": example.video_id, "ground_truth": example.label, "dataset": example.dataset}
            elif not row.get("ground_truth") or not dataset:
                raise DataError(f"{where}: clip {row['video_id']} has no ground_truth and dataset; give --data, too")
            key = row["dataset"].lower(), clip
            kind = "judgement" if "gpt_response" in row else "output"
            if (key, kind) in first:
                raise DataError(f"{where}: a second {kind} of clip {row['video_id']}, after {first[key, kind]}")
            first[key, kind] = where
            if kind == "judgement":
                judgement = read_answer(row.pop("gpt_response"), labels(row["dataset"]))
                row["judged_emotion"], row["judge_status"] = judgement.emotion, judgement.status
                reason = row.pop("reason")
                if not rows.get(key, {}).get("output"):
                    row["output"] = reason if "<think>" in reason else f"<think>{reason}</think>"
            row["ground_truth"] = check_label(row["ground_truth"], row["dataset"], where)
            rows[key] = rows.get(key, {}) | row
    if not rows:
        raise DataError(f"{files}: no prediction for a clip of --data; "
                        f"the first there: {', '.join(unknown[:3]) or 'none'}")
    order = truth or rows
    return ([rows[key] for key in order if key in rows],
            {"missing": [truth[key].video_id for key in truth if key not in rows], "unknown": unknown})


def _rows(path: Path, names) -> Iterator[tuple[str, dict]]:
    """(place in the file, row) of a file in any of the three forms."""
    text = read_text(path)
    first = text.lstrip()[:1]
    if first == "{":
        return _jsonl_rows(path)
    if not names:
        raise DataError(f"{path}: a released results file holds no labels; give --data, too")
    return _judged_rows(text, path) if first == "[" else _text_rows(text, path, names)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict]]:
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or "video_id" not in row or not isinstance(row.get("output"), str):
            raise DataError(f"{where}: expected fields video_id and output (text), found {str(row)[:80]}")
        for field in ("ground_truth", "dataset"):
            if not isinstance(row.get(field, ""), str):
                raise DataError(f"{where}: field {field} is not text: {str(row[field])[:80]}")
        yield where, {**row, "video_id": str(row["video_id"])}


def _judged_rows(text: str, path: Path) -> Iterator[tuple[str, dict]]:
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}, line {getattr(error, 'lineno', 1)}: not JSON ({error})") from None
    for number, entry in enumerate(entries):
        for clip, judged in entry.items() if isinstance(entry, dict) else (("?", None),):
            if not isinstance(judged, dict) or not all(isinstance(judged.get(field), str)
                                                       for field in ("reason", "gpt_response")):
                raise DataError(f'{path}, entry {number}: expected {{clip: {{"reason": ..., "gpt_response": ...}}}}')
            yield f"{path}, entry {number}", {"video_id": clip, "reason": judged["reason"],
                                              "gpt_response": judged["gpt_response"]}


def _text_rows(text: str, path: Path, names) -> Iterator[tuple[str, dict]]:
    """A record begins where a line starts with a clip and `|`: a clip of the data, or a name with a clip's suffix."""
    where, row = "", None
    for number, line in enumerate(text.splitlines(), 1):
        clip, bar, rest = line.partition("|")
        if bar and (clip_key(clip) in names or re.fullmatch(r"\S+\.(mp4|avi|mkv|webm)", clip.strip(), re.IGNORECASE)):
            if row:
                yield where, row
            where, row = f"{path}, line {number}", {"video_id": clip.strip(), "output": rest}
        elif row:
            row["output"] += "\n" + line
        elif line.strip():
            raise DataError(f"{path}, line {number}: expected `clip|output`, found {line[:80]!r}; "
                            "are these results of the clips in --data?")
    if row:
        yield where, row
