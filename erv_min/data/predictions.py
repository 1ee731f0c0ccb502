"""Predictions as files: what a model answered for each clip, in the forms in which systems keep it.

Ours: JSONL rows {"video_id", "output", "ground_truth", "dataset"}. The release's: text `<clip>|<output>`, where an
output may run over lines, and judged results, a JSON list of {clip: {"reason", "gpt_response"}}. The last two name
neither label nor data set: they are joined with the data's examples by clip.
"""

import json
import re
import time
from dataclasses import fields
from hashlib import sha256
from pathlib import Path, PurePosixPath

import torch

from erv_min.data.readers import Example, check_label, read_text
from erv_min.emotions import labels
from erv_min.generate import rollout, sampling_noise
from erv_min.inputs import Collator, clip_inputs, embed
from erv_min.judge import read_answer
from erv_min.run.errors import ClipError, DataError, SettingsError
from erv_min.run.files import append_jsonl, read_json, read_jsonl, write_json, write_jsonl
from erv_min.run.processes import Processes, gather_lists
from erv_min.run.settings import PredictionSettings


@torch.no_grad()
def predict(collate: Collator, examples: list[Example], processes: Processes, max_new_tokens: int = 512,
            temperature: float = 0.3, top_p: float = 1.0, seed: int = 0, batch_size: int = 8, num_frames: int = 8,
            geometry: str = "pad", workers: int = 2, progress: str = "",
            silence: str = "hear") -> tuple[list[dict], list[ClipError]]:
    """One output for each example, in the order of `examples`, whatever the number of processes and the batch size.

    Returns rows {"video_id", "output", "ground_truth", "dataset"} and the errors of clips that could not be decoded.
    Temperature 0.3 is section 4.3's; 0 is greedy, as the release unless asked (divergence 9).
    """
    model, tokenizer = collate.model, collate.tokenizer
    model.eval()
    mine = list(range(processes.rank, len(examples), processes.size))
    stream = clip_inputs([examples[i] for i in mine], model.config, collate.cache, collate.modality, num_frames, geometry,
                         workers, silence)
    rows, errors, started = [], [], time.time()
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        pairs = [(i, next(stream)) for i in indices]
        errors += [x for _, x in pairs if isinstance(x, ClipError)]
        pairs = [(i, x) for i, x in pairs if not isinstance(x, ClipError)]
        if not pairs:
            continue
        noise = sampling_noise(seed, 0, [i for i, _ in pairs], 1, max_new_tokens) if temperature > 0 else None
        completions = rollout(model, embed(model, collate([x for _, x in pairs])), 1, max_new_tokens, tokenizer.eos_id, noise,
                              temperature, top_p=top_p)
        for (i, x), ids, mask in zip(pairs, completions.ids, completions.mask):
            rows.append((i, {"video_id": x.example.video_id, "output": tokenizer.decode(ids[mask].tolist(), skip_special=True),
                             "ground_truth": x.example.label, "dataset": x.example.dataset}))
        if progress and processes.main:
            rate = len(rows) / (time.time() - started)
            print(f"{progress}: {start + len(indices)}/{len(mine)} clips, {rate:.1f} clips/s, "
                  f"{(len(mine) - start - len(indices)) / rate:.0f} s left", flush=True)
    rows = sorted(gather_lists(rows), key=lambda pair: pair[0])
    return [row for _, row in rows], gather_lists(errors)


def clip_key(name: str) -> str:
    """A clip's name however a system writes it: without folders, suffix and leading zeros."""
    stem = PurePosixPath(str(name).strip().replace("\\", "/")).name
    stem = re.sub(r"\.(mp4|avi|mkv|webm|mov|wav|flac)$", "", stem, flags=re.IGNORECASE)
    return stem.lstrip("0") or "0" if stem.isdecimal() else stem


