"""The reward of GRPO: R_format, R_answer and the explanation reward R_E (Eq. 4, Eq. 5, algorithm 1).

    completion -> explanation E -> sentences s_k -> verifier's probabilities u_k -> label sets EL_k -> R_E

One function an equation, plain Python on strings and label sets. All text is read in one pass: no completion, however
odd, takes more than linear time. `RewardSettings` holds the paper's parameters, its ablations (table 2), the
divergences (`RewardSettings.released()`), and remedies against reward hacking, off by default.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from erv_min.emotions import canonical, normalize
from erv_min.run.errors import DataError, SettingsError
from erv_min.sentences import split_sentences

# ---- reading a completion --------------------------------------------------------------------------------------------


def between(text: str, opening: str, closing: str) -> str | None:
    """What stands between the first `opening` and the first `closing` after it, stripped; None where one is missing."""
    _, found, rest = text.partition(opening)
    inside, closed, _ = rest.partition(closing)
    return inside.strip() if found and closed else None


def extract_explanation(completion: str) -> str:
    """E: the text between the first <think> and the next </think>; "" where there is none or it is not closed."""
    return between(completion, "<think>", "</think>") or ""


def extract_answer(completion: str, rule: str = "paper") -> str | None:
    """The text of the first <answer>...</answer>. "released": it must stand on one line, and without one the whole
    completion is the answer. None ("paper" only) where there is no closed answer."""
    if rule == "paper":
        return between(completion, "<answer>", "</answer>")
    lines = (between(line, "<answer>", "</answer>") for line in completion.split("\n"))
    return next((answer for answer in lines if answer is not None), completion.strip())


def format_reward(completion: str) -> float:
    """R_format: 1 where the whole completion is <think>...</think>, white space, <answer>...</answer>; else 0.

    The released regex, `<think>.*?</think>\\s*<answer>.*?</answer>` over all of it, without its backtracking: the first
    place where </think> meets <answer> leaves the most room for the closing tag, which must be the end."""
    if not completion.startswith("<think>"):
        return 0.0
    middle = re.compile(r"</think>\s*<answer>").search(completion, len("<think>"))
    return float(middle is not None and completion.endswith("</answer>"))


def answer_reward(completion: str, e_gt: str, dataset: str, rule: str = "paper") -> float:
    """R_answer: 1 where the answer names e_gt, else 0. "paper" reads both through `emotions.normalize`; "released"
    compares the normalised answer with the label as it stands. Raises DataError where e_gt is no label of `dataset`."""
    answer = extract_answer(completion, rule)
    if rule == "released":
        return float(normalize(answer, dataset, rule) == e_gt)
    target = normalize(e_gt, dataset)
    if target is None:
        raise DataError(f"ground truth {e_gt!r} is not a label of {dataset}")
    return float(answer is not None and normalize(answer, dataset) == target)


# ---- Eq. 4 -----------------------------------------------------------------------------------------------------------


def select_labels(probs: Tensor, labels: Sequence[str], tau: float = 0.5, k: int = 2) -> list[list[str]]:
    """EL_k, algorithm 1 lines 7-14: probs [S, K] -> for each sentence its labels, best first.

    The k best of those strictly over tau; the best one where none is. Of equal probabilities the later label goes
    first, as in the release. Raises SettingsError where K is not len(labels), or a probability is not a number."""
    probs = torch.as_tensor(probs)
    if probs.numel() == 0:
        return [[] for _ in range(len(probs))]
    if probs.shape[1] != len(labels) or probs.isnan().any():
        raise SettingsError(f"the verifier gave {tuple(probs.shape)} probabilities for {len(labels)} labels"
                            + (", some of them not a number" if probs.isnan().any() else ""))
    order = probs.argsort(dim=1, stable=True).flip(1)[:, :k].tolist()  # [S, k]
    over = (probs > tau).sum(1).tolist()  # [S]
    return [[labels[j] for j in best[: max(1, n)]] for best, n in zip(order, over)]


def explanation_reward(label_sets: Sequence[Sequence[str]], e_gt: str, neutral_rule: str = "only",
                       neutral_filter: bool = True, weights: Sequence[float] | None = None) -> float:
    """R_E of one completion (Eq. 4): c / (N - N_neu), or c / N where e_gt is neutral; 0 where the denominator is 0.

    label_sets: EL_k of each sentence, names of ERV_LABELS, GoEmotions or a data set. c: sentences with e_gt among their
    labels. N_neu: sentences whose only label is neutral ("only"), or that have it among them ("any", as algorithm 1
    prints it: such a sentence can count above the line and not below, so R_E can pass 1; divergence 2).
    neutral_filter=False divides by N (table 2). weights: what each sentence adds to c, 1 where None. A label that the
    verifier does not have is never met: 0.
    """
    if neutral_rule not in ("only", "any"):
        raise SettingsError(f"neutral rule {neutral_rule!r} is unknown; there are 'only' and 'any'")
    target = canonical(e_gt)
    sets = [[canonical(label) for label in EL] for EL in label_sets]
    weights = [1.0] * len(sets) if weights is None else weights
    c = sum(w for w, EL in zip(weights, sets) if target in EL)
    N = len(sets)
    N_neu = sum(EL == ["neutral"] if neutral_rule == "only" else "neutral" in EL for EL in sets)
    below = N - N_neu if neutral_filter and target != "neutral" else N
    return c / below if below > 0 else 0.0


# ---- Eq. 5 -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardSettings:
    """Eq. 5's parameters. Defaults: the paper, or where it is undefined the README's table of divergences.

    The remedies against reward hacking, off by default, take an idea each from the literature; the forms are ours.
    gate_on_answer: GRPO-CARE (arXiv 2506.16141), whose consistency bonus lifts only what is also correct.
    phase_in_steps: EmotionThinker (2601.15668), whose reasoning reward comes in progressively. length_target:
    AffectGPT-R1 (2508.01318), with a term on length; here from below, since R_E invites short explanations.
    repeat_discount: the repetition penalty of Demystifying Long Chain-of-Thought (2502.03373), on whole sentences.
    """

    tau: float = 0.5  # divergence 1
    k: int = 2
    neutral_rule: str = "only"  # divergence 2: "only" or "any"
    neutral_filter: bool = True  # table 2: W/o Neutral Filtering
    sentence_level: bool = True  # table 2: W/o Sentence-Level Verification
    answer_rule: str = "paper"  # divergence 18: "paper" or "released"
    sentence_rule: str = "released"  # or "extended"
    w_format: float = 1.0
    w_answer: float = 1.0
    w_explanation: float = 1.0
    gate_on_answer: bool = False  # R_E only where format and answer are right
    phase_in_steps: int = 0  # R_E's weight grows linearly over the first N steps
    length_target: int = 0  # R_E shrinks with an explanation of fewer words
    repeat_discount: float = 0.0  # a repeated sentence adds 1 - this to c, and still 1 to N

    def __post_init__(self):
        for name, ok in (("tau", 0 <= self.tau <= 1), ("k", self.k >= 1), ("phase_in_steps", self.phase_in_steps >= 0),
                         ("length_target", self.length_target >= 0),
                         ("repeat_discount", 0 <= self.repeat_discount <= 1),
                         ("neutral_rule", self.neutral_rule in ("only", "any")),
                         ("answer_rule", self.answer_rule in ("paper", "released")),
                         ("sentence_rule", self.sentence_rule in ("released", "extended"))):
            if not ok:
                raise SettingsError(f"reward setting {name} = {getattr(self, name)!r} is out of its range")

    @classmethod
    def released(cls, **changes) -> "RewardSettings":
        """The released code's rewards; its labels are normalised with the MAFW rule, which ALIASES contain."""
        return replace(cls(tau=0.1, answer_rule="released"), **changes)


