"""Eq. 5 by hand: R = R_E + R_format + R_answer of whole completions, its weights, and table 2's ablations."""

import pytest
import torch
from erv_min.base.errors import DataError
from erv_min.rewards import RewardSettings, answer_reward, extract_answer, extract_explanation, score_completions


LABELS = ("sad", "happy", "neutral")  # a verifier of three, for numbers by hand


def verifier(sentences):
    """A verifier to check on paper: 0.9 for each label whose name stands in the sentence, else 0.1."""
    return torch.tensor([[0.9 if label in s else 0.1 for label in LABELS] for s in sentences]).reshape(-1, 3)


def reward(completion, e_gt="sad", **changes):
    return score_completions([completion], [e_gt], "dfew", verifier, LABELS, RewardSettings(**changes))[0]


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


MIXED = "<think>A neutral coat. So sad. So sad! He is happy.</think><answer>sad</answer>"  # R_E 2/3, both others 1


def test_eq5_weights_and_ablations():
    assert reward(MIXED).total == pytest.approx(1 + 1 + 2 / 3)
    assert reward(MIXED, w_format=2, w_answer=0.5, w_explanation=3).total == pytest.approx(2 + 0.5 + 2)
    assert reward(MIXED, ablate="neutral-filtering").explanation == 2 / 4
    whole = reward(MIXED, ablate="sentence-level")  # one "sentence" with all three over tau: the two best hold sad or not
    assert whole.sentences == ["A neutral coat. So sad. So sad! He is happy."] and len(whole.label_sets[0]) == 2
    assert reward("<think>So sad. A hat.</think>", ablate="sentence-level").explanation == 1
    assert reward("<think> </think>", ablate="sentence-level").sentences == []
    without = score_completions([MIXED], ["sad"], "dfew", None, LABELS)[0]
    assert (without.total, without.explanation, without.sentences) == (2, 0, [])


@pytest.mark.parametrize("completion, changes, part, default, changed", [
    # sad and happy have 0.9, the later one goes first: of one label that is happy; over 0.95 is none, the best counts.
    ("<think>A sad, happy man.</think>", dict(k=1), "explanation", 1, 0),
    ("<think>A sad, happy man.</think>", dict(tau=0.95), "explanation", 1, 0),
    # c 1 of N 2; with "any" the first, which is neutral too, leaves the denominator.
    ("<think>A neutral, sad hat. So happy.</think>", dict(neutral_rule="any"), "explanation", 1 / 2, 1),
    ("<think>A neutral hat. So sad.</think>", dict(ablate="neutral-filtering"), "explanation", 1, 1 / 2),
    # One sentence with both labels; "extended" splits at the newline.
    ("<think>So happy\nSo sad</think>", dict(sentence_rule="extended"), "explanation", 1, 1 / 2),
    ("<think>So happy. So sad.</think>", dict(ablate="sentence-level"), "explanation", 1 / 2, 1),
    ("<answer>sorrow</answer>", dict(answer_rule="released"), "answer", 1, 0),  # the release knows no synonym
])
def test_each_setting_reaches_its_part(completion, changes, part, default, changed):
    assert getattr(reward(completion), part) == default
    assert getattr(reward(completion, **changes), part) == changed


def test_the_released_rule_wants_the_whole_label():
    for answer, expected in (("sad", 1), ("", 0), ("sa", 0), ("a sad man", 0)):
        assert answer_reward(f"<answer>{answer}</answer>", "sad", "dfew", "released") == expected
