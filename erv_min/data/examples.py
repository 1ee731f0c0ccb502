"""Examples of any mixture of data sets, and whether all their clips are there. Annotations are read by readers.py."""

import os
import re
from collections import Counter
from pathlib import Path

from erv_min.base.errors import DataError
from erv_min.base.files import atomic_write
from erv_min.data.readers import FOLDS, FORMATS, note, read_annotated, read_training_json
from erv_min.emotions import labels
from erv_min.inputs import Example

SPLITS = {"toy": ("train", "test", "sft", "tune"), "emer": ("train", "sft"), "merr": ("train", "sft")}


def load_examples(spec: str, split: str = "train") -> list[Example]:
    """Reads a mixture such as "dfew:/path,mafw:/path". Raises DataError.

    split: "train" | "test" | "sft" (the world's train.json for toy, else the training split) | "tune" (a toy world's
    clips to tune settings on). `dfew:/path@set_3`, `mafw:/path@set_3`: another of the five sets than the paper's, 5.
    `json:[dataset:]/file.json[@/clips]` is a training JSON in the released form, which carries no split; `dataset`
    (`json:mafw:/file.json`) may be left out if every clip lies below a folder called like its data set.
    """
    examples = []
    for part in re.split(r",(?=\w+:)", spec.strip()):
        name, _, path = part.strip().partition(":")
        name = name.lower()
        if not path or name not in (*FORMATS, "toy", "json"):
            raise DataError(f"--data {part!r}: expected name:/path with name one of toy, {', '.join(FORMATS)}, "
                            "or json:mafw:/file.json; dfew:/path@set_3 is another set than the paper's 5; several are "
                            "joined by commas")
        if split not in (splits := SPLITS.get(name, ("train", "test", "sft"))):
            raise DataError(f"--data {part}: has no {split} split; there are {', '.join(splits)}")
        path, fold = re.fullmatch(r"(.+?)(?:@set_([1-5]))?", path).groups() if name in FOLDS else (path, None)
        if fold and os.path.isfile(path):
            raise DataError(f"--data {part}: a file is one set already; give its folder, or leave @set_{fold} out")
        if name == "toy" and not (Path(path) / "world.json").is_file():
            raise DataError(f"{path}: no finished toy world (world.json is written last); render it again")
        if name == "json":
            dataset, file, clips = re.fullmatch(r"(?:(\w+):)?(.+?)(?:@(.+))?", path).groups()
            found = read_training_json(file, clips, dataset, split)
        elif name == "toy" and split == "sft":
            found = read_training_json(Path(path) / "train.json", path, "dfew")
        else:
            found = read_annotated("dfew" if name == "toy" else name, path, "train" if split == "sft" else split,
                                   fold or "5")
        if not found:
            raise DataError(f"--data {part}: no example in it")
        examples += found
    return examples


def too_many(failed: int, total: int, allow_missing: float, first="", what: str = "cannot be decoded") -> None:
    """Raises DataError if more than the fraction `allow_missing` of `total` clips failed, or all of them. `first`: the
    first one or its error."""
    if failed > allow_missing * total or 0 < failed == total:
        raise DataError(f"{failed} of {total} clips {what} ({failed / total:.1%}), the first: {first}. Check data root "
                        f"and clips, or allow more than {allow_missing:.1%} (--allow-missing)")


def check_clips(examples: list[Example], allow_missing: float = 0.01,
                report: str | Path | None = None) -> list[Example]:
    """The examples whose clip is on the disk; the others are logged, and listed in `report`. Raises as too_many."""
    clips = {example.path for example in examples}
    found = set(filter(os.path.exists, clips))  # a file, or a folder of frames
    if missing := sorted(map(str, clips - found)):
        first = missing[0] + (f"; all of them: {report}" if report else "")
        if report:
            atomic_write(report, "".join(f"{path}\n" for path in missing))
        too_many(len(missing), len(clips), allow_missing, first, "are missing")
        note("%d of %d clips are missing, the first: %s", len(missing), len(clips), first)
    return [example for example in examples if example.path in found]


def summary(examples: list[Example]) -> str:
    """A line per data set and split: clips, examples, and examples per class."""
    lines = []
    for dataset, split in dict.fromkeys((example.dataset, example.split) for example in examples):
        part = [example for example in examples if (example.dataset, example.split) == (dataset, split)]
        there = [os.path.exists(path) for path in {example.path for example in part}]
        count = Counter(example.label for example in part)
        classes = ", ".join(f"{label} {count[label]}" for label in labels(dataset))
        lines.append(f"{dataset} {split}: {sum(there)} clips found, {len(there) - sum(there)} missing, "
                     f"{len(part)} examples ({classes})")
    return "\n".join(lines)
