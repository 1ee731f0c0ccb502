"""What people and models write about clips of the small world: explanations, captions, the verifier's training pairs.

An explanation has 4 or 5 short sentences: appearance and background (neutral), face, voice, conclusion, as in figures
8 to 11. Each emotional sentence is a cue of one emotion alone, so that R_E cannot be gained by a cue true of two. The
labels of `erv_row` stand in for GPT-4.1's (section 3.2, figure 6): they are of the generator's own record of cues, not
of the words. The judges read words: `lexicon.py`.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np

from erv_min.base.files import read_jsonl
from erv_min.emotions import LABELS, to_erv
from erv_min.rewards import extract_explanation, split_sentences
from erv_min.toy.render import FACE, HAIRS, ROOMS, SHIRTS, VOICE, Look

EMOTIONS = LABELS["dfew"]  # happy, sad, neutral, angry, surprise, disgust, fear: ids 1..7

# The last words of the sentences that convey an emotion, and the forms that they end; {S}: He or She. Sentences differ
# in this word alone, so that a policy that begins one and ends another (GRPO paid it for "The voice is calm and
# tired.", "The voice is long.", "His mouth back.") still writes a sentence of the grammar.
FORMS = {"face": ["{S} _."] * 3, "voice": ["The voice is _.", "{S} _."],
         "conclusion": ["{S} feels _.", "{S} feels _.", "This shows _."]}
WORDS = {
    "happy": ("smiles grins beams", "bright laughs", "happy glad joy"),
    "sad": ("weeps mopes slumps", "heavy sobs", "sad grief sorrow"),
    "neutral": ("rests relaxes waits", "even talks", "neutral nothing indifference"),
    "angry": ("scowls glares snarls", "harsh shouts", "angry mad rage"),
    "surprise": ("gapes stares blinks", "sudden gasps", "surprised amazed shock"),
    "disgust": ("sneers gags grimaces", "sour groans", "disgusted sick distaste"),
    "fear": ("trembles freezes flinches", "shaky whimpers", "afraid scared fear"),
}
CUES: dict[str, dict[str, list[str]]] = {subject: {} for subject in FORMS}  # subject -> emotion -> wordings
for emotion, of_subjects in WORDS.items():
    for (subject, forms), words in zip(FORMS.items(), of_subjects):
        CUES[subject][emotion] = [form.replace("_", word) for form, word in zip(forms, words.split())]

# What a caption says of a parameter below -0.3, between, and above 0.3; then what only shows above 0.4.
LEVELS = {
    "mouth_curve": "down, level, up", "mouth_open": "-, shut, open", "brow_height": "low, level, high",
    "brow_slant": "tilt out, straight, tilt in", "eye_open": "small, level, wide", "pitch": "low, level, high",
    "tempo": "slow, steady, fast", "loudness": "faint, level, loud", "glide": "falls, steady, rises"}
SEEN = ("The mouth is {mouth_curve} and {mouth_open}.", "The brows are {brow_height} and {brow_slant}.",
        "The eyes are {eye_open}.")
HEARD = ("The voice is {pitch} and {tempo}.", "The voice is {loudness} and {glide}.")
MARKS = {"lip_skew": "The lip is tilted.", "tremble": "The mouth moves fast.", "tremolo": "The voice moves fast.",
         "roughness": "The voice is rough."}


@dataclass(frozen=True)
class Sentence:
    """A sentence and the generator's record of what it conveys: one of EMOTIONS, None for appearance."""

    text: str
    emotion: str | None = None


def pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def fill(wording: str, woman: bool) -> str:
    return wording.format(S="She" if woman else "He")


def appearances(look: Look) -> tuple[list[str], list[str]]:
    """What can be said about the clip besides the expression: first sentences, and second ones."""
    who, S, o = ("woman", "She", "her") if look.woman else ("man", "He", "him")
    more = [f"{S} has {'long' if look.long_hair else 'short'} hair.", f"{S} has {look.hair} hair."]
    return ([f"A {who} wears {look.shirt}.", f"Behind {o} is the {look.room}."],
            more + [f"{S} has glasses."] * look.glasses)


def appearance(rng: np.random.Generator, look: Look, second: float) -> list[Sentence]:
    """One neutral sentence about the clip, with probability `second` two."""
    first, more = appearances(look)
    return [Sentence(pick(rng, first)), *([Sentence(pick(rng, more))] if rng.random() < second else [])]