def by_clip(examples: list[Example]) -> dict[str, Example]:
    """clip_key -> example. Raises DataError where two data sets share a name (released files name none)."""
    found: dict[str, Example] = {}
    for example in examples:
        other = found.setdefault(clip_key(example.video_id), example)
        if other.path != example.path:
            raise DataError(f"{other.path} and {example.path} have one name: give --data one data set at a time")
    return found


def read_predictions(files: str, examples: list[Example]) -> tuple[list[dict], dict]:
    """Rows from one or several (comma-separated) files, joined by clip: outputs from one, judgements from another.

    examples: the evaluated split; may be empty for JSONL rows that carry their ground truth. Returns the rows in the
    order of the examples, and {"missing": [...], "unknown": [...]} clips. A released judged file alone gives rows whose
    output is its reason, without an answer. Raises DataError naming file, line and field.
    """
    truth, rows, unknown = None, {}, []
    for name in files.split(","):
        path = Path(name.strip())
        text = read_text(path)
        first = text.lstrip()[:1]
        if first == "{":
            found = [_jsonl_row(row, f"{path}, row {n}") for n, row in enumerate(read_jsonl(path), 1)]
        else:
            truth = by_clip(examples) if truth is None else truth
            if not truth:
                raise DataError(f"{path}: a released results file holds no labels; give --data, too")
            found = _judged_rows(text, path) if first == "[" else _text_rows(text, path, truth)
        if truth is None and examples:
            truth = by_clip(examples)
        for row in found:
            key = clip_key(row["video_id"])
            if truth is not None:
                if key not in truth:
                    unknown.append(row["video_id"])
                    continue
                example = truth[key]
                row |= {"video_id": example.video_id, "ground_truth": example.label, "dataset": example.dataset}
            elif not row.get("ground_truth") or not row.get("dataset"):
                raise DataError(f"{path}: clip {row['video_id']} has no ground_truth and dataset; give --data, too")
            if "gpt_response" in row:
                judgement = read_answer(row.pop("gpt_response"), labels(row["dataset"]))
                row["judged_emotion"], row["judge_status"] = judgement.emotion, judgement.status
                reason = row.pop("reason")
                if not rows.get(key, {}).get("output"):
                    row["output"] = reason if "<think>" in reason else f"<think>{reason}</think>"
            row["ground_truth"] = check_label(row["ground_truth"], row["dataset"], f"{path}, clip {row['video_id']}")
            rows[key] = rows.get(key, {}) | row
    if not rows:
        raise DataError(f"{files}: no prediction for a clip of --data; "
                        f"the first there: {', '.join(unknown[:3]) or 'none'}")
    order = list(truth) if truth is not None else list(rows)
    missing = [truth[key].video_id for key in order if key not in rows] if truth is not None else []
    return [rows[key] for key in order if key in rows], {"missing": missing, "unknown": unknown}


def _jsonl_row(row, where: str) -> dict:
    if not isinstance(row, dict) or "video_id" not in row or not isinstance(row.get("output"), str):
        raise DataError(f"{where}: expected fields video_id and output (text), found {str(row)[:80]}")
    for field in ("ground_truth", "dataset"):
        if not isinstance(row.get(field, ""), str):
            raise DataError(f"{where}: field {field} is not text: {str(row[field])[:80]}")
    return {**row, "video_id": str(row["video_id"])}


def _judged_rows(text: str, path: Path) -> list[dict]:
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}, line {getattr(error, 'lineno', 1)}: not JSON ({error})") from None
    rows, seen = [], set()
    for number, entry in enumerate(entries):
        for clip, judged in entry.items() if isinstance(entry, dict) else (("?", None),):
            if not isinstance(judged, dict) or not all(isinstance(judged.get(field), str)
                                                       for field in ("reason", "gpt_response")):
                raise DataError(f'{path}, entry {number}: expected {{clip: {{"reason": ..., "gpt_response": ...}}}}')
            if clip_key(clip) in seen:
                raise DataError(f"{path}, entry {number}: clip {clip} is there twice")
            seen.add(clip_key(clip))
            rows.append({"video_id": clip, "reason": judged["reason"], "gpt_response": judged["gpt_response"]})
    return rows


