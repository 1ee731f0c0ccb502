"""A hosted model asked many prompts: cache, retries. What is asked and how a reply is read: judge.py, augment.py.

Requests are OpenAI's chat completions. Every answer is appended to the cache as it comes in: a stopped run asks nothing
twice. A failure is not kept. Keys come from the environment and go nowhere but the request's header.
"""

import hashlib
import json
import os
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urljoin
from urllib.request import HTTPErrorProcessor, Request, build_opener

from erv_min.base.errors import JudgeError
from erv_min.base.files import append_jsonl, read_jsonl
from erv_min.base.progress import Progress

PROVIDERS = {  # name -> its OpenAI-compatible server, the environment variable of its key
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "gemini": ("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "hf": ("https://router.huggingface.co/v1", "HF_TOKEN")}
TIMEOUT, RETRIES, BACKOFF = 60, 6, 1.0  # seconds of a request; further tries; seconds before the first of them
MAX_WAIT = 300  # seconds; if a server asks for more, the prompt fails
GIVE_UP = 20  # failed prompts in a row that end `ask`
# Asking on is pointless: another address, a refused key, no credit, no access, no such model.
HOPELESS = r"^HTTP (3\d\d|40[1-4]),|insufficient_quota"
REFUSABLE = ("max_tokens", "temperature", "seed", "reasoning_effort")  # some models answer 400 to one of these:
REFUSED = r"['\"`]{0}['\"`]|\b(?:invalid|unsupported|unknown)\W+{0}\b|\b{0} (?:is|does|must)\b"
THOUGHT = r"[<\[◁]{}(?:think|thinking|thought|reasoning)[>\]▷]"  # a reasoning model's tags: {} is "" or "/"


@dataclass(frozen=True)
class Reply:
    text: str
    error: str = ""  # why there is no text


class AnyStatus(HTTPErrorProcessor):
    """Hands on every response as it is; so no redirect is followed, with which urllib would send the key along."""

    http_response = https_response = lambda self, request, response: response


class ChatClient:
    """Asks one hosted model. spec: openai:MODEL, gemini:MODEL or hf:ORG/MODEL; ERV_JUDGE_BASE_URL sends openai: to
    another server. reply_tokens: the longest reply, in place of what the caller of `ask` thinks enough; 0: that.
    Raises JudgeError if there is no key.
    """

    def __init__(self, spec: str, cache: str | Path | None = None, concurrency: int = 8, reply_tokens: int = 0):
        provider, _, self.model = spec.partition(":")
        if provider not in PROVIDERS or not self.model:
            raise JudgeError(f"{spec!r}: expected openai:MODEL, gemini:MODEL or hf:ORG/MODEL")
        url, variable = PROVIDERS[provider]
        own_server = os.environ.get("ERV_JUDGE_BASE_URL") if provider == "openai" else ""
        if own_server and not re.match("https?://.", own_server):
            raise JudgeError(f"ERV_JUDGE_BASE_URL={own_server}: expected an address as http://127.0.0.1:8000/v1")
        self._key = os.environ.get(variable, "").strip()
        if not self._key and not own_server:
            raise JudgeError(f"{spec}: no key; set {variable} (openai: or ERV_JUDGE_BASE_URL, a server without keys)")
        if not re.fullmatch("[!-~]*", self._key):
            raise JudgeError(f"{variable} holds a character that no key has, such as a space: set it anew")
        self.name, self.url = spec, (own_server or url).rstrip("/")
        self.cache, self.concurrency, self.reply_tokens = cache, concurrency, reply_tokens
        self._lock, self._stop, self._reached, self._refused = threading.Lock(), threading.Event(), False, set()
        self.answers = {}  # key of a request -> what was said
        for row in read_jsonl(cache, log=True) if cache and Path(cache).exists() else []:
            match row:  # what is no answer is asked again
                case {"key": str(key), "raw": str(text)} if text.strip():
                    self.answers[key] = text

    def request(self, prompt: str, limit: int, temperature: float = 0.0, seed: int | None = None) -> dict:
        """The body of a request for a reply of at most `limit` tokens. Half a surrogate in a prompt becomes "?"."""
        message = {"role": "user", "content": prompt.encode(errors="replace").decode()}
        body = {"model": self.model, "messages": [message], "temperature": temperature, "max_tokens": limit,
                "stream": False}
        if "2.5-flash" in self.model:
            body["reasoning_effort"] = "none"  # else thoughts eat max_tokens
        return body if seed is None else body | {"seed": seed}

    def key(self, request: dict) -> str:
        """sha256 of all that shapes a reply: the server and the request."""
        return hashlib.sha256(f"{self.url}\0{json.dumps(request)}".encode()).hexdigest()

    def ask(self, prompts: list[str], temperature: float = 0.0, seeds: list[int] | None = None, max_tokens: int = 16,
            whole: Callable[[str], bool] = lambda text: False) -> list[Reply]:
        """A Reply for each prompt, in order, without a reasoning model's thought; equal prompts are asked once, cached
        ones not at all. A reply that was cut at its longest is an error, unless it is `whole` all the same.

        Raises JudgeError if what a server says is HOPELESS, if none is there, after GIVE_UP failures in a row, and if
        no prompt has an answer. A stop (Ctrl-C) waits for the requests under way, keeps their answers, starts no other.
        """
        limit = self.reply_tokens or max_tokens
        requests = [self.request(prompt, limit, temperature, seed)
                    for prompt, seed in zip(prompts, seeds or [None] * len(prompts))]
        keys = [self.key(request) for request in requests]
        replies = {key: Reply(self.answers[key]) for key in keys if key in self.answers}
        todo = {key: request for key, request in zip(keys, requests) if key not in replies}
        print(f"{self.name}: {len(todo)} requests ({len(prompts) - len(todo)} answered or repeated) of at most {limit} "
              "tokens out", flush=True)
        in_a_row = 0  # failures
        self._stop.clear()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            with Progress(self.name, len(todo), "request") as progress:
                for part in (list(todo)[:1], list(todo)[1:]):  # what the first learns of a server others need not
                    futures = {pool.submit(self._one, key, todo[key], whole): key for key in part}
                    for future in as_completed(futures):
                        progress.add()
                        reply = replies[futures[future]] = future.result()
                        in_a_row = in_a_row + 1 if reply.error else 0
                        if in_a_row == GIVE_UP:
                            raise JudgeError(f"{self.name}: {in_a_row} requests failed in a row, the last: "
                                             f"{reply.error}. What was answered is kept; run again to go on")
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if failed := [reply.error for reply in replies.values() if reply.error]:
            said = f"{self.name}: {len(failed)} of {len(todo)} requests failed, the first: {failed[0]}"
            if len(failed) == len(replies):
                raise JudgeError(said)
            print(said)
        return [replies[key] for key in keys]

    def _one(self, key: str, request: dict, whole: Callable[[str], bool]) -> Reply:
        """One prompt with retries; an answer is kept. Back-off is exponential with jitter, never before Retry-After. A
        server that has sent neither a completion nor an error of HTTP is tried three times. What a model refuses is
        left out from then on, and its limit called by its newer name."""
        reason, pause = "stopped", 0.0
        for attempt in range(RETRIES + 1):
            if self._stop.wait(pause):
                break
            sent = {name: value for name, value in request.items() if name not in self._refused}
            if "max_tokens" in self._refused:
                sent["max_completion_tokens"] = request["max_tokens"]
            status, body, asked_to_wait = self._post(sent)
            if reply := read_completion(body):
                text, cut = reply
                self._reached = True
                if cut and not whole(text):
                    return Reply("", f"a reply cut at {request['max_tokens']} tokens, raise --reply-tokens")
                if not text.strip():  # or reasoning took all tokens before the first word
                    return Reply("", self._told(f"an empty reply: {body}"))
                with self._lock:
                    if self.cache:
                        append_jsonl(self.cache, {"key": key, "model": self.name, "raw": text})
                    self.answers[key] = text
                return Reply(text)
            said = f"HTTP {status}, no completion: {body}" if status else body
            reason, self._reached = self._told(said), self._reached or status >= 400
            if re.search(HOPELESS, said) or attempt == 2 and not self._reached:
                raise JudgeError(f"{self.name}: nothing more can be asked of {self.url}: {reason}")
            refused = [name for name in REFUSABLE if name in sent and re.search(REFUSED.format(name), body)]
            if status in (400, 422) and refused:
                self._refused.add(refused[0])
                print(f"{self.name}: asked without {refused[0]}, which is refused ({reason})")
                continue
            if 400 <= status < 500 and status not in (408, 409, 425, 429) or asked_to_wait > MAX_WAIT:
                break  # about this prompt, so that asking again gives the same; or too long to wait for
            pause = max(min(BACKOFF * 2**attempt * random.uniform(0.5, 1.5), 60), asked_to_wait)
        return Reply("", reason)

    def _post(self, body: dict) -> tuple[int, str, float]:
        """(status, body, seconds of Retry-After) of a response; (0, the reason, 0) if there is none."""
        headers = {"Content-Type": "application/json", "User-Agent": "erv-min"}  # some refuse urllib's own name
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            request = Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
            with build_opener(AnyStatus).open(request, timeout=TIMEOUT) as response:
                text, said = response.read().decode(errors="replace"), response.headers
            if response.status // 100 == 3:
                text = f"the server sends requests on to {urljoin(request.full_url, said.get('Location', ''))} {text}"
            seconds = re.fullmatch(r"\d+(\.\d+)?", said.get("Retry-After", ""))
            return response.status, text, float(seconds[0]) if seconds else 0.0
        except (OSError, HTTPException, ValueError) as error:  # ValueError: no address of a server
            return 0, f"{type(error).__name__}: {error.reason if isinstance(error, URLError) else error}", 0.0

    def _told(self, text: str) -> str:
        """A server's words in 300 characters, without a page's tags, and without the key, which some repeat."""
        text = re.sub(r"<(style|script)\b.*?</\1>|<[^<>]*>", " ", text[:10_000], flags=re.DOTALL | re.IGNORECASE)
        if len(self._key) > 7:  # no key, but a word for "none", may stand in any sentence
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:300]


def read_completion(body: str) -> tuple[str, bool] | None:
    """(what a chat completion says without its thought, whether it was cut); None if a body is no completion (an error,
    a page, a stream), or if the model failed. Its content is a text, or a list of parts, some of which are texts."""
    try:
        choice = json.loads(body)["choices"][0]
        content = choice["message"].get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        text = "".join(part["text"] for part in parts if part.get("type", "text") in ("text", "output_text"))
        cut = choice.get("finish_reason") in ("length", "max_tokens")
        return None if choice.get("error") else (after_thought(text), cut)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def after_thought(text: str) -> str:
    """What a reasoning model says after its thought; "" if the thought has no end."""
    said = re.split(THOUGHT.format("/"), text, flags=re.IGNORECASE)[-1]
    return "" if re.match(rf"\s*{THOUGHT.format('')}", said, flags=re.IGNORECASE) else said
