"""Files of predictions, in the forms in which systems keep them: `read_predictions`.

Ours: JSONL rows {"video_id", "output", "ground_truth", "dataset"}. The release's: text `<clip>|<output>`, where an
output may run over lines, and judged results, a JSON list of {clip: {"reason", "gpt_response"}}. The last two name
neither label nor data set: they are joined with the data's examples by clip.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from erv_min.base.chat import after_thought
from erv_min.base.errors import DataError
from erv_min.base.files import read_jsonl
from erv_min.base.options import file_list
from erv_min.data.readers import check_label, clip_key, read_text
from erv_min.emotions import labels
from erv_min.inputs import Example
from erv_min.judge import read_answer


def read_predictions(files: str, examples: list[Example]) -> tuple[list[dict], dict]:
    """Rows from one or several (comma-separated) files, joined by data set and clip: outputs from one, judgements from
    another.

    examples: the evaluated split; may be empty for JSONL rows that carry their ground truth. Returns the rows in the
    order of the examples, and {"missing": [...], "unknown": [...]} clips. Raises DataError naming file, line and field,
    on a second output of one clip, and on a clip of several data sets in a row that names none.
    """
    truth, datasets = {}, defaultdict(set)  # (data set, clip_key) -> example; clip_key -> the data sets that have it
    for example in examples:
        clip = clip_key(example.video_id)
        if truth.setdefault((example.dataset, clip), example).path != example.path:
            raise DataError(f"{truth[example.dataset, clip].path} and {example.path} have one name: predictions cannot "
                            "be told apart")
        datasets[clip].add(example.dataset)
    rows, first, unknown = {}, {}, []  # first: (key, kind) -> its place in the files
    for path in file_list(files):
        for where, row in _rows(Path(path.strip()), datasets):
            clip = clip_key(row["video_id"])
            known = [row["dataset"].lower()] if row.get("dataset") else sorted(datasets.get(clip, []))
            if len(known) > 1:
                raise DataError(f"{where}: clip {row['video_id']} is in {' and '.join(known)}, and the file does not "
                                "say which: give --data one data set at a time")
            key = (known[0] if known else "", clip)
            if key in truth:
                example = truth[key]
                row |= {"video_id": example.video_id, "ground_truth": example.label, "dataset": example.dataset}
            elif truth:
                unknown.append(row["video_id"])
                continue
            elif not row.get("ground_truth") or not known:
                raise DataError(f"{where}: clip {row['video_id']} has no ground_truth and dataset; give --data, too")
            row["ground_truth"] = check_label(row["ground_truth"], row["dataset"], where)
            kind = "judgement" if "gpt_response" in row else "output"
            if (key, kind) in first:
                raise DataError(f"{where}: a second {kind} of clip {row['video_id']}, after {first[key, kind]}")
            first[key, kind] = where
            if kind == "judgement":
                _read_judgement(row, rows.get(key, {}).get("output"))
            rows[key] = rows.get(key, {}) | row
    if not rows:
        raise DataError(f"{files}: no prediction for a clip of --data; "
                        f"the first there: {', '.join(unknown[:3]) or 'none'}")
    return ([rows[key] for key in truth or rows if key in rows],
            {"missing": [truth[key].video_id for key in truth if key not in rows], "unknown": unknown})


def _read_judgement(row: dict, output: str | None) -> None:
    """The release's fields of a row become ours; `output`: the clip's in another file, without it the reason stands."""
    reason, said = row.pop("reason"), after_thought(row.pop("gpt_response"))
    judgement = read_answer(said, labels(row["dataset"]))
    row |= {"judged_emotion": judgement.emotion, "judge_status": judgement.status}
    row["output"] = output or (reason if "<think>" in reason else f"<think>{reason}</think>")


def _rows(path: Path, names) -> Iterator[tuple[str, dict]]:
    """(place in the file, row) of a file in any of the three forms."""
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: no prediction in it")
    if text.lstrip().startswith("{"):
        return _jsonl_rows(path)
    if not names:
        raise DataError(f"{path}: a released results file holds no labels; give --data, too")
    return _judged_rows(text, path) if text.lstrip().startswith("[") else _text_rows(text, path, names)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict]]:
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or "video_id" not in row or not isinstance(row.get("output"), str):
            raise DataError(f"{where}: expected fields video_id and output (text), found {str(row)[:80]}")
        for field in ("ground_truth", "dataset", "judged_emotion"):
            if not isinstance(row.get(field) or "", str):
                raise DataError(f"{where}: field {field} is not text: {str(row[field])[:80]}")
        yield where, {**row, "video_id": str(row["video_id"])}


def _judged_rows(text: str, path: Path) -> Iterator[tuple[str, dict]]:
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}, line {getattr(error, 'lineno', 1)}: not JSON ({error})") from None
    for number, entry in enumerate(entries):
        for clip, judged in entry.items() if isinstance(entry, dict) else [("?", None)]:
            row = {field: judged.get(field) for field in ("reason", "gpt_response")} if isinstance(judged, dict) else {}
            if not row or not all(isinstance(x, str) for x in row.values()):
                raise DataError(f'{path}, entry {number}: expected {{clip: {{"reason": ..., "gpt_response": ...}}}}')
            yield f"{path}, entry {number}", {"video_id": clip, **row}


def _text_rows(text: str, path: Path, names) -> Iterator[tuple[str, dict]]:
    """A record begins at a line that starts with a clip and `|`: a clip of the data, or a name with a clip's suffix."""
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        clip, bar, rest = line.partition("|")
        if bar and (clip_key(clip) in names or re.fullmatch(r"\S+\.(mp4|avi|mkv|webm)", clip.strip(), re.IGNORECASE)):
            records.append((f"{path}, line {number}", {"video_id": clip.strip(), "output": rest}))
        elif records:
            records[-1][1]["output"] += "\n" + line
        elif line.strip():
            raise DataError(f"{path}, line {number}: expected `clip|output`, found {line[:80]!r}; "
                            "are these results of the clips in --data?")
    return iter(records)
