"""Figure 3's judge against a local server that behaves like the API, well and badly (divergence 14)."""

import contextlib
import io
import json
import logging
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import erv_min.toy.judges  # noqa: F401  registers them: lexicon, paraphrases
from erv_min.base import chat
from erv_min.base.chat import ChatClient
from erv_min.base.errors import DataError, DiskError, JudgeError
from erv_min.base.files import append_jsonl
from erv_min.emotions import ERV_LABELS
from erv_min.judge import (Judgement, erv_judge, explanation_of, hosted_judge, judge_rows, make_judge, permuted,
                           read_answer)
from erv_min.metrics import score
from erv_min.prompts import judge_prompt

KEY = "sk-planted-0123456789"
DFEW = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")


class FakeApi:
    """An OpenAI-compatible server on 127.0.0.1. `behave(prompt, times)` -> (status, headers, body | None to cut)."""

    def __init__(self, behave):
        self.behave = behave
        self.asked, self.bodies, self.auth, self.most_at_once, self._now = Counter(), [], set(), 0, 0
        lock = threading.Lock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with lock:
                    api._now += 1
                    api.most_at_once = max(api.most_at_once, api._now)
                    api.asked[prompt] += 1
                    times = api.asked[prompt]
                    api.bodies.append(body)
                    api.auth.add(self.headers["Authorization"])
                try:
                    status, headers, content = api.behave(prompt, times)
                finally:
                    with lock:
                        api._now -= 1
                if content is None:  # the line goes dead in the middle of an answer
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices"')
                    self.close_connection = True
                    return
                self.send_response(status)
                headers = {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def explanation_counts(self) -> dict[str, int]:
        counts = Counter()
        for prompt, times in self.asked.items():
            counts[reason(prompt)] += times
        return dict(counts)


def reason(prompt: str) -> str:
    return re.search(r"Reason:\s*(.*?)\s*Answer Emotion:", prompt, re.DOTALL).group(1)


def good(text: str | None, finish_reason: str = "stop"):
    return 200, {}, json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [
        {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}]}).encode()


def bad(status: int, message: str = "no", **headers):
    return status, headers, json.dumps({"error": {"message": message, "code": message}}).encode()


