"""Section 4.2 by hand: EEA, FCR, EPC, WAR and UAR, under the paper's rule and the release's."""

import pytest
from erv_min.metrics import read_prediction, score


def row(truth, predicted, judged, number=0):
    return {"video_id": number, "output": f"<think>x</think>\n<answer>{predicted}</answer>", "ground_truth": truth,
            "judged_emotion": judged}


# Eight clips of DFEW. truth, predicted, judged:       right?  judged = truth?  judged = predicted?  all three?
EIGHT = [row(*x, number) for number, x in enumerate([
    ("happy", "happy", "happy"),                          # yes     yes              yes                 yes
    ("happy", "happy", "sad"),                            # yes     no               no                  no
    ("happy", "sad", "sad"),                              # no      no               yes                 no
    ("happy", "happy", "happy"),                          # yes     yes              yes                 yes
    ("sad", "sad", "happy"),                              # yes     no               no                  no
    ("sad", "angry", "sad"),                              # no      yes              no                  no
    ("angry", "smug", "angry"),                           # unknown yes              no                  no
    ("angry", "angry", "angry")])]                        # yes     yes              yes                 yes


def test_by_hand():
    s = score(EIGHT, "DFEW")
    assert s["WAR"] == 100 * 5 / 8
    assert s["UAR"] == pytest.approx(100 * (3 / 4 + 1 / 2 + 1 / 2) / 3)  # happy, sad, angry; the absent four left out
    assert s["EEA"] == 100 * 5 / 8
    assert s["EPC"] == 100 * 4 / 8
    assert s["FCR"] == 100 * 3 / 8
    assert s["EEA_answered"] == 100 * 4 / 8  # `smug` is no readable answer
    assert s["FCR/WAR"] == pytest.approx(100 * 3 / 5)
    assert (s["n"], s["unparsed"], s["unknown_labels"]) == (8, 1, 1)
    # columns happy, sad, neutral, angry, surprise, disgust, fear, unknown
    assert s["confusion"][:4] == [[3, 1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 1, 0, 0, 0, 1]]
    assert s["recall"] == {"happy": 75, "sad": 50, "neutral": None, "angry": 50, "surprise": None, "disgust": None,
                           "fear": None}
    assert s["per_class"][0] == [3, 4] and s["labels"][0] == "happy"


def test_by_hand_released():
    s = score(EIGHT, "DFEW", "released")
    assert s["UAR"] == pytest.approx(100 * (3 / 4 + 1 / 2 + 1 / 2) / 7)  # an empty class counts 0
    assert s["EEA"] == s["EEA_answered"] == 50
    mafw = score([row("anger", "anger", "anger"), row("anger", "smug", "anger")], "MAFW", "released")
    assert mafw["UAR"] == pytest.approx(100 / 11) and mafw["per_class"][0] == [1, 1]  # the unknown one leaves its class
    assert score([row("anger", "anger", "x"), row("anger", "smug", "x")], "MAFW")["UAR"] == 50


@pytest.mark.parametrize("output, paper, released", [
    ("<think>x</think><answer>Sadness</answer>", ("sad", "sad"), ("sad", "sad")),
    ("<think>x</think><answer>sad", ("sad", "sad"), ("sad", "sad")),  # not closed
    ("<think>x</think>\nsad\n", ("sad", None), ("sad", "")),  # no tags: for WAR only
    ("sad", ("sad", None), ("sad", "")),
    ("<think>x</think> so <answer>sad</answer>", ("sad", "sad"), ("so sad", "sad")),
    ("<think>x</think><answer>sad</answer><answer>x</answer>", ("sad", "sad"), ("sadx", "sad")),
    ("<think>sad", (None, None), ("<think>sad", "")),
    ("", (None, None), ("", "")),
])
def test_what_is_read(output, paper, released):
    assert read_prediction(output, "DFEW") == paper
    assert read_prediction(output, "DFEW", "released") == released


def test_eea_without_an_answer():
    s = score([row("sad", "", "sad") | {"output": "<think>He cries.</think>"}], "DFEW")
    assert (s["EEA"], s["EEA_answered"], s["FCR"], s["EPC"], s["WAR"]) == (100, 0, 0, 0, 0)  # divergence 15
    assert s["FCR/WAR"] is None


def test_fcr_and_epc_want_an_answer_in_its_tags():
    untagged = row("sad", "", "sad") | {"output": "<think>He cries.</think>\nsad"}  # right for WAR, and no answer
    s = score([untagged], "DFEW")
    assert (s["WAR"], s["EEA"], s["FCR"], s["EPC"]) == (100, 100, 0, 0)
    s = score([row("sad", "smug", "bored")], "DFEW")  # none of the labels twice is no agreement
    assert (s["EPC"], s["judge_outside"], s["unparsed"]) == (0, 1, 1)


def test_section_6_follows_from_table_1():
    """55.13% of R1-Omni's right predictions on MAFW are supported: FCR 31.80 over WAR 57.68; and so on."""
    for fcr, war, ratio in ((3180, 5768, 55.13), (2809, 6544, 42.92), (4357, 5749, 75.79), (4021, 6728, 59.77)):
        rows = ([row("sad", "sad", "sad")] * fcr + [row("sad", "sad", "fear")] * (war - fcr)
                + [row("sad", "fear", "happy")] * (10000 - war))
        s = score(rows, "DFEW")
        assert (round(s["FCR"], 2), round(s["WAR"], 2), round(s["FCR/WAR"], 2)) == (fcr / 100, war / 100, ratio)
