"""The data sets' own files -> `Example`s (section 4.1; formats as users already have them).

DFEW (split 5), MAFW (set 5), EMER, MERR-fine, RAVDESS and the training JSON of the released code. A reader reads
annotations only: whether the clips are there is `examples.check_clips`'s question. Every label is checked against the
data set's list, every clip stays inside the data root, an id may occur once (the training JSON may repeat a clip:
one `Example` per entry). What cannot be read raises DataError with file, line or entry, field and the way out.
A data root is the data set's folder, or an annotation file, whose name must not be that of the other split.
"""

import csv
import io
import json
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from erv_min.emotions import LABELS, labels, normalize
from erv_min.run.errors import DataError

log = logging.getLogger("erv_min")
CLIP_FOLDERS = ("clip", "clips", "data/clips", "video", "videos", "")  # searched in this order under a data root
CLIP_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".wav", ".flac")
MISSING = {"dfew": "clip/{}.mp4", "mafw": "clips/{}.mp4", "emer": "{}.avi", "merr": "{}.avi"}  # where a clip should be
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


class Source:
    """One annotation file while it is read: its data root, the clips that lie there, and the examples found so far."""

    def __init__(self, dataset: str, split: str, root: str | Path, *names: str, prefer: str = ""):
        self.dataset, self.split, self.root = dataset, split, Path(root)
        self.path = find_annotation(self.root, *names, split=split, prefer=prefer)
        if self.root.is_file():  # its clips: beside it, else the nearest folder of clips around it
            above = (up for up in self.path.parents[:5] if any(os.path.isdir(up / x) for x in CLIP_FOLDERS if x))
            self.root = self.path.parent if index_clips(self.path.parent) else next(above, self.path.parent)
        self.clips, self.places, self.examples = index_clips(self.root), {}, []  # places: clip -> where it is annotated

    def add(self, name: str, place: str, label: str, explanation: str = "", subtitle: str = "") -> None:
        """One more example; `name` is the clip's, with or without the file's suffix. Raises DataError."""
        inside(self.root, name, f"{self.path}, {place}")
        stem = Path(name).stem if Path(name).suffix.lower() in CLIP_SUFFIXES else name
        number = stem.lstrip("0") or "0" if stem.isdecimal() else stem  # DFEW's 1 and 00001 are one clip
        if number in self.places:
            raise DataError(f"{self.path}, {place}: clip {stem!r} was already on {self.places[number]}; "
                            "each may be there once")
        self.places[number] = place
        missing = self.root / MISSING[self.dataset].format(stem)
        clip = next((self.clips[x] for x in (stem, number, number.zfill(5)) if x in self.clips), missing)
        self.examples.append(Example(stem, clip, label, self.dataset, explanation, subtitle, self.split))


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


def find_annotation(root: Path, *names: str, split: str, prefer: str = "") -> Path:
    """The annotation file: `root` itself, else the first of `names` that is in root or up to three folders below it.

    Of several on one level the one with `prefer` in its path. Raises DataError for none, for more than one, and for a
    file whose name says the other split.
    """
    if root.is_file():
        words = re.findall("[a-z]+", root.name.lower())  # `single_trainset_5.csv` says train, `contest.csv` nothing
        said = [part for part in ("train", "test") if any(word.startswith(part) for word in words)]
        if said and split not in said:
            raise DataError(f"{root}: is the {said[0]} split, and {split} was asked for; give the {split} file, or the "
                            "folder that holds both")
        return root
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the data set's folder as name:/path")
    for prefix, name in ((prefix, name) for prefix in ("", "*/", "*/*/", "*/*/*/") for name in names):
        found = sorted(path for path in root.glob(prefix + name) if path.is_file())
        found = [path for path in found if prefer and prefer in path.as_posix()] or found
        if len(found) > 1:
            raise DataError(f"{root}: more than one annotation file ({', '.join(map(str, found[:5]))}); "
                            "give the file itself instead of the folder")
        if found:
            return found[0]
    raise DataError(f"{root}: no {' or '.join(names)} in it, nor in the three levels below; "
                    "give the folder that holds the official annotation files")


def index_clips(root: Path) -> dict[str, Path]:
    """File name without suffix -> clip, for the folders in which the data sets keep them."""
    found = {}
    for folder in (root / name for name in CLIP_FOLDERS if (root / name).is_dir()):
        files = [path for path in folder.iterdir() if path.suffix.lower() in CLIP_SUFFIXES]
        for path in sorted(files, key=lambda path: CLIP_SUFFIXES.index(path.suffix.lower())):
            found.setdefault(path.stem, path)
    return found


