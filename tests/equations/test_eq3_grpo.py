"""Eq. 3 by hand: advantages A_i, the KL term and its gradient, the clipped ratio, the objective."""

import math
from types import SimpleNamespace

import pytest
import torch
from erv_min.base.errors import SettingsError
from erv_min.grpo import ended, group_advantages, grpo_loss, kl_k2, kl_k3, masked_mean, normaliser
from erv_min.logps import Completions
from erv_min.train.log import clipped


def test_group_advantages_by_hand():
    # Group 1: rewards 1, 3: mean 2, unbiased std sqrt(((-1)^2 + 1^2) / 1) = sqrt 2. Group 2: 0, 0: no spread.
    advantages = group_advantages(torch.tensor([1.0, 3.0, 0.0, 0.0]), 2)
    a = 1 / (math.sqrt(2) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([-a, a, 0.0, 0.0]))


@pytest.mark.parametrize("group_size", [2, 3, 8, 16])
def test_equal_rewards_have_advantage_zero_whatever_their_mean_rounds_to(group_size):
    # Eq. 5 gives 8/3 for R_E = 2/3: the float32 mean of 8 such rewards differs from them in its last bit.
    for reward in (8 / 3, 1 / 3, 7 / 5, 2.0):
        assert group_advantages(torch.full((2 * group_size,), reward), group_size).eq(0).all()


def test_group_of_one_and_uneven_groups():
    assert group_advantages(torch.tensor([1.0, 2.0]), 1).tolist() == [0, 0]
    with pytest.raises(SettingsError, match="3 rewards do not divide into groups of 2"):
        group_advantages(torch.ones(3), 2)


def test_advantages_without_division_by_hand():
    # Dr. GRPO. Group 1: 1, 3 around 2; group 2: 2.4, 2.6 around 2.5: with the division both are -a, a; without, not.
    rewards = torch.tensor([1.0, 3.0, 2.4, 2.6])
    torch.testing.assert_close(group_advantages(rewards, 2, divide=False), torch.tensor([-1.0, 1.0, -0.1, 0.1]))
    assert group_advantages(torch.full((8,), 8 / 3), 8, divide=False).eq(0).all()


def test_kl_k2_by_hand():
    # d = ln 2: d^2 / 2; on policy its gradient is that of KL(pi || ref), see the test below.
    torch.testing.assert_close(kl_k2(torch.tensor([0.0, -1.0]), torch.tensor([math.log(2), -1.0])),
                               torch.tensor([math.log(2) ** 2 / 2, 0.0]))
    logps, ref = torch.zeros(1, 1, requires_grad=True), torch.full((1, 1), math.log(2))
    grpo_loss(logps, logps.detach(), ref, torch.zeros(1), torch.ones(1, 1), beta=0.1, kl_term="k2").backward()
    assert logps.grad.item() == pytest.approx(-0.1 * math.log(2))  # of 0.1 (ref - logp)^2 / 2; k3's: 0.1 (1 - 2)


def test_kl_k3_by_hand():
    # d = ln 2 - 0 = ln 2: exp(d) - d - 1 = 2 - 0.6931 - 1; equal policies: 0.
    kl = kl_k3(torch.tensor([0.0, -1.0]), torch.tensor([math.log(2), -1.0]))
    torch.testing.assert_close(kl, torch.tensor([1 - math.log(2), 0.0]))


