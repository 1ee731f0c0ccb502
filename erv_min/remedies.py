"""Remedies against a policy that games R_E: small functions, off by default. Eq. 4 and Eq. 5 stay as printed.

    score_completions by each verifier, [V][R] Rewards -> `apply` -> the [R] Rewards that a run trains with

What they do to a policy: scripts/reproduce.py; what they pay for known ways to cheat: scripts/tools/audit.py.
"""

import dataclasses
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance

import torch

from erv_min.base.options import setting
from erv_min.rewards import (Reward, RewardSettings, explanation_reward, extract_answer, extract_explanation,
                             select_labels, total_reward)


@dataclass
class Remedies:
    """Options; the defaults leave Eq. 4 and 5 as printed. Sources: the functions."""

    variance_weight: float = setting(0.0, "--erv A,B: R_E is the mean less this times the variance; 0: the minimum "
                                          "(remedy)", least=0)
    count_calm: bool = setting(False, "an explanation that the verifier reads as neutral keeps its neutral sentences "
                                      "in N of Eq. 4 (remedy)")
    likelihood_floor: float = setting(0.0, "a sentence with a lower mean log-prob per token under pi_ref adds nothing "
                                           "to c, and still 1 to N; 0: off (remedy)", most=0)
    care_bonus: float = setting(0.0, "weight of GRPO-CARE's bonus: right answers that pi_ref finds likely after their "
                                     "explanation; there 0.5 (remedy)", least=0)
    gate_on_answer: bool = setting(False, "R_E only where format and answer are right (remedy)")
    phase_in_steps: int = setting(0, "R_E grows linearly over the first steps; 0: at once (remedy)", least=0)
    length_target: int = setting(0, "R_E shrinks with an explanation of fewer words; 0: off (remedy)", least=0)
    repeat_discount: float = setting(0.0, "a repeated sentence adds 1 less this to c, and still 1 to N (remedy)",
                                     least=0, most=1)


def repeats(sentences: Sequence[str], discount: float) -> list[float]:
    """1, or 1 - discount where a sentence's words stood before (as 2502.03373's penalty, here on whole sentences)."""
    keys = [" ".join(re.findall(r"\w+", sentence.lower())) for sentence in sentences]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    return [1.0 if first[key] == i else 1.0 - discount for i, key in enumerate(keys)]


def likely(mean_logps: Sequence[float], floor: float) -> list[float]:
    """1, or 0 where a sentence's mean log pi_ref per token is under the floor: a scrap that only a verifier understands
    is no text of the reference. Ours: the KL term bounds a whole completion, not one sentence of it."""
    return [float(logp >= floor) for logp in mean_logps]


def claims_calm(whole: Sequence[str]) -> bool:
    """Whether the verifier reads neutral in the explanation as a whole; whole: its labels EL.

    Section 3.3 leaves neutral sentences out since they "provide little to no emotional signal". Where the whole reads
    as neutral they gave it its signal, as they do in Eq. 4's second line: they are claims, and count in N."""
    return "neutral" in whole


def ensemble(R_E: Sequence[float], variance_weight: float) -> float:
    """Of several verifiers: the minimum, or mean - weight * variance, unbiased (2310.02743: worst-case and
    uncertainty-weighted optimization)."""
    return fmean(R_E) - variance_weight * variance(R_E) if variance_weight and len(R_E) > 1 else min(R_E)


def length_factor(sentences: Sequence[str], target: int) -> float:
    """words / target, at most 1: AffectGPT-R1's term on length (2508.01318), from below, since a share invites short
    explanations."""
    return min(1.0, sum(len(s.split()) for s in sentences) / target) if target else 1.0


def gate(reward: Reward, on: bool) -> float:
    """0 where format or answer is wrong, so that the explanation of a wrong answer earns nothing. Ours."""
    return float(not on or bool(reward.format and reward.answer))


def phase_in(step: int | None, steps: int) -> float:
    """Share of R_E at a training step, counted from 0; 1 where it is None. The idea: EmotionThinker (2601.15668)."""
    return 1.0 if step is None or not steps else min(1.0, step / steps)


