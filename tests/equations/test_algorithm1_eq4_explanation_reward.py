"""Algorithm 1 and Eq. 4 by hand: sentences s_k, label sets EL_k, and R_E = c / (N - N_neu)."""

import pytest
import torch
from erv_min.base.errors import SettingsError
from erv_min.rewards import explanation_reward, select_labels, split_sentences


LABELS = ("sad", "happy", "neutral")  # a verifier of three, for numbers by hand


def verifier(sentences):
    """A verifier to check on paper: 0.9 for each label whose name stands in the sentence, else 0.1."""
    return torch.tensor([[0.9 if label in s else 0.1 for label in LABELS] for s in sentences]).reshape(-1, 3)


def test_select_labels():
    probs = torch.tensor([[0.9, 0.7, 0.6],   # three over tau: the two best
                          [0.6, 0.1, 0.8],   # two: both, best first
                          [0.5, 0.2, 0.1],   # 0.5 is not over 0.5, none is: the best
                          [0.1, 0.6, 0.5]])  # one: 0.5 is not over
    assert select_labels(probs, LABELS) == [["sad", "happy"], ["neutral", "sad"], ["sad"], ["happy"]]
    assert select_labels(probs, LABELS, tau=0.65, k=1) == [["sad"], ["neutral"], ["sad"], ["happy"]]
    assert select_labels(probs, LABELS, tau=0.05, k=3)[3] == ["happy", "neutral", "sad"]
    assert select_labels(torch.zeros(0, 3), LABELS) == []


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
    *[(f"He sees{mark}Dr. Lee. He nods.", [f"He sees{mark}Dr.", "Lee.", "He nods."],
       [f"He sees{mark}Dr. Lee.", "He nods."]) for mark in ("\t", "\u00a0", " [", " («", " ‘", " „", "—", "-", "/", " *")],
    ("", [], []), (" . ", ["."], ["."]),
])
def test_sentence_rules(text, released, extended):
    assert split_sentences(text) == released
    assert split_sentences(text, "extended") == extended
    with pytest.raises(SettingsError, match="best"):
        split_sentences(text, "best")
