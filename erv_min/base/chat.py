"""A hosted model asked many prompts: cache, retries. What is asked and how a reply is read: judge.py, augment.py.

Requests go through huggingface_hub's InferenceClient, which tries each once: the retries are here. Every answer is
appended to the cache as it comes in: a stopped run asks nothing twice. A failure is not kept. Keys come from the
environment and go nowhere but the request's header.
"""

import hashlib
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from erv_min.base.errors import JudgeError
from erv_min.base.files import append_jsonl, read_jsonl

PROVIDERS = {  # name -> its OpenAI-compatible server, the environment variable of its key
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "gemini": ("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "hf": ("https://router.huggingface.co/v1", "HF_TOKEN")}
MAX_WAIT = 300  # seconds; if a server asks for more, the prompt fails
HOPELESS = {  # status of a response, or words in it -> why asking on is pointless
    401: "the key is refused", 403: "the key is not allowed to", 404: "no such model or address",
    "insufficient_quota": "no credit left",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it to ask a hosted model"}


@dataclass(frozen=True)
class Reply:
    text: str
    error: str = ""  # why there is no text


class ChatClient:
    """Asks one hosted model. spec: openai:MODEL, gemini:MODEL or hf:ORG/MODEL; ERV_JUDGE_BASE_URL sends openai: to
    another server. Raises JudgeError if there is no key.

    reply_tokens: the longest reply, in place of what the caller of `ask` thinks enough; 0: that. Time-out and back-off
    in seconds; `give_up`: failed prompts in a row that end `ask`.
    """

    def __init__(self, spec: str, cache: str | Path | None = None, concurrency: int = 8, timeout: float = 60,
                 retries: int = 6, backoff: float = 1.0, give_up: int = 20, reply_tokens: int = 0, show=print):
        provider, _, self.model = spec.partition(":")
        if provider not in PROVIDERS or not self.model:
            raise JudgeError(f"{spec!r}: expected openai:MODEL, gemini:MODEL or hf:ORG/MODEL")
        url, variable = PROVIDERS[provider]
        own_server = os.environ.get("ERV_JUDGE_BASE_URL") if provider == "openai" else ""
        self.url = (own_server or url).rstrip("/").removesuffix("/chat/completions")
        self._key = os.environ.get(variable, "").strip()
        if not self._key and not own_server:
            raise JudgeError(f"{spec}: no key; set {variable} in the environment"
                             + (" (or ERV_JUDGE_BASE_URL for a server without one)" if provider == "openai" else ""))
        self.name, self.cache, self.reply_tokens, self.show = spec, cache and Path(cache), reply_tokens, show
        self.concurrency, self.retries, self.backoff, self.give_up = concurrency, retries, backoff, give_up
        self.extra = {"reasoning_effort": "none"} if "2.5-flash" in self.model else None  # else thoughts eat max_tokens
        from huggingface_hub import InferenceClient  # given a key always: else it sends the user's hub token there
        self._client = InferenceClient(base_url=f"{self.url}/chat/completions", api_key=self._key or "none",
                                       timeout=timeout)
        self._lock, self._stop, self._reached = threading.Lock(), threading.Event(), False
        rows = read_jsonl(self.cache, log=True) if self.cache and self.cache.exists() else []
        self.answers = {row["key"]: row["raw"] for row in rows  # what is no answer is asked again
                        if isinstance(row, dict) and isinstance(row.get("key"), str)
                        and isinstance(row.get("raw"), str) and row["raw"].strip()}

    def key(self, prompt: str, temperature: float = 0.0, seed: int | None = None) -> str:
        """sha256 of server, model and prompt (and of temperature and seed if the answer is drawn)."""
        drawn = "" if temperature == 0 else f"\0{temperature}\0{seed}"
        return hashlib.sha256(f"{self.url}\0{self.name}\0{prompt}{drawn}".encode()).hexdigest()

    def ask(self, prompts: list[str], temperature: float = 0.0, seeds: list[int] | None = None,
            max_tokens: int = 16) -> list[Reply]:
        """A Reply for each prompt, in order; equal prompts are asked once, cached ones not at all.

        Raises JudgeError if asking on is pointless: a refused key, an unknown model, no credit left, `give_up` failures
        in a row, a server that is not there, or not one prompt with an answer. A stop (Ctrl-C) waits for the requests
        under way, keeps their answers, and starts no other.
        """
        limit, seeds = self.reply_tokens or max_tokens, seeds or [None] * len(prompts)
        keys = [self.key(prompt, temperature, seed) for prompt, seed in zip(prompts, seeds)]
        todo = {key: (prompt, seed) for key, prompt, seed in zip(keys, prompts, seeds) if key not in self.answers}
        # Told first: 4 characters per token, and 8 tokens of the chat's own around each prompt.
        tokens_in = sum(len(prompt) for prompt, _ in todo.values()) // 4 + 8 * len(todo)
        self.show(f"{self.name}: {len(todo)} requests ({len(prompts) - len(todo)} answered or repeated), "
                  f"about {tokens_in:,} tokens in, at most {limit * len(todo):,} out")
        failed, in_a_row = {}, 0
        self._stop.clear()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = {pool.submit(self._one, key, prompt, temperature, seed, limit): key
                       for key, (prompt, seed) in todo.items()}
            for done, future in enumerate(as_completed(futures), 1):
                error = future.result()
                if error:
                    failed[futures[future]] = error
                in_a_row = in_a_row + 1 if error else 0
                if in_a_row == self.give_up:
                    raise JudgeError(f"{self.name}: {in_a_row} requests failed in a row, the last: {error}. "
                                     "What was answered is kept; run again to go on")
                if done % 100 == 0 or done == len(todo):
                    self.show(f"{self.name}: {done}/{len(todo)} answered")
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if failed:
            first = next(iter(failed.values()))
            if not self._reached or not any(key in self.answers for key in keys):
                raise JudgeError(f"{self.name}: none of {len(todo)} requests was answered, the first: {first}")
            self.show(f"{self.name}: {len(failed)} of {len(todo)} requests failed, the first: {first}")
        return [Reply(self.answers.get(key, ""), failed.get(key, "")) for key in keys]

    def _one(self, key: str, prompt: str, temperature: float, seed: int | None, limit: int) -> str:
        """One prompt with retries: "" with its answer kept, or what went wrong. Back-off is exponential with jitter,
        never before Retry-After. A server that has not sent any response yet is tried three times: it may not be there.
        """
        reason, wait = "stopped", 0.0
        for attempt in range(self.retries + 1):
            if attempt > 2 and not self._reached or self._stop.wait(wait):
                break
            try:
                choice = self._client.chat_completion(
                    [{"role": "user", "content": prompt}], model=self.model, temperature=temperature, seed=seed,
                    max_tokens=limit, extra_body=self.extra).choices[0]
                text = choice.message.content or ""
            except Exception as error:  # the client's exceptions differ between its versions; sorted by status below
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", None)
                reason = f"{type(error).__name__}: {error}".replace(self._key or "\0", "***")  # servers repeat the key
                reason = " ".join(reason.split())[:300]
            else:
                return self._keep(key, text, choice.finish_reason, limit)
            self._reached = self._reached or status is not None
            for sign, why in HOPELESS.items():
                if sign == status or isinstance(sign, str) and sign in reason:
                    raise JudgeError(f"{self.name}: {why} ({reason})")
            if status is not None and status < 500 and status not in (408, 409, 425, 429):
                break  # about this prompt: asking again gives the same
            backoff = min(self.backoff * 2**attempt * random.uniform(0.5, 1.5), 60)
            wait = max(backoff, asked_to_wait(getattr(response, "headers", {}).get("Retry-After", "")))
            if wait > MAX_WAIT:
                return f"{reason} (may be asked again in {wait:.0f} s)"
        return reason

    def _keep(self, key: str, text: str, finish_reason: str | None, limit: int) -> str:
        """Keeps an answer, returns "". An empty reply is none: reasoning may take all tokens before the first word."""
        self._reached = True
        if not text.strip():
            cut = f": cut at {limit} tokens, raise --reply-tokens" if finish_reason == "length" else ""
            return f"an empty reply ({finish_reason}){cut}"
        with self._lock:
            if self.cache:
                append_jsonl(self.cache, {"key": key, "model": self.name, "raw": text})
            self.answers[key] = text
        return ""


def asked_to_wait(retry_after: str) -> float:
    """Seconds of a Retry-After header, which holds them or a date; 0 if neither can be read."""
    try:
        if retry_after.isdecimal():
            return float(retry_after)
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
