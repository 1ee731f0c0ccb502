"""Supervised fine-tuning (Eq. 2): the negative log-likelihood of y = <think>..</think><answer>..</answer>."""

from torch import Tensor

from erv_min.inputs import Example


def sft_loss(logps: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """L_SFT = - sum_t log pi_theta(y_t | x, y_<t) over the label tokens, divided by `denominator` (Eq. 2); a scalar.

    logps [R, T] from logps.completion_logps, mask [R, T] True at label tokens. The denominator is the number of label
    tokens (default; the release's mean) or of targets (the equation's expectation over (x, y)); divergence 8.
    With micro-batches it is that of the whole batch, so that the gradients of the parts add up to the batch's."""
    denominator = mask.sum().clamp_min(1) if denominator is None else denominator
    return -logps.masked_fill(~mask.bool(), 0.0).sum() / denominator


def group_targets(examples: list[Example], size: int) -> list[list[Example]]:
    """Units of `size` targets that share a clip and so its prompt; each target stands in one unit at least.

    A clip whose targets do not divide into units fills its last one with its first targets again; size 1 gives every
    example a unit of its own."""
    by_clip: dict[tuple, list[Example]] = {}
    for example in examples:
        by_clip.setdefault((example.path, example.subtitle), []).append(example)
    units = []
    for targets in by_clip.values():
        for start in range(0, len(targets), size):
            units.append([targets[(start + i) % len(targets)] for i in range(size)])
    return units
