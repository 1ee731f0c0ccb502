"""Emotion names: label lists of the data sets, the verifier's 11, GoEmotions' 28, and the words that mean the same.

Divergences 4 (the verifier's labels) and 18 (aliases). Figures under rule="released" depend on RELEASED alone.
"""

import re

from erv_min.base.errors import DataError, SettingsError

LABELS: dict[str, tuple[str, ...]] = {
    "dfew": ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"),  # label ids 1..7
    "mafw": ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise", "contempt", "anxiety",
             "helplessness", "disappointment"),  # label ids 1..11
    "emer": ("angry", "happy", "sad", "surprise", "worried"),
    "merr": ("angry", "happy", "sad", "surprise", "fear", "neutral", "contempt", "worried", "doubt"),
    "ravdess": ("happy", "surprised", "neutral", "angry", "disgust", "sad", "fearful", "calm"),
}
ERV_LABELS = LABELS["mafw"]  # order of the 11-way head

GOEMOTIONS = (
    "admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire",
    "disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief", "joy",
    "love", "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness", "surprise", "neutral")
GOEMOTIONS_INDEX = {  # ERV label -> class of the released verifier (GoEmotions' order; divergence 4)
    "anger": 2, "disgust": 11, "fear": 14, "happiness": 17, "neutral": 27, "sadness": 25, "surprise": 26,
    "contempt": 10, "anxiety": 19, "helplessness": 16, "disappointment": 9}

# Word -> one of ERV_LABELS. ALIASES: the 11 names, and the word forms that the release knows, here for all data sets.
ALIASES = {name: name for name in ERV_LABELS} | {
    "angry": "anger", "happy": "happiness", "sad": "sadness", "anxious": "anxiety", "helpless": "helplessness",
    "disappointed": "disappointment", "contemptuous": "contempt"}
SYNONYMS = {word: name for name, words in {
    "happiness": "joy joyful glad cheerful delighted", "sadness": "saddened sorrow sorrowful",
    "anger": "furious rage enraged", "fear": "fearful afraid scared frightened terrified",
    "surprise": "surprised astonished astonishment", "disgust": "disgusted", "anxiety": "worried worry",
    "contempt": "scorn scornful disdain disdainful",
}.items() for word in words.split()}
# RAVDESS has `calm` beside `neutral`: as an answer it counts there alone. `doubt` (MERR) has no counterpart: table 5
# leaves it out.
LABEL_NAMES = ALIASES | SYNONYMS | {"calm": "neutral"}
_CANONICAL = {GOEMOTIONS[i]: name for name, i in GOEMOTIONS_INDEX.items()} | LABEL_NAMES


def labels(dataset: str) -> tuple[str, ...]:
    """The label list of a data set, whose name may be in any case. Raises DataError."""
    if dataset.lower() not in LABELS:
        raise DataError(f"data set {dataset!r} is unknown; there are {', '.join(LABELS)}")
    return LABELS[dataset.lower()]


def canonical(label: str) -> str:
    """The name in which R_E compares labels (Eq. 4): of any data set, of the verifier, of GoEmotions -> ERV_LABELS.

    A label without a counterpart (MERR's `doubt`, 17 of GoEmotions) stays itself, so that no other label ever meets it.
    """
    word = label.strip().lower()
    return _CANONICAL.get(word, word)


def to_erv(label: str) -> str:
    """A label of any data set -> its name among ERV_LABELS. Raises DataError if it has none.

    Not GoEmotions' classes: `grief` is `helplessness` if the released verifier says it, and in no annotation."""
    name = LABEL_NAMES.get(label.strip().lower())
    if name is None:
        raise DataError(f"label {label!r} has no counterpart among the verifier's {', '.join(ERV_LABELS)}")
    return name


def trimmed(text: str) -> str:
    """The text without what is neither letter nor digit at its ends, in one pass."""
    return re.match(r"[\W_]*(.*[^\W_])?", text, re.DOTALL)[1] or ""


def label_among(names: tuple[str, ...], text: str) -> str | None:
    """The one of a data set's labels that the whole text is, white space and punctuation around it apart: its name, or
    one of its ALIASES or SYNONYMS (divergence 18). None if it is none: `unhappy`, `a bit of anger`, `sad or angry`."""
    word = trimmed(text.lower())
    if word in names:
        return word
    emotion = ALIASES.get(word) or SYNONYMS.get(word)
    return next((name for name in names if emotion and LABEL_NAMES.get(name) == emotion), None)


RELEASED = {  # data set -> whole answers, and parts of an answer, that the release takes for a label
    "dfew": ({"sadness": "sad"}, {"happiness": "happy", "anger": "angry"}),
    "mafw": ({"angry": "anger", "sad": "sadness", "anxious": "anxiety", "helpless": "helplessness",
              "disappointed": "disappointment"}, {"happy": "happiness", "contemptuous": "contempt"})}


def normalize(text: str, dataset: str, rule: str = "paper") -> str | None:
    """An answer as it was written -> the data set's label.

    "paper": `label_among`; None if it is none. "released": lower case, no newlines, then the release's rules; what no
    rule knows comes back as it is. Raises DataError (unknown data set), SettingsError (unknown rule)."""
    if rule == "paper":
        return label_among(labels(dataset), text)
    if rule != "released":
        raise SettingsError(f"answer rule {rule!r} is unknown; there are 'paper' and 'released'")
    text = text.lower().replace("\n", "")
    words, parts = RELEASED.get(dataset.lower(), ({}, {}))
    return words.get(text) or next((label for part, label in parts.items() if part in text), text)