@pytest.fixture
def serve(monkeypatch):
    """serve(behave) -> FakeApi, to which the environment points."""
    servers = []

    def start(behave):
        api = FakeApi(behave)
        servers.append(api.server)
        monkeypatch.setenv("ERV_JUDGE_BASE_URL", api.url)
        return api

    monkeypatch.setattr(chat, "BACKOFF", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def client(cache=None, **options) -> ChatClient:
    return ChatClient("openai:gpt-4.1-mini", cache, **options)


def ask(texts, cache=None, labels=DFEW, **options):
    """(judgements, the lines that were printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        judgements = hosted_judge(client(cache, **options))(texts, labels)
    return judgements, shown.getvalue().splitlines()


# ---------------------------------------------------------------------------------------------------- good answers

def test_request_is_figure_3_at_temperature_0(serve):
    api = serve(lambda prompt, times: good("happy"))
    judgements, shown = ask(["He smiles."])
    assert judgements == [Judgement("happy", "ok")]
    (body,) = api.bodies
    assert body["temperature"] == 0 and body["model"] == "gpt-4.1-mini" and len(body["messages"]) == 1
    prompt = body["messages"][0]["content"]
    assert prompt.startswith("Read the reasoning content and respond with the appropriate emotion in")
    assert "Reply with only the emotion word." in prompt and reason(prompt) == "He smiles."
    assert prompt == judge_prompt("He smiles.", permuted(DFEW, "He smiles."))  # in the explanation's own order
    assert permuted(DFEW, "He smiles.") != list(DFEW) and api.auth == {f"Bearer {KEY}"}
    assert "1 requests (0 answered or repeated) of at most 16 tokens out" in shown[0]


def test_order_repeats_empty_and_outside(serve):
    answers = {"a": "Happy.", "b": "**sad**", "c": "content", "d": "happy, sad", "e": "I cannot tell.", "f": "?",
               "g": "Answer Emotion: fear", "h": "Happiness", "i": "unhappy"}
    api = serve(lambda prompt, times: good(answers[reason(prompt)]))
    texts = [*answers, "a", "", "  "]
    judgements, _ = ask(texts)
    assert [j.emotion for j in judgements] == ["happy", "sad", None, None, None, None, "fear", "happy", None, "happy",
                                               None, None]
    assert {j.status for j in judgements if j.emotion is None} == {"outside"}
    assert api.explanation_counts() == dict.fromkeys(answers, 1)  # "a" once, the empty ones never


def test_labels_are_permuted_by_item_and_the_same_each_time():
    orders = [permuted(DFEW, f"text {i}") for i in range(200)]
    assert all(sorted(order) == sorted(DFEW) for order in orders)
    assert orders == [permuted(DFEW, f"text {i}") for i in range(200)]
    assert permuted(DFEW, "x", 1) != permuted(DFEW, "x", 2)
    first = Counter(order[0] for order in orders)
    assert len(first) == 7 and max(first.values()) < 60  # 200 / 7 = 29 each where no label is favoured


def test_read_answer_knows_the_data_set_of_the_labels():
    mafw = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise", "contempt", "anxiety",
            "helplessness", "disappointment")
    assert read_answer("Anger!\n", mafw).emotion == "anger" and read_answer("happy", mafw).emotion == "happiness"
    assert read_answer("contempt", DFEW).status == "outside"


def test_bounded_and_concurrent(serve):
    def slow(prompt, times):
        time.sleep(0.05)
        return good("sad")

    api = serve(slow)
    judgements, _ = ask([f"text {i}" for i in range(12)], concurrency=3)
    assert {j.emotion for j in judgements} == {"sad"} and 2 <= api.most_at_once <= 3


@pytest.mark.parametrize("content", [
    "<think>\nShe is sad, no.\n</think>\n\nhappy", "<think>\n\n</think>\n\nHappy.", "sad? No.</think>happy",
    "<THINKING>sad</THINKING> happy", "[THINK]sad[/THINK]happy", "<reasoning>a</reasoning><think>sad</think>happy",
    [{"type": "text", "text": "happy"}], [{"type": "thinking", "thinking": [{"type": "text", "text": "sad"}]},
                                          {"type": "text", "text": "hap"}, {"type": "text", "text": "py"}],
    [{"type": "reasoning", "text": "sad"}, {"type": "output_text", "text": "happy"}]])
def test_thoughts_and_parts_of_a_reply_are_told_from_the_answer(serve, content):
    serve(lambda prompt, times: good(content))
    assert [j.emotion for j in ask(["x"])[0]] == ["happy"]


def test_half_a_surrogate_ends_no_evaluation(serve, tmp_path):
    """What a JSON file may hold, cut in the middle of an emoji; "?" stands for it in the prompt."""
    api = serve(lambda prompt, times: good("happy \ud83d" if "laugh" in prompt else "sad"))
    texts = ["She \ud83d smiles.", "She smiles. \U0001f600", "laugh"]
    assert [j.emotion for j in ask(texts, tmp_path / "c")[0]] == ["sad", "sad", "happy"]
    assert set(map(reason, api.asked)) == {"She ? smiles.", "She smiles. \U0001f600", "laugh"}
    assert [j.emotion for j in ask(texts, tmp_path / "c")[0]] == ["sad", "sad", "happy"] and len(api.bodies) == 3


# ---------------------------------------------------------------------------------------------------- bad servers

@pytest.mark.parametrize("first", [
    lambda: bad(429), lambda: bad(500), lambda: bad(503), lambda: (200, {}, None), lambda: (200, {}, b"{not json"),
    lambda: (200, {}, b"{}"), lambda: (200, {}, b'{"choices": []}'),
], ids=["429", "500", "503", "cut", "malformed", "empty", "no-choices"])
def test_one_failure_is_asked_again(serve, tmp_path, first):
    api = serve(lambda prompt, times: first() if times == 1 else good("angry"))
    judgements, _ = ask(["x"], tmp_path / "cache.jsonl")
    assert judgements == [Judgement("angry", "ok")] and api.explanation_counts() == {"x": 2}
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 1


def test_an_answer_without_a_completion_is_told_in_the_server_s_words(serve, monkeypatch):
    """The sentence that says what to do stands in the error, whatever the form that it comes in."""
    monkeypatch.setattr(chat, "RETRIES", 2)
    page = b"<html><style>b {}</style><body>Please <b>sign in</b> to the hotel network</body></html>"
    chunk = json.dumps({"object": "chat.completion.chunk", "choices": [{"delta": {"content": "happy"}}]})
    for status, body, told in (
            (200, {"error": {"message": "free-models-per-min", "code": 429}}, "free-models-per-min"),
            (200, {"error": {"message": "no such route", "code": "404"}}, "no such route"),
            (200, {"error": "model 'm' not found"}, "model 'm' not found"), (200, {"choices": []}, "choices.*\\[\\]"),
            (200, {"choices": [{"message": {"content": ""}, "error": {"message": "overloaded"}}]}, "overloaded"),
            (200, {"choices": [{"message": {"content": None, "refusal": "I will not."}}]}, "reply: .*I will not."),
            (200, f"data: {chunk}\n\ndata: [DONE]\n\n".encode(), "chat.completion.chunk"),
            (200, page, "Please sign in to the hotel network"), (502, page, "HTTP 502, no completion: Please sign in"),
            (403, b"Forbidden by the proxy's rules", "http.*: HTTP 403, .*Forbidden by the proxy's rules")):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        serve(lambda prompt, times: (status, {}, body))
        with pytest.raises(JudgeError, match=told):
            ask([f"text {i}" for i in range(3)])


def test_what_a_model_refuses_is_left_out_from_then_on(serve, capsys):
    def newer(prompt, times):
        sent = api.bodies[-1]
        if "max_tokens" in sent:
            return bad(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return good("sad") if "temperature" not in sent else bad(400, "'temperature' does not support 0 here.")

    api = serve(newer)
    judge = hosted_judge(client())
    assert {j.emotion for texts in ("abcdefghij", "klm") for j in judge(list(texts), DFEW)} == {"sad"}
    assert len(api.bodies) == 13 + 2 and api.bodies[-1]["max_completion_tokens"] == 16  # learned once
    shown = capsys.readouterr().out
    assert shown.count("asked without max_tokens, which is refused (HTTP 400, no completion: ") == 1
    assert shown.count("asked without temperature") == 1 and "does not support 0 here" in shown
    for words, times_asked in (("'temperature', 'max_tokens', 'max_completion_tokens', 'seed': all wrong", 3),
                               ("invalid temperature: only 1 is all wrong", 2),
                               ("'She has a high temperature' is all wrong", 1)):  # about the prompt
        api = serve(lambda prompt, times: bad(400, words))
        with pytest.raises(JudgeError, match="all wrong"):
            ask(["x"])
        assert len(api.bodies) == times_asked


def test_slow_answers_time_out_and_are_asked_again(serve, monkeypatch):
    monkeypatch.setattr(chat, "TIMEOUT", 0.4)

    def slow_once(prompt, times):
        time.sleep(1.5 if times == 1 else 0)
        return good("fear")

    api = serve(slow_once)
    judgements, _ = ask(["x"])
    assert judgements[0].emotion == "fear" and api.explanation_counts() == {"x": 2}


def test_retry_after_is_honoured(serve):
    stamps = []

    def behave(prompt, times):
        stamps.append(time.monotonic())
        return bad(429, **{"Retry-After": "1.2"}) if times == 1 else good("sad")

    serve(behave)
    assert ask(["x"])[0][0].emotion == "sad" and stamps[1] - stamps[0] >= 1.2
    api = serve(lambda prompt, times: bad(429, "in an hour", **{"Retry-After": "3600"}))  # too long to wait for
    with pytest.raises(JudgeError, match="HTTP 429, no completion: .*in an hour"):
        ask(["x"])
    assert api.explanation_counts() == {"x": 1}
    for unread in ("Wed, 21 Oct 2015 07:28:10 GMT", "nan", "-1", "1.2.3", ""):  # back-off alone
        api = serve(lambda prompt, times: bad(429, **{"Retry-After": unread}) if times == 1 else good("sad"))
        assert ask(["x"])[0][0].emotion == "sad" and api.explanation_counts() == {"x": 2}


def test_lasting_failures_are_errors_and_not_cached(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "RETRIES", 2)
    cache = tmp_path / "cache.jsonl"
    api = serve(lambda prompt, times: bad(500) if reason(prompt) == "b" else bad(400, "content_filter")
                if reason(prompt) == "c" else good("sad"))
    judgements, _ = ask(["a", "b", "c"], cache)
    assert [(j.emotion, j.status) for j in judgements] == [("sad", "ok"), (None, "error"), (None, "error")]
    assert api.explanation_counts() == {"a": 1, "b": 3, "c": 1}  # a 400 is not asked again
    assert len(cache.read_text().splitlines()) == 1
    api.behave = lambda prompt, times: good("fear")
    api.asked.clear()
    judgements, shown = ask(["a", "b", "c"], cache)
    assert [j.emotion for j in judgements] == ["sad", "fear", "fear"] and api.explanation_counts() == {"b": 1, "c": 1}
    assert "2 requests (1 answered or repeated)" in shown[0]


@pytest.mark.parametrize("answer, message", [
    (bad(401, f"Incorrect API key provided: {KEY}"), "Incorrect API key provided: [*]{3}"),
    (bad(404, "model_not_found"), "HTTP 404, no completion: .*model_not_found"),
    (bad(429, 400 * "x" + "insufficient_quota"), "HTTP 429.*xxx"), (bad(402, "top up"), "HTTP 402.*top up")])
def test_hopeless_answers_end_the_run(serve, answer, message):
    api = serve(lambda prompt, times: answer)
    with pytest.raises(JudgeError, match=message):
        ask([f"text {i}" for i in range(50)], concurrency=2)
    assert len(api.asked) < 10


def test_a_dead_server_ends_the_run(serve, monkeypatch):
    monkeypatch.setattr(chat, "RETRIES", 0)
    monkeypatch.setattr(chat, "GIVE_UP", 5)
    serve(lambda prompt, times: bad(500))
    with pytest.raises(JudgeError, match="5 requests failed in a row"):
        ask([f"text {i}" for i in range(50)])


@pytest.mark.parametrize("text", [None, "", " \n", "<think>\nShe is happy", "Okay, she smiles. So", "hap"])
def test_a_reply_without_its_end_is_an_error_that_says_what_to_raise(serve, tmp_path, text):
    """What reasoning models give if their thoughts take all of max_tokens: no answer, and none to keep."""
    cache = tmp_path / "cache.jsonl"
    api = serve(lambda prompt, times: good("sad") if reason(prompt) == "a" else good(text, "length"))
    judgements, shown = ask(["a", "b"], cache)
    assert judgements[0].emotion == "sad" and judgements[1].status == "error"
    assert "cut at 16 tokens, raise --reply-tokens" in shown[-1]
    assert len(cache.read_text().splitlines()) == 1 and api.explanation_counts() == {"a": 1, "b": 1}
    api.behave = lambda prompt, times: good("happy", "length")  # a whole label, although it was cut after it
    assert ask(["c"], cache)[0][0].emotion == "happy"
    api.behave = lambda prompt, times: good("fear") if api.bodies[-1]["max_tokens"] == 500 else good(text, "length")
    assert [j.emotion for j in ask(["b"], cache, reply_tokens=500)[0]] == ["fear"]
    api.behave = lambda prompt, times: good("<think>without an end")
    with pytest.raises(JudgeError, match="an empty reply: .*without an end"):
        ask(["d"], cache)


def test_where_nothing_is_answered_the_first_reason_is_the_error(serve, capsys):
    api = serve(lambda prompt, times: bad(400, "no such parameter"))
    with pytest.raises(JudgeError, match="3 of 3 requests failed, the first: .*no such parameter"):
        hosted_judge(client())(["a", "b", "c"], DFEW)
    assert sum(api.asked.values()) == 3 and capsys.readouterr().out.count("\n") == 1  # what will be asked


def test_one_prompt_that_is_always_refused_ends_no_evaluation(serve, tmp_path):
    """The next run asks it alone, and it fails again: the others' answers are in the cache."""
    serve(lambda prompt, times: bad(400, "content_filter") if reason(prompt) == "b" else good("sad"))
    for _ in range(2):
        assert [j.status for j in ask(["a", "b"], tmp_path / "cache.jsonl")[0]] == ["ok", "error"]


def test_a_server_that_is_not_there_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("ERV_JUDGE_BASE_URL", "http://127.0.0.1:9/v1")  # the discard port: nobody listens
    waits = []
    made = client()
    made._stop.wait = waits.append
    made.answers[made.key(made.request("cached", 16))] = "sad"
    with pytest.raises(JudgeError, match="nothing more can be asked of http://127.0.0.1:9/v1: .*[Cc]onnect"):
        made.ask(["cached", "y", "z", "x"])  # all but the first are not sent
    assert len(waits) == 3 and sum(waits) < 5  # seconds before each of three tries


def test_a_full_disk_is_told_and_nothing_is_paid_twice(serve, tmp_path, monkeypatch):
    def full(path, row):
        raise DiskError("the disk is full")

    api = serve(lambda prompt, times: good("sad"))
    monkeypatch.setattr("erv_min.base.chat.append_jsonl", full)
    with pytest.raises(DiskError):
        ask(["x"], tmp_path / "cache.jsonl")
    assert api.explanation_counts() == {"x": 1}


# ---------------------------------------------------------------------------------------------------- stop and resume

@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_stopped_and_resumed_nothing_is_asked_twice(serve, tmp_path, stop, monkeypatch):
    def behave(prompt, times):
        time.sleep(0.01)
        return good("sad")

    api, cache = serve(behave), tmp_path / "cache.jsonl"
    prompts = [f"Reason: {i} Answer Emotion:" for i in range(140)]

    def keep_and_stop(path, row):
        append_jsonl(path, row)
        if len(path.read_text().splitlines()) >= 100:
            raise stop("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(chat, "append_jsonl", keep_and_stop)
        with pytest.raises(stop):
            client(cache, concurrency=4).ask(prompts)
    answered = len(cache.read_text().splitlines())
    assert 100 <= answered < 140 and answered == sum(api.asked.values())  # what was under way is kept
    with open(cache, "a") as f:
        f.write('{"key": "cut in the mid')  # as a power cut would leave it
    replies = client(cache).ask(prompts)
    assert [reply.text for reply in replies] == ["sad"] * 140 and set(api.asked.values()) == {1}
    assert len([json.loads(line) for line in cache.read_text().splitlines()]) == 140
    assert client(cache).ask(prompts) == replies and set(api.asked.values()) == {1}


def test_cache_is_keyed_by_all_that_shapes_a_reply_and_damage_is_named(serve, tmp_path):
    api, cache = serve(lambda prompt, times: good(f"{times}")), tmp_path / "cache.jsonl"
    prompt = "Reason: x Answer Emotion:"
    assert client(cache).ask([prompt])[0].text == "1"
    assert ChatClient("openai:gpt-4.1", cache).ask([prompt])[0].text == "2"
    drawn = client(cache).ask([prompt] * 2, temperature=1.0, seeds=[1, 2])  # drawn answers: one a seed
    assert sorted(reply.text for reply in drawn) == ["3", "4"] and sum(api.asked.values()) == 4
    assert client(cache, reply_tokens=64).ask([prompt])[0].text == "5"
    api = serve(lambda prompt, times: good("another server"))  # of the same model's name
    assert client(cache).ask([prompt])[0].text == "another server"
    cache.write_text("nonsense\n" + cache.read_text())
    with pytest.raises(DataError, match="cache.jsonl, line 1"):
        client(cache)


# ---------------------------------------------------------------------------------------------------- keys

def test_the_key_appears_nowhere(serve, tmp_path, caplog, capfd, monkeypatch):
    monkeypatch.setattr(chat, "RETRIES", 1)
    caplog.set_level(logging.DEBUG)
    echo = f"your key {KEY} is over its limit"
    serve(lambda prompt, times: bad(500, echo) if reason(prompt) == "b" else bad(400, echo) if reason(prompt) == "c"
          else good("sad"))
    judgements, shown = ask(["a", "b", "c"], tmp_path / "cache.jsonl")
    assert judgements[2].status == "error" and "***" in "".join(shown)
    serve(lambda prompt, times: bad(401, echo))
    with pytest.raises(JudgeError) as error:
        ask(["z"])
    seen = [str(judgements), str(shown), str(error.value), repr(error.getrepr(chain=True)), caplog.text, repr(client()),
            *capfd.readouterr(), *(path.read_text() for path in tmp_path.iterdir())]
    assert not any(KEY in text for text in seen)


def test_no_hub_token_for_other_servers(serve, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.delenv("OPENAI_API_KEY")
    api = serve(lambda prompt, times: good("sad"))
    ask(["x"])
    assert api.auth == {None}


def test_makers_errors(monkeypatch):
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "HF_TOKEN", "ERV_JUDGE_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for spec, message in (("openai:gpt-4.1-mini", "set OPENAI_API_KEY"),
                          ("gemini:gemini-2.5-flash", "set GEMINI_API_KEY"), ("hf:a/b", "set HF_TOKEN"),
                          ("gpt-4.1-mini", "expected openai:MODEL"), ("openai:", "expected openai:MODEL"),
                          ("erv:", "expected")):
        with pytest.raises(JudgeError, match=message):
            make_judge(spec)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(JudgeError, match="OPENAI_API_KEY holds a character that no key has") as error:
        make_judge("openai:m")
    assert KEY not in str(error.value)
    for address in ("127.0.0.1:8000/v1", "localhost", "ftp://x/v1"):
        monkeypatch.setenv("ERV_JUDGE_BASE_URL", address)
        with pytest.raises(JudgeError, match=f"ERV_JUDGE_BASE_URL={address}: expected an address as http://"):
            make_judge("openai:m")


def test_an_own_server_is_asked_without_the_hub(serve, monkeypatch):
    """HF_HUB_OFFLINE=1, with which one works without a network, is the hub's alone."""
    serve(lambda prompt, times: good("sad"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert ask(["x"])[0] == [Judgement("sad", "ok")]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_key_follows_no_redirect(serve, status):
    other = serve(lambda prompt, times: good("sad"))
    serve(lambda prompt, times: bad(status, Location=f"{other.url}/chat/completions"))
    with pytest.raises(JudgeError, match=f"HTTP {status}, .*sends requests on to {other.url}/chat/completions"):
        ask(["x"])
    assert not other.auth


def test_a_proxy_is_asked_in_place_of_the_server(serve, monkeypatch):
    proxy = serve(lambda prompt, times: good("sad"))
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("ERV_JUDGE_BASE_URL", "http://judge.example/v1")
    assert ask(["x"])[0] == [Judgement("sad", "ok")] and proxy.bodies


def test_gemini_thinks_not_and_each_provider_has_its_own_address(monkeypatch):
    for name in ("GEMINI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, KEY)
    gemini, hub = ChatClient("gemini:gemini-2.5-flash"), ChatClient("hf:Qwen/Qwen3-8B")
    assert gemini.request("x", 16)["reasoning_effort"] == "none" and "reasoning_effort" not in hub.request("x", 16)
    assert gemini.url == "https://generativelanguage.googleapis.com/v1beta/openai"
    assert hub.url == "https://router.huggingface.co/v1" and hub.model == "Qwen/Qwen3-8B"


# ---------------------------------------------------------------------------------------------------- local judges

def test_erv_judge_takes_the_best_of_the_labels():
    class Verifier:
        labels = tuple(ERV_LABELS)

        def probabilities(self, texts):
            said = {"happiness": .2, "contempt": .9, "fear": .6, "sadness": .1}
            return torch.tensor([[said.get(label, 0.0) for label in self.labels] for _ in texts]).reshape(-1, 11)

    judged = erv_judge(Verifier())(["x", " "], ("happy", "fear", "sad"))  # contempt is not on this list
    assert judged == [Judgement("fear", "ok"), Judgement(None, "outside")]


# ---------------------------------------------------------------------------------------------------- what is judged

@pytest.mark.parametrize("output, read", [
    ("<think> He weeps. </think><answer>sad</answer>", "He weeps."),
    ("<think>He weeps. He", "He weeps. He"),  # cut at its longest: divergence 15
    ("<think>He weeps.\n<answer>sad</answer>", "He weeps."),
    ("He weeps. <answer>sad</answer>", ""), ("He weeps.</think>", ""), ("", ""),
])
def test_the_explanation_is_judged_whatever_became_of_its_tags(output, read):
    assert explanation_of(output) == read


def test_an_unclosed_explanation_counts_for_eea():
    rows = [{"output": "<think>He is sad and weeps.", "dataset": "dfew", "video_id": "1", "ground_truth": "sad"}]
    judge_rows(rows, make_judge("lexicon"))
    assert rows[0]["judged_emotion"] == "sad"
    found = score(rows, "dfew")
    assert (found["EEA"], found["EEA_answered"], found["FCR"]) == (100, 0, 0)
