"""The reward of GRPO: algorithm 1 and Eq. 4 (R_E), R_format and R_answer, and their sum, Eq. 5.

    completion o -> explanation E -> sentences s_k -> verifier u_k = sigmoid(ERV(s_k)) -> labels EL_k -> c, N_neu -> R_E
    line 3: extract_explanation, split_sentences; 6: erv.py; 7-14: select_labels; 15-26: explanation_reward

All text is read in one pass: no completion, however odd, takes more than linear time. `RewardSettings` holds the
paper's parameters, its ablations (table 2) and the divergences.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from erv_min.base.errors import DataError, SettingsError
from erv_min.base.options import check, option
from erv_min.base.sentences import split_sentences
from erv_min.emotions import canonical, normalize

# ---- algorithm 1 and Eq. 4: R_E --------------------------------------------------------------------------------------


def extract_explanation(completion: str) -> str:
    """E: the text between the first <think> and the next </think>; "" if there is none or it is not closed."""
    return between(completion, "<think>", "</think>") or ""


def between(text: str, opening: str, closing: str) -> str | None:
    """What stands between the first `opening` and the first `closing` after it, stripped; None if one is missing."""
    inside, closed, _ = text.partition(opening)[2].partition(closing)
    return inside.strip() if closed else None


def select_labels(probs: Tensor, labels: Sequence[str], tau: float = 0.5, k: int = 2) -> list[list[str]]:
    """EL_k, algorithm 1 lines 7-14: u [S, K] -> for each sentence its labels, best first: the k best of those strictly
    over tau; the best one if none is. Of equal probabilities the later label goes first, as in the release."""
    u = torch.as_tensor(probs)
    if u.shape[1:] != (len(labels),) or u.isnan().any():
        raise SettingsError(f"the verifier gave {tuple(u.shape)} probabilities for {len(labels)} labels, or some that "
                            "are not a number")
    order = u.argsort(dim=1, stable=True).flip(1)[:, :k].tolist()  # [S, k]
    over = (u > tau).sum(1).tolist()  # [S]
    return [[labels[j] for j in best[: max(1, n)]] for best, n in zip(order, over)]


def explanation_reward(label_sets: Sequence[Sequence[str]], e_gt: str, neutral_rule: str = "only",
                       neutral_filter: bool = True) -> float:
    """R_E of one completion, algorithm 1 lines 15-26 (Eq. 4): c / (N - N_neu), or c / N if e_gt is neutral.

    label_sets: EL_k of each sentence, names of ERV_LABELS, GoEmotions or a data set. c: sentences with e_gt among their
    labels. N: sentences. N_neu: those whose only label is neutral ("only"), or that have it among them ("any", as line
    15 prints it: R_E can pass 1; divergence 2). neutral_filter=False divides by N (table 2).
    R_E is 0 if the denominator is (divergence 3)."""
    if neutral_rule not in ("only", "any"):
        raise SettingsError(f"neutral rule {neutral_rule!r} is unknown; there are 'only' and 'any'")
    e_gt = canonical(e_gt)
    sets = [[canonical(label) for label in EL] for EL in label_sets]
    N = len(sets)
    N_neu = sum(EL == ["neutral"] if neutral_rule == "only" else "neutral" in EL for EL in sets)
    c = sum(e_gt in EL for EL in sets)
    denominator = N - N_neu if neutral_filter and e_gt != "neutral" else N
    return c / denominator if denominator > 0 else 0.0


# ---- R_format, R_answer and Eq. 5: R ---------------------------------------------------------------------------------


def format_reward(completion: str) -> float:
    """R_format: 1 if the whole completion is <think>...</think>, white space, <answer>...</answer>; else 0. It is the
    released regex, `<think>.*?</think>\\s*<answer>.*?</answer>` over all of it, without its backtracking."""
    middle = re.search(r"</think>\s*<answer>", completion.removeprefix("<think>"))
    return float(completion.startswith("<think>") and middle is not None and completion.endswith("</answer>"))


def extract_answer(completion: str, rule: str = "paper") -> str | None:
    """The text of the first <answer>...</answer>. "released": it must stand on one line, and without one the whole
    completion is the answer. None ("paper" only) if there is no closed answer."""
    if rule == "paper":
        return between(completion, "<answer>", "</answer>")
    lines = (between(line, "<answer>", "</answer>") for line in completion.split("\n"))
    return next((answer for answer in lines if answer is not None), completion.strip())


def answer_reward(completion: str, e_gt: str, dataset: str, rule: str = "paper") -> float:
    """R_answer: 1 if the answer names e_gt, else 0. "paper" reads both through `emotions.normalize`; "released"
    compares the normalised answer with the label as it stands. Raises DataError if e_gt is no label of `dataset`."""
    answer = extract_answer(completion, rule)
    if rule == "released":
        return float(normalize(answer, dataset, rule) == e_gt)
    target = normalize(e_gt, dataset)
    if target is None:
        raise DataError(f"ground truth {e_gt!r} is not a label of {dataset}")
    return float(answer is not None and normalize(answer, dataset) == target)


reward_option = partial(option, group="reward")
variant = partial(option, group="variant")


@dataclass
class RewardSettings:
    """Parameters of algorithm 1 and Eq. 5, and table 2's rows. Raises SettingsError out of its ranges."""

    tau: float = reward_option(0.5, "threshold of algorithm 1 (release: 0.1; divergence 1)", least=0, most=1)
    k: int = reward_option(2, "labels per sentence at most (algorithm 1)", least=1)
    neutral_rule: str = reward_option("only", "a sentence is neutral if neutral is its only label, or one of its "
                                              "labels (divergence 2)", ("only", "any"))
    ablate: str = reward_option("", "table 2: leave one part of R_E out (augmentation: of the verifier's data)",
                                ("", "neutral-filtering", "sentence-level", "augmentation"))
    answer_rule: str = variant("paper", "how an answer is read (divergence 18)", ("paper", "released"))
    sentence_rule: str = variant("released", "how an explanation is split (split_sentences)", ("released", "extended"))
    w_format: float = reward_option(1.0, "weight of R_format (Eq. 5)")
    w_answer: float = reward_option(1.0, "weight of R_answer (Eq. 5)")
    w_explanation: float = reward_option(1.0, "weight of R_E (Eq. 5); 0 is the paper's Baseline")

    def __post_init__(self):
        check(self)


