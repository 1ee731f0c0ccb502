"""The data sets' own files -> `Example`s (section 4.1): DFEW, MAFW, EMER, MERR-fine, and the release's training JSON.

Annotations only: whether the clips are there is `examples.check_clips`'s question. A label is one of the data set's, a
clip (a file, or a folder of frames) lies inside the data root, and is there once (the training JSON may repeat it).
What cannot be read raises DataError with file, line or entry, and the way out. A data root is the data set's folder, or
an annotation file, whose name must not be that of the other split.
"""

import csv
import io
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from erv_min.base.decode import frame_files
from erv_min.base.errors import DataError
from erv_min.base.files import read_json, read_text
from erv_min.emotions import LABELS, labels, normalize
from erv_min.inputs import Example
from erv_min.rewards import between

log = logging.getLogger("erv_min")
CLIP_FOLDERS = (  # searched in this order under a data root; clips with sound before folders of frames
    "clip", "clips", "data/clips", "Clip/original", "video", "videos", "Clip/clip_224x224", "Clip/clip_224x224_16f",
    "data/frames", "frames", "Clip", "")
CLIP_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".gif", ".wav", ".flac")
ABSENT = {"nan", "NaN", "NAN", "<NA>", "N/A", "n/a", "NULL", "null", "None"}  # how programs write an empty cell


def note(text: str, *values) -> None:
    """A warning, by the first process of a job alone: all of them read the same files."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(text, *values)


def cell(value) -> str:
    """The text of a cell, stripped; "" for an absent one: None, NaN, or what programs write for them."""
    text = str(value).strip()
    return "" if text in ABSENT else text


def find_annotation(root: Path, names: list[str], prefer: str) -> Path:
    """The first of `names` that is in `root` or up to three folders below it; of several on one level the one with
    `prefer` in its path. Raises DataError for none, and for more than one."""
    for pattern in (depth + name for depth in ("", "*/", "*/*/", "*/*/*/") for name in names):
        found = [path for path in sorted(root.glob(pattern)) if path.is_file() and not path.name.startswith("._")]
        found = [path for path in found if prefer in path.as_posix()] or found
        if len(found) > 1:
            raise DataError(f"{root}: more than one annotation file ({', '.join(map(str, found[:5]))}); "
                            "give the file itself instead of the folder")
        if found:
            return found[0]
    raise DataError(f"{root}: no {' or '.join(names)} in it or up to three levels below"
                    f"{'' if root.is_dir() else ' (no such folder)'}; give the folder that holds the official files")


def clip_key(name: str) -> str:
    """A clip's name however a system writes it: without folders, suffix and leading zeros, composed (NFC)."""
    path = PurePosixPath(unicodedata.normalize("NFC", str(name)).strip().replace("\\", "/"))
    stem = path.stem if path.suffix.lower() in CLIP_SUFFIXES else path.name
    return stem.lstrip("0") or "0" if stem.isdecimal() else stem


def clips_in(folder: Path) -> list[Path]:
    """The clips in a folder, by name: files, and folders of frames. macOS's own `._` files are left out and counted."""
    paths = [x for x in sorted(folder.iterdir()) if x.suffix.lower() in CLIP_SUFFIXES or frame_files(x)]
    clips = [path for path in paths if not path.name.startswith("._")]
    if len(clips) < len(paths):
        note("%s: %d files ._* skipped: macOS's own notes, no clips", folder, len(paths) - len(clips))
    return clips


def index_clips(root: Path) -> dict[str, Path]:
    """clip_key -> clip, for the folders in which the data sets keep them."""
    found = {}
    for folder in (root / name for name in CLIP_FOLDERS if (root / name).is_dir()):
        for path in sorted(clips_in(folder), key=lambda x: (*CLIP_SUFFIXES, x.suffix.lower()).index(x.suffix.lower())):
            found.setdefault(clip_key(path.name), path)
    return found


