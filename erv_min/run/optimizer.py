"""AdamW, its learning rate, one update, and which items a step reads (table 8)."""

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor


def learning_rate(step: int, total: int, peak: float, warmup: float = 0.03, schedule: str = "cosine") -> float:
    """Rate of step `step` (0-based) of `total`: linear warm-up over a share `warmup`, then the schedule."""
    rising = math.ceil(total * warmup)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    left = 1 - (step - rising) / max(1, total - rising)
    return peak * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def make_optimizer(params: Iterable[Tensor]) -> torch.optim.AdamW:
    """AdamW with beta_1 = 0.9, beta_2 = 0.999 (table 8), without weight decay (as released); `update` sets its rate.

    On CUDA one fused kernel per tensor: the default there holds temporaries as large as all gradients.
    """
    params = list(params)
    return torch.optim.AdamW(params, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, fused=params[0].is_cuda)


def update(policy, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float, loss: float = 0.0) -> float:
    """One optimizer step on gradients averaged over processes and clipped to a global norm; returns the norm before.

    `policy` is one of run/sharding.py's. `loss` is the sum over processes, so that every process knows where one of
    theirs is not finite: then, or where the norm is not, the weights stay as they are, and NaN is returned. Gradients
    are cleared.
    """
    norm = policy.clip_gradients(max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if finite else math.nan


@lru_cache(maxsize=4)
def data_order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of `count` items that epoch `epoch` reads: a function of its arguments alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def item_at(place: int, count: int, seed: int) -> int:
    """Which of `count` items stands at a place of the endless order: epoch after epoch, each in an order of its own."""
    return data_order(count, seed, place // count)[place % count]


def batch_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Items of step `step`'s global batch: places step * batch_size and on, so that no item is dropped."""
    return [item_at(place, count, seed) for place in range(step * batch_size, (step + 1) * batch_size)]
