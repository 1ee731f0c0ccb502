"""The data sets' own files -> `Example`s (section 4.1; formats as users already have them).

DFEW (split 5), MAFW (set 5), EMER, MERR-fine, RAVDESS and the training JSON of the released code. A reader reads
annotations only: whether the clips are there is `data.check_clips`'s question. Every label is checked against the
data set's list, every clip stays inside the data root, an id may occur once (the training JSON may repeat a clip:
one `Example` an entry). What cannot be read raises DataError with file, line or entry, field and the way out.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from erv_min.emotions import labels, normalize
from erv_min.run.errors import DataError

CLIP_FOLDERS = ("clip", "clips", "video", "videos", "")  # searched in this order under a data root
CLIP_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".wav", ".flac")
RAVDESS_EMOTIONS = {"01": "neutral", "02": "calm", "03": "happy", "04": "sad",
                    "05": "angry", "06": "fearful", "07": "disgust", "08": "surprised"}  # third field of a file name


@dataclass(frozen=True)
class Example:
    """One labelled clip, or one of several explanations of it. `label` is in the list of `dataset`, lower case."""
    video_id: str
    path: Path
    label: str
    dataset: str
    explanation: str = ""
    subtitle: str = ""
    split: str = ""


def read_text(path: Path, encodings=("utf-8-sig",)) -> str:
    """The file's text in the first of `encodings` that fits; a byte-order mark is dropped. Raises DataError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            failure = error
    raise DataError(f"{path}: not {' or '.join(encodings)} text (byte {failure.start}); save it as UTF-8")


def find_annotation(root: Path, *names: str) -> Path:
    """The annotation file: `root` itself, or the first of `names` in root or in at most two folders below it."""
    root = Path(root)
    if root.is_file():
        return root
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the data set's folder as name:/path")
    for prefix, name in ((prefix, name) for prefix in ("", "*/", "*/*/") for name in names):
        found = sorted(path for path in root.glob(prefix + name) if path.is_file())
        if len(found) > 1:
            raise DataError(f"{root}: more than one annotation file ({', '.join(map(str, found[:5]))}); "
                            "give the file itself instead of the folder")
        if found:
            return found[0]
    raise DataError(f"{root}: no {' or '.join(names)} in it, nor in the two levels below; "
                    "give the folder that holds the official annotation files")


def inside(root: Path, name: str, where: str) -> Path:
    """root/name. Raises DataError where that leaves `root`. Symbolic links are kept: data roots are full of them."""
    if "\0" in name or any(len(part.encode(errors="replace")) > 250 for part in Path(name).parts):
        raise DataError(f"{where}: {name[:80]!r}... cannot be a file's name")
    path = Path(os.path.abspath(Path(root) / name))
    if not path.is_relative_to(os.path.abspath(root)):
        raise DataError(f"{where}: {name!r} lies outside the data root {root}; "
                        "move the clip below it, or give a root that holds all clips")
    return path


def index_clips(root: Path) -> dict[str, Path]:
    """File name without suffix -> clip, for the folders in which the data sets keep them."""
    found: dict[str, Path] = {}
    for folder in CLIP_FOLDERS:
        if (Path(root) / folder).is_dir():
            files = [path for path in (Path(root) / folder).iterdir() if path.suffix.lower() in CLIP_SUFFIXES]
            for path in sorted(files, key=lambda path: CLIP_SUFFIXES.index(path.suffix.lower())):
                found.setdefault(path.stem, path)
    return found


def check_label(text: str, dataset: str, where: str) -> str:
    """The label in the data set's own spelling. Raises DataError where it is not in the list."""
    label = normalize(str(text), dataset)
    if label is None:
        raise DataError(f"{where}: label {text!r} is not one of {dataset}'s: {', '.join(labels(dataset))}")
    return label


def label_from_id(text: str, dataset: str, where: str) -> str:
    """1-based label id -> label."""
    names = labels(dataset)
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= len(names):
        raise DataError(f"{where}: label id {text!r} is not in 1..{len(names)} ({', '.join(names)})")
    return names[int(text) - 1]


def once(seen: dict, key, line, path: Path) -> None:
    """Notes the line on which `key` was met. Raises DataError at the second time."""
    if key in seen:
        raise DataError(f"{path}, line {line}: clip {key!r} was already on line {seen[key]}; each may be there once")
    seen[key] = line


# ---------------------------------------------------------------------------------------------------- data sets

