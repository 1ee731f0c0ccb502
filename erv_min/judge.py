"""Who reads the emotion out of an explanation: figure 3's judge (sections 4.2 and 5.4).

`make_judge("openai:gpt-4.1-mini")`, "gemini:gemini-2.5-flash", "hf:ORG/MODEL", "erv:/folder" (a local verifier on whole
explanations), "lexicon" or "lexicon2" (the embedded world's own two). Hosted models are asked through huggingface_hub's
InferenceClient at temperature 0, a bounded number at once, with time-outs and retries; every answer is appended to a
cache as it comes in, so that a stopped run asks nothing twice. An answer outside the list and a failed call are states
of their own, never an emotion (divergence 14). Keys come from the environment and go nowhere but the request's header.
"""

import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Protocol

from erv_min.emotions import ERV_LABELS, LABELS, labels, normalize, to_erv
from erv_min.run.errors import JudgeError
from erv_min.run.files import append_jsonl, read_jsonl, write_jsonl
from erv_min.prompts import judge_prompt
from erv_min.rewards import extract_explanation

BASE_URLS = {"openai": "https://api.openai.com/v1", "gemini": "https://generativelanguage.googleapis.com/v1beta/openai"}
KEYS = {"openai": "OPENAI_API_KEY", "gemini": "GEMINI_API_KEY", "hf": "HF_TOKEN"}
PRICES = {"gpt-4.1": (2.00, 8.00), "gpt-4.1-mini": (0.40, 1.60), "gpt-4.1-nano": (0.10, 0.40),  # USD a million tokens,
          "gemini-2.5-flash": (0.30, 2.50), "gemini-2.5-pro": (1.25, 10.00)}                     # in and out, mid 2025


@dataclass(frozen=True)
class Judgement:
    """What a judge made of one explanation; `emotion` is None unless `status` is "ok"."""
    emotion: str | None
    status: str  # "ok", "outside" (an answer, but none of the labels), "error" (no answer)
    raw: str


class Judge(Protocol):
    name: str

    def judge(self, explanations: list[str], labels: tuple[str, ...]) -> list[Judgement]: ...


# ---------------------------------------------------------------------------------------------------- hosted models

@dataclass(frozen=True)
class Reply:
    text: str
    error: str = ""  # why there is no text


