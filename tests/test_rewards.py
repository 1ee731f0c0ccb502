"""Eq. 4, Eq. 5 and algorithm 1: the recorded rewards, and every edge case with its number worked out by hand."""

import random
import re

import pytest
import torch

from conftest import GOLDEN
from erv_min.emotions import GOEMOTIONS
from erv_min.run.errors import DataError, SettingsError
from erv_min.run.files import read_json
from erv_min.rewards import (RewardSettings, answer_reward, explanation_reward, extract_answer, extract_explanation,
                             format_reward, score_completions, select_labels, split_sentences)

GROUPS = read_json(GOLDEN / "text/rewards.json")["groups"]
EDGES = read_json(GOLDEN / "text/edge_cases.json")
LABELS = ("sad", "happy", "neutral")  # a verifier of three, for numbers by hand


def verifier(sentences):
    """A verifier to check on paper: 0.9 for each label whose name stands in the sentence, else 0.1."""
    return torch.tensor([[0.9 if label in s else 0.1 for label in LABELS] for s in sentences]).reshape(-1, 3)


def reward(completion, e_gt="sad", step=None, **changes):
    return score_completions([completion], [e_gt], "dfew", verifier, LABELS, RewardSettings(**changes), step)[0]


# ---- recorded ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_groups(dtype):
    for g in GROUPS:
        scored = score_completions(g["completions"], [g["ground_truth"]] * 6, g["dataset"],
                                   lambda s: torch.tensor([g["probs"][x] for x in s], dtype=dtype), GOEMOTIONS,
                                   RewardSettings.released())
        assert [r.sentences for r in scored] == g["sentences"]
        assert [r.explanation for r in scored] == pytest.approx(g["explanation_reward"], abs=1e-9)
        assert [r.answer for r in scored] == g["answer_reward"]
        assert [r.format for r in scored] == g["format_reward"]
        assert [r.total for r in scored] == pytest.approx([sum(x) for x in zip(
            g["explanation_reward"], g["answer_reward"], g["format_reward"])], abs=1e-9)


def test_recorded_edge_cases():
    for x in EDGES["answers"]:
        assert answer_reward(x["completion"], x["ground_truth"], x["dataset"], "released") == x["answer_reward"]
        assert format_reward(x["completion"]) == x["format_reward"]
    for x in EDGES["explanations"]:
        sets = select_labels(torch.tensor(x["probs"]), GOEMOTIONS, tau=0.1)
        assert explanation_reward(sets, x["ground_truth"]) == pytest.approx(x["explanation_reward"], abs=1e-9)


# ---- algorithm 1, lines 7-14 ----


def test_select_labels():
    probs = torch.tensor([[0.9, 0.7, 0.6],   # three over tau: the two best
                          [0.6, 0.1, 0.8],   # two: both, best first
                          [0.5, 0.2, 0.1],   # 0.5 is not over 0.5, none is: the best
                          [0.1, 0.6, 0.5]])  # one: 0.5 is not over
    assert select_labels(probs, LABELS) == [["sad", "happy"], ["neutral", "sad"], ["sad"], ["happy"]]
    assert select_labels(probs, LABELS, tau=0.65, k=1) == [["sad"], ["neutral"], ["sad"], ["happy"]]
    assert select_labels(probs, LABELS, tau=0.05, k=3)[3] == ["happy", "neutral", "sad"]
    assert select_labels(torch.zeros(0, 3), LABELS) == []


def test_select_labels_refuses_what_is_no_verifier():
    with pytest.raises(SettingsError, match="4"):
        select_labels(torch.zeros(1, 3), ("a", "b", "c", "d"))
    with pytest.raises(SettingsError, match="not a number"):
        select_labels(torch.tensor([[0.1, float("nan"), 0.2]]), LABELS)


# ---- Eq. 4 ----

SAD, HAPPY, NEUTRAL, BOTH, SAD_NEUTRAL = ["sad"], ["happy"], ["neutral"], ["sad", "happy"], ["sad", "neutral"]


