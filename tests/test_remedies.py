"""Remedies against reward hacking: each worked out by hand, and all of them together."""

import dataclasses
import math

import pytest
import torch

from erv_min import remedies
from erv_min.remedies import Remedies, apply
from erv_min.rewards import Reward, RewardSettings, score_completions
from erv_min.train.settings import GRPOSettings

LABELS = ("sad", "happy", "neutral")  # a verifier of three, for numbers by hand


class Named:
    """A verifier to check on paper: 0.9 for each label whose name stands in the text, else 0.1."""

    labels = LABELS

    def probabilities(self, texts):
        return torch.tensor([[0.9 if label in text else 0.1 for label in LABELS] for text in texts]).reshape(-1, 3)


class First(Named):
    """Reads of the three only what stands first in a text."""

    def probabilities(self, texts):
        places = [[text.find(label) % 10_000 for label in LABELS] for text in texts]
        return torch.tensor([[0.9 if place == min(row) else 0.1 for place in row] for row in places]).reshape(-1, 3)


def rewards(completions, e_gt="sad", group_size=1, step=None, likelihood=None, verifiers=(Named(),), **on):
    truths, rules = [e_gt] * len(completions), RewardSettings()
    readings = [score_completions(completions, truths, "dfew", v.probabilities, v.labels, rules) for v in verifiers]
    return apply(readings, completions, truths, verifiers, group_size, rules, Remedies(**on), step, likelihood)


MIXED = "<think>A neutral coat. So sad. So sad! He is happy.</think><answer>sad</answer>"  # R_E 2/3, both others 1


def R_E(completion, **on):
    return rewards([completion], **on)[0].explanation


def test_off_by_default_and_all_are_options():
    readings = [[Reward(1, 1, 0.3, 2.7, [], [])]]  # with a total that is none of Eq. 5's: as it came
    assert apply(readings, [""], ["sad"], [], 1, RewardSettings(), Remedies(), step=3) is readings[0]
    assert apply(readings, [""], ["sad"], [], 1, RewardSettings(), GRPOSettings(), step=3) is readings[0]
    assert {f.name for f in dataclasses.fields(Remedies)} <= {f.name for f in dataclasses.fields(GRPOSettings)}


def test_repeats_by_hand():
    assert remedies.repeats(["So sad.", "So sad!", "Not so."], 0.5) == [1.0, 0.5, 1.0]
    # `So sad!` repeats `So sad.`: below the line stay N 4 less 1 neutral; c is 1 at 1.0 and 1.5 at 0.5
    assert R_E(MIXED, repeat_discount=1.0) == pytest.approx(1 / 3)
    assert R_E(MIXED, repeat_discount=0.5) == pytest.approx(1.5 / 3)


def test_length_gate_and_phase_by_hand():
    assert R_E(MIXED, length_target=20) == pytest.approx(2 / 3 * 10 / 20)  # 10 words
    assert R_E(MIXED, length_target=5) == pytest.approx(2 / 3)
    wrong = MIXED.replace("<answer>sad", "<answer>happy")
    assert R_E(MIXED, gate_on_answer=True) == pytest.approx(2 / 3)
    assert R_E(wrong, gate_on_answer=True) == 0 and R_E(wrong, length_target=1) == pytest.approx(2 / 3)
    assert R_E(MIXED + ".", gate_on_answer=True) == 0  # the format is wrong
    for step, share in ((0, 0), (5, 1 / 2), (10, 1), (50, 1), (None, 1)):
        (reward,) = rewards([MIXED], step=step, phase_in_steps=10)
        assert reward.total == pytest.approx(2 + share * 2 / 3) and reward.explanation == pytest.approx(2 / 3)


def test_likelihood_floor_by_hand():
    # Four sentences; the second "So sad" lies under the floor: c is 1, N_neu 1, N 4.
    def likelihood(i, pieces):
        assert (i, pieces) == (0, ["<think>", "A neutral coat.", "So sad.", "So sad!", "He is happy."])
        return [-9.0, -1.0, -2.0, -3.5, -1.0]
    assert remedies.likely([-1.0, -3.0, -3.5], -3.0) == [1.0, 1.0, 0.0]
    assert R_E(MIXED, likelihood_floor=-3.0, likelihood=likelihood) == pytest.approx(1 / 3)
    assert R_E(MIXED, likelihood_floor=-4.0, likelihood=likelihood) == pytest.approx(2 / 3)


