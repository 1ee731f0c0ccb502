"""Emotion names: label lists of the data sets, the verifier's 11, GoEmotions' 28, and the words that mean the same.

Divergences 4 (the verifier's labels) and 18 (aliases). A word in another form (`anxious`) or a plain synonym (`joy`) of
a label is that label under rule="paper". The release looks for substrings and knows no synonym: figures under
rule="released" do not depend on these tables.
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
SAME_LABELS = {"merrfine": "merr", "toy": "dfew"}  # other names that a data set goes by

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
    """The label list of a data set, whose name may be in any case (`DFEW`, `MERR-fine`). Raises DataError."""
    name = "".join(c for c in dataset.lower() if c.isalnum())
    name = SAME_LABELS.get(name, name)
    if name not in LABELS:
        raise DataError(f"data set {dataset!r} is unknown; there are {', '.join(LABELS)}")
    return LABELS[name]


def canonical(label: str) -> str:
    """The name in which R_E compares labels (Eq. 4): of any data set, of the verifier, of GoEmotions -> ERV_LABELS.

    GoEmotions' classes by index, as in the release (divergence 4). A label without a counterpart (MERR's `doubt`, the
    17 other classes) stays itself, so that no other label ever meets it.
    """
    word = label.strip().lower()
    return _CANONICAL.get(word, word)


def to_erv(label: str) -> str:
    """A label of any data set -> its name among ERV_LABELS. Raises DataError if it has none.

    Not GoEmotions' classes: `grief` is `helplessness` if the released verifier says it, and in no annotation.
    """
    name = LABEL_NAMES.get(label.strip().lower())
    if name is None:
        raise DataError(f"label {label!r} has no counterpart among the verifier's {', '.join(ERV_LABELS)}")
    return name


def trimmed(text: str) -> str:
    """The text without what is neither letter nor digit at its ends, in one pass."""
    return re.match(r"[\W_]*(.*[^\W_])?", text, re.DOTALL)[1] or ""


def normalize(text: str, dataset: str, rule: str = "paper") -> str | None:
    """An answer as it was written -> the data set's label.

    "paper": the whole answer, white space and punctuation around it apart, is a label, one of its ALIASES or SYNONYMS
    (divergence 18); None if it is none, so `unhappy`, `a bit of anger` and `sad or angry` are no emotion of DFEW.
    "released": lower case, no newlines, then the release's rules, which look for substrings on DFEW and MAFW; what no
    rule knows comes back as it is. Raises DataError (unknown data set), SettingsError (unknown rule).
    """
    if rule == "released":
        return _released(text.lower().replace("\n", ""), dataset.lower())
    if rule != "paper":
        raise SettingsError(f"answer rule {rule!r} is unknown; there are 'paper' and 'released'")
    names = labels(dataset)
    word = trimmed(text.lower())
    if word in names:
        return word
    emotion = ALIASES.get(word) or SYNONYMS.get(word)
    return next((name for name in names if emotion and LABEL_NAMES.get(name) == emotion), None)


RELEASED_WORDS = {"dfew": {"sadness": "sad"},
                  "mafw": {"angry": "anger", "sad": "sadness", "anxious": "anxiety", "helpless": "helplessness",
                           "disappointed": "disappointment"}}
RELEASED_PARTS = {"dfew": {"happiness": "happy", "anger": "angry"},
                  "mafw": {"happy": "happiness", "contemptuous": "contempt"}}


def _released(text: str, dataset: str) -> str:
    """The release's rules: whole words, then parts of the text, the first that is in it."""
    found = (label for part, label in RELEASED_PARTS.get(dataset, {}).items() if part in text)
    return RELEASED_WORDS.get(dataset, {}).get(text) or next(found, text)
