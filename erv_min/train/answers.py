"""What a policy answers: for one clip (`answer`), for data sets (`predict`), kept in a folder (`predict_to_file`)."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path

import torch

from erv_min.base.errors import ClipError, SettingsError
from erv_min.base.files import read_json, read_jsonl, write_json, write_jsonl
from erv_min.base.options import check
from erv_min.base.processes import Processes, gather_lists, join_processes
from erv_min.base.progress import Progress
from erv_min.data.loader import clip_inputs
from erv_min.generate import rollout, sampling_noise
from erv_min.inputs import Collator, Example, embed
from erv_min.prompts import sft_target
from erv_min.rewards import extract_answer, extract_explanation
from erv_min.train.settings import AnswerSettings, PredictionSettings
from erv_min.train.start import clip_options, load_collator, weights_key

ANSWER_TOKENS = 16  # a label and </answer> take at most half of them


@torch.no_grad()
def outputs(collate: Collator, examples: list[Example], numbers: list[int], settings: AnswerSettings,
            batch_size: int = 1, on_token=None) -> Iterator[str | ClipError]:
    """The policy's output for each example, in order, or its ClipError. An output depends on the clip, the settings and
    its number, which keys the noise, not on the batch. `on_token(ids [B])` is called after each token."""
    model = collate.model.eval()
    how = clip_options(settings) | {"num_frames": settings.num_frames or model.config.num_frames,
                                "without": settings.without}
    if settings.without not in settings.modality:
        raise SettingsError(f"--without {settings.without}: with --modality {settings.modality} there is none")
    stream = clip_inputs(examples, model.config, collate.cache, **how)
    for at in range(0, len(examples), batch_size):
        items = dict(zip(numbers[at : at + batch_size], stream))
        decoded = {number: x for number, x in items.items() if not isinstance(x, ClipError)}
        if decoded:
            noise = sampling_noise(settings.seed, 0, list(decoded), 1, settings.max_new_tokens)
            found = rollout(model, embed(model, collate(list(decoded.values()))), 1, settings.max_new_tokens,
                            collate.tokenizer.eos_id, noise, settings.temperature, top_p=settings.top_p,
                            on_token=on_token)
            for (number, x), ids, mask in zip(decoded.items(), found.ids, found.mask):
                items[number] = x.example.begun + collate.tokenizer.decode(ids[mask].tolist(), skip_special=True)
        yield from items.values()


@dataclass(frozen=True)
class Answer:
    """What a policy says about one clip."""

    explanation: str  # "" if it is not between <think> and </think>
    emotion: str | None  # as it was written; None without a closed <answer>
    text: str  # the whole output


def load_policy(settings: AnswerSettings) -> Collator:
    """The policy that `settings.model` names, a folder or a hub repository, ready for `answer`."""
    check(settings)
    return load_collator(settings, join_processes(settings.device))


def answer(policy: Collator, clip: str | Path, settings: AnswerSettings = AnswerSettings(),
           subtitle: str = "") -> Answer:
    """One clip's Answer. Raises ClipError if it cannot be decoded."""
    said = next(answers(policy, [clip], settings, subtitle))
    if isinstance(said, ClipError):
        raise said
    return said


def answers(policy: Collator, clips: list, settings: AnswerSettings = AnswerSettings(), subtitle: str = "",
            on_token=None) -> Iterator[Answer | ClipError]:
    """An Answer for each clip, or its ClipError, one after the other; none depends on the others."""
    examples = [Example(Path(clip).stem, Path(clip), "", "", subtitle=subtitle) for clip in clips]
    settings = replace(settings, workers=settings.workers if len(examples) > 1 else 0)

    def heard(ids) -> None:
        progress.stop()  # an answer on a terminal is not broken by a line
        on_token(ids)

    stream = outputs(policy, examples, [0] * len(examples), settings, 1, on_token and heard)
    for clip in clips:
        with Progress(f"{clip} is answered") as progress:
            said = next(stream)
        yield said if isinstance(said, ClipError) else Answer(extract_explanation(said), extract_answer(said), said)


