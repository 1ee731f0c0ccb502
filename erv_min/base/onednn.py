"""nn.Linear that is fast where nothing trains on a CPU: towers, prefill, decode steps, reference pass, verifier."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available()
# PyTorch's binding and oneDNN itself each keep what they made for the last 1,024 shapes, half a megabyte per shape;
# about a hundred come back at each step.
for cache, shapes in (("LRU_CACHE_CAPACITY", "16"), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")):
    os.environ.setdefault(cache, shapes)  # read at the first product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x [..., K], weight [N, K], bias [N] -> [..., N]. In float32 on a CPU without gradients through oneDNN
    in place of MKL: on one row it reads the weight twice as fast, on many it uses AVX-512 where MKL does not (AMD)."""
    if (ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel()
            and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use_onednn(model: nn.Module) -> nn.Module:
    """Sends every nn.Linear of `model` through `linear`, in place; returns `model`. Only the modules' class changes."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model