@dataclass
class Reward:
    """One completion's rewards; `explanation` is R_E after the remedies, but for the phase-in: that is in `total`."""

    format: float
    answer: float
    explanation: float
    total: float
    sentences: list[str]
    label_sets: list[list[str]]


def sentences_of(completion: str, settings: RewardSettings) -> list[str]:
    """S_i of a completion, or the whole explanation as one where `sentence_level` is off."""
    explanation = extract_explanation(completion)
    if settings.sentence_level:
        return split_sentences(explanation, settings.sentence_rule)
    return [explanation] if explanation else []


def _weights(sentences: list[str], discount: float) -> list[float]:
    seen, weights = set(), []
    for sentence in sentences:
        key = " ".join(re.findall(r"\w+", sentence.lower()))
        weights.append(1.0 - discount if key in seen else 1.0)
        seen.add(key)
    return weights


def score_completions(completions: Sequence[str], e_gt: Sequence[str], dataset: str | Sequence[str],
                      probabilities: Callable[[list[str]], Tensor] | None, labels: Sequence[str],
                      settings: RewardSettings = RewardSettings(), step: int | None = None) -> list[Reward]:
    """R = R_E + R_format + R_answer of each completion (Eq. 5), weighted by the settings.

    e_gt: a label a completion, as its data set spells it; dataset: one name, or one a completion. probabilities: the
    verifier, sentences -> [S, K] in the order of `labels`, called once with every distinct sentence, and not at all
    where there is none (divergence 17: R_E = 0); None leaves R_E out (the paper's baseline). step: training step,
    counted from 0, for `phase_in_steps` (None: fully in). Raises SettingsError, DataError.
    """
    datasets = [dataset] * len(completions) if isinstance(dataset, str) else dataset
    if not len(completions) == len(e_gt) == len(datasets):
        raise SettingsError(f"{len(completions)} completions, {len(e_gt)} labels and {len(datasets)} data sets")
    split = [sentences_of(c, settings) if probabilities else [] for c in completions]
    distinct = list(dict.fromkeys(s for sentences in split for s in sentences))
    chosen = select_labels(probabilities(distinct), labels, settings.tau, settings.k) if distinct else []
    if len(chosen) != len(distinct):
        raise SettingsError(f"the verifier gave {len(chosen)} rows for {len(distinct)} sentences")
    label_sets = dict(zip(distinct, chosen))
    phase = 1.0 if step is None or not settings.phase_in_steps else min(1.0, step / settings.phase_in_steps)
    rewards = []
    for completion, label, name, sentences in zip(completions, e_gt, datasets, split):
        R_format = format_reward(completion)
        R_answer = answer_reward(completion, label, name, settings.answer_rule)
        EL = [label_sets[s] for s in sentences]
        R_E = explanation_reward(EL, label, settings.neutral_rule, settings.neutral_filter,
                                 _weights(sentences, settings.repeat_discount))
        if settings.length_target:
            R_E *= min(1.0, sum(len(s.split()) for s in sentences) / settings.length_target)
        if settings.gate_on_answer and not (R_format and R_answer):
            R_E = 0.0
        total = settings.w_explanation * phase * R_E + settings.w_format * R_format + settings.w_answer * R_answer
        rewards.append(Reward(R_format, R_answer, R_E, total, sentences, EL))
    return rewards