def test_gradients_of_kl_estimators_by_hand():
    """A policy over 4 tokens: the mean of k3 under pi is KL(pi || ref), and the mean of its gradient is not that KL's
    but the gradient of KL(ref || pi); k2 = d^2 / 2 has the wrong mean and the right gradient (arXiv 2510.01555)."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    logp = logits.log_softmax(0)
    pi = logp.detach().exp()  # on policy: tokens are drawn with these probabilities, which carry no gradient

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    forward = (logp.exp() * (logp - ref)).sum()  # KL(pi || ref)
    reverse = (ref.exp() * (ref - logp)).sum()  # KL(ref || pi)
    k3, k2 = (pi * kl_k3(logp, ref)).sum(), (pi * kl_k2(logp, ref)).sum()
    torch.testing.assert_close(k3, forward)
    torch.testing.assert_close(gradient(k3), gradient(reverse))
    assert (gradient(k3) - gradient(forward)).norm() > 0.1 * gradient(forward).norm()
    torch.testing.assert_close(gradient(k2), gradient(forward))
    # Tokens of an older policy, as from the second update on: their mean is pi's only if each is weighted by pi / old.
    # TRL's default does the same by another road: pi / old * k3, with a gradient through both factors.
    old = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    losses = [grpo_loss(*(x[i].view(1, 1) for x in (logp, old, ref)), torch.zeros(1), torch.ones(1, 1), beta=1.0,
                        kl_term="k2") for i in range(4)]
    torch.testing.assert_close(gradient((old.exp() * torch.stack(losses)).sum()), gradient(forward))
    torch.testing.assert_close(gradient((old.exp() * (logp - old).exp() * kl_k3(logp, ref)).sum()), gradient(forward))



def test_masked_mean_is_over_tokens_then_completions():
    # Completion 1: mean(1, 3) = 2; completion 2: 5 alone; completion 3 is empty and counts 0: (2 + 5 + 0) / 3.
    values = torch.tensor([[1.0, 3.0], [5.0, 100.0], [7.0, 7.0]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    assert masked_mean(values, mask).item() == pytest.approx(7 / 3)


VALUES = torch.tensor([[1.0, 3.0, 0.0], [5.0, 0.0, 0.0], [1.0, 1.0, 1.0], [2.0, 4.0, 0.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize("loss_type, by_hand", [
    ("grpo", (2 + 5 + 1 + 3) / 4), ("dapo", (4 + 5 + 3 + 6) / 8), ("dr-grpo", (4 + 5 + 3 + 6) / (4 * 10))])
def test_loss_types_by_hand_whatever_the_processes_and_passes(loss_type, by_hand):
    """Completions of 2, 1, 3, 2 tokens; at most 10. On two processes of two completions each, in passes of one: shares
    of 1/2, the mean over processes; the batch's 8 tokens are summed over all of them."""
    length = normaliser([SimpleNamespace(loss_mask=MASK)], loss_type, 10)
    assert masked_mean(VALUES, MASK, length).item() == pytest.approx(by_hand)
    passes = [[masked_mean(VALUES[i:i + 1], MASK[i:i + 1], length) / 2 for i in own] for own in ((0, 2), (1, 3))]
    assert sum(sum(own) for own in passes).item() / 2 == pytest.approx(by_hand)
    logps = torch.zeros(4, 3, requires_grad=True)  # and through the loss: with A = 1 a token's gradient is its weight
    grpo_loss(logps, torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(4), MASK, beta=0, length=length).backward()
    assert -(logps.grad * VALUES).sum().item() == pytest.approx(by_hand)


def test_completions_cut_at_the_limit_leave_the_loss():
    # EOS is 9: the second never met it.
    cut = Completions(torch.tensor([[4, 9], [4, 5], [9, 9]]), torch.tensor([[1, 1], [1, 1], [1, 0]]).bool())
    assert ended(cut, 9).tolist() == [True, False, True]
    assert not ended(Completions(torch.tensor([[4, 9]]), torch.tensor([[True, False]])), 9)  # padding
    mask = torch.tensor([[1, 1], [0, 0], [1, 0]])  # what is left of cut.mask
    # its tokens count nowhere: (2 + 0 + 4) / 3 completions, and of the batch's tokens 3 are left, (1 + 3 + 4) / 3
    values = torch.tensor([[1.0, 3.0], [7.0, 7.0], [4.0, 0.0]])
    assert masked_mean(values, mask).item() == pytest.approx(2)
    assert masked_mean(values, mask, normaliser([SimpleNamespace(loss_mask=mask)], "dapo", 10)).item() == pytest.approx(8 / 3)
    assert normaliser([SimpleNamespace(loss_mask=0 * mask)], "dapo", 10) > 0  # all of them cut: a loss of 0, no division by it