def inside(root: Path, name: str, where: str) -> Path:
    """root/name. Raises DataError where that leaves `root`. Symbolic links are kept: data roots are full of them."""
    if "\0" in name or any(len(part.encode(errors="replace")) > 250 for part in Path(name).parts):
        raise DataError(f"{where}: {name[:80]!r}... cannot be a file's name")
    path = Path(os.path.abspath(Path(root) / name))
    if not path.is_relative_to(os.path.abspath(root)):
        raise DataError(f"{where}: {name!r} lies outside the data root {root}; "
                        "move the clip below it, or give a root that holds all clips")
    return path


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


# ---------------------------------------------------------------------------------------------------- data sets

def read_dfew(root: str | Path, split: str) -> list[Example]:
    """`single_{train,test}set_5.csv`: a header, then `clip number,label id` (1..7); clips `clip/<number>.mp4`."""
    source = Source("dfew", split, root, f"single_{split}set_5.csv")
    for line, text in enumerate(read_text(source.path).splitlines(), 1):
        row = [field.strip(' \t"') for field in text.split(",")]
        if not any(row) or (line == 1 and not row[-1].isdecimal()):  # blank, or the header
            continue
        if len(row) != 2 or not row[0].isdecimal() or len(row[0]) > 20:
            raise DataError(f"{source.path}, line {line}: expected `clip number,label id`, found {text!r}")
        source.add(row[0], f"line {line}", label_from_id(row[1], "dfew", f"{source.path}, line {line}"))
    return _some(source.examples, source.path)


def read_mafw(root: str | Path, split: str) -> list[Example]:
    """`set_5/{train,test}.txt`: a line is `01234.mp4 label`, a word or an id (1..11); clips `clips/*.mp4`.

    Of the official archive, `Train & Test Set/single/no_caption/set_5`: section 4.1's counts are of single labels.
    """
    source = Source("mafw", split, root, f"set_5/{split}.txt", prefer="/single/no_caption/")
    for line, text in enumerate(read_text(source.path).splitlines(), 1):
        where, fields = f"{source.path}, line {line}", text.split()
        if fields and len(fields) != 2:
            raise DataError(f"{where}: expected `01234.mp4 label`, found {text!r}")
        if fields:
            read = label_from_id if fields[1].isdecimal() else check_label
            source.add(fields[0], f"line {line}", read(fields[1], "mafw", where))
    return _some(source.examples, source.path)


def read_emer(root: str | Path) -> list[Example]:
    """CSV with names, emotions, subtitles, reasons (UTF-8 or GB18030: it was edited in both); clips `<name>.avi`.

    A cell with two labels is an error: e_gt is one label (Eq. 4, 5), and nothing says that the first is the main one.
    """
    source, doubtful = Source("emer", "train", root, "EMER.csv", "*.csv"), []
    path, wanted = source.path, ("names", "emotions", "subtitles", "reasons")
    rows = csv.DictReader(io.StringIO(read_text(path, ("utf-8-sig", "gb18030"))), skipinitialspace=True)
    try:
        rows.fieldnames = columns = [str(name).strip() for name in rows.fieldnames or ()]
        if missing := [name for name in wanted if name not in columns]:
            raise DataError(f"{path}, line 1: no column {', '.join(missing)}; found {', '.join(columns) or 'nothing'}. "
                            f"EMER's file has {', '.join(wanted)}")
        for row in rows:
            place, where = f"line {rows.line_num}", f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: {'more' if None in row else 'fewer'} fields than columns; quote commas")
            name, emotions, subtitle, reason = (row[column].strip() for column in wanted)
            if not name or not reason:
                raise DataError(f"{where}: an empty field {'reasons' if name else 'names'}")
            words = [word.strip() for word in re.split(r"[^\w ]+", emotions) if word.strip()] or [""]
            label, *others = dict.fromkeys(check_label(word, "emer", f"{where}, field emotions") for word in words)
            doubtful += [str(rows.line_num)] if others else []
            source.add(name, place, label, reason, subtitle)
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file ({error}); look for an unclosed quote") from None
    if doubtful:
        raise DataError(f"{path}, lines {', '.join(doubtful)}, field emotions: more than one label; a clip has one "
                        "ground truth: keep one in each, or take the lines out")
    return _some(source.examples, path)


def read_merr(root: str | Path) -> list[Example]:
    """MERR-fine's JSON `{clip: {"pseu_emotion", "smp_reason_caption", "text", ...}}`; clips .avi or .mp4.

    `doubt` is among its labels and not among the verifier's 11: who trains the verifier leaves those clips out. Table
    5's row, 4,132, is 355 short of section 4.1's 4,487; it has no `worried` clips, and the paper says of neither why.
    """
    source = Source("merr", "train", root, "MERR_fine_grained.json", "*.json")
    for name, entry in _json(source.path, dict, '{clip: {"pseu_emotion": ..., ...}}').items():
        where = f"{source.path}, entry {name!r}"
        if not isinstance(entry, dict) or not isinstance(entry.get("pseu_emotion"), str):
            raise DataError(f"{where}: no text in field pseu_emotion")
        label = check_label(entry["pseu_emotion"], "merr", f"{where}, field pseu_emotion")
        source.add(name, f"entry {name!r}", label,
                   *(str(entry.get(key) or "").strip() for key in ("smp_reason_caption", "text")))
    return _some(source.examples, source.path)