def care_bonus(answers: Sequence[float], confidence: Sequence[float], group_size: int, weight: float) -> list[float]:
    """GRPO-CARE (2506.16141): weight * R_answer, added to R where the answer is right and the reference's likelihood of
    it, after the explanation, is no lower than the mean of the group's right ones.

    answers: R_answer; confidence: exp of the mean log pi_ref of the answer's tokens, cut at 0.95, compared with a
    margin of 0.01 (the source's scripts); [R] each. There the reference is a moving average of the policy, and beta 0.
    """
    a, p = (torch.tensor(x, dtype=torch.float64).view(-1, group_size) for x in (answers, confidence))
    p, right = p.clamp(max=0.95), a > 0
    mean = (p * right).sum(1, keepdim=True) / right.sum(1, keepdim=True).clamp(min=1)
    return (weight * a * (right & (p >= mean - 0.01))).flatten().tolist()


def piece_logps(decode: Callable, ids: Sequence[int], logps: Sequence[float], pieces: Sequence[str]) -> list[float]:
    """Mean log-prob of the tokens that hold each piece of a completion's text, in which the pieces stand in this order.
    A token that two share counts for both; a piece that is empty or not there has -inf."""
    text, at, means, lengths = decode(ids), 0, [], range(len(ids) + 1)
    for piece in pieces:
        start = text.find(piece, at) if piece else -1
        at = max(at, start + len(piece))
        first = bisect_right(lengths, start, key=lambda t: len(decode(ids[:t]))) - 1  # the last that begins by then
        stop = bisect_left(lengths, at, key=lambda t: len(decode(ids[:t])))
        means.append(fmean(logps[first:stop]) if start >= 0 else -math.inf)
    return means


def apply(readings: list[list[Reward]], texts: Sequence[str], e_gt: Sequence[str], verifiers: Sequence, group_size: int,
          rules: RewardSettings, on: Remedies, step: int | None = None,
          likelihood: Callable[[int, list[str]], list[float]] | None = None) -> list[Reward]:
    """The rewards of R completions with the remedies that are on; sentences and labels are the first verifier's.

    readings [V][R]: as printed, by each verifier. likelihood(i, pieces): `piece_logps` of completion i under pi_ref."""
    if len(readings) == 1 and all(getattr(on, f.name) == f.default for f in dataclasses.fields(Remedies)):
        return readings[0]
    calm, bonus, rewards = [[False] * len(texts)] * len(readings), [0.0] * len(texts), []
    if on.count_calm and verifiers:
        E = [extract_explanation(text) for text in texts]
        calm = [[claims_calm(EL) for EL in select_labels(v.probabilities(E), v.labels, rules.tau, rules.k)]
                for v in verifiers]
    if on.care_bonus:
        confidence = [math.exp(likelihood(i, ["<answer>", extract_answer(o) or ""])[1]) for i, o in enumerate(texts)]
        bonus = care_bonus([r.answer for r in readings[0]], confidence, group_size, on.care_bonus)
    for i, (first, *others) in enumerate(zip(*readings)):
        S, weights = first.sentences, repeats(first.sentences, on.repeat_discount)
        if on.likelihood_floor:
            known = likely(likelihood(i, ["<think>", *S])[1:], on.likelihood_floor)
            weights = [a * b for a, b in zip(weights, known)]
        R_E = ensemble([explanation_reward(r.label_sets, e_gt[i], rules.neutral_rule,
                                           rules.neutral_filter and not calm[v][i], weights)
                        for v, r in enumerate((first, *others))], on.variance_weight)
        R_E *= length_factor(S, on.length_target) * gate(first, on.gate_on_answer)
        R = total_reward(phase_in(step, on.phase_in_steps) * R_E, first.format, first.answer, rules) + bonus[i]
        rewards.append(replace(first, explanation=R_E, total=R, bonus=bonus[i]))
    return rewards