@pytest.mark.parametrize("sets, e_gt, only, any_, unfiltered", [
    # c / (N - N_neu) with "only"; with "any"; c / N
    ([SAD, HAPPY, NEUTRAL], "sad", 1 / 2, 1 / 2, 1 / 3),  # c 1, N 3, N_neu 1
    ([SAD, HAPPY, SAD, BOTH], "sad", 3 / 4, 3 / 4, 3 / 4),  # none neutral
    ([NEUTRAL, NEUTRAL], "sad", 0, 0, 0),  # all neutral: 0 / 0 is 0 (divergence 3)
    ([NEUTRAL, SAD, SAD_NEUTRAL], "neutral", 2 / 3, 2 / 3, 2 / 3),  # the neutral label divides by N
    ([BOTH], "happy", 1, 1, 1),  # two labels: one match is enough
    ([SAD_NEUTRAL, SAD, HAPPY], "sad", 2 / 3, 2 / 2, 2 / 3),  # any: the first counts above and not below
    ([SAD_NEUTRAL, SAD], "sad", 1, 2, 1),  # any: R_E passes 1 (divergence 2)
    ([SAD_NEUTRAL], "sad", 1, 0, 1),  # any: 1 / 0 is 0
    ([SAD, HAPPY], "contempt", 0, 0, 0),  # a label the verifier does not have
    ([], "sad", 0, 0, 0),  # no sentence
    ([[], SAD], "sad", 1 / 2, 1 / 2, 1 / 2),  # a sentence without a usable label is not neutral
])
def test_eq4(sets, e_gt, only, any_, unfiltered):
    assert explanation_reward(sets, e_gt) == pytest.approx(only)
    assert explanation_reward(sets, e_gt, "any") == pytest.approx(any_)
    assert explanation_reward(sets, e_gt, neutral_filter=False) == pytest.approx(unfiltered)


def test_eq4_compares_names_of_every_list():
    """DFEW's happy is MAFW's happiness and GoEmotions' joy; 17 of GoEmotions' classes are no emotion of ours."""
    assert explanation_reward([["happiness"], ["joy"], ["admiration"], ["love", "neutral"]], "happy") == 2 / 4
    assert explanation_reward([["nervousness"], ["grief"]], "anxiety") == 1 / 2
    # EMER's worried is anxiety, RAVDESS's fearful, surprised and calm are fear, surprise and neutral (divided by N).
    for e_gt, EL in (("worried", "anxiety"), ("fearful", "fear"), ("surprised", "surprise"), ("calm", "neutral")):
        assert explanation_reward([[EL], ["anger"]], e_gt) == 1 / 2
    with pytest.raises(SettingsError, match="most"):
        explanation_reward([SAD], "sad", "most")


# ---- edge cases through Eq. 5: a sentence that names a label has it ----


@pytest.mark.parametrize("completion, e_gt, R_format, R_answer, R_E", [
    ("<think>A sad man. A coat, neutral. He is happy.</think>\n<answer>sad</answer>", "sad", 1, 1, 1 / 2),
    ("A sad man. <answer>sad</answer>", "sad", 0, 1, 0),  # no <think>: no sentence
    ("<think></think><answer>sad</answer>", "sad", 1, 1, 0),  # empty
    ("", "sad", 0, 0, 0),
    ("<think> </think> \n <answer></answer>", "sad", 1, 0, 0),
    ("<think>A sad man</think><answer>happy</answer>", "sad", 1, 0, 1),  # one sentence, no full stop
    ("<think>A neutral coat. A neutral hat.</think><answer>sad</answer>", "sad", 1, 1, 0),  # all neutral
    ("<think>So sad. Also happy.</think><answer>sad</answer>", "sad", 1, 1, 1 / 2),  # none neutral
    ("<think>A neutral coat. A sad man.</think><answer>neutral</answer>", "neutral", 1, 1, 1 / 2),  # c / N
    ("<think>Both sad and happy. So happy.</think><answer>sad</answer>", "sad", 1, 1, 1 / 2),  # two labels
    ("<think>A neutral, sad man.</think><answer>sad</answer>", "sad", 1, 1, 1),  # neutral beside e_gt: not neutral
    ("<think>A sad man.</think><answer>surprise</answer>", "surprise", 1, 1, 0),  # not in the verifier's list
    ("<think>So sad.<think>Not happy.</think>Sad.</think><answer>sad</answer>", "sad", 1, 1, 1),  # nested
    ("<think>So sad.</think><think>So happy.</think><answer>sad</answer>", "sad", 1, 1, 1),  # repeated: the first
    ("<think>Sad, so sad.</think><answer>sad</answer><answer>happy</answer>", "sad", 1, 1, 1),  # the first answer
    ("<think>So sad. <answer>sad</answer>", "sad", 0, 1, 0),  # <think> not closed
    ("<think>So sad.</think><answer>sad", "sad", 0, 0, 1),  # <answer> not closed
    ("So sad.</think><answer>sad</answer>", "sad", 0, 1, 0),  # not opened
    ("<think>So sad.</think> so <answer>sad</answer>", "sad", 0, 1, 1),  # text between
    (" <think>So sad.</think><answer>sad</answer>", "sad", 0, 1, 1),  # before
    ("<think>So sad.</think><answer>sad</answer>.", "sad", 0, 1, 1),  # after
])
def test_edge_cases(completion, e_gt, R_format, R_answer, R_E):
    """Nested: E is `So sad.<think>Not happy.`; no white space follows its first stop, so it is one sentence with both
    labels, and R_E = 1/1."""
    r = reward(completion, e_gt)
    assert (r.format, r.answer, r.explanation) == (R_format, R_answer, pytest.approx(R_E))
    assert r.total == pytest.approx(R_format + R_answer + R_E)  # Eq. 5