def read_dfew(root: str | Path, split: str) -> list[Example]:
    """`single_{train,test}set_5.csv`: a header, then `clip number,label id` (1..7); clips `clip/<number>.mp4`."""
    path = find_annotation(Path(root), f"single_{split}set_5.csv")
    root = path.parent if Path(root).is_file() else Path(root)
    clips, seen, examples = index_clips(root), {}, []
    for line, row in enumerate(_csv(csv.reader(io.StringIO(read_text(path))), path), 1):
        row = [field.strip() for field in row]
        if not any(row) or (line == 1 and not row[-1].isdecimal()):  # blank, or the header
            continue
        if len(row) != 2 or not row[0].isdecimal() or len(row[0]) > 20:
            raise DataError(f"{path}, line {line}: expected `clip number,label id`, found {','.join(row)!r}")
        number = row[0]
        once(seen, int(number), line, path)
        label = label_from_id(row[1], "dfew", f"{path}, line {line}")
        names = (number, str(int(number)), f"{int(number):05d}")  # both spellings are around
        clip = next((clips[name] for name in names if name in clips), root / "clip" / f"{number}.mp4")
        examples.append(Example(number, clip, label, "dfew", split=split))
    return _some(examples, path)


def read_mafw(root: str | Path, split: str) -> list[Example]:
    """`set_5/{train,test}.txt`: `01234.mp4 label` a line, the label a word or an id (1..11); clips `clips/*.mp4`."""
    path = find_annotation(Path(root), f"set_5/{split}.txt")
    root = path.parent.parent if Path(root).is_file() else Path(root)
    clips, seen, examples = index_clips(root), {}, []
    for line, text in enumerate(read_text(path).splitlines(), 1):
        where, fields = f"{path}, line {line}", text.split()
        if not fields:
            continue
        if len(fields) != 2:
            raise DataError(f"{where}: expected `01234.mp4 label`, found {text!r}")
        name, label = fields
        inside(root, name, where)
        once(seen, Path(name).stem, line, path)
        label = label_from_id(label, "mafw", where) if label.isdecimal() else check_label(label, "mafw", where)
        clip = clips.get(Path(name).stem, root / "clips" / name)
        examples.append(Example(Path(name).stem, clip, label, "mafw", split=split))
    return _some(examples, path)


def read_emer(root: str | Path) -> list[Example]:
    """CSV with names, emotions, subtitles, reasons (UTF-8 or GB18030: it was edited in both); clips `<name>.avi`."""
    path = find_annotation(Path(root), "EMER.csv", "*.csv")
    root = path.parent if Path(root).is_file() else Path(root)
    rows = csv.DictReader(io.StringIO(read_text(path, ("utf-8-sig", "gb18030"))), skipinitialspace=True)
    columns = [str(name).strip() for name in rows.fieldnames or ()]
    missing = [name for name in ("names", "emotions", "subtitles", "reasons") if name not in columns]
    if missing:
        raise DataError(f"{path}, line 1: no column {', '.join(missing)}; found {', '.join(columns) or 'nothing'}. "
                        "EMER's file has names, emotions, subtitles, reasons")
    rows.fieldnames = columns
    clips, seen, examples = index_clips(root), {}, []
    for row in _csv(rows, path):
        where = f"{path}, line {rows.line_num}"
        if None in row or None in row.values():
            raise DataError(f"{where}: {'more' if None in row else 'fewer'} fields than columns; quote commas")
        name = row["names"].strip()
        if not name or not row["reasons"].strip():
            raise DataError(f"{where}: an empty field {'reasons' if name else 'names'}")
        inside(root, name, where)
        name = Path(name).stem if Path(name).suffix.lower() in CLIP_SUFFIXES else name
        once(seen, name, rows.line_num, path)
        label = check_label(row["emotions"].strip(" []'\""), "emer", f"{where}, field emotions")
        clip = clips.get(name, root / f"{name}.avi")
        examples.append(Example(name, clip, label, "emer", row["reasons"].strip(), row["subtitles"].strip(), "train"))
    return _some(examples, path)


def read_merr(root: str | Path) -> list[Example]:
    """MERR-fine's JSON `{clip: {"pseu_emotion", "smp_reason_caption", "text", ...}}`; clips .avi or .mp4.

    `doubt` is among its labels and not among the verifier's 11: who trains the verifier leaves those clips out. Table
    5's row, 4,132, is 355 short of section 4.1's 4,487; it has no `worried` clips, and the paper says of neither why.
    """
    path = find_annotation(Path(root), "MERR_fine_grained.json", "*.json")
    root = path.parent if Path(root).is_file() else Path(root)
    entries = _json(path, dict, '{clip: {"pseu_emotion": ..., ...}}')
    clips, examples = index_clips(root), []
    for name, entry in entries.items():
        where = f"{path}, entry {name!r}"
        if not isinstance(entry, dict) or not isinstance(entry.get("pseu_emotion"), str):
            raise DataError(f"{where}: no text in field pseu_emotion")
        inside(root, name, where)
        label = check_label(entry["pseu_emotion"], "merr", f"{where}, field pseu_emotion")
        explanation, subtitle = (str(entry.get(key) or "").strip() for key in ("smp_reason_caption", "text"))
        name = Path(name).stem if Path(name).suffix.lower() in CLIP_SUFFIXES else name
        clip = clips.get(name, root / f"{name}.avi")
        examples.append(Example(name, clip, label, "merr", explanation, subtitle, "train"))
    return _some(examples, path)


