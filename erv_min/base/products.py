"""Matrix products of bfloat16 whose sums stay in float32: on CUDA in one kernel, from torch 2.8 on."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, batches of matrices, in the type of `out`: [B, M, K], [B, K, N] -> [B, M, N]."""
    if a.dtype == out.dtype:
        out.copy_(a @ b)
    elif a.is_cuda and "dtype_out" in torch.ops.aten.bmm.overloads():
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the type of `total`: [M, K], [K, N] -> [M, N]."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