def test_piece_logps_by_hand():
    # Tokens "<th", "ink>", "So", " sad. So", " mad", "."; " sad. So" is shared by both sentences; 7 is special, no text
    words = {1: "<th", 2: "ink>", 3: "So", 4: " sad. So", 5: " mad", 6: ".", 7: ""}

    def decode(ids):
        return "".join(words[i] for i in ids)
    ids, logps = [1, 2, 3, 4, 5, 6, 7], [-1.0, -2.0, -3.0, -5.0, -6.0, -7.0, -100.0]
    found = remedies.piece_logps(decode, ids, logps, ["<think>", "So sad.", "So mad."])
    assert found == pytest.approx([-1.5, (-3 - 5) / 2, (-5 - 6 - 7) / 3])
    assert remedies.piece_logps(decode, ids, logps, ["mad", "So", ""]) == [-6.0, -math.inf, -math.inf]  # not after it
    assert remedies.piece_logps(decode, [], [], ["a"]) == [-math.inf]


def test_calm_claims_by_hand():
    """Eq. 4 as printed leaves "neutral" out: 1 of 1. Of the whole, First reads neutral, where it stands first: the
    claim counts, 1 of 2; where e_gt is neutral nothing changes."""
    calm, sad = "neutral face. So sad.", "So sad. neutral coat."
    assert remedies.claims_calm(["anger", "neutral"]) and not remedies.claims_calm(["anger"])
    for text, printed, counted in ((calm, 1, 1 / 2), (sad, 1, 1)):
        completion = f"<think>{text}</think><answer>sad</answer>"
        assert R_E(completion, verifiers=(First(),)) == printed
        assert R_E(completion, verifiers=(First(),), count_calm=True) == counted
    assert R_E(f"<think>{calm}</think>", e_gt="neutral", verifiers=(First(),), count_calm=True) == 1 / 2


def test_without_a_verifier_r_e_is_0_whatever_is_on():
    reading = score_completions([MIXED], ["sad"], "dfew", None, LABELS)  # the paper's Baseline
    on = Remedies(count_calm=True, likelihood_floor=-1.0, repeat_discount=1.0, length_target=9, gate_on_answer=True)
    (reward,) = apply([reading], [MIXED], ["sad"], [], 1, RewardSettings(), on, 0, lambda i, pieces: [0.0])
    assert (reward.total, reward.explanation) == (2, 0)


def test_several_verifiers_by_hand():
    # R_E 2/3 and 1/3: minimum 1/3; mean 1/2, variance (1/6)^2 * 2 / 1 = 1/18, at weight 3: 1/2 - 1/6 = 1/3.
    assert remedies.ensemble([2 / 3, 1 / 3], 0) == pytest.approx(1 / 3)
    assert remedies.ensemble([2 / 3, 1 / 3], 1.5) == pytest.approx(1 / 2 - 1.5 / 18)
    assert remedies.ensemble([2 / 3], 3) == pytest.approx(2 / 3)
    completion = "<think>So happy, so sad. So sad.</think><answer>sad</answer>"  # Named: 2/2; First: 1/2
    both = {"verifiers": (Named(), First())}
    (reward,) = rewards([completion], **both)
    assert (reward.explanation, reward.total) == (1 / 2, 2.5) and reward.label_sets[0] == ["happy", "sad"]
    assert R_E(completion, variance_weight=2.0, **both) == pytest.approx(3 / 4 - 2 * 1 / 8)
    # each verifier's own reading of the whole decides for it alone
    calm = "<think>neutral, happy face. So sad.</think><answer>sad</answer>"
    assert R_E(calm, count_calm=True, **both) == 1 / 2  # Named: 1/2, counted already; First: 1/1 -> 1/2
    three = "<think>So sad. A happy coat. A neutral hat.</think><answer>sad</answer>"  # 1/2; Named sees calm: 1/3
    assert R_E(three, count_calm=True, verifiers=(First(), Named())) == pytest.approx(1 / 3)


def test_care_bonus_by_hand():
    """A group of four, three of them right: their confidence 0.9, 0.99 (cut to 0.95), 0.5, mean 0.7833; the wrong
    one's is not asked. In the second group two are within the margin of 0.01; in the third none is right."""
    right = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    confidence = [0.9, 0.99, 0.5, 1.0, 0.80, 0.815, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9]
    assert remedies.care_bonus(right, confidence, 4, 0.5) == [0.5, 0.5, 0, 0, 0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert remedies.care_bonus([1, 1], [0.8, 0.821], 2, 1) == [0, 1]  # 0.8 < 0.8105 - 0.01
    assert remedies.care_bonus([1, 1, 0], [0.8, 0.7, 0.1], 3, 1) == [1, 0, 0]  # the mean of the right ones, 0.75
    assert remedies.care_bonus([1, 1], [0.95, 0.999], 2, 1) == [1, 1]  # over 0.95 all are alike

    def likelihood(i, pieces):
        assert pieces == ["<answer>", "sad"] or i == 2
        return [0.0, math.log(0.9 if i == 0 else 0.5)]
    got = rewards([MIXED, MIXED, "no answer"], group_size=3, care_bonus=0.5, likelihood=likelihood)
    assert [r.bonus for r in got] == [0.5, 0, 0]
    assert [r.total for r in got] == pytest.approx([2 + 2 / 3 + 0.5, 2 + 2 / 3, 0])