def test_extraction():
    assert extract_explanation("a<think> b <think>c</think>d</think>") == "b <think>c"
    assert extract_explanation("</think>a<think>b") == ""
    assert extract_answer("<answer>\nsad\n</answer>") == "sad"
    assert extract_answer("sad") is None and extract_answer("<answer>sad") is None
    assert extract_answer(" sad ", "released") == "sad"
    assert extract_answer("<answer>a\n<answer>b</answer>", "released") == "b"  # the tag must close on its line


def test_answer_reward_reads_the_label_too():
    assert answer_reward("<answer>Happiness!</answer>", "happy", "DFEW") == 1
    assert answer_reward("<answer>happy</answer>", "happiness", "DFEW") == 1  # the paper's rule; not the release's:
    assert answer_reward("<answer>happy</answer>", "happiness", "DFEW", "released") == 0
    assert answer_reward("<answer>unhappy</answer>", "happiness", "MAFW") == 0
    with pytest.raises(DataError, match="smug"):
        answer_reward("<answer>sad</answer>", "smug", "DFEW")


# ---- Eq. 5 ----

MIXED = "<think>A neutral coat. So sad. So sad! He is happy.</think><answer>sad</answer>"  # R_E 2/3, both others 1


def test_eq5_weights_and_ablations():
    assert reward(MIXED).total == pytest.approx(1 + 1 + 2 / 3)
    assert reward(MIXED, w_format=2, w_answer=0.5, w_explanation=3).total == pytest.approx(2 + 0.5 + 2)
    assert reward(MIXED, neutral_filter=False).explanation == 2 / 4
    whole = reward(MIXED, sentence_level=False)  # one "sentence" with all three over tau: the two best hold sad or not
    assert whole.sentences == ["A neutral coat. So sad. So sad! He is happy."] and len(whole.label_sets[0]) == 2
    assert reward("<think>So sad. A hat.</think>", sentence_level=False).explanation == 1
    assert reward("<think> </think>", sentence_level=False).sentences == []
    without = score_completions([MIXED], ["sad"], "dfew", None, LABELS)[0]
    assert (without.total, without.explanation, without.sentences) == (2, 0, [])


def test_remedies():
    wrong = MIXED.replace("<answer>sad", "<answer>happy")
    assert reward(MIXED, gate_on_answer=True).explanation == pytest.approx(2 / 3)
    assert reward(wrong, gate_on_answer=True).explanation == 0 and reward(wrong).explanation == pytest.approx(2 / 3)
    assert reward(MIXED + ".", gate_on_answer=True).explanation == 0  # the format is wrong
    for step, share in ((0, 0), (5, 1 / 2), (10, 1), (50, 1), (None, 1)):
        assert reward(MIXED, step=step, phase_in_steps=10).total == pytest.approx(2 + share * 2 / 3)
    assert reward(MIXED, length_target=20).explanation == pytest.approx(2 / 3 * 10 / 20)  # 10 words
    assert reward(MIXED, length_target=5).explanation == pytest.approx(2 / 3)
    # `So sad!` repeats `So sad.`: below the line stay N 4 less 1 neutral; c is 1 at 1.0 and 1.5 at 0.5
    assert reward(MIXED, repeat_discount=1.0).explanation == pytest.approx(1 / 3)
    assert reward(MIXED, repeat_discount=0.5).explanation == pytest.approx(1.5 / 3)


