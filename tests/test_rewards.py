"""Eq. 4, Eq. 5 and algorithm 1: the recorded rewards, and every edge case with its number worked out by hand."""

import random
import re

import pytest
import torch

from erv_min.base.errors import SettingsError
from erv_min.rewards import (RewardSettings, answer_reward, format_reward, score_completions, select_labels,
                             split_sentences)

LABELS = ("sad", "happy", "neutral")  # a verifier of three, for numbers by hand


def verifier(sentences):
    """A verifier to check on paper: 0.9 for each label whose name stands in the sentence, else 0.1."""
    return torch.tensor([[0.9 if label in s else 0.1 for label in LABELS] for s in sentences]).reshape(-1, 3)


def test_select_labels_refuses_what_is_no_verifier():
    with pytest.raises(SettingsError, match="4"):
        select_labels(torch.zeros(1, 3), ("a", "b", "c", "d"))
    with pytest.raises(SettingsError, match="not a number"):
        select_labels(torch.tensor([[0.1, float("nan"), 0.2]]), LABELS)


def test_the_verifier_is_called_once_with_all_sentences():
    calls = []

    def counted(sentences):
        calls.append(sentences)
        return verifier(sentences)

    texts = ["<think>So sad. A hat.</think>", "<think>A hat. So sad. So sad.</think>", "no tags"]
    scored = score_completions(texts, ["sad", "happy", "sadness"], ["dfew", "dfew", "mafw"], counted, LABELS)
    assert calls == [["So sad.", "A hat.", "A hat.", "So sad.", "So sad."]]
    # `A hat.` has no label over tau: its best of three equal ones is the last, neutral. c / (N - N_neu): 1/1, 0/2, none
    assert [r.explanation for r in scored] == [1, 0, 0]
    calls.clear()
    none = score_completions(["", "x"], ["sad", "sad"], "dfew", counted, LABELS)  # divergence 17: 0, no failure
    assert calls == [] and [r.explanation for r in none] == [0, 0]


def test_score_completions_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="shorter"):
        score_completions(["a", "b"], ["sad"], "dfew", None, LABELS)
    with pytest.raises(ValueError, match="shorter"):
        score_completions(["<think>So sad. A hat.</think>"], ["sad"], "dfew", lambda s: verifier(s)[:1], LABELS)
    for bad in ({"tau": 1.5}, {"k": 0}, {"neutral_rule": "all"}, {"answer_rule": "x"}, {"sentence_rule": "x"}):
        with pytest.raises(SettingsError, match="--" + next(iter(bad)).replace("_", "-")):
            RewardSettings(**bad)


def test_defaults_are_the_papers():
    s = RewardSettings()
    assert (s.tau, s.k, s.neutral_rule, s.ablate) == (0.5, 2, "only", "")


# ---- format and sentences against the released regexes, and in one pass ----

RELEASED_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
RELEASED_SPLIT = re.compile(r'(?<=[.!?])\s+(?=(?:[^"]*"[^"]*")*[^"]*$)')


def test_format_equals_the_regex_on_random_tags():
    random.seed(0)
    parts, ones = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "x"], 0
    for _ in range(20000):
        text = "".join(random.choices(parts, k=random.randint(0, 9)))
        text = random.choice([text, "<think>" + text + "</answer>"])
        ones += format_reward(text)
        assert format_reward(text) == float(RELEASED_FORMAT.fullmatch(text) is not None), text
    assert ones > 500


def test_sentences_equal_the_regex_on_random_text():
    random.seed(0)
    for _ in range(20000):
        text = "".join(random.choices('a.!? "\n\t', k=random.randint(0, 14)))
        want = [s.strip() for s in RELEASED_SPLIT.split(text) if s.strip()]
        assert split_sentences(text) == want, repr(text)


def test_a_megabyte_of_quotes_stops_and_tags():
    """Quadratic code would sit here for minutes: 10^6 characters each."""
    random.seed(0)
    n = 10**6
    for text in ('".' * (n // 2), ". " * (n // 2), '". ' * (n // 3), "." * n, '"' * n, " " * n, '."' + " " * n,
                 "".join(random.choices('". ', k=n)), '. "' * (n // 3)):
        assert all(split_sentences(text)) and all(split_sentences(text, "extended"))
    assert len(split_sentences('". ' * (n // 3) + '"')) == 166667  # 333,334 quotes: a split after each 2nd stop
    for text in ("<think>" * (n // 7), "<think>" + "</think>" * (n // 8), "<think>" + "</think><answer>" * (n // 16),
                 "<think></think>" + " " * n, "<think></think><answer>" + "</answer>" * (n // 9) + "x"):
        assert format_reward(text) == 0 and answer_reward(text, "sad", "dfew") == 0
        assert answer_reward(text, "sad", "dfew", "released") == 0
