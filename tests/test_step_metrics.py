"""What a GRPO step logs, by hand: token_sums of a pass, step_metrics over the completions of all processes."""

import math

import pytest
import torch

from erv_min.grpo import MiniBatch
from erv_min.logps import Completions
from erv_min.rewards import Reward
from erv_min.train.log import step_metrics, token_sums


def sums_of(*values: float) -> dict[str, float]:
    return dict(zip(("tokens", "ended", "kl", "entropy", "clip_fraction_low", "clip_fraction_high", "sampler_gap",
                     "sampler_gap_max"), values))


def test_token_sums_by_hand():
    """Two completions of two tokens and one; EOS is 9. The ratio of the first token is 1.5, its advantage 1: the clip
    holds it back above; that of the third is 0.5 at advantage -1: below."""
    mask = torch.tensor([[True, True], [True, False]])
    old = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    sampled = Completions(torch.tensor([[4, 9], [5, 9]]), mask, old + torch.tensor([[0.5, -0.1], [0.2, 7.0]]))
    ratio = torch.tensor([[1.5, 1.0], [0.5, 1.0]])
    logps = old + ratio.log()
    ref = logps + math.log(2) * torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # k3 of d = ln 2: 2 - ln 2 - 1
    k3, entropy = 1 - math.log(2), torch.tensor([[1.0, 0.5], [0.25, 9.0]])
    part = MiniBatch(None, sampled, mask, 1.0, ref, torch.tensor([1.0, -1.0]), old)
    first, second = token_sums(part, logps, entropy, 9, 0.2)
    assert first == pytest.approx(sums_of(2, 1, k3, 1.5, 0, 1, 0.6, 0.5))
    assert second == pytest.approx(sums_of(1, 0, k3, 0.25, 1, 0, 0.2, 0.2))  # the 9 behind it is padding


def test_step_metrics_by_hand():
    """Two groups of two: R 3, 1 and 2, 2; tokens 4, 2, 10, 4, of which the third met no EOS."""
    rewards = [Reward(1, 1, 1.0, 3.0, [], []), Reward(1, 0, 0.0, 1.0, [], []),
               Reward(1, 1, 0.0, 2.0, [], []), Reward(1, 0, 1.0, 2.0, [], [])]
    sums = [sums_of(4, 1, 2.0, 8.0, 1, 0, 0.1, 0.1), sums_of(2, 1, 0.0, 2.0, 0, 1, 0.3, 0.2),
            sums_of(10, 0, 2.0, 5.0, 1, 0, 0.0, 0.0), sums_of(4, 1, 0.0, 5.0, 0, 0, 0.0, 0.0)]
    found = step_metrics(rewards, sums, 2)
    assert found == pytest.approx({
        "reward": 2, "reward_format": 1, "reward_answer": 0.5, "reward_explanation": 0.5,
        # standard deviations of 3, 1: sqrt 2; of 1, 0: sqrt(1/2), in one of the two groups or in both
        "reward_std": math.sqrt(2) / 2, "reward_format_std": 0, "reward_answer_std": math.sqrt(0.5),
        "reward_explanation_std": math.sqrt(0.5),
        "frac_zero_std": 0.5,
        "kl": 4 / 20, "entropy": 20 / 20, "clip_fraction_low": 2 / 20, "clip_fraction_high": 1 / 20,
        "sampler_gap": 0.4 / 20, "sampler_gap_max": 0.2, "completion_length": 5, "completion_length_min": 2,
        "completion_length_max": 10, "truncated": 0.25})