def test_the_verifier_is_called_once_with_distinct_sentences():
    calls = []

    def counted(sentences):
        calls.append(sentences)
        return verifier(sentences)

    texts = ["<think>So sad. A hat.</think>", "<think>A hat. So sad. So sad.</think>", "no tags"]
    scored = score_completions(texts, ["sad", "happy", "sadness"], ["dfew", "dfew", "mafw"], counted, LABELS)
    assert calls == [["So sad.", "A hat."]]
    # `A hat.` has no label over tau: its best of three equal ones is the last, neutral. c / (N - N_neu): 1/1, 0/2, none
    assert [r.explanation for r in scored] == [1, 0, 0]
    calls.clear()
    none = score_completions(["", "x"], ["sad", "sad"], "dfew", counted, LABELS)  # divergence 17: 0, no failure
    assert calls == [] and [r.explanation for r in none] == [0, 0]


def test_score_completions_refuses_what_does_not_fit():
    with pytest.raises(SettingsError, match="2 completions, 1 labels"):
        score_completions(["a", "b"], ["sad"], "dfew", None, LABELS)
    with pytest.raises(SettingsError, match="1 rows for 2 sentences"):
        score_completions(["<think>So sad. A hat.</think>"], ["sad"], "dfew", lambda s: verifier(s)[:1], LABELS)
    for bad in ({"tau": 1.5}, {"k": 0}, {"neutral_rule": "all"}, {"answer_rule": "x"}, {"repeat_discount": 2},
                {"sentence_rule": "x"}, {"length_target": -1}, {"phase_in_steps": -1}):
        with pytest.raises(SettingsError, match="--" + next(iter(bad)).replace("_", "-")):
            RewardSettings(**bad)


def test_defaults_are_the_papers():
    s = RewardSettings()
    assert (s.tau, s.k, s.neutral_rule, s.neutral_filter, s.sentence_level) == (0.5, 2, "only", True, True)
    assert not (s.gate_on_answer or s.phase_in_steps or s.length_target or s.repeat_discount)
    assert RewardSettings.released(k=3) == RewardSettings(tau=0.1, answer_rule="released", k=3)


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


@pytest.mark.parametrize("text, released, extended", [
    ("He nods. She smiles!", ["He nods.", "She smiles!"], ["He nods.", "She smiles!"]),
    ("Mr. Lee met Dr. J. Kim at 3.5 s. He left.", ["Mr.", "Lee met Dr.", "J.", "Kim at 3.5 s.", "He left."],
     ["Mr. Lee met Dr. J. Kim at 3.5 s.", "He left."]),
    ("It is dim... and quiet. So sad... He left.", ["It is dim...", "and quiet.", "So sad...", "He left."],
     ["It is dim... and quiet.", "So sad...", "He left."]),
    ('"Stop! Now!" she cries. He goes.', ['"Stop! Now!" she cries.', "He goes."],
     ['"Stop! Now!" she cries.', "He goes."]),
    ("“Stop! Now!” she cries. He goes.", ["“Stop!", "Now!” she cries.", "He goes."],
     ["“Stop! Now!” she cries.", "He goes."]),
    ('She left. He said. "no', ['She left. He said. "no'], ["She left.", "He said.", '"no']),  # an unpaired quote
    ("A list\nof cues\n\nhere.", ["A list\nof cues\n\nhere."], ["A list", "of cues", "here."]),
    ("他很伤心。他哭了！“走。”她说。", ["他很伤心。他哭了！“走。”她说。"], ["他很伤心。", "他哭了！", "“走。”", "她说。"]),
    ("वह दुखी है। वह रोता है।", ["वह दुखी है। वह रोता है।"], ["वह दुखी है।", "वह रोता है।"]),
    ("He lives in the U.S. now. Is it? Yes.", ["He lives in the U.S.", "now.", "Is it?", "Yes."],
     ["He lives in the U.S. now.", "Is it?", "Yes."]),
    ("", [], []), (" . ", ["."], ["."]),
])
def test_sentence_rules(text, released, extended):
    assert split_sentences(text) == released
    assert split_sentences(text, "extended") == extended
    with pytest.raises(SettingsError, match="best"):
        split_sentences(text, "best")
