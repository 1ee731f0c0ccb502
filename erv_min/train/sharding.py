"""How a model lies on the processes of a job: whole on each, sharded by hand, or by PyTorch's fully_shard.

`shard(model, "none" | "hand" | "torch", ...)` gives one of three objects with one interface, so that a training script
does not ask which it has:

    with policy.forward_pass():        a forward pass; its backward pass may follow after the block
    with policy.unsharded(*parts):     the whole model in the compute type, without gradients: for sampling; or the
                                       root and the parts of it whose names begin so
    policy.named_parameters()          what the optimizer trains: tensors by name, whole or this process's shards
    policy.clip_gradients(max_norm)    mean over processes if that is still to do, scaled to a global norm of at most
                                       max_norm; returns the norm before
    policy.full_shapes()               released name -> a tensor of the parameter's shape
    policy.full_tensors()              (name, parameter) in that order; all must run through it
    policy.every_process_writes, state_shapes(), read(files, key, name)     for training states (train/state.py)

`FullyShard` is the way out for clusters that outgrow `Sharded`, and there to compare with. Left out: checkpoints of
PyTorch's distributed format.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from erv_min.base.processes import barrier, rank_and_size
from erv_min.base.progress import Progress
from erv_min.checkpoint import save_humanomni
from erv_min.fsdp import Sharded, unit_modules


def shard(model: nn.Module, sharding: str, device: str | torch.device, compute: torch.dtype):
    """The model on the processes of the job: `sharding` is none, hand or torch."""
    with Progress("the model is put on its devices"):
        return {"none": Replicated, "hand": Sharded, "torch": FullyShard}[sharding](model, device, compute)


def to_full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that fully_shard cut (every process must call it); another as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Replicated:
    """The whole model on every process; bf16 by autocast, gradients averaged by one flat all-reduce."""

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", compute: torch.dtype = torch.bfloat16):
        self.model, self.compute, self.device = model, compute, torch.device(device)

    def forward_pass(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute == torch.bfloat16)

    @contextlib.contextmanager
    def unsharded(self, *parts: str):
        with torch.no_grad(), self.forward_pass():
            yield

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def clip_gradients(self, max_norm: float) -> float:
        params, size = list(self.named_parameters().values()), rank_and_size()[1]
        if size > 1:
            for p in params:  # a missing gradient counts as zeros
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads = [p.grad for p in params]
            flat = nn.utils.parameters_to_vector(grads)
            dist.all_reduce(flat)
            nn.utils.vector_to_parameters(flat.div_(size), grads)
        return float(nn.utils.clip_grad_norm_(params, max_norm))

    def full_shapes(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, to_full(p.detach())) for name, p in self.model.named_parameters())

    every_process_writes = False  # a state is one file, with whole tensors

    def state_shapes(self) -> dict[str, list[int]]:
        return {name: list(p.shape) for name, p in self.named_parameters().items()}

    def read(self, files: list, key: str, name: str) -> Tensor:
        value, p = files[0].get_tensor(key), self.named_parameters()[name]
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements) if isinstance(p, DTensor) else value


class FullyShard(Replicated):
    """PyTorch's fully_shard with the units and types of `Sharded`. Every process holds the whole model at the start."""

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", compute: torch.dtype = torch.bfloat16):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        # It warns of in-place writes to outputs that are views (here keys and values); none are written to.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.model, self.root = model, nn.Identity()
        self.root.model = model
        how = {"mesh": init_device_mesh(torch.device(device).type, (dist.get_world_size(),)),
               "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)}
        for module in [*(module for _, module in unit_modules(model)), self.root]:
            fully_shard(module, **how)
        self.modules = [m for m in self.root.modules() if isinstance(m, FSDPModule)]
        self.root(None)  # it finds its units in its first forward pass; the model's own is never called
        self.root.reshard()

    @contextlib.contextmanager
    def forward_pass(self):
        self.root.unshard()  # the units below it do so by themselves, in their forward
        try:
            yield
        finally:
            if not torch.is_grad_enabled():  # else the end of the backward pass reshards it
                self.root.reshard()

    @contextlib.contextmanager
    def unsharded(self, *parts: str):
        self.root.set_reshard_after_forward(False)
        for module in self.modules:
            module.unshard()
        try:
            with torch.no_grad():
                yield
        finally:
            self.root.set_reshard_after_forward(True)
            for module in self.modules:
                module.reshard()

    def clip_gradients(self, max_norm: float) -> float:
        return float(to_full(nn.utils.clip_grad_norm_(self.named_parameters().values(), max_norm)))


def save_model(policy, folder: str | Path) -> None:
    """Writes the model in the released layout from process 0; all must call it, and it is there when they return."""
    tensors = policy.full_tensors()
    if rank_and_size()[0] == 0:
        save_humanomni(policy.model, folder, torch.float32, policy.full_shapes(), tensors)
    for _ in tensors:  # on the others: what the gathering of full tensors needs of them
        pass
    barrier()
