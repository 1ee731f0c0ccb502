"""GRPO (Eq. 3; arXiv 2402.03300), as plain functions: advantages, KL, the clipped objective.

Eq. 3 asks for the policy that maximises E[R - beta KL(pi_theta || pi_ref)]; README.md beside this file walks through a
step of it (`scripts/grpo.py`), and names the variants, which are a line or three each. With mu = 1 the ratio is 1 and
nothing is clipped: the gradient is then exactly the released one (divergence 6).
"""

from dataclasses import dataclass

from torch import Tensor

from erv_min.base.errors import SettingsError
from erv_min.base.processes import all_reduce_sum
from erv_min.inputs import Batch
from erv_min.logps import Completions

MAX_LOG_RATIO = 80.0  # exp of it is a float32; a token so far up is clipped anyway, and exp's gradient would be 0 * inf


def group_advantages(rewards: Tensor, group_size: int, divide: bool = True) -> Tensor:
    """A_i = (R_i - mean(R)) / (std(R) + 1e-4) within each group of `group_size`; float [B * G] -> [B * G].

    The standard deviation is the unbiased one, as released. A group of equal rewards has advantage 0: that is tested
    as max = min, since the mean of G equal numbers (8/3, say) is not always that number in float32.
    divide=False: R_i - mean(R), without the bias towards groups of little spread (Dr. GRPO, arXiv 2503.20783).
    Raises SettingsError if the rewards do not divide into groups."""
    if rewards.numel() % group_size:
        raise SettingsError(f"{rewards.numel()} rewards do not divide into groups of {group_size}")
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    centred = centred.masked_fill(groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True), 0)
    if group_size == 1 or not divide:
        return centred.flatten()
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(pi_theta || pi_ref) per token, estimator k3: exp(d) - d - 1 with d = ref_logps - logps; any shape, >= 0.
    Unbiased under pi_theta (Schulman, "Approximating KL divergence", 2020; divergence 7); its gradient on policy is
    that of KL(pi_ref || pi_theta), the other direction (divergence 21)."""
    d = ref_logps - logps
    return d.exp() - d - 1


def kl_k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimator k2: d^2 / 2 with d = ref_logps - logps. Biased; its gradient, weighted by pi_theta / pi_old as in
    `grpo_loss`, is Eq. 3's (divergence 21)."""
    return (ref_logps - logps) ** 2 / 2


def masked_mean(values: Tensor, mask: Tensor, length: float | None = None) -> Tensor:
    """Mean over the tokens of each completion, then over completions: [R, T] -> scalar. An empty one counts 0.

    length: what each completion's sum is divided by in place of its own number of tokens (`normaliser`)."""
    mask = mask.to(values.dtype)
    return ((values * mask).sum(1) / (mask.sum(1).clamp_min(1) if length is None else length)).mean()


def grpo_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor,
              beta: float = 0.04, epsilon: float = 0.2, kl_term: str = "k3", length: float | None = None) -> Tensor:
    """The objective of Eq. 3, negated, for one batch of R = B * G completions; a scalar to descend.

        ratio = pi_theta(o_t) / pi_old(o_t)
        loss  = mean_i mean_t [ -min(ratio * A_i, clip(ratio, 1 - epsilon, 1 + epsilon) * A_i) + beta * k3 ]

    kl_term="k2" has ratio * k2 in place of k3, in which the ratio is a weight without gradient.
    logps, old_logps, ref_logps, mask: [R, T]; advantages: [R]. What stands outside the mask is set to 0 first, since a
    gradient through exp of a padding value could be 0 * inf."""
    inside = mask.bool()
    logps, old_logps, ref_logps = (x.masked_fill(~inside, 0.0) for x in (logps, old_logps, ref_logps))
    log_ratio, A = logps - old_logps.detach(), advantages[:, None]
    ratio = log_ratio.masked_fill((log_ratio > MAX_LOG_RATIO) & (A >= 0), MAX_LOG_RATIO).exp()
    surrogate = (ratio * A).minimum(ratio.clamp(1 - epsilon, 1 + epsilon) * A)
    ref_logps = ref_logps.detach()
    kl = ratio.detach() * kl_k2(logps, ref_logps) if kl_term == "k2" else kl_k3(logps, ref_logps)
    return masked_mean(beta * kl - surrogate if beta else -surrogate, inside, length)


# ---- a step in mini-batches ------------------------------------------------------------------------------------------


@dataclass
class MiniBatch:
    """Some prompts x of a step with the G completions o of each (R = prompts * G rows), filled in step by step."""

    prompts: Batch
    completions: Completions
    loss_mask: Tensor  # [R, T] bool: the tokens that the loss counts
    share: float  # of this process's prompts in the step
    ref_logps: Tensor | None = None  # [R, T]
    advantages: Tensor | None = None  # [R]
    old_logps: Tensor | None = None  # [R, T], of the first of the mu updates

    @property
    def names(self) -> list[str]:
        """What each row is, for messages."""
        group_size = len(self.completions.ids) // len(self.prompts)
        return [f"{x.video_id}, completion {i}" for x in self.prompts.examples for i in range(group_size)]


def split_batch(prompts: Batch, completions: Completions, size: int, eos_token_id: int,
                mask_truncated: bool = False) -> list[MiniBatch]:
    """A step's prompts and completions in mini-batches of `size` prompts, whose gradients add up to the step's.

    mask_truncated: the loss leaves out completions that did not meet EOS (DAPO's filtering)."""
    minibatches, group_size = [], len(completions.ids) // len(prompts)
    for start in range(0, len(prompts), size):
        some, part = prompts[start : start + size], completions[start * group_size : (start + size) * group_size]
        loss_mask = part.mask & ended(part, eos_token_id)[:, None] if mask_truncated else part.mask
        minibatches.append(MiniBatch(some, part, loss_mask, len(some) / len(prompts)))
    return minibatches


def ended(completions: Completions, eos_token_id: int) -> Tensor:
    """Which completions met EOS before the limit: bool [R]."""
    return ((completions.ids == eos_token_id) & completions.mask).any(1)


def normaliser(minibatches: list[MiniBatch], loss_type: str, max_new_tokens: int) -> float | None:
    """What `masked_mean` divides by. "grpo": None, each completion by its own length, so that a long one's tokens weigh
    less. "dr-grpo" (2503.20783): a constant. "dapo" (arXiv 2503.14476): each token of the batch weighs the same; sum /
    tokens = mean over completions of sum / (tokens / completions), both numbers over all mini-batches of all processes,
    which must all call it."""
    if loss_type != "dapo":
        return max_new_tokens if loss_type == "dr-grpo" else None
    masks = [part.loss_mask for part in minibatches]
    batch = all_reduce_sum({"tokens": sum(int(mask.sum()) for mask in masks), "completions": sum(map(len, masks))})
    return max(1.0, batch["tokens"]) / batch["completions"]