def inside(root: Path, name: str, where: str) -> Path:
    """root/name, as it is spelled on the disk: composed (NFC) or, by macOS, not (NFD). Raises DataError if that leaves
    `root`. Symbolic links are kept: data roots are full of them."""
    path = Path(os.path.abspath(root / name))
    if "\0" in name or not path.is_relative_to(os.path.abspath(root)):
        raise DataError(f"{where}: {name!r} lies outside the data root {root}; "
                        "move the clip below it, or give a root that holds all clips")
    others = (Path(os.path.abspath(root / unicodedata.normalize(form, name))) for form in ("NFC", "NFD"))
    return next(filter(os.path.exists, (path, *others)), path)


def check_label(text: str, dataset: str, where: str, ids: bool = False) -> str:
    """The label in the data set's own spelling, also from its 1-based id if the file may hold `ids`."""
    names = labels(dataset)
    numbered = {str(number): name for number, name in enumerate(names, 1)} if ids else {}
    label = numbered.get(text.lstrip("0")) or normalize(text, dataset)
    if label is None:
        raise DataError(f"{where}: label {text!r} is not one of {dataset}'s: {', '.join(names)}"
                        + f", or 1..{len(names)}" * ids)
    return label


Row = tuple[str, str, str, str, str]  # place in the file, clip, label, subtitle, explanation


def _clip_and_label(path: Path) -> Iterator[Row]:
    """DFEW: a header, then `clip number,label id` (1..7). MAFW: `01234.mp4 label`, a word or an id (1..11)."""
    for line, text in enumerate(read_text(path).splitlines(), 1):
        fields = re.findall(r'[^,\s"]+', text)
        if not fields or line == 1 and re.fullmatch("[^0-9]*,[^0-9]*", text):  # DFEW's header
            continue
        if len(fields) != 2:
            raise DataError(f"{path}, line {line}: expected a clip and its label, found {text!r}")
        yield f"line {line}", *fields, "", ""


def _emer(path: Path) -> Iterator[Row]:
    """CSV with names, emotions (one: e_gt of Eq. 4, 5), subtitles, reasons; UTF-8 or GB18030: it was edited in both."""
    rows = csv.DictReader(io.StringIO(read_text(path, "gb18030"), newline=None), skipinitialspace=True, strict=True)
    wanted, line = ("names", "emotions", "subtitles", "reasons"), 1  # line: the one that the next row begins on
    try:
        columns = rows.fieldnames or []
        if missing := [name for name in wanted if name not in columns]:
            raise DataError(f"{path}, line 1: no column {', '.join(missing)}; found {', '.join(columns) or 'nothing'}")
        line = rows.line_num + 1
        for row in rows:
            begin, line = line, rows.line_num + 1
            cells = [cell(row[name]) for name in wanted]
            if not any(map(cell, row.values())):
                continue
            if None in (*row, *row.values()) or not cells[0] or not cells[3]:
                raise DataError(f"{path}, line {begin}: more or less than {len(columns)} fields, or none in names or "
                                "reasons; quote commas")
            yield f"line {begin}", *cells
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not CSV ({error}); look for a quote that is never closed") from None


def _merr(path: Path) -> Iterator[Row]:
    """JSON `{clip: {"pseu_emotion", "smp_reason_caption", "text", ...}}`."""
    for name, entry in read_json(path, dict, once=True).items():
        if not isinstance(entry, dict) or not isinstance(entry.get("pseu_emotion"), str):
            raise DataError(f"{path}, entry {name!r}: no text in field pseu_emotion")
        texts = (cell(entry.get(field)) for field in ("pseu_emotion", "text", "smp_reason_caption"))
        yield f"entry {name!r}", name, *texts


FORMATS = {  # rows of a file, names of the annotation file, where a missing clip should be, which copy is meant
    "dfew": (_clip_and_label, ["single_{split}set_{fold}.csv", "{split}(single?labeled)/set_{fold}.csv"],
             "clip/{}.mp4", ""),
    # `Train & Test Set/single/no_caption` of the official archive: section 4.1's counts are of single labels
    "mafw": (_clip_and_label, ["set_{fold}/{split}.txt"], "clips/{}.mp4", "/single/no_caption/"),
    "emer": (_emer, ["EMER.csv", "track3_train_ovmerd.csv", "*.csv"], "{}.avi", ""),
    "merr": (_merr, ["MERR_fine_grained.json", "*.json"], "{}.avi", "")}
