"""Label lists, the alias table (divergence 18) and GoEmotions' index map (divergence 4)."""

import pytest

from conftest import GOLDEN
from erv_min.base.errors import DataError, SettingsError
from erv_min.base.files import read_json
from erv_min.emotions import (ALIASES, ERV_LABELS, GOEMOTIONS, GOEMOTIONS_INDEX, LABELS, SYNONYMS, canonical, labels,
                              normalize, to_erv)
from erv_min.judge import read_answer
from erv_min.rewards import explanation_reward


def test_label_ids_are_the_data_sets():
    golden = read_json(GOLDEN / "text/metrics.json")
    for dataset in ("DFEW", "MAFW"):
        assert {name: i + 1 for i, name in enumerate(labels(dataset))} == golden[dataset]["label_ids"]
    assert labels("Dfew") == LABELS["dfew"]
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
    ("Joy", "DFEW", "happy", "joy"),  # a synonym counts where its label is in the list
    ("joyful", "MAFW", "happiness", "joyful"),
    ("furious.", "MERR", "angry", "furious."),
    ("afraid", "MAFW", "fear", "afraid"),
    ("scared", "EMER", None, "scared"),  # EMER has no fear
    ("surprised", "DFEW", "surprise", "surprised"),  # another form of the word is the label
    ("Fearful.", "DFEW", "fear", "fearful."),
    ("fearful", "MAFW", "fear", "fearful"),
    ("worried", "MAFW", "anxiety", "worried"),
    ("saddened", "DFEW", "sad", "saddened"),
    ("__disgusted__", "DFEW", "disgust", "__disgusted__"),
    ("unsurprised", "DFEW", None, "unsurprised"),
    ("calm", "DFEW", None, "calm"),
    ("joy and fear", "DFEW", None, "joy and fear"),
    ("calm", "RAVDESS", "calm", "calm"),
    ("", "DFEW", None, ""),
    ("?!", "DFEW", None, "?!"),
])
def test_normalize(text, dataset, paper, released):
    assert normalize(text, dataset) == paper
    assert normalize(text, dataset, "released") == released


def test_long_answers_take_linear_time():
    """40,000 stops between two letters took 13 s."""
    for text in ("a" + "." * 10**6 + "b", "." * 10**6, "_" * 10**6 + "sad" + " " * 10**6):
        assert normalize(text, "dfew") == ("sad" if "sad" in text else None)
        assert read_answer(text, LABELS["dfew"]).emotion == ("sad" if "sad" in text else None)


def test_normalize_refuses_another_rule():
    with pytest.raises(SettingsError, match="strict"):
        normalize("sad", "dfew", "strict")


def test_r_e_knows_every_label_of_every_data_set():
    """Eq. 4 compares e_gt with the verifier's labels, whatever each of them is called: a clip of EMER's `worried` is
    paid for a sentence of anxiety. Otherwise R_E is 0 for all clips of that label."""
    for names in LABELS.values():
        for name in names:
            if name != "doubt":
                assert explanation_reward([[to_erv(name)]], name) == 1.0, name
    assert explanation_reward([["anxiety"]], "worried") == explanation_reward([["nervousness"]], "worried") == 1.0
    assert explanation_reward([["neutral"], ["fear"]], "calm") == 0.5  # a neutral e_gt: nothing is filtered
    assert [canonical(x) for x in ("joy", "grief", " Fearful ", "surprised", "admiration")] == [
        "happiness", "helplessness", "fear", "surprise", "admiration"]


def test_doubt_has_no_counterpart_and_is_never_met():
    assert canonical("doubt") == "doubt"
    assert all(explanation_reward([[label]], "doubt") == 0.0 for label in (*ERV_LABELS, *GOEMOTIONS))


def test_synonyms_change_no_figure_of_the_released_rule():
    """Nor the index map: none is one of GoEmotions' 17 classes that R_E does not read (divergence 4)."""
    unread = set(GOEMOTIONS) - {GOEMOTIONS[i] for i in GOEMOTIONS_INDEX.values()}
    assert not unread & set(SYNONYMS) and not set(SYNONYMS) & set(ALIASES) and set(SYNONYMS.values()) < set(ERV_LABELS)
    for word in SYNONYMS:
        assert {normalize(word, dataset, "released") for dataset in ("dfew", "mafw")} == {word}
