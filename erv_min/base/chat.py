"""A hosted model asked many prompts: cache, retries. What is asked and how a reply is read: judge.py, augment.py.

Requests are OpenAI's chat completions, sent by huggingface_hub's session; the retries are here. Every answer is
appended to the cache as it comes in: a stopped run asks nothing twice. A failure is not kept. Keys come from the
environment and go nowhere but the request's header.
"""

import hashlib
import json
import os
import random
import re
import threading
import time
from calendar import timegm
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate
from pathlib import Path

from huggingface_hub.utils import get_session

from erv_min.base.errors import JudgeError
from erv_min.base.files import append_jsonl, read_jsonl
from erv_min.base.progress import Progress

PROVIDERS = {  # name -> its OpenAI-compatible server, the environment variable of its key
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "gemini": ("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "hf": ("https://router.huggingface.co/v1", "HF_TOKEN")}
MAX_WAIT = 300  # seconds; if a server asks for more, the prompt fails
HOPELESS = {  # status of a response, or words in it -> why asking on is pointless
    401: "the key is refused", 402: "no credit left", 403: "access is refused, by the server or a proxy before it",
    404: "no such model or address", "insufficient_quota": "no credit left",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it to ask a hosted model"}
REFUSABLE = ("max_tokens", "temperature", "seed", "reasoning_effort")  # some models answer 400 to one of these:
REFUSED = r"['\"`]{0}['\"`]|\b(?:invalid|unsupported|unknown)\W+{0}\b|\b{0} (?:is|does|must)\b"
THOUGHT = r"[<\[◁]{}(?:think|thinking|thought|reasoning)[>\]▷]"  # a reasoning model's tags: {} is "" or "/"


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
        if own_server and not re.match("https?://.", own_server):
            raise JudgeError(f"ERV_JUDGE_BASE_URL={own_server}: expected an address as http://127.0.0.1:8000/v1")
        self.url = (own_server or url).rstrip("/").removesuffix("/chat/completions")
        self._key = os.environ.get(variable, "").strip()
        if not self._key and not own_server:
            raise JudgeError(f"{spec}: no key; set {variable} in the environment"
                             + (" (or ERV_JUDGE_BASE_URL for a server without one)" if provider == "openai" else ""))
        self.name, self.cache, self.reply_tokens, self.show = spec, cache and Path(cache), reply_tokens, show
        self.concurrency, self.timeout = concurrency, timeout
        self.retries, self.backoff, self.give_up = retries, backoff, give_up
        self.extra = {"reasoning_effort": "none"} if "2.5-flash" in self.model else {}  # else thoughts eat max_tokens
        self._lock, self._stop, self._reached, self._refused = threading.Lock(), threading.Event(), False, set()
        rows = read_jsonl(self.cache) if self.cache and self.cache.exists() else []
        self.answers = {row["key"]: row["raw"] for row in rows  # what is no answer is asked again
                        if isinstance(row, dict) and isinstance(row.get("key"), str)
                        and isinstance(row.get("raw"), str) and row["raw"].strip()}

    def request(self, prompt: str, limit: int, temperature: float = 0.0, seed: int | None = None) -> dict:
        """The body of a request for a reply of at most `limit` tokens. Half a surrogate in a prompt becomes "?"."""
        prompt = prompt.encode(errors="replace").decode()
        return {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": temperature,
                "max_tokens": limit, "stream": False, **self.extra} | ({} if seed is None else {"seed": seed})

    def key(self, request: dict) -> str:
        """sha256 of all that shapes a reply: the server and the request."""
        return hashlib.sha256(f"{self.url}\0{json.dumps(request)}".encode()).hexdigest()

    def ask(self, prompts: list[str], temperature: float = 0.0, seeds: list[int] | None = None, max_tokens: int = 16,
            whole: Callable[[str], bool] = lambda text: False) -> list[Reply]:
        """A Reply for each prompt, in order, without a reasoning model's thought; equal prompts are asked once, cached
        ones not at all. A reply that was cut at its longest is an error, unless it is `whole` all the same.

        Raises JudgeError if asking on is pointless: a refused key, an unknown model, no credit left, `give_up` failures
        in a row, a server that is not there, or not one prompt with an answer. A stop (Ctrl-C) waits for the requests
        under way, keeps their answers, and starts no other.
        """
        limit = self.reply_tokens or max_tokens
        requests = [self.request(prompt, limit, temperature, seed)
                    for prompt, seed in zip(prompts, seeds or [None] * len(prompts))]
        keys = [self.key(request) for request in requests]
        todo = {key: request for key, request in zip(keys, requests) if key not in self.answers}
        # Told first: 4 characters per token, and 8 tokens of the chat's own around each prompt.
        tokens_in = sum(len(request["messages"][0]["content"]) for request in todo.values()) // 4 + 8 * len(todo)
        self.show(f"{self.name}: {len(todo)} requests ({len(prompts) - len(todo)} answered or repeated), "
                  f"about {tokens_in:,} tokens in, at most {limit * len(todo):,} out")
        failed, in_a_row = {}, 0
        self._stop.clear()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            with Progress(self.name, len(todo), "request") as progress:
                for part in (list(todo)[:1], list(todo)[1:]):  # what the first learns of a server others need not
                    if failed and not self._reached:
                        break
                    futures = {pool.submit(self._one, key, todo[key], whole): key for key in part}
                    for future in as_completed(futures):
                        progress.add()
                        error = future.result()
                        if error:
                            failed[futures[future]] = error
                        in_a_row = in_a_row + 1 if error else 0
                        if in_a_row == self.give_up:
                            raise JudgeError(f"{self.name}: {in_a_row} requests failed in a row, the last: {error}. "
                                             "What was answered is kept; run again to go on")
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if failed:
            first = next(iter(failed.values()))
            if not self._reached or not any(key in self.answers for key in keys):
                raise JudgeError(f"{self.name}: none of {len(todo)} requests was answered, the first: {first}")
            self.show(f"{self.name}: {len(failed)} of {len(todo)} requests failed, the first: {first}")
        elif todo:
            self.show(f"{self.name}: {len(todo)} of {len(todo)} answered")
        return [Reply(self.answers.get(key, ""), failed.get(key, "")) for key in keys]

    def _one(self, key: str, request: dict, whole: Callable[[str], bool]) -> str:
        """One prompt with retries: "" with its answer kept, or what went wrong. Back-off is exponential with jitter,
        never before Retry-After. A server that has not sent any completion or error yet is tried three times: it may
        not be one.
        """
        reason, pause = "stopped", 0.0
        for attempt in range(self.retries + 1):
            if attempt > 2 and not self._reached or self._stop.wait(pause):
                break
            status, body, retry_after = self._post(request)
            choice = first_choice(body) if 200 <= status < 300 else {}
            if choice:
                return self._keep(key, choice, request["max_tokens"], whole)
            reason = self._told(f"HTTP {status}, no completion: {body}" if status else body)
            code = re.search(r'"code": *"?([45]\d\d)\b', body) if 200 <= status < 300 else None
            status = int(code[1]) if code else status  # some send an error as 200 with the true status inside
            self._reached = self._reached or status >= 400
            for sign, why in HOPELESS.items():
                if sign == status or isinstance(sign, str) and sign in body:
                    raise JudgeError(f"{self.name}: {why} ({self.url}: {reason})")
            if 400 <= status < 500 and status not in (408, 409, 425, 429):
                break  # about this prompt: asking again gives the same
            pause = max(min(self.backoff * 2**attempt * random.uniform(0.5, 1.5), 60), asked_to_wait(retry_after))
            if pause > MAX_WAIT:
                return f"{reason} (may be asked again in {pause:.0f} s)"
        return reason

    def _post(self, request: dict) -> tuple[int, str, str]:
        """(status, body, Retry-After) of a response; (0, the reason, "") if there is none. What a model refuses is left
        out from then on, and its limit called by its newer name."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        while True:
            sent = {name: value for name, value in request.items() if name not in self._refused}
            if "max_tokens" in self._refused:
                sent["max_completion_tokens"] = request["max_tokens"]
            try:
                response = get_session().post(f"{self.url}/chat/completions", json=sent, headers=headers,
                                              timeout=self.timeout)
                body = response.text
            except Exception as error:  # of the HTTP library that this huggingface_hub uses: requests, httpx, ...
                return 0, f"{type(error).__name__}: {error}", ""
            refused = [name for name in REFUSABLE if name in sent and re.search(REFUSED.format(name), body)]
            if response.status_code not in (400, 422) or not refused:
                return response.status_code, body, response.headers.get("Retry-After", "")
            if refused[0] not in self._refused:
                instead = "with max_completion_tokens" if refused[0] == "max_tokens" else "without it"
                self.show(f"{self.name}: {refused[0]} is refused, asked {instead} ({self._told(body)})")
            self._refused.add(refused[0])

    def _told(self, text: str) -> str:
        """A server's words in 300 characters, without a page's tags, and without the key, which some repeat."""
        text = re.sub(r"<(style|script)\b.*?</\1>|<[^<>]*>", " ", text[:10_000], flags=re.DOTALL | re.IGNORECASE)
        if len(self._key) > 7:  # no key, but a word for "none", may stand in any sentence
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:300]

    def _keep(self, key: str, choice: dict, limit: int, whole: Callable[[str], bool]) -> str:
        """Keeps an answer, returns "". None is an empty reply (reasoning may take all tokens before the first word) or
        one that is cut."""
        self._reached = True
        text = after_thought(text_of(choice["message"].get("content")))
        if choice.get("finish_reason") in ("length", "max_tokens") and not whole(text):
            return f"a reply cut at {limit} tokens, raise --reply-tokens"
        if not text.strip():
            return self._told(f"an empty reply: {json.dumps(choice)}")
        with self._lock:
            if self.cache:
                append_jsonl(self.cache, {"key": key, "model": self.name, "raw": text})
            self.answers[key] = text
        return ""


def first_choice(body: str) -> dict:
    """What a chat completion holds; {} if a body is none (an error, a page, a stream), or if the model failed."""
    try:
        choice = json.loads(body)["choices"][0]
        return choice if isinstance(choice["message"], dict) and not choice.get("error") else {}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}


def text_of(content) -> str:
    """A message's content: a text, or a list of parts, some of which are texts (others thoughts, refusals)."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts
             if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")]
    return "".join(text for text in texts if isinstance(text, str))


def after_thought(text: str) -> str:
    """What a reasoning model says after its thought; "" if the thought has no end."""
    said = re.split(THOUGHT.format("/"), text, flags=re.IGNORECASE)[-1]
    return "" if re.match(rf"\s*{THOUGHT.format('')}", said, flags=re.IGNORECASE) else said


def asked_to_wait(retry_after: str) -> float:
    """Seconds of a Retry-After header, which holds them or a date (always of GMT); 0 if neither can be read."""
    try:
        if re.fullmatch(r"[\d.]+", retry_after):
            return float(retry_after)
        return timegm(parsedate(retry_after)) - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0