FOLDS = ("dfew", "mafw")  # come in five sets, each of a training and a test file


def read_annotated(dataset: str, root: str | Path, split: str, fold: str = "5") -> list[Example]:
    """The examples of a data set in FORMATS; `root` is its folder, or the annotation file. Raises DataError."""
    (rows, names, missing, prefer), path = FORMATS[dataset], Path(root)
    if path.is_file():
        said = (re.findall("(?<![a-z])(train|test)", path.name.lower())  # single_trainset_5.csv; but not contest.csv
                or re.findall(r"^(train|test)(?:_?(?:set|split|data))?(?!\w)", path.absolute().parent.name.lower()))
        if dataset in FOLDS and said and split not in said:
            raise DataError(f"{path}: is the {said[0]} split, and {split} was asked for; give the {split} file, or the "
                            "folder that holds both")
        # its clips: beside it, else the nearest folder of clips around it
        above = (up for up in path.absolute().parents[:5] if any((up / x).is_dir() for x in CLIP_FOLDERS if x))
        root = path.parent if index_clips(path.parent) else next(above, path.parent)
    else:
        root, path = path, find_annotation(path, [name.format(split=split, fold=fold) for name in names], prefer)
    clips, places, examples = index_clips(root), {}, []  # places: clip -> where it is annotated
    for place, name, label, subtitle, explanation in rows(path):
        where = f"{path}, {place}"
        inside(root, name, where)
        stem, key = Path(name).stem if Path(name).suffix.lower() in CLIP_SUFFIXES else name, clip_key(name)
        if key in places:  # DFEW's 1 and 00001 are one clip
            raise DataError(f"{where}: clip {stem!r} was already on {places[key]}; each may be there once")
        places[key] = place
        clip, label = clips.get(key, root / missing.format(stem)), check_label(label, dataset, where, dataset in FOLDS)
        examples.append(Example(stem, clip, label, dataset, explanation, subtitle, split))
    return examples


def read_training_json(path: str | Path, root: str | Path | None = None, dataset: str | None = None,
                       split: str = "sft") -> list[Example]:
    """The released code's training JSON (SFT and RL): one Example per entry; answers with tags, or a bare label.

    `video` is relative to `root` (default: the file's folder). `dataset` None: a folder of the video's path has its
    name. Such a file carries no split: `split` is given to its entries."""
    path = Path(path)
    root = Path(os.path.abspath(root or path.parent))
    examples, form = [], '{"video": PATH, "conversations": [..., {"from": "gpt", "value": TEXT}]}'
    for number, entry in enumerate(read_json(path, list, once=True)):
        where = f"{path}, entry {number}"
        try:
            video = entry["video"].strip()
            (said,) = (turn["value"].strip() for turn in entry["conversations"] if turn["from"] == "gpt")
        except (TypeError, KeyError, ValueError, AttributeError):
            video = said = ""
        think, answer = (between(said, f"<{tag}>", f"</{tag}>") for tag in ("think", "answer"))
        if not video or not said or "<" in said and None in (think, answer):
            raise DataError(f"{where}: expected {form} with one gpt turn, which is "
                            f"<think>..</think><answer>..</answer> or a bare label, found {str(entry)[:200]}")
        clip = inside(root, video, f"{where}, field video")
        folders = {part.lower() for part in clip.relative_to(root).parts[:-1]}
        name = dataset or next((name for name in LABELS if name in folders), "")
        if not name:
            raise DataError(f"{where}: no folder of {video!r} is a data set's name; name one: json:mafw:{path}")
        label = check_label(said if answer is None else answer, name, where)
        examples.append(Example(clip.stem, clip, label, name, cell(think), split=split))
    stems = Counter(clip.stem for clip in {example.path for example in examples})  # equal ones get the path as id
    return [x if stems[x.video_id] == 1 else replace(x, video_id=x.path.relative_to(root).with_suffix("").as_posix())
            for x in examples]