def test_objective_by_hand():
    # One token each, epsilon 0.2, beta 0.1. Ratios 1.5 and 0.5; reference: the policy in row 1, d = ln 2 in row 2.
    # Row 1, A = +1: min(1.5, 1.2) = 1.2, held back by the clip.   loss -1.2
    # Row 2, A = -1: min(-0.5, -0.8) = -0.8, held back too.        loss  0.8 + 0.1 * (1 - ln 2)
    logps = torch.tensor([[math.log(1.5)], [math.log(0.5)]], requires_grad=True)
    old = torch.zeros(2, 1)
    ref = torch.tensor([[math.log(1.5)], [0.0]])
    advantages = torch.tensor([1.0, -1.0])
    loss = grpo_loss(logps, old, ref, advantages, torch.ones(2, 1), beta=0.1, epsilon=0.2)
    assert loss.item() == pytest.approx((-1.2 + 0.8 + 0.1 * (1 - math.log(2))) / 2, abs=1e-6)
    # Both ratios are clipped, so only the KL moves: d/dlogp of exp(d) - d - 1 = 1 - exp(d) = -1 in row 2, 0 in row 1.
    loss.backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[0.0], [0.1 * -1 / 2]]))
    low, high = clipped(logps.detach(), old, advantages, torch.ones(2, 1))
    assert low.tolist() == [[False], [True]] and high.tolist() == [[True], [False]]


def test_the_clip_holds_back_only_what_goes_too_far():
    # Ratio 1.5 with A = -1: the update would lower the ratio, back towards 1, so min(-1.5, -1.2) = -1.5 is not clipped.
    logps = torch.tensor([[math.log(1.5)]], requires_grad=True)
    loss = grpo_loss(logps, torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1), beta=0)
    loss.backward()
    assert loss.item() == pytest.approx(1.5) and logps.grad.item() == pytest.approx(1.5)
    assert not any(x.any() for x in clipped(logps.detach(), torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1)))
    near = torch.tensor([[0.9, 1.1], [0.9, 1.1]]).log()  # within 1 - epsilon and 1 + epsilon, whatever the sign of A
    assert not any(x.any() for x in clipped(near, torch.zeros(2, 2), torch.tensor([1.0, -1.0]), torch.ones(2, 2)))


def test_first_update_has_loss_beta_kl_and_the_policy_gradient():
    # Ratio 1: the surrogate of a group sums to the mean advantage = 0, which is why the loss starts at 0; its gradient
    # is -A / T a token, not 0.
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], requires_grad=True)
    advantages = torch.tensor([0.7, -0.7])
    loss = grpo_loss(logps, logps.detach(), logps.detach(), advantages, torch.ones(2, 2))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(logps.grad, torch.tensor([[-0.175, -0.175], [0.175, 0.175]]))


def test_padding_takes_no_part_whatever_stands_there():
    mask = torch.tensor([[1, 1, 0]])
    for rubbish in (1e4, -1e4, float("inf")):
        logps = torch.tensor([[-1.0, -2.0, rubbish]], requires_grad=True)
        loss = grpo_loss(logps, torch.full((1, 3), -1.5), torch.full((1, 3), -1.2), torch.tensor([1.0]), mask)
        loss.backward()
        assert math.isfinite(loss.item()) and torch.isfinite(logps.grad).all() and logps.grad[0, 2] == 0


def test_a_ratio_beyond_float32_takes_no_part_if_the_clip_holds_it():
    logps = torch.full((2, 1), -1.0, requires_grad=True)
    loss = grpo_loss(logps, torch.full((2, 1), -100.0), logps.detach(), torch.tensor([0.0, 1.0]), torch.ones(2, 1))
    loss.backward()
    assert loss.item() == pytest.approx(-1.2 / 2) and logps.grad.tolist() == [[0.0], [0.0]]


def test_neither_the_reference_nor_the_old_policy_gets_a_gradient():
    logps, old, ref = (torch.full((1, 2), x, requires_grad=True) for x in (-1.0, -1.1, -1.2))
    for kl_term in ("k3", "k2"):
        grpo_loss(logps, old, ref, torch.tensor([1.0]), torch.ones(1, 2), kl_term=kl_term).backward()
    assert old.grad is None and ref.grad is None and (logps.grad != 0).all()
