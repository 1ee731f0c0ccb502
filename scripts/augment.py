"""The verifier's training data (section 3.2, appendix B): `scripts/augment.py STEP ...`

  annotated   EMER and MERR-fine as they are:    --data emer:/path,merr:/path --out human.jsonl
  describe    a policy explains training clips:  --model FOLDER --data dfew:/path,mafw:/path --out raw/
  label       figure 6, up to two emotions:      --input raw/descriptions.jsonl --ask openai:gpt-4.1 --out pseudo.jsonl
  complement  figure 7, for rare classes:       --input human.jsonl,pseudo.jsonl --ask openai:gpt-4.1-mini --out c.jsonl
  stats       table 5:                           --input human.jsonl,pseudo.jsonl,c.jsonl

Rows are what `scripts/erv.py --data` reads, with the raw answer, the prompt's figure, model and seed beside. A stopped
step goes on where it was (hosted answers lie in OUT.cache.jsonl). What has no usable answer goes to OUT.rejected.jsonl.
Texts are kept once; clips of a test split are refused.
"""

import argparse
import hashlib
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from erv_min.base.chat import ChatClient
from erv_min.base.errors import DataError
from erv_min.base.files import read_jsonl, write_jsonl
from erv_min.base.options import OneLineParser, checked, option, parser_for
from erv_min.base.processes import join_processes, run_script
from erv_min.data.examples import load_examples, too_many
from erv_min.data.pairs import counts_table, read_rows
from erv_min.data.readers import cell
from erv_min.emotions import ERV_LABELS, to_erv
from erv_min.inputs import Example
from erv_min.judge import permuted, read_answer
from erv_min.prompts import complement_prompt, label_prompt
from erv_min.rewards import extract_explanation
from erv_min.train.answers import predict_to_file
from erv_min.train.settings import PredictionSettings
from erv_min.train.start import check_names, clips_there


def text_key(text: str) -> str:
    return " ".join(text.lower().split())  # texts that differ in case and white space alone are one


def without_repeats(rows: list[dict]) -> list[dict]:
    """The first row of each text."""
    return list({text_key(row["text"]): row for row in reversed(rows)}.values())[::-1]


def annotated(examples) -> tuple[list[dict], Counter]:
    """Human descriptions -> rows, and how many of each label have no counterpart among the 11 (MERR's doubt)."""
    rows, left = [], Counter()
    for example in examples:
        if not example.explanation:
            left["without a description"] += 1
            continue
        try:
            label = to_erv(example.label)
        except DataError:
            left[example.label] += 1
            continue
        rows.append({"text": example.explanation, "labels": [label], "source": example.dataset,
                     "clip": f"{example.dataset}/{example.video_id}", "split": example.split})
    return without_repeats(rows), left


def described(rows: list[dict], model: str, seed: int) -> tuple[list[dict], list[dict]]:
    """A policy's outputs -> descriptions, and the rows whose output has no explanation."""
    found = [{"text": extract_explanation(row["output"]).strip(), "source": row["dataset"], "split": "train",
              "clip": f"{row['dataset']}/{row['video_id']}", "ground_truth": row["ground_truth"], "raw": row["output"],
              "model": model, "seed": seed} for row in rows]
    return without_repeats([row for row in found if row["text"]]), [row for row in found if not row["text"]]


def read_labels(raw: str) -> list[str]:
    """Figure 6's answer -> one or two of the 11 emotions; [] if it is anything else (three labels, another word)."""
    said = [read_answer(part, ERV_LABELS).emotion for part in re.split(r",|\band\b|\n", raw.strip()) if part.strip()]
    names = list(dict.fromkeys(said))
    return names if 1 <= len(names) <= 2 and None not in names else []


