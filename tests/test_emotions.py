"""Label lists, the alias table (divergence 18) and GoEmotions' index map (divergence 4)."""

import pytest

from conftest import GOLDEN
from erv_min.emotions import ALIASES, ERV_LABELS, GOEMOTIONS, GOEMOTIONS_INDEX, LABELS, labels, normalize, to_erv
from erv_min.run.errors import DataError, SettingsError
from erv_min.run.files import read_json


def test_label_ids_are_the_data_sets():
    golden = read_json(GOLDEN / "text/metrics.json")
    for dataset in ("DFEW", "MAFW"):
        assert {name: i + 1 for i, name in enumerate(labels(dataset))} == golden[dataset]["label_ids"]
    assert labels("MERR-fine") == LABELS["merr"] and labels("Dfew") == LABELS["dfew"]
    with pytest.raises(DataError, match="imagenet"):
        labels("imagenet")


def test_goemotions_index_points_at_the_classes_the_release_reads():
    assert GOEMOTIONS_INDEX == read_json(GOLDEN / "text/rewards.json")["goemotions_index"]
    assert len(GOEMOTIONS) == 28 and set(GOEMOTIONS_INDEX) == set(ERV_LABELS) and len(ERV_LABELS) == 11
    names = ("happiness", "anxiety", "helplessness", "contempt", "neutral")
    assert [GOEMOTIONS[GOEMOTIONS_INDEX[x]] for x in names] == ["joy", "nervousness", "grief", "disapproval", "neutral"]


def test_every_label_but_doubt_has_a_name_of_the_verifier():
    for names in LABELS.values():
        for name in names:
            if name != "doubt":
                assert to_erv(name) in ERV_LABELS
    assert [to_erv(x) for x in ("worried", " Happy", "fearful", "calm", "ANGER")] == [
        "anxiety", "happiness", "fear", "neutral", "anger"]
    assert set(ALIASES.values()) == set(ERV_LABELS)
    with pytest.raises(DataError, match="doubt"):
        to_erv("doubt")


@pytest.mark.parametrize("text, dataset, paper, released", [
    ("Sadness", "DFEW", "sad", "sad"),
    (" happiness. ", "DFEW", "happy", "happy"),
    ("\n**Angry**\n", "MAFW", "anger", "**angry**"),
    ("unhappy", "MAFW", None, "happiness"),  # divergence 18
    ("a bit of anger", "DFEW", None, "angry"),
    ("sad or angry", "DFEW", None, "sad or angry"),
    ("not happy", "MAFW", None, "happiness"),
    ("contempt", "DFEW", None, "contempt"),  # an emotion, but none of DFEW's
    ("worried", "emer", "worried", "worried"),
    ("anxiety", "emer", "worried", "anxiety"),
    ("fear", "RAVDESS", "fearful", "fear"),
    ("calm", "RAVDESS", "calm", "calm"),
    ("", "DFEW", None, ""),
    ("?!", "DFEW", None, "?!"),
])
def test_normalize(text, dataset, paper, released):
    assert normalize(text, dataset) == paper
    assert normalize(text, dataset, "released") == released


def test_normalize_refuses_another_rule():
    with pytest.raises(SettingsError, match="strict"):
        normalize("sad", "dfew", "strict")