def read_ravdess(root: str | Path) -> list[Example]:
    """The clips' names are the annotation: `01-01-06-01-02-01-12.mp4` = modality (01: sound and picture), channel
    (01: speech, 02: song), emotion, ... All full-AV speech below `root` (`Actor_01/` to `Actor_24/`).

    Song beside it is left out and counted: the release's eight labels are those of speech, song has six of them.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds RAVDESS's Actor_01 to Actor_24")
    paths = [path for path in sorted(root.rglob("??-??-??-??-??-??-??.*")) if path.suffix.lower() in CLIP_SUFFIXES]
    kinds, found = Counter(path.name[:5] for path in paths), {}
    for path in (path for path in paths if path.name.startswith("01-01-")):
        code = path.stem.split("-")[2]
        if code not in RAVDESS_EMOTIONS:
            raise DataError(f"{path}: emotion {code!r} (third field of the name) is not in 01..08")
        if path.stem in found:
            raise DataError(f"{path}: is there twice, also as {found[path.stem].path}; each clip may be there once")
        found[path.stem] = Example(path.stem, path, RAVDESS_EMOTIONS[code], "ravdess", split="test")
    if not found:
        seen = ", ".join(f"{count} of modality {kind[:2]}, channel {kind[3:]}" for kind, count in kinds.items())
        raise DataError(f"{root}: no clip of modality 01 (sound and picture), channel 01 (speech) like "
                        f"01-01-06-01-02-01-12.mp4; found {seen or 'no RAVDESS file name at all'}. "
                        "Unpack Video_Speech_Actor_*.zip there")
    if kinds["01-02"]:
        log.warning("%s: %d clips of song left out, %d of speech taken", root, kinds["01-02"], len(found))
    return list(found.values())


def read_training_json(path: str | Path, root: str | Path | None = None, dataset: str | None = None,
                       split: str = "sft") -> list[Example]:
    """The released code's training JSON (SFT and RL): one Example per entry; answers with tags, or a bare label.

    `video` is relative to `root` (default: the file's folder). `dataset` None: taken from a folder of that name in
    the video's path, else the first data set whose list has every label of the file. Such a file carries no split:
    its entries are called by the one that is asked for.
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
        think, answer = (re.search(f"<{tag}>(.*?)</{tag}>", answers[0], re.DOTALL) for tag in ("think", "answer"))
        if "<" in answers[0] and not (think and answer):
            raise DataError(f"{where}: the gpt turn is neither <think>..</think><answer>..</answer> nor a bare label: "
                            f"{answers[0][:80]!r}")
        label = (answer[1] if answer else answers[0]).strip()
        clip = inside(root, entry["video"].strip(), f"{where}, field video")
        rows.append((clip, label, think[1].strip() if think else "", where))
    whole = dataset or next(
        (name for name in LABELS if all(normalize(label, name) == label.lower() for _, label, _, _ in rows)), None)
    stems = Counter(clip.stem for clip in {row[0] for row in rows})
    examples = []
    for clip, label, explanation, where in rows:
        parts = {part.lower() for part in clip.relative_to(root).parts[:-1]} if dataset is None else ()
        name = next((name for name in LABELS if name in parts), whole)
        if name is None:
            raise DataError(f"{path}: no data set's label list holds all its labels; name one: json:mafw:{path}")
        video_id = clip.stem if stems[clip.stem] == 1 else clip.relative_to(root).with_suffix("").as_posix()
        examples.append(Example(video_id, clip, check_label(label, name, where), name, explanation, split=split))
    return _some(examples, path)


def _json(path: Path, kind: type, form: str):
    """The file's value, a `kind`. json.load silently keeps the last of two equal keys: here they are an error."""
    def once(pairs: list) -> dict:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise DataError(f"{path}: {key!r} is there twice; each clip may be there once")
        return dict(pairs)

    try:
        value = json.loads(read_text(path), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise DataError(f"{path}: not JSON of any use (nested too deep)") from None
    if not isinstance(value, kind):
        raise DataError(f"{path}: expected {form}, found a {type(value).__name__}")
    return value


def _some(examples: list[Example], path: Path) -> list[Example]:
    if not examples:
        raise DataError(f"{path}: no example in it")
    return examples
