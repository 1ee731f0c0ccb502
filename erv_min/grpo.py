"""GRPO (Eq. 3; arXiv 2402.03300), as plain functions: advantages, KL, the clipped objective.

Eq. 3 asks for the policy that maximises E[R - beta KL(pi_theta || pi_ref)]. A step of it is:
1. sample G completions of each prompt from pi_theta (generate.rollout);
2. score them: R = R_E + R_format + R_answer (Eq. 5, rewards.score_completions);
3. A_i = (R_i - mean) / (std + 1e-4) within each group (`group_advantages`);
4. mu times: descend `grpo_loss`, the clipped surrogate plus beta * k3.

With mu = 1 the ratio is 1 and nothing is clipped: the gradient is then exactly the released one (divergence 6).
`scripts/grpo.py` is the loop around these functions.
"""

from torch import Tensor

from erv_min.run.errors import SettingsError


def group_advantages(rewards: Tensor, group_size: int, eps: float = 1e-4) -> Tensor:
    """A_i = (R_i - mean(R)) / (std(R) + eps) within each group of `group_size`; float [B * G] -> [B * G].

    The standard deviation is the unbiased one, as released. A group without spread, or of one, has advantage 0.
    """
    if rewards.numel() % group_size:
        raise SettingsError(f"{rewards.numel()} rewards do not divide into groups of {group_size}")
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if group_size == 1:
        return centred.flatten()
    return (centred / (groups.std(1, keepdim=True) + eps)).flatten()


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(pi_theta || pi_ref) a token, estimator k3: exp(d) - d - 1 with d = ref_logps - logps; any shape, >= 0.

    Unbiased under pi_theta and of low variance (Schulman, "Approximating KL divergence", 2020; divergence 7).
    """
    d = ref_logps - logps
    return d.exp() - d - 1


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each completion, then over completions: [R, T] -> scalar. An empty completion counts 0."""
    mask = mask.to(values.dtype)
    return ((values * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()


def grpo_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor,
              beta: float = 0.04, epsilon: float = 0.2) -> Tensor:
    """The objective of Eq. 3, negated, for one batch of R = B * G completions; a scalar to descend.

        ratio = pi_theta(o_t) / pi_old(o_t)
        loss  = mean_i mean_t [ -min(ratio * A_i, clip(ratio, 1 - epsilon, 1 + epsilon) * A_i) + beta * k3 ]

    logps, old_logps, ref_logps, mask: [R, T]; advantages: [R]. Positions outside the mask take no part, whatever
    stands there: they are set to 0 first, since a gradient through exp of a padding value could be 0 * inf.
    """
    inside = mask.bool()
    logps, old_logps, ref_logps = (x.masked_fill(~inside, 0.0) for x in (logps, old_logps, ref_logps))
    log_ratio, gain = logps - old_logps.detach(), advantages[:, None]
    ratio = log_ratio.masked_fill((log_ratio > 80) & (gain > 0), 80.0).exp()  # clipped anyway; exp's gradient: 0 * inf
    surrogate = (ratio * gain).minimum(ratio.clamp(1 - epsilon, 1 + epsilon) * gain)
    loss = -surrogate
    if beta:
        loss = loss + beta * kl_k3(logps, ref_logps.detach())
    return masked_mean(loss, inside)


def clip_fraction(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, epsilon: float = 0.2) -> Tensor:
    """Share of completion tokens whose update the clip holds back (0 while mu = 1); scalar."""
    ratio = (logps - old_logps).exp()
    held = ((ratio > 1 + epsilon) & (advantages[:, None] > 0)) | ((ratio < 1 - epsilon) & (advantages[:, None] < 0))
    return (held & mask.bool()).sum() / mask.sum().clamp_min(1)
