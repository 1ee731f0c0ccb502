"""What the released code gave for the same inputs: rewards of 40 groups, edge cases, and one on-policy GRPO step."""

import pytest
import torch
from conftest import GOLDEN
from erv_min.base.files import read_json
from erv_min.emotions import GOEMOTIONS
from erv_min.rewards import (RewardSettings, answer_reward, explanation_reward, format_reward, score_completions,
                             select_labels)
from safetensors.torch import load_file
from erv_min.grpo import group_advantages, grpo_loss, kl_k3


GROUPS = read_json(GOLDEN / "text/rewards.json")["groups"]


EDGES = read_json(GOLDEN / "text/edge_cases.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_groups(dtype):
    for g in GROUPS:
        scored = score_completions(g["completions"], [g["ground_truth"]] * 6, g["dataset"],
                                   lambda s: torch.tensor([g["probs"][x] for x in s], dtype=dtype), GOEMOTIONS,
                                   RewardSettings(tau=0.1, answer_rule="released"))
        assert [r.sentences for r in scored] == g["sentences"]
        assert [r.explanation for r in scored] == pytest.approx(g["explanation_reward"], abs=1e-9)
        assert [r.answer for r in scored] == g["answer_reward"]
        assert [r.format for r in scored] == g["format_reward"]
        assert [r.total for r in scored] == pytest.approx([sum(x) for x in zip(
            g["explanation_reward"], g["answer_reward"], g["format_reward"])], abs=1e-9)


def test_recorded_edge_cases():
    for x in EDGES["answers"]:
        assert answer_reward(x["completion"], x["ground_truth"], x["dataset"], "released") == x["answer_reward"]
        assert format_reward(x["completion"]) == x["format_reward"]
    for x in EDGES["explanations"]:
        sets = select_labels(torch.tensor(x["probs"]), GOEMOTIONS, tau=0.1)
        assert explanation_reward(sets, x["ground_truth"]) == pytest.approx(x["explanation_reward"], abs=1e-9)


def test_released_step():
    """Advantages, per-token KL, loss and gradient of the released trainer at mu = 1."""
    golden = load_file(GOLDEN / "text" / "grpo_on_policy.safetensors")
    group_size = next(g for g in (2, 3, 4, 6, 12) if torch.allclose(
        group_advantages(golden["rewards"], g), golden["advantages"], atol=1e-6))
    advantages = group_advantages(golden["rewards"], group_size)
    torch.testing.assert_close(advantages, golden["advantages"], atol=1e-6, rtol=0)
    logps = golden["policy_logps"].clone().requires_grad_()
    kl = kl_k3(logps.detach(), golden["ref_logps"]) * golden["mask"]
    torch.testing.assert_close(kl, golden["per_token_kl"] * golden["mask"], atol=1e-6, rtol=0)
    loss = grpo_loss(logps, logps.detach(), golden["ref_logps"], advantages, golden["mask"])
    torch.testing.assert_close(loss.detach(), golden["loss"][0], atol=1e-6, rtol=0)
    loss.backward()
    torch.testing.assert_close(logps.grad, golden["grad"], atol=1e-6, rtol=0)