def explain(rng: np.random.Generator, look: Look, emotion: str, sentence_noise: float = 0.0) -> list[Sentence]:
    """An explanation of `emotion` (of EMOTIONS): each emotional sentence is about another one with `sentence_noise`.

    Never about neutral: such a sentence beside a cue of anger is what Eq. 4 does not count, and texts that mix the two
    would show a policy where to hide its doubts.
    """
    subjects = ["face"] * (1 + (rng.random() < 0.4)) + ["voice"]
    subjects += ["conclusion"] * (rng.random() < 0.85)
    sentences = appearance(rng, look, second=0.4)
    for subject in subjects:
        about = emotion
        if rng.random() < sentence_noise:
            about = pick(rng, [e for e in EMOTIONS if e not in (emotion, "neutral")])
        cue = None
        while cue is None or cue in sentences:  # two face sentences, never the same
            cue = Sentence(fill(pick(rng, CUES[subject][about]), look.woman), about)
        sentences.append(cue)
    return sentences


def join(sentences: list[Sentence]) -> str:
    return " ".join(s.text for s in sentences)


def caption(rng: np.random.Generator, look: Look, face, voice) -> str:
    """What is seen and heard, without a word of emotion: attributes read off the clip's parameters (pre-training)."""
    values = dict(zip(FACE + VOICE, (*face, *voice)))
    say = {name: words.split(", ")[(values[name] >= -0.3) + (values[name] > 0.3)] for name, words in LEVELS.items()}
    chosen = []
    for wordings, names, most in ((SEEN, FACE, 3), (HEARD, VOICE, 2)):
        said = [wording.format(**say) for wording in wordings]
        said += [sentence for name, sentence in MARKS.items() if name in names and values[name] > 0.4]
        chosen += [said[i] for i in sorted(rng.permutation(len(said))[:most])]
    return " ".join([appearance(rng, look, 0.0)[0].text, *chosen])


@lru_cache
def grammar(woman: bool) -> dict[str, tuple[str, str | None]]:
    """Every sentence that an explanation about a woman (or a man) can hold -> its subject ("look" or of CUES), and the
    emotion that it conveys."""
    found = {}
    for values in product(SHIRTS, HAIRS, (True, False), (True, False), ROOMS):
        first, more = appearances(Look(woman, *values, skin=0))
        found |= dict.fromkeys(first + more, ("look", None))
    for subject, table in CUES.items():
        for emotion, wordings in table.items():
            found |= {fill(words, woman): (subject, emotion) for words in wordings}
    return found


def count_sentences(rows: list[dict], world: str | Path) -> Counter:
    """Counts over predictions `rows`, by the truth of their clips (params.jsonl) in the folder `world`.

    "sentences": of all explanations, "formed": of the grammar and in the clip's person, "cues": of these about face or
    voice, "true": cues that convey what the clip's face (voice) shows.
    """
    clips, total = {str(clip["number"]): clip for clip in read_jsonl(Path(world, "params.jsonl"))}, Counter()
    for row in rows:
        clip, sentences = clips[row["video_id"]], split_sentences(extract_explanation(row["output"]))
        own = grammar(clip["look"]["woman"])
        formed = [own[sentence] for sentence in sentences if sentence in own]
        cues = [clip[f"{subject}_shows"] == emotion for subject, emotion in formed if subject in ("face", "voice")]
        total.update(sentences=len(sentences), formed=len(formed), cues=len(cues), true=sum(cues))
    return total


def true_labels(sentences: list[Sentence]) -> list[str]:
    """Up to two ERV labels, best first, from the record of cues: the second if it has half as many as the first.
    Appearance alone is neutral. Of two equally frequent emotions the later mentioned one comes first."""
    told = [s.emotion for s in sentences if s.emotion] or ["neutral"]
    ranked = sorted(dict.fromkeys(reversed(told)), key=told.count, reverse=True)  # equal ones keep their order
    return [to_erv(e) for e in ranked[:2] if told.count(e) >= told.count(ranked[0]) / 2]


def erv_row(rng: np.random.Generator, look: Look, emotion: str, source: str, clip: str, noise: float,
            sentence_noise: float) -> dict:
    """One training pair about a clip: a whole explanation, or a sentence (not "human": annotators describe clips).

    Keys: text, labels (the first is wrong with probability `noise`: no annotator is perfect), truth (ERV names), source
    ("human" | "pseudo" | "complement"), clip.
    """
    sentences = explain(rng, look, emotion, 0.0 if source == "complement" else sentence_noise)
    if source != "human" and rng.random() < 0.6:
        sentences = [pick(rng, sentences)]
    truth = true_labels(sentences)
    labels = [*truth]
    if rng.random() < noise:
        labels[0] = pick(rng, [name for name in map(to_erv, EMOTIONS) if name not in truth])
    return {"text": join(sentences), "labels": labels, "truth": truth, "source": source, "clip": clip}