def labelled(rows: list[dict], client: ChatClient, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Descriptions -> (rows with labels, rejected rows); figure 6 with the 11 labels permuted for each description."""
    rows = without_repeats(rows)
    prompts = [label_prompt(row["text"], permuted(ERV_LABELS, row["text"], seed)) for row in rows]
    good, rejected = [], []
    for row, reply in zip(rows, client.ask(prompts, max_tokens=24)):
        names = [] if reply.error else read_labels(reply.text)
        row = {**row, "labels": names, "raw": reply.text or reply.error, "description_raw": row.get("raw", ""),
               "described_by": row.get("model", ""), "model": client.name, "prompt": "figure 6", "seed": seed}
        (good if names else rejected).append(row)
    return good, rejected


def complement_plan(rows: list[dict], target: int, classes: tuple[str, ...],
                    seed: int) -> list[tuple[str, list[str], int]]:
    """(emotion, two examples, seed of the draw) for each description that is missing to `target` per class: drawn from
    the class's pseudo-labelled rows, or all if these are fewer than two, by seed, class and number alone. Raises
    DataError if a class has less than two examples."""
    plan = []
    for emotion in classes:
        of_class = [row for row in rows if emotion in map(to_erv, row["labels"])]
        pool = [row["text"] for row in of_class if row.get("prompt") == "figure 6"]
        pool = pool if len(pool) > 1 else [row["text"] for row in of_class]
        for number in range(target - len(of_class)):
            if len(pool) < 2:
                raise DataError(f"--input holds {len(pool)} descriptions of {emotion}: figure 7 shows two")
            key = int.from_bytes(hashlib.sha256(f"{seed}:{emotion}:{number}".encode()).digest()[:4], "big")
            plan.append((emotion, random.Random(key).sample(sorted(pool), 2), key % 2**31))
    return plan


def complemented(rows: list[dict], client: ChatClient, target: int, classes: tuple[str, ...], seed: int = 0,
                 temperature: float = 1.0) -> tuple[list[dict], list[dict]]:
    """New descriptions (figure 7) that bring each class to about `target`; those that repeat a text are rejected."""
    plan = complement_plan(rows, target, classes, seed)
    prompts = [complement_prompt(emotion, examples) for emotion, examples, _ in plan]
    replies = client.ask(prompts, temperature, [draw for *_, draw in plan], max_tokens=400)
    good, rejected, seen = [], [], {text_key(row["text"]) for row in rows}
    for (emotion, examples, draw), reply in zip(plan, replies):
        text = re.sub(r"^\W*target emotion:\s*\w+\W*", "", reply.text.strip(), flags=re.IGNORECASE).strip()
        row = {"text": text, "labels": [emotion], "source": "complement", "raw": reply.text or reply.error,
               "examples": examples, "model": client.name, "prompt": "figure 7", "seed": draw}
        (rejected if not text or text_key(text) in seen else good).append(row)
        seen.add(text_key(text))
    return good, rejected


@dataclass
class Annotated:
    data: str = option("", "data sets, 'emer:/path,merr:/path'")
    out: str = option("", "JSONL file")


@dataclass
class Stats:
    input: str = option("", "JSONL files, separated by commas")


@dataclass
class Label(Stats):
    ask: str = option("", "openai:MODEL, gemini:MODEL, hf:ORG/MODEL (paper: gpt-4.1 for label, gpt-4.1-mini for "
                           "complement)")
    out: str = option("", "JSONL file")
    concurrency: int = option(8, "requests at once", least=1)
    reply_tokens: int = option(0, "longest reply in tokens, a reasoning model's thoughts included; 0: 24 for label, "
                                   "400 for complement", least=0)
    seed: int = option(0, "seed of permutations and draws")


@dataclass
class Complement(Label):
    per_class: int = option(1000, "descriptions per class in the end (section 3.2: about 1K)", least=0)
    classes: str = option("disgust,fear,contempt,disappointment,neutral,helplessness", "the rare ones (section 3.2)")
    temperature: float = option(1.0, "of the new descriptions (the paper does not say)", least=0)


STEPS = {"annotated": (Annotated, "EMER and MERR-fine as training rows"),
         "describe": (PredictionSettings, "explanations of training clips by a policy"),
         "label": (Label, "figure 6: up to two emotions per description"),
         "complement": (Complement, "figure 7: descriptions of rare classes"),
         "stats": (Stats, "table 5")}


def parser() -> argparse.ArgumentParser:
    top = OneLineParser(description=__doc__)
    steps = top.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, (cls, text) in STEPS.items():
        steps.add_parser(name, help=text, parents=[parser_for(cls, text)], add_help=False)
    return top


def keep(out: str | Path, rejected_out: str | Path, good: list[dict], rejected: list[dict]) -> None:
    write_jsonl(out, good)
    write_jsonl(rejected_out, rejected)
    if rejected and not good:
        raise DataError(f"none of {len(rejected)} answers can be used; they are in {rejected_out}")
    print(f"{out}: {len(good)} rows, {len(rejected)} rejected ({rejected_out})")


def check_disjoint(train: list[Example], test: list[Example]) -> None:
    """Raises DataError if a clip is in both lists (by its path, or by data set and id)."""
    def keys(example: Example) -> set:
        return {os.path.realpath(example.path), (example.dataset, example.video_id)}

    known = set().union(*map(keys, train))
    if shared := [example for example in test if keys(example) & known]:
        raise DataError(f"{len(shared)} clips are in training and test data, the first: {shared[0].path}; "
                        "take the same official split for both")


def describe(settings: PredictionSettings) -> None:
    examples = load_examples(settings.data, "train")
    for part in re.split(r",(?=\w+:)", settings.data):
        if part.partition(":")[0].lower() in ("dfew", "mafw", "toy"):
            check_disjoint(examples, load_examples(part, "test"))
    processes, out = join_processes(settings.device), Path(settings.out)
    examples = clips_there(examples, settings, processes)
    check_names(settings)
    examples = list({e.path: e for e in examples}.values())[: settings.limit or None]  # each clip once
    rows, failed, _ = predict_to_file(examples, processes, settings)
    too_many(len(failed), len(examples), settings.allow_missing, "".join(failed[:1]))
    if processes.main:
        keep(out / "descriptions.jsonl", out / "descriptions.rejected.jsonl",
             *described(rows, settings.model, settings.seed))


def main(argv: list[str] | None = None) -> None:
    options = parser()
    given = vars(options.parse_args(argv))
    step = given.pop("step")
    args = checked(options, STEPS[step][0], given)
    for name in ("model", "data", "input", "ask", "out"):
        if getattr(args, name, None) == "":
            options.error(f"{step} needs --{name}")
    if step == "describe":
        return describe(args)
    if step == "annotated":
        rows, left = annotated(load_examples(args.data, "train"))
        lost = ", ".join(f"{count} {what}" for what, count in left.items()) or "none"
        if not rows:
            raise DataError(f"--data {args.data}: no description with a label of the 11; left out: {lost}")
        write_jsonl(args.out, rows)
        return print(f"{args.out}: {len(rows)} rows; left out: {lost}")
    files = args.input.split(",")
    if step == "stats":
        return print(counts_table(read_rows(files)))
    rows = [(f"{file}, row {n}", row) for file in files for n, row in enumerate(read_jsonl(file), 1)]
    for where, row in rows:
        if not isinstance(row.get("text"), str) or not cell(row["text"]):
            raise DataError(f"{where}: no text in field text; `describe` writes such rows")
        if row.get("split") == "test":
            raise DataError(f"{where}: clip {row.get('clip')} is of a test split, which the verifier must not see")
    if not rows:
        raise DataError(f"{args.input}: no description in it")
    rows = [row for _, row in rows]
    client = ChatClient(args.ask, f"{args.out}.cache.jsonl", args.concurrency, reply_tokens=args.reply_tokens)
    if step == "label":
        good, rejected = labelled(rows, client, args.seed)
    else:
        read_rows(files)  # checks every field
        classes = tuple(map(to_erv, args.classes.split(",")))
        good, rejected = complemented(rows, client, args.per_class, classes, args.seed, args.temperature)
    keep(args.out, f"{args.out}.rejected.jsonl", good, rejected)
    if good:
        print(counts_table(read_rows([args.out])))


if __name__ == "__main__":
    run_script(main)
