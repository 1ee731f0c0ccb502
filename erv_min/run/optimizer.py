"""AdamW, its learning rate, one update, and which items a step reads (table 8)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from erv_min.run.processes import Processes
from erv_min.run.sharding import average_gradients

def learning_rate(step: int, total: int, peak: float, warmup: float = 0.03, schedule: str = "cosine") -> float:
    """Rate of step `step` (0-based) of `total`: linear warm-up over a share `warmup`, then cosine, linear or constant."""
    rising = math.ceil(total * warmup)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    left = 1 - (step - rising) / max(1, total - rising)
    return peak * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def make_optimizer(params: list[Tensor], weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW with beta_1 = 0.9, beta_2 = 0.999 (table 8); the rate is set at each step."""
    return torch.optim.AdamW(params, lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay)


def update(optimizer: torch.optim.Optimizer, params: list[Tensor], lr: float, max_grad_norm: float, processes: Processes,
           clip: Callable[[float], float] | None = None, loss: float = 0.0) -> float:
    """One optimizer step on gradients averaged over processes and clipped to a global norm; returns the norm before.

    `clip` does both where given (of `Sharded` and its like). Gradients are cleared. A norm, or a `loss` of any process,
    that is not finite leaves the weights alone; the norm is not finite then.
    """
    if not math.isfinite(loss):
        grad = next(p.grad for p in params if p.grad is not None)
        grad.fill_(math.nan)  # the norm tells every process
    if clip is None:
        average_gradients(params)
        norm = float(nn.utils.clip_grad_norm_(params, max_grad_norm))
    else:
        norm = clip(max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def data_order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of `count` items that epoch `epoch` reads: a function of its arguments alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def batch_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of step `step`'s global batch; the stream of epochs is read on, so that no item is dropped."""
    picked, position = [], step * batch_size
    order, at = [], -1
    for i in range(position, position + batch_size):
        if i // count != at:
            at = i // count
            order = data_order(count, seed, at)
        picked.append(order[i % count])
    return picked
