"""AdamW, its learning rate, and one update (table 8)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def learning_rate(step: int, total: int, peak: float, warmup: float = 0.03, schedule: str = "cosine") -> float:
    """Rate of step `step` (0-based) of `total`, as transformers' Trainer has it: over a share `warmup` of the steps
    linearly from 0, the first step's rate, towards `peak`; then the schedule."""
    rising = math.ceil(total * warmup)
    if step < rising:
        return peak * step / rising
    if schedule == "constant":
        return peak
    left = 1 - (step - rising) / max(1, total - rising)
    return peak * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def make_optimizer(params: Iterable[Tensor]) -> torch.optim.AdamW:
    """AdamW with beta_1 = 0.9, beta_2 = 0.999 (table 8), without weight decay (as released); `update` sets its rate."""
    params = list(params)  # fused: the default on CUDA holds temporaries as large as all gradients
    return torch.optim.AdamW(params, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, fused=params[0].is_cuda)


def update(policy, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float, loss: float = 0.0) -> float:
    """One step of a train/sharding.py policy on gradients averaged over processes and clipped to a global norm; returns
    the norm before, and clears them. If it or `loss`, the sum over processes, is not finite, the weights stay as they
    are, and NaN is returned."""
    norm = policy.clip_gradients(max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if finite else math.nan