def read_ravdess(root: str | Path) -> list[Example]:
    """The clips' names are the annotation: `01-01-06-01-02-01-12.mp4` = modality (01: sound and picture), channel,
    emotion, ... All full-AV clips below `root` (`Actor_01/` to `Actor_24/`); the others are not read."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds RAVDESS's Actor_01 to Actor_24")
    names = [path for path in sorted(root.rglob("??-??-??-??-??-??-??.*")) if path.suffix.lower() in CLIP_SUFFIXES]
    seen, examples = {}, []
    for path in (path for path in names if path.stem.startswith("01-")):
        once(seen, path.stem, path.relative_to(root), root)
        code = path.stem.split("-")[2]
        if code not in RAVDESS_EMOTIONS:
            raise DataError(f"{path}: emotion {code!r} (third field of the name) is not in 01..08")
        label = check_label(RAVDESS_EMOTIONS[code], "ravdess", str(path))
        examples.append(Example(path.stem, path, label, "ravdess", split="test"))
    if not examples:
        kinds = ", ".join(f"{count} of modality {kind}" for kind, count in Counter(p.name[:2] for p in names).items())
        raise DataError(f"{root}: no clip of modality 01 (sound and picture) like 01-01-06-01-02-01-12.mp4; "
                        f"found {kinds or 'no RAVDESS file name at all'}. Unpack Video_Speech_Actor_*.zip there")
    return examples


def read_training_json(path: str | Path, root: str | Path | None = None, dataset: str | None = None,
                       split: str = "sft") -> list[Example]:
    """The released code's training JSON (SFT and RL): one Example an entry; answers with tags, or a bare label.

    `video` is relative to `root` (default: the file's folder). `dataset` None: taken from a folder of that name in
    the video's path, else the first data set whose list has every label of the file.
    """
    path = Path(path)
    root = Path(os.path.abspath(root or path.parent))
    rows = []
    for number, entry in enumerate(_json(path, list, '[{"video": ..., "conversations": [...]}]')):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("video"), str) or not entry["video"].strip():
            raise DataError(f"{where}: no path in field video")
        turns = entry.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{where}: field conversations is not a list of {{\"from\", \"value\"}}")
        answers = [turn.get("value") for turn in turns if turn.get("from") == "gpt"]
        if len(answers) != 1 or not isinstance(answers[0], str) or not answers[0].strip():
            raise DataError(f"{where}, field conversations: expected one gpt turn with text, found {len(answers)}")
        think = re.search(r"<think>(.*?)</think>", answers[0], re.DOTALL)
        answer = re.search(r"<answer>(.*?)</answer>", answers[0], re.DOTALL)
        if "<" in answers[0] and not (think and answer):
            raise DataError(f"{where}: the gpt turn is neither <think>..</think><answer>..</answer> nor a bare label: "
                            f"{answers[0][:80]!r}")
        label = (answer.group(1) if answer else answers[0]).strip()
        clip = inside(root, entry["video"].strip(), f"{where}, field video")
        rows.append((clip, label, think.group(1).strip() if think else "", where))
    whole = dataset or next((name for name in ("dfew", "mafw", "emer", "merr", "ravdess")
                             if all(normalize(row[1], name) == row[1].lower() for row in rows)), None)
    stems = Counter(clip.stem for clip in {row[0] for row in rows})
    examples = []
    for clip, label, explanation, where in rows:
        parts = {part.lower() for part in clip.relative_to(root).parts[:-1]} if dataset is None else ()
        name = next((name for name in ("dfew", "mafw", "emer", "merr", "ravdess") if name in parts), whole)
        if name is None:
            raise DataError(f"{path}: no data set's label list holds all its labels; name one: json:mafw:{path}")
        video_id = clip.stem if stems[clip.stem] == 1 else clip.relative_to(root).with_suffix("").as_posix()
        examples.append(Example(video_id, clip, check_label(label, name, where), name, explanation, split=split))
    return _some(examples, path)


def _csv(rows, path: Path):
    """The rows of a csv reader. Raises DataError where the file is not CSV."""
    try:
        yield from rows
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file ({error}); look for an unclosed quote") from None


def _json(path: Path, kind: type, form: str):
    try:
        value = json.loads(read_text(path), object_pairs_hook=lambda pairs: _no_twice(pairs, path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise DataError(f"{path}: not JSON of any use (nested too deep)") from None
    if not isinstance(value, kind):
        raise DataError(f"{path}: expected {form}, found a {type(value).__name__}")
    return value


def _no_twice(pairs, path: Path) -> dict:
    """JSON keeps the last of two equal keys without a word; two annotations of one clip are an error here."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise DataError(f"{path}: {key!r} is there twice; each clip may be there once")
    return dict(pairs)


def _some(examples: list[Example], path: Path) -> list[Example]:
    if not examples:
        raise DataError(f"{path}: no example in it")
    return examples