@dataclass
class Reward:
    """One completion's rewards, and what the verifier read in each of its sentences."""

    format: float
    answer: float
    explanation: float
    total: float
    sentences: list[str]
    label_sets: list[list[str]]


def sentences_of(completion: str, settings: RewardSettings) -> list[str]:
    """S_i of a completion; with --ablate sentence-level the whole explanation as one sentence (table 2)."""
    E = extract_explanation(completion)
    if settings.ablate == "sentence-level":
        return [E] if E else []
    return split_sentences(E, settings.sentence_rule)


def score_completions(completions: Sequence[str], e_gt: Sequence[str], dataset: str | Sequence[str],
                      probabilities: Callable[[list[str]], Tensor] | None, labels: Sequence[str],
                      settings: RewardSettings = RewardSettings()) -> list[Reward]:
    """R = R_E + R_format + R_answer of each completion (Eq. 5), weighted by the settings.

    e_gt: one label per completion, as its data set spells it; dataset: one name, or one per completion. probabilities:
    the verifier, sentences -> [S, K] in the order of `labels`, called once with every sentence, and not at all if there
    is none (divergence 17: R_E = 0); None: R_E = 0 (the paper's Baseline)."""
    datasets = [dataset] * len(completions) if isinstance(dataset, str) else dataset
    split = [sentences_of(o, settings) if probabilities else [] for o in completions]
    sentences = [sentence for S in split for sentence in S]
    label_sets = select_labels(probabilities(sentences), labels, settings.tau, settings.k) if sentences else []
    EL_of, rewards = dict(zip(sentences, label_sets, strict=True)), []
    for o, label, name, S in zip(completions, e_gt, datasets, split, strict=True):
        EL = [EL_of[sentence] for sentence in S]
        R_E = explanation_reward(EL, label, settings.neutral_rule, settings.ablate != "neutral-filtering")
        R_format, R_answer = format_reward(o), answer_reward(o, label, name, settings.answer_rule)
        R = settings.w_explanation * R_E + settings.w_format * R_format + settings.w_answer * R_answer
        rewards.append(Reward(R_format, R_answer, R_E, R, S, EL))
    return rewards
