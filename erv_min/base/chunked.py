"""Log-softmax of hidden @ weight.T at given ids, in chunks that the backward pass computes again: no [N, V] tensor."""

import torch
from torch import Tensor

from erv_min.base.onednn import linear

CHUNK_LOGITS = 2**24  # logits that exist at once: 64 MiB in float32
# On CUDA so many times as many. By arithmetic, not measured: a chunk of 110 rows (0.5B) multiplies for 0.5 ms of an
# A100, then rewrites the head's float32 gradient [V, D] for 1 ms; 441 rows do so a quarter as often, in 0.7 GiB.
ON_CUDA = 4


def scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """hidden @ weight.T / temperature: [n, D], [V, D] -> [n, V]; divided in float32."""
    logits = linear(hidden, weight)
    return logits if temperature == 1 else logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the type of `total`: [M, K], [K, N] -> [M, N]."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():  # from torch 2.8 on
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class TokenLogps(torch.autograd.Function):
    """hidden [N, D], weight [V, D], ids [N] -> log-probs and entropy of each row's softmax at a temperature, [N] each,
    in float32 (float64 stays). The entropy carries no gradient, and is left empty unless `with_entropy`."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, with_entropy: bool):
        size = max(1, CHUNK_LOGITS * (ON_CUDA if weight.is_cuda else 1) // weight.shape[0])
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logps, entropy = (hidden.new_empty(len(ids), dtype=dtype) for _ in range(2))
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            log_probs = scaled_logits(hidden[part], weight, temperature).log_softmax(-1, dtype)  # [n, V]
            logps[part] = log_probs.gather(-1, ids[part, None])[:, 0]
            if with_entropy:  # - sum of p log p
                entropy[part] = -log_probs.exp().mul_(log_probs).sum(-1)
            del log_probs  # else it lives while the next chunk's is made
        ctx.save_for_backward(hidden, weight, ids)
        ctx.temperature, ctx.size = temperature, size
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        hidden, weight, ids = ctx.saved_tensors
        grad, grad_hidden, grad_weight = grad / ctx.temperature, torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:  # one buffer for all chunks, in float32: in bfloat16 later chunks would be lost
            grad_weight = torch.zeros(weight.shape, dtype=grad.dtype, device=weight.device)
        minus_one = grad.new_full((len(ids), 1), -1)
        for start in range(0, len(ids), ctx.size):
            part = slice(start, start + ctx.size)
            probs = scaled_logits(hidden[part], weight, ctx.temperature).softmax(-1, grad.dtype)
            # d logp / d logits = -(probs - onehot), in the type of the products
            probs.scatter_add_(1, ids[part, None], minus_one[part])
            grad_logits = torch.mul(probs, -grad[part, None], out=torch.empty_like(probs, dtype=hidden.dtype))
            grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.T, hidden[part])
            del probs, grad_logits
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
