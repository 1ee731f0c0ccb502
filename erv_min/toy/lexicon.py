"""Two offline judges for the small world: what emotion does an explanation convey (figure 3)?

Written by hand from English words. They import nothing of the package: not the grammar, not the labeller of the
verifier's training pairs. `LexiconJudge` knows the words of the whole grammar, so that it is right on what it writes by
construction; `ParaphraseJudge` learns from other sentences, so that it is right if these carry. They stand in for
GPT-4.1-mini and Gemini (table 4); they do not understand language.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

# Beginnings of words (\b: the whole word) that name the emotion, weight 3; that hardly mean anything else, 2; that lean
# towards it, 1.
WEIGHTS = {
    "happy": ("happ joy glad delight", "pleased smil grin laugh beam cheer giggl amus", "warm bright"),
    "sad": ("sad sorrow grief griev unhapp despair", "tear sob weep droop mourn gloom mope slump", "cry heav tired"),
    "angry": (r"angr anger rage furious fury mad\b", "hostil scowl glar clench shout yell harsh scold snarl",
              r"hard\b"),
    "surprise": ("surpris shock amaz astonish startl", "gasp jump sudden unexpected gape blink", r"drop stare round\b"),
    "disgust": ("disgust distaste revol repuls nausea", "sick sneer wrinkl groan sour gag grimac",
                r"curl turns\saway squint"),
    "fear": ("fear afraid scare terror terrif panic fright dread", "trembl shak whimper shrink freez flinch",
             r"thin\b"),
    "neutral": ("neutral indifferen", r"calm relax plain rests?\b composed ordinary nothing unmoved",
                r"even\b (waits|talks)\b still\b"),
}
SPELLINGS = {"happy": ("happy", "happiness"), "sad": ("sad", "sadness"), "angry": ("angry", "anger"),
             "surprise": ("surprise", "surprised"), "disgust": ("disgust", "disgusted"),
             "fear": ("fear", "fearful"), "neutral": ("neutral",)}
NEGATIONS = {"no", "not", "without", "never", "n't", "hardly"}
SMOOTHING = 0.1  # of the counts of PARAPHRASES


def weight_of(phrase: str, stems: tuple[str, ...]) -> int:
    """Sum of the weights of those `stems` that `phrase` holds, and that none of the three words before negates."""
    total = 0
    for weight, of_weight in zip((3, 2, 1), stems):
        for stem in of_weight.split():
            found = re.search(rf"\b{stem}", phrase)
            if found and not NEGATIONS.intersection(re.findall(r"[a-z']+", phrase[: found.start()])[-3:]):
                total += weight
    return total


class Judge:
    """What both share, on `votes(text)`: emotion -> what speaks for it."""

    def judge(self, explanations: list[str], labels) -> list[str | None]:
        """One of `labels` for each explanation: neutral without emotional words; None if it is empty, or its emotion
        is not among them."""
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
            scores = {emotion: weight_of(phrase, stems) for emotion, stems in WEIGHTS.items()}
            best = max(scores.values())
            winners = [emotion for emotion, score in scores.items() if score == best > 0]
            for emotion in winners:
                votes[emotion] += min(best, 3) / len(winners)  # a phrase is heard once, however many words it piles up
        return votes


# A happy, a sad, ... person in other words, face, voice and conclusion; "looks": looks and rooms. Written before the
# judge was tried on anything, and not changed since: none of these sentences stands in a world.
PARAPHRASES: dict[str, list[str]] = json.loads(Path(__file__).with_name("paraphrases.json").read_text())


def letters(text: str) -> list[str]:
    """Every 3, 4 and 5 letters in a row of each word, whose ends are "<" and ">"."""
    words = [f"<{word}>" for word in re.findall(r"[a-z']+", text.lower())]
    return [word[i : i + n] for word in words for n in (3, 4, 5) for i in range(len(word) - n + 1)]


class ParaphraseJudge(Judge):
    """Naive Bayes on the letters of PARAPHRASES: each sentence votes for the emotions by their probabilities. It hears
    neither a negation nor the order of words."""

    def __init__(self):
        counts = {emotion: Counter(letters(" ".join(texts))) for emotion, texts in PARAPHRASES.items()}
        classes = Counter(run for seen in counts.values() for run in seen)
        runs = [run for run, n in classes.items() if n <= len(counts) / 2]  # the others are of words like "she"
        self.logs = {run: {} for run in runs}  # run of letters -> class -> log p(run | class)
        for emotion, seen in counts.items():
            total = sum(seen[run] + SMOOTHING for run in runs)
            for run in runs:
                self.logs[run][emotion] = math.log((seen[run] + SMOOTHING) / total)

    def probabilities(self, sentence: str) -> dict[str, float]:
        """p(class | sentence), all classes equally probable beforehand."""
        logs = dict.fromkeys(PARAPHRASES, 0.0)
        for run in letters(sentence):
            for emotion, log in self.logs.get(run, {}).items():
                logs[emotion] += log
        weights = {emotion: math.exp(log - max(logs.values())) for emotion, log in logs.items()}
        return {emotion: weight / sum(weights.values()) for emotion, weight in weights.items()}

    def votes(self, text: str) -> dict[str, float]:
        found = [self.probabilities(sentence) for sentence in re.split(r"(?<=[.!?])\s+", text)]
        votes = {emotion: sum(p[emotion] for p in found) for emotion in WEIGHTS}
        return votes if max(votes.values()) > 0.5 else {}  # looks alone: neutral
