"""Files of predictions, in the forms in which systems keep them: `read_predictions`.

Ours: JSONL rows {"video_id", "output", "ground_truth", "dataset"}. The release's: text `<clip>|<output>`, where an
output may run over lines, and judged results, a JSON list of {clip: {"reason", "gpt_response"}}. The last two name
neither label nor data set: they are joined with the data's examples by clip.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from erv_min.base.chat import after_thought
from erv_min.base.errors import DataError
from erv_min.base.files import read_json, read_jsonl, read_text
from erv_min.base.options import file_list
from erv_min.data.readers import check_label, clip_key
from erv_min.emotions import LABELS, labels
from erv_min.inputs import Example
from erv_min.judge import read_answer

Rows = Iterator[tuple[str, dict]]  # (place in the file, row)


def read_predictions(files: str, examples: list[Example]) -> tuple[list[dict], dict]:
    """Rows from one or several (comma-separated) files, joined by data set and clip: outputs from one, judgements from
    another. examples: the evaluated split; may be empty for JSONL rows that carry their ground truth.

    Returns the rows in the order of the examples, and {"missing": [...], "unknown": [...]} clips. Raises DataError, for
    a second output of one clip and for a clip of several data sets in a row that names none, too."""
    truth = {}  # (data set, clip_key) -> example
    for example in examples:
        first = truth.setdefault((example.dataset, clip_key(example.video_id)), example)
        if first.path != example.path:
            raise DataError(f"{first.path} and {example.path} have one name: predictions cannot be told apart")
    clips = {clip for _, clip in truth}
    rows, first, unknown = {}, {}, []  # first: (key, kind) -> its place in the files
    for path in file_list(files):
        begin = read_text(path := Path(path.strip())).lstrip()[:1]
        rows_of = {"{": _jsonl_rows, "[": _judged_rows}.get(begin, _text_rows)
        for where, row in rows_of(path, clips):
            clip = clip_key(row["video_id"])
            known = [row["dataset"].lower()] if row.get("dataset") else [x for x in LABELS if (x, clip) in truth]
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
            kind = "output" if "output" in row else "judgement"
            if (key, kind) in first:
                raise DataError(f"{where}: a second {kind} of clip {row['video_id']}, after {first[key, kind]}")
            first[key, kind] = where
            if kind == "judgement":
                said = read_answer(after_thought(row.pop("gpt_response")), labels(row["dataset"]))
                row |= {"judged_emotion": said.emotion, "judge_status": said.status}
            rows[key] = rows.get(key, {}) | row
    if not rows:
        raise DataError(f"{files}: no prediction for a clip of --data; "
                        f"the first there: {', '.join(unknown[:3]) or 'none'}")
    for row in rows.values():
        reason = row.pop("reason", "")  # of a judgement; it stands for an output that no file has
        row.setdefault("output", reason if "<think>" in reason else f"<think>{reason}</think>")
    return ([rows[key] for key in truth or rows if key in rows],
            {"missing": [truth[key].video_id for key in truth if key not in rows], "unknown": unknown})


def _jsonl_rows(path: Path, _) -> Rows:
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, row {number}"
        if "video_id" not in row or not isinstance(row.get("output"), str):
            raise DataError(f"{where}: expected fields video_id and output (text), found {str(row)[:80]}")
        if odd := [x for x in ("ground_truth", "dataset", "judged_emotion") if not isinstance(row.get(x) or "", str)]:
            raise DataError(f"{where}: field {odd[0]} is not text: {str(row[odd[0]])[:80]}")
        yield where, {**row, "video_id": str(row["video_id"])}


def _judged_rows(path: Path, _) -> Rows:
    form = '{clip: {"reason": ..., "gpt_response": ...}}'
    for number, entry in enumerate(read_json(path, list, once=True)):
        for clip, judged in entry.items() if isinstance(entry, dict) else [("?", None)]:
            row = {field: judged.get(field) for field in ("reason", "gpt_response")} if isinstance(judged, dict) else {}
            if not row or not all(isinstance(x, str) for x in row.values()):
                raise DataError(f"{path}, entry {number}: expected {form}")
            yield f"{path}, entry {number}", {"video_id": clip, **row}


def _text_rows(path: Path, clips) -> Rows:
    """A record begins at a line that starts with a clip and `|`: a clip of the data, or a name with a clip's suffix."""
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        clip, bar, rest = line.partition("|")
        if bar and (clip_key(clip) in clips or re.fullmatch(r"\S+\.(mp4|avi|mkv|webm)", clip.strip(), re.IGNORECASE)):
            records.append((f"{path}, line {number}", {"video_id": clip.strip(), "output": rest}))
        elif records:
            records[-1][1]["output"] += "\n" + line
        elif line.strip():
            raise DataError(f"{path}, line {number}: expected `clip|output`, found {line[:80]!r}; "
                            "are these results of the clips in --data?")
    if not records:
        raise DataError(f"{path}: no prediction in it")
    return iter(records)
