"""Who reads the emotion out of an explanation: figure 3's judge (sections 4.2 and 5.4).

Hosted models are asked at temperature 0 by base/chat.py. An answer outside the list and a failed call are states of
their own, never an emotion (divergence 14).
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from erv_min.base.chat import PROVIDERS, ChatClient
from erv_min.base.errors import JudgeError
from erv_min.base.progress import Progress
from erv_min.emotions import label_among, labels, to_erv, trimmed
from erv_min.erv import Verifier, erv_columns
from erv_min.prompts import judge_prompt


@dataclass(frozen=True)
class Judgement:
    """What a judge made of one explanation; `emotion` is None unless `status` is "ok"."""
    emotion: str | None
    status: str  # "ok", "outside" (an answer, but none of the labels), "error" (no answer)


NOTHING = Judgement(None, "outside")  # an empty explanation conveys no emotion; no judge is asked
READERS: dict[str, type] = {}  # judges that need no model, by name; the embedded world registers two (toy/judges.py)
Judge = Callable[[list[str], tuple[str, ...]], list[Judgement]]  # explanations, labels to choose from


def permuted(labels: tuple[str, ...], item: str, seed: int = 0) -> list[str]:
    """The labels in an order of the item's own, the same in each run, as in figure 6 (divergence 20)."""
    order = list(labels)
    digest = hashlib.sha256(f"{seed}\0{item}".encode(errors="replace")).digest()
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    return order


def read_answer(text: str, labels: tuple[str, ...]) -> Judgement:
    """A judge's reply -> Judgement: one word, one of the labels or an alias of it."""
    label = label_among(labels, re.sub(r"^(answer\s+)?emotion\s*:", "", trimmed(text.lower())))
    return Judgement(label, "ok" if label else "outside")


def hosted_judge(client: ChatClient) -> Judge:
    """Figure 3's prompt to a hosted model."""
    def judge(explanations: list[str], labels: tuple[str, ...]) -> list[Judgement]:
        prompts = {text: judge_prompt(text, permuted(labels, text)) for text in explanations if text.strip()}
        replies = client.ask(list(prompts.values()), whole=lambda said: read_answer(said, labels).status == "ok")
        said = {text: Judgement(None, "error") if reply.error else read_answer(reply.text, labels)
                for text, reply in zip(prompts, replies)}
        return [said.get(text, NOTHING) for text in explanations]
    return judge


def erv_judge(verifier) -> Judge:
    """A local verifier on the whole explanation: the most probable of the labels. If it was the training's own verifier
    it is not independent: good to watch, not to report."""
    column = erv_columns(verifier.labels)

    def judge(explanations: list[str], labels: tuple[str, ...]) -> list[Judgement]:
        texts = [text for text in explanations if text.strip()]
        with Progress(f"{len(texts)} explanations are judged"):
            probs = verifier.probabilities(texts)[:, [column[to_erv(label)] for label in labels]]  # [S, len(labels)]
        said = {text: Judgement(labels[int(row.argmax())], "ok") for text, row in zip(texts, probs)}
        return [said.get(text, NOTHING) for text in explanations]
    return judge


def make_judge(spec: str, cache: str | Path | None = None, device: str = "cpu", **options) -> Judge:
    """The judge that `spec` names: "openai:gpt-4.1-mini", "gemini:gemini-2.5-flash", "hf:ORG/MODEL", "erv:/folder", or
    one of READERS; `options` are ChatClient's, for hosted ones. Raises JudgeError (unknown, no key)."""
    kind, _, rest = spec.partition(":")
    if spec in READERS:
        read = READERS[spec]().judge  # explanations, labels -> one of the labels or None for each
        return lambda texts, labels: [Judgement(x, "ok") if x else NOTHING for x in read(texts, labels)]
    if kind == "erv" and rest:
        return erv_judge(Verifier.load(rest, device))
    if kind in PROVIDERS and rest:
        return hosted_judge(ChatClient(spec, cache, **options))
    names = ", ".join(("openai:MODEL", "gemini:MODEL", "hf:ORG/MODEL", "erv:FOLDER", *READERS))
    raise JudgeError(f"--judge {spec!r}: expected {names}")


def explanation_of(output: str) -> str:
    """What a judge reads: the text between <think> and </think>; if it was never closed (an output cut at its longest),
    up to <answer> or the end (divergence 15). R_E reads closed ones alone (rewards.extract_explanation)."""
    _, _, rest = output.partition("<think>")
    return rest.partition("</think>" if "</think>" in rest else "<answer>")[0].strip()


def judge_rows(rows: list[dict], judge: Judge) -> None:
    """Adds "judged_emotion" and "judge_status" to prediction rows ({"output", "dataset", ...}), in place.
    Data sets are asked one after another, each with its own labels. Raises JudgeError if a hosted judge cannot be asked
    at all."""
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        part = [row for row in rows if row["dataset"] == dataset]
        judgements = judge([explanation_of(row["output"]) for row in part], labels(dataset))
        for row, judgement in zip(part, judgements, strict=True):
            row["judged_emotion"], row["judge_status"] = judgement.emotion, judgement.status
