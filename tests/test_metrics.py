"""EEA, FCR, EPC, WAR, UAR: the recorded scores exactly, one hand-worked case a metric, intervals and agreement."""

import pytest

from conftest import GOLDEN
from equations.test_metrics_eea_fcr_epc_war_uar import EIGHT, row
from erv_min.base.errors import DataError, SettingsError
from erv_min.base.files import read_json
from erv_min.metrics import agreement, bootstrap, score, table

RECORDED = read_json(GOLDEN / "text/metrics.json")


def test_judge_failures_are_never_an_emotion():
    rows = [row("neutral", "neutral", None) | {"judge_status": "error"},  # the API failed
            row("neutral", "neutral", "melancholy"),  # outside the list
            row("neutral", "neutral", None) | {"judge_status": "outside"},
            row("neutral", "neutral", "neutral")]
    s = score(rows, "DFEW")
    assert (s["EEA"], s["EPC"], s["FCR"], s["judge_errors"], s["judge_outside"]) == (25, 25, 25, 1, 2)
    s = score(rows, "DFEW", "released")  # counted as neutral, here to the model's profit
    assert (s["EEA"], s["EPC"], s["FCR"], s["judge_errors"], s["judge_outside"]) == (100, 100, 100, 1, 2)
    smug = score([row("happy", "smug", None)], "DFEW")  # two unknowns do not agree
    assert (smug["EPC"], smug["FCR"], smug["EEA"]) == (0, 0, 0)


def test_rows_that_were_not_judged():
    rows = [{k: v for k, v in r.items() if k != "judged_emotion"} for r in EIGHT]
    s = score(rows, "DFEW")
    assert s["WAR"] == 62.5 and all(s[x] is None for x in ("EEA", "FCR", "EPC", "EEA_answered", "FCR/WAR"))
    assert set(bootstrap(rows, "DFEW", n=10)) == {"WAR", "UAR"}


def test_bad_rows_are_named():
    with pytest.raises(DataError, match="empty"):
        score([], "DFEW")
    with pytest.raises(DataError, match="video_id 7.*smug"):
        score([row("smug", "sad", "sad", 7)], "DFEW")
    with pytest.raises(DataError, match="output"):
        score([{"video_id": 1, "ground_truth": "sad"}], "DFEW")
    with pytest.raises(SettingsError, match="strict"):
        score(EIGHT, "DFEW", "strict")
    with pytest.raises(DataError, match="imagenet"):
        score(EIGHT, "imagenet")


def test_bootstrap_interval():
    """400 clips, 100 right: the standard error of WAR is sqrt(0.25 * 0.75 / 400) = 2.165 points, so 25 -+ 4.24."""
    rows = [row("sad", "sad", "sad")] * 100 + [row("sad", "fear", "fear")] * 300
    low, high = bootstrap(rows, "DFEW", n=4000, seed=1)["WAR"]
    assert low == pytest.approx(25 - 4.24, abs=0.6) and high == pytest.approx(25 + 4.24, abs=0.6)
    assert bootstrap(rows, "DFEW", n=50, seed=3) == bootstrap(rows, "DFEW", n=50, seed=3)
    assert bootstrap(rows, "DFEW", n=50, seed=3) != bootstrap(rows, "DFEW", n=50, seed=4)
    assert bootstrap([row("sad", "sad", "sad")] * 5, "DFEW", n=20)["UAR"] == (100, 100)
    released = bootstrap(EIGHT, "DFEW", n=200, rule="released")
    assert released["EEA"] == released["EEA_answered"] != bootstrap(EIGHT, "DFEW", n=200)["EEA"]


def test_agreement_by_hand():
    """p_o = 3/4; a says sad 2, happy 2; b says sad 3, happy 1: p_e = (2*3 + 2*1)/16 = 1/2; kappa = (1/4)/(1/2)."""
    a = ["sad", "sad", "happy", "happy", None]
    b = ["sad", "sad", "sad", "happy", "sad"]
    found = agreement(a, b)
    assert (found["n"], found["left_out"], found["accuracy"], found["kappa"]) == (4, 1, 0.75, 0.5)
    assert agreement(["sad"], ["sad"])["kappa"] is None
    assert agreement([None], ["sad"]) == {"n": 0, "left_out": 1, "accuracy": None, "kappa": None}


def test_table():
    text = table({"Baseline": {"EEA": 32.41, "FCR": 27.27, "EPC": 40.98, "WAR": 56.83, "UAR": 38.66},
                  "HumanOmni": {"EEA": None, "FCR": None, "EPC": None, "WAR": 20.18, "UAR": 13.52}})
    assert [line.split() for line in text.split("\n")] == [
        ["System", "EEA", "FCR", "EPC", "WAR", "UAR"], ["Baseline", "32.41", "27.27", "40.98", "56.83", "38.66"],
        ["HumanOmni", "-", "-", "-", "20.18", "13.52"]]
    assert len({len(line) for line in text.split("\n")}) == 1