class ChatClient:
    """Asks a hosted model many prompts. Raises JudgeError where asking on is pointless: no or a refused key, an unknown
    model, no credit left, or `give_up` failed prompts in a row; what was answered until then is in the cache."""

    def __init__(self, spec: str, cache: str | Path | None = None, concurrency: int = 8, timeout: float = 60,
                 retries: int = 6, backoff: float = 1.0, max_wait: float = 300, give_up: int = 20):
        provider, colon, model = spec.partition(":")
        if provider not in KEYS or not model:
            raise JudgeError(f"{spec!r}: expected openai:MODEL, gemini:MODEL or hf:ORG/MODEL")
        self.name, self.model, self.cache = spec, model, Path(cache) if cache else None
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.backoff, self.max_wait, self.give_up = backoff, max_wait, give_up
        self.extra = {"reasoning_effort": "none"} if "2.5-flash" in model else None  # else thinking eats max_tokens
        base = os.environ.get("ERV_JUDGE_BASE_URL") if provider == "openai" else None
        self._key = os.environ.get(KEYS[provider], "").strip()
        if not self._key and not base and provider != "hf":
            raise JudgeError(f"{spec}: no key; set {KEYS[provider]} in the environment"
                             + (" (or ERV_JUDGE_BASE_URL for a server without one)" if provider == "openai" else ""))
        from huggingface_hub import InferenceClient
        if provider == "hf":
            self._client = InferenceClient(model=model, token=self._key or None, timeout=timeout)
        else:  # a key is always given: without one the client would send the user's hub token to that server
            url = (base or BASE_URLS[provider]).rstrip("/")
            url += "" if url.endswith("/chat/completions") else "/chat/completions"
            self._client = InferenceClient(base_url=url, api_key=self._key or "none", timeout=timeout)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.answers = self._load()

    def _load(self) -> dict[str, str]:
        if self.cache is None or not self.cache.exists():
            return {}
        rows = read_jsonl(self.cache)
        if not self.cache.read_bytes().endswith(b"\n"):  # a cut last line would swallow the next one appended
            write_jsonl(self.cache, rows)
        return {row["key"]: row["raw"] for row in rows if isinstance(row, dict)  # what is no answer is asked again
                and isinstance(row.get("key"), str) and isinstance(row.get("raw"), str)}

    def key(self, prompt: str, temperature: float = 0.0, seed: int | None = None) -> str:
        """sha256 of model and prompt (and of temperature and seed where the answer is drawn)."""
        drawn = "" if temperature == 0 else f"\0{temperature}\0{seed}"
        return hashlib.sha256(f"{self.name}\0{prompt}{drawn}".encode()).hexdigest()

    def estimate(self, prompts: list[str], output_tokens: int = 4, temperature: float = 0.0, seeds=None) -> str:
        """What asking costs, as a line to print first: requests not in the cache, tokens (4 characters each), price."""
        pairs = zip(prompts, seeds or [None] * len(prompts))
        keys = {self.key(prompt, temperature, seed): prompt for prompt, seed in pairs}
        todo = [prompt for key, prompt in keys.items() if key not in self.answers]
        tokens = (sum(map(len, todo)) // 4 + 8 * len(todo), output_tokens * len(todo))
        price = PRICES.get(self.model)
        cost = "unknown price" if price is None else f"about ${sum(n * p for n, p in zip(tokens, price)) / 1e6:.2f}"
        return (f"{self.name}: {len(todo)} requests ({len(prompts) - len(todo)} answered or repeated), "
                f"about {tokens[0]:,} tokens in, {tokens[1]:,} out: {cost}")

    def ask(self, prompts: list[str], temperature: float = 0.0, seeds: list[int] | None = None, max_tokens: int = 16,
            on_reply: Callable[[int, int], None] | None = None) -> list[Reply]:
        """A Reply for each prompt, in order; equal prompts are asked once, cached ones not at all.

        `on_reply(done, all)` is called in this thread after each. A stop (Ctrl-C, or an exception from `on_reply`)
        waits for the requests under way, which are kept, and starts no other.
        """
        seeds = seeds or [None] * len(prompts)
        keys = [self.key(prompt, temperature, seed) for prompt, seed in zip(prompts, seeds)]
        todo = {key: (prompt, seed) for key, prompt, seed in zip(keys, prompts, seeds) if key not in self.answers}
        failed, in_a_row = {}, 0
        self._stop.clear()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = {pool.submit(self._one, key, prompt, temperature, seed, max_tokens): key
                       for key, (prompt, seed) in todo.items()}
            for done, future in enumerate(as_completed(futures), 1):
                reply = future.result()
                in_a_row = in_a_row + 1 if reply.error else 0
                if reply.error:
                    failed[futures[future]] = reply
                if in_a_row >= self.give_up:
                    raise JudgeError(f"{self.name}: {in_a_row} requests failed in a row, the last: {reply.error}. "
                                     "What was answered is kept; run again to go on")
                if on_reply:
                    on_reply(done, len(todo))
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return [failed[key] if key in failed else Reply(self.answers[key]) for key in keys]

    def _one(self, key: str, prompt: str, temperature: float, seed: int | None, max_tokens: int) -> Reply:
        """One prompt with retries: exponential back-off with jitter, never before Retry-After; the answer is cached."""
        for attempt in range(self.retries + 1):
            if self._stop.is_set():
                return Reply("", "stopped")
            try:
                answer = self._client.chat_completion(
                    [{"role": "user", "content": prompt}], model=self.model, temperature=temperature, seed=seed,
                    max_tokens=max_tokens, **({"extra_body": self.extra} if self.extra else {}))
                text = answer.choices[0].message.content or ""
                with self._lock:
                    if self.cache:
                        append_jsonl(self.cache, {"key": key, "model": self.name, "raw": text})
                    self.answers[key] = text
                return Reply(text)
            except Exception as error:  # the client's exceptions differ between its versions; sorted by status below
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", None)
                reason = self._clean(f"{type(error).__name__}: {error}")
            self._raise_if_hopeless(status, reason)
            if status is not None and status < 500 and status not in (408, 409, 425, 429):
                return Reply("", reason)  # about this prompt: asking again gives the same
            wait = self.backoff * 2**attempt * random.uniform(0.5, 1.5)
            wait = max(min(wait, 60), _retry_after(response))
            if wait > self.max_wait:
                return Reply("", f"{reason} (may be asked again in {wait:.0f} s)")
            if attempt < self.retries:
                self._stop.wait(wait)
        return Reply("", reason)

    def _raise_if_hopeless(self, status: int | None, reason: str) -> None:
        offline = "OfflineModeIsEnabled" in reason
        if status in (401, 403, 404) or "insufficient_quota" in reason or offline:
            way = {401: "the key is refused", 403: "the key is not allowed to", 404: "no such model or address"}
            raise JudgeError(f"{self.name}: " + ("HF_HUB_OFFLINE is set: unset it to ask a hosted model" if offline else
                                                 f"{way.get(status, 'no credit left')} ({reason})"))

    def _clean(self, text: str) -> str:
        """An error's text on one line, without the key, which servers like to repeat."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:300]


def _retry_after(response) -> float:
    """Seconds that a Retry-After header asks for (a number or a date); 0 without one."""
    value = getattr(response, "headers", {}).get("Retry-After", "") if response is not None else ""
    try:
        if re.fullmatch(r"[\d.]+", value):
            return float(value)
        return parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0


# ---------------------------------------------------------------------------------------------------- judges

def permuted(labels: tuple[str, ...], item: str, seed: int = 0) -> list[str]:
    """The labels in an order of the item's own (figure 3: {Emotion List} is a permutation), the same in each run."""
    order = list(labels)
    random.Random(int.from_bytes(hashlib.sha256(f"{seed}\0{item}".encode()).digest()[:8], "big")).shuffle(order)
    return order


def read_answer(text: str, labels: tuple[str, ...]) -> Judgement:
    """A judge's reply -> Judgement: one word, the label or an alias of it in the data set with these labels."""
    word = re.sub(r"^\W*((answer\s+)?emotion\s*:)?\W*|\W+$", "", text.strip().lower())
    dataset = next((name for name, names in LABELS.items() if set(names) == set(labels)), None)
    if word not in labels and dataset and re.fullmatch(r"\w+", word):
        word = normalize(word, dataset)
    return Judgement(word, "ok", text) if word in labels else Judgement(None, "outside", text)


class HostedJudge:
    """Figure 3's prompt to a hosted model. An empty explanation conveys no emotion: it is "outside", and not asked."""

    def __init__(self, client: ChatClient, show: Callable[[str], None] = print):
        self.client, self.name, self.show = client, client.name, show

    def judge(self, explanations: list[str], labels: tuple[str, ...]) -> list[Judgement]:
        prompts = {text: judge_prompt(text, permuted(labels, text)) for text in explanations if text.strip()}
        self.show(self.client.estimate(list(prompts.values())))
        replies = dict(zip(prompts, self.client.ask(list(prompts.values()), on_reply=self._progress)))
        return [Judgement(None, "outside", "") if text not in replies else
                Judgement(None, "error", replies[text].error) if replies[text].error else
                read_answer(replies[text].text, labels) for text in explanations]

    def _progress(self, done: int, total: int) -> None:
        if done % 100 == 0 or done == total:
            self.show(f"{self.name}: {done}/{total} answered")


class ErvJudge:
    """A local verifier on the whole explanation: the most probable of the labels. Not independent where it was the
    training's own verifier: good to watch, not to report."""

    def __init__(self, folder: str, device: str = "cpu"):
        from erv_min.erv import Verifier, erv_columns
        self.name, self.verifier = f"erv:{folder}", Verifier.load(folder, device)
        self.column = dict(zip(ERV_LABELS, erv_columns(tuple(self.verifier.labels))))

    def judge(self, explanations: list[str], labels: tuple[str, ...]) -> list[Judgement]:
        texts = [text for text in explanations if text.strip()]
        columns = [self.column[to_erv(label)] for label in labels]
        rows = iter(self.verifier.probabilities(texts)[:, columns].tolist() if texts else ())
        judgements = []
        for text in explanations:
            probs = next(rows) if text.strip() else None
            best = labels[max(range(len(labels)), key=probs.__getitem__)] if probs else None
            judgements.append(Judgement(best, "ok", f"{max(probs):.3f}") if probs else Judgement(None, "outside", ""))
        return judgements


class OfflineJudge:
    """One of the embedded world's two judges (toy/lexicon.py): they read words, not language."""

    def __init__(self, name: str):
        from erv_min.toy.lexicon import LexiconJudge, SecondJudge
        self.name, self.reader = name, {"lexicon": LexiconJudge, "lexicon2": SecondJudge}[name]()

    def judge(self, explanations: list[str], labels: tuple[str, ...]) -> list[Judgement]:
        said = self.reader.judge(explanations, labels)
        return [Judgement(emotion, "ok" if emotion else "outside", emotion or "") for emotion in said]


def make_judge(spec: str, cache: str | Path | None = None, device: str = "cpu", **options) -> Judge:
    """The judge that `spec` names; `options` are ChatClient's. Raises JudgeError (unknown name, no key)."""
    kind, _, rest = spec.partition(":")
    if spec in ("lexicon", "lexicon2"):
        return OfflineJudge(spec)
    if kind == "erv" and rest:
        return ErvJudge(rest, device)
    if kind in KEYS and rest:
        return HostedJudge(ChatClient(spec, cache, **options))
    raise JudgeError(f"--judge {spec!r}: expected openai:MODEL, gemini:MODEL, hf:ORG/MODEL, erv:FOLDER, "
                     "lexicon or lexicon2")


def judge_rows(rows: list[dict], judge: Judge) -> None:
    """Adds "judged_emotion" and "judge_status" to prediction rows ({"output", "dataset", ...}), in place.

    The judge reads what stands between <think> and </think>, and nothing else; data sets are asked one after another,
    each with its own label list.
    """
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        part = [row for row in rows if row["dataset"] == dataset]
        judgements = judge.judge([extract_explanation(row["output"]) for row in part], labels(dataset))
        for row, judgement in zip(part, judgements, strict=True):
            row["judged_emotion"], row["judge_status"] = judgement.emotion, judgement.status