def predict(collate: Collator, examples: list[Example], processes: Processes, settings: AnswerSettings,
            batch_size: int = 8, progress: str = "answers") -> tuple[list[dict], list[ClipError]]:
    """Rows {"video_id", "output", "ground_truth", "dataset"}, in the order of `examples`, whatever the number of
    processes and the batch size, and the errors of clips that could not be decoded."""
    mine, found = list(range(processes.rank, len(examples), processes.size)), []
    with Progress(progress, len(mine), "clip") as shown:
        for said in outputs(collate, [examples[i] for i in mine], mine, settings, batch_size):
            found.append(said)
            shown.add()
    said = [x for _, x in sorted(gather_lists([*zip(mine, found)]), key=lambda pair: pair[0])]
    rows = [{"video_id": e.video_id, "output": x, "ground_truth": e.label, "dataset": e.dataset}
            for e, x in zip(examples, said) if isinstance(x, str)]
    return rows, [x for x in said if isinstance(x, ClipError)]


def answers_after(collate: Collator, examples: list[Example], explanations: list[str], processes: Processes,
                  settings: PredictionSettings) -> list[str]:
    """The outputs that the policy ends greedily after `<think>explanation</think>\\n<answer`, without ">", which
    tokenizers join to the word after it. Raises ClipError: the clips had been decoded."""
    examples = [replace(x, begun=sft_target(text, "").removesuffix("></answer>"))
                for x, text in zip(examples, explanations, strict=True)]
    rows, failed = predict(collate, examples, processes, replace(settings, temperature=0, max_new_tokens=ANSWER_TOKENS),
                           settings.batch_size, "answers again")
    if failed:
        raise failed[0]
    return [row["output"] for row in rows]


def predict_to_file(examples: list[Example], processes: Processes, settings: PredictionSettings,
                    chunk: int = 256) -> tuple[list[dict], list[str], Collator]:
    """(rows, messages of the clips that could not be decoded, the policy), kept in OUT/predictions.jsonl chunk by
    chunk, so that a stop loses one. A resume with other settings or clips than OUT/predictions.json says is refused
    before the weights are read, one with other weights after that.
    The result depends on neither processes nor stops: chunk c samples with seed (seed, c) whoever computes it."""
    out = Path(settings.out)
    apart = ("out", "resume", "device", "workers", "batch_size", "allow_missing")  # what changes no prediction
    clips = sha256("\n".join(f"{x.dataset}/{x.video_id}" for x in examples).encode()).hexdigest()
    made_by = {f.name: getattr(settings, f.name) for f in fields(PredictionSettings) if f.name not in apart} | {
        "clips": clips}
    file, about, failures = out / "predictions.jsonl", out / "predictions.json", out / "failed_clips.jsonl"
    rows, failed, before = [], [], {}
    if file.exists():
        if not settings.resume:
            raise SettingsError(f"{file} already exists: give --resume to go on with it, another --out, or delete it")
        rows, failed, before = read_jsonl(file), read_jsonl(failures), read_json(about)
    check_same(about, before, made_by)
    collate = load_collator(settings, processes)
    made_by["weights"] = weights_key(collate.model)
    check_same(about, before, made_by)
    if processes.main:
        write_json(about, made_by)
    chunks = [examples[at : at + chunk] for at in range(0, len(examples), chunk)]
    done = Counter(row["chunk"] for row in rows + failed)
    for n, part in enumerate(chunks):
        if done[n] == len(part):
            continue
        new, errors = predict(collate, part, processes, replace(settings, seed=settings.seed * 100_003 + n),
                              settings.batch_size, f"part {n + 1} of {len(chunks)}")
        rows = [row for row in rows if row["chunk"] != n] + [{**row, "chunk": n} for row in new]
        failed = [row for row in failed if row["chunk"] != n] + [{"error": str(e), "chunk": n} for e in errors]
        if processes.main:
            write_jsonl(failures, failed)
            write_jsonl(file, rows)
    return rows, [row["error"] for row in failed], collate


def check_same(about: Path, before: dict, now: dict) -> None:
    """Raises SettingsError if the predictions that are there were made by something else, as `about` says."""
    if before and (other := [name for name in now if before.get(name) != now[name]]):
        raise SettingsError(f"{about}: these predictions were made with other values of {', '.join(other)}; give "
                            "another --out")
