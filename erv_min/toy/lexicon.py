"""Two offline judges for the small world: what emotion does an explanation convey (figure 3)?

Written by hand from English words. They import nothing of the package: not the grammar, not its labels, not the
labeller of the verifier's training pairs. Both know the words of the whole grammar, so that they agree on what it
writes by construction: two readers of one language, not two independent judges.
They stand in for GPT-4.1-mini (`LexiconJudge`) and Gemini (`SecondJudge`, table 4); they do not understand language.
"""

import re

# Weights: 3 names the emotion, 2 hardly means anything else, 1 leans towards it. A key is the beginning
# of a word (\b: the whole word).
WEIGHTS = {
    "happy": {"happ": 3, "joy": 3, "glad": 3, "delight": 3, "pleased": 2, "smil": 2, "grin": 2, "laugh": 2, "beam": 2,
              "cheer": 2, "giggl": 2, "warm": 1, "bright": 1, "amus": 2},
    "sad": {"sad": 3, "sorrow": 3, "grief": 3, "griev": 3, "unhapp": 3, "despair": 3, "tear": 2, "sob": 2, "weep": 2,
            "cry": 1, "droop": 2, "mourn": 2, "heav": 1, "tired": 1, "gloom": 2, "mope": 2, "slump": 2},
    "angry": {"angr": 3, "anger": 3, "rage": 3, "furious": 3, "fury": 3, r"mad\b": 3, "hostil": 2, "scowl": 2,
              "glar": 2, "clench": 2, "shout": 2, "yell": 2, "harsh": 2, "scold": 2, "snarl": 2, r"hard\b": 1},
    "surprise": {"surpris": 3, "shock": 3, "amaz": 3, "astonish": 3, "startl": 3, "gasp": 2, "jump": 2, "sudden": 2,
                 "drop": 1, "stare": 1, r"round\b": 1, "unexpected": 2, "gape": 2,
                 "blink": 2},
    "disgust": {"disgust": 3, "distaste": 3, "revol": 3, "repuls": 3, "nausea": 3, "sick": 2, "sneer": 2, "wrinkl": 2,
                "groan": 2, "curl": 1, "sour": 2, "gag": 2, "turns away": 1, "squint": 1, "grimac": 2},
    "fear": {"fear": 3, "afraid": 3, "scare": 3, "terror": 3, "terrif": 3, "panic": 3, "fright": 3, "dread": 3,
             "trembl": 2, "shak": 2, "whimper": 2, "shrink": 2, "freez": 2, r"thin\b": 1, "flinch": 2},
    "neutral": {"neutral": 3, "calm": 2, "relax": 2, "plain": 2, r"rests?\b": 2, r"even\b": 1, "composed": 2,
                "ordinary": 2, "nothing": 2, r"(waits|talks)\b": 1, "indifferen": 3, r"still\b": 1, "unmoved": 2},
}
SHARED = {  # phrases that fit two emotions: half a vote each
    "eyes are wide open": ("surprise", "fear"), "voice is very loud": ("angry", "surprise"),
    "voice is very high": ("happy", "surprise"), "brows press low": ("angry", "disgust"),
    "corners hang": ("sad", "disgust"), "voice fades": ("sad", "fear"),
}
SPELLINGS = {"happy": ("happy", "happiness"), "sad": ("sad", "sadness"), "angry": ("angry", "anger"),
             "surprise": ("surprise", "surprised"), "disgust": ("disgust", "disgusted"),
             "fear": ("fear", "fearful"), "neutral": ("neutral",)}
NEGATIONS = ("no", "not", "without", "never", "n't", "hardly")


def _matches(phrase: str, stem: str) -> bool:
    """Whether a word of `phrase` begins with `stem` and none of the three words before it negates it."""
    found = re.search(rf"\b{stem}", phrase)
    return bool(found) and not set(re.findall(r"[a-z']+", phrase[:found.start()])[-3:]) & set(NEGATIONS)


class Judge:
    """What both share: `votes(text)` counts for each emotion."""

    def judge(self, explanations: list[str], labels) -> list[str | None]:
        """One of `labels` for each explanation; a text without emotional words is neutral, an empty one None.

        None also where the emotion found is not in `labels`.
        """
        found = [SPELLINGS.get(self.emotion(text), ()) for text in explanations]
        return [next((label for label in labels if label.lower() in spellings), None) for spellings in found]

    def emotion(self, text: str) -> str | None:
        if not re.search(r"[a-z]", text.lower()):
            return None
        votes = self.votes(text.lower())
        return max(votes, key=votes.get) if any(votes.values()) else "neutral"


class LexiconJudge(Judge):
    """Reads the whole explanation: each phrase votes for the emotion whose words weigh most in it."""

    def votes(self, text: str) -> dict[str, float]:
        votes = dict.fromkeys(WEIGHTS, 0.0)
        for phrase in re.split(r"[.,;:!?]|\bbut\b|\bwhile\b", text):
            scores = {e: sum(w for stem, w in words.items() if _matches(phrase, stem)) for e, words in WEIGHTS.items()}
            for shared, pair in SHARED.items():
                for emotion in pair:
                    scores[emotion] += shared in phrase
            best = max(scores.values())
            winners = [e for e, s in scores.items() if s == best and s > 0]
            for emotion in winners:
                votes[emotion] += min(best, 3) / len(winners)  # a phrase is heard once, however many words it piles up
        return votes


class SecondJudge(Judge):
    """Counts sentences, one vote each without weights; a sentence that names an emotion outright has two votes."""

    NAMES = {"happy": "happy|joy|glad", "sad": "sad|sorrow|grief", "angry": "angry|rage|anger|mad|furious",
             "surprise": "surprised?|shock|amazed", "disgust": "disgust(ed)?|distaste|sick",
             "fear": "fear|afraid|scared", "neutral": "neutral|calm|nothing|indifference"}
    SIGNS = {"happy": "smiles?|grins?|laughs?|beams?|bright", "sad": "tears|droops?|sobs?|weeps?|heavy|mopes|slumps",
             "angry": "scowls?|glares?|snarls|shouts?|harsh", "surprise": "gasps?|sudden|gapes|stares?|blinks",
             "disgust": "sneers|grimaces|gags|groans?|sour", "fear": "trembles?|shaky|whimpers?|flinches|freezes",
             "neutral": "rests?|relaxe[sd]|waits|talks|even|still"}

    def votes(self, text: str) -> dict[str, float]:
        votes = dict.fromkeys(self.NAMES, 0)
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            for emotion in votes:
                if re.search(rf"\b({self.NAMES[emotion]})\b", sentence):
                    votes[emotion] += 2
                elif re.search(rf"\b({self.SIGNS[emotion]})\b", sentence):
                    votes[emotion] += 1
        return votes