def _text_rows(text: str, path: Path, truth: dict[str, Example]) -> list[dict]:
    """A record begins where a line starts with a clip and `|`: a clip of the data, or a name with a clip's suffix."""
    rows, seen = [], {}
    for line, content in enumerate(text.splitlines(), 1):
        clip, bar, rest = content.partition("|")
        if bar and (clip_key(clip) in truth or re.fullmatch(r"\S+\.(mp4|avi|mkv|webm)", clip.strip(), re.IGNORECASE)):
            if clip_key(clip) in seen:
                raise DataError(f"{path}, line {line}: clip {clip} was already on line {seen[clip_key(clip)]}")
            seen[clip_key(clip)] = line
            rows.append({"video_id": clip.strip(), "output": rest})
        elif rows:
            rows[-1]["output"] += "\n" + content
        elif content.strip():
            raise DataError(f"{path}, line {line}: expected `clip|output`, found {content[:80]!r}; "
                            "are these results of the clips in --data?")
    return rows


def predict_to_file(builder, examples: list[Example], processes, out: Path, settings: PredictionSettings,
                    chunk: int = 256) -> tuple[list[dict], list[str]]:
    """predict.predict over `examples`, kept in out/predictions.jsonl a chunk at a time, so that a stop loses one chunk.

    What made the predictions is kept in out/predictions.json; a resume with other settings or clips is refused. Returns
    the rows and the messages of the clips that could not be decoded, on every process. The result depends on neither
    the number of processes nor on stops: chunk c samples with seed (seed, c) whoever computes it.
    """
    apart = ("out", "resume", "device", "workers", "batch_size", "allow_missing")  # what changes no prediction
    made_by = {f.name: getattr(settings, f.name) for f in fields(PredictionSettings) if f.name not in apart}
    names = "\n".join(f"{example.dataset}/{example.video_id}" for example in examples)
    made_by |= {"split": getattr(settings, "split", "train"), "clips": sha256(names.encode()).hexdigest()}
    file, about, failures = out / "predictions.jsonl", out / "predictions.json", out / "failed_clips.jsonl"
    there = file.exists()
    if there and not settings.resume:
        raise SettingsError(f"{file} already exists: give --resume to go on with it, another --out, or delete it")
    chunks = [examples[at : at + chunk] for at in range(0, len(examples), chunk)]
    rows, failed = [], []
    if there:
        if read_json(about) != made_by:
            raise SettingsError(f"{about}: these predictions were made with other settings or clips; give another --out")
        rows, failed = read_jsonl(file), read_jsonl(failures) if failures.exists() else []
    whole = {n for n in range(len(chunks)) if sum(row["chunk"] == n for row in rows)
             + sum(row["chunk"] == n for row in failed) == len(chunks[n])}
    rows, failed = ([row for row in part if row["chunk"] in whole] for part in (rows, failed))
    gather_lists([])  # every process has read the files before the first changes them
    if processes.main:
        write_json(about, made_by)
        for path, part in ((file, rows), (failures, failed)):
            write_jsonl(path, part)
    for n in (n for n in range(len(chunks)) if n not in whole):
        new, errors = predict(
            builder, chunks[n], processes, settings.max_new_tokens, settings.temperature, settings.top_p,
            settings.seed * 100_003 + n, settings.batch_size, settings.num_frames or builder.model.config.num_frames,
            settings.geometry, settings.workers, f"part {n + 1} of {len(chunks)}", settings.silence)
        new, errors = [{**row, "chunk": n} for row in new], [{"error": str(error), "chunk": n} for error in errors]
        rows, failed = rows + new, failed + errors
        if processes.main:
            for path, part in ((failures, errors), (file, new)):
                for row in part:
                    append_jsonl(path, row)
    return rows, [row["error"] for row in failed]
