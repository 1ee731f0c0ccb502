"""How a model lies on the processes of a job: whole on each, sharded by hand, or by PyTorch's fully_shard.

`shard(model, "none" | "hand" | "torch", ...)` gives one of three objects with one interface, so that a training script
does not ask which it has:

    with policy.forward_pass():        a forward pass; its backward pass may follow after the block
    with policy.unsharded(*parts):     the whole model in the compute type, without gradients: for sampling; or the
                                       root and the parts of it whose names begin so
    policy.named_parameters()          what the optimizer trains: tensors by name, whole or this process's shards
    policy.clip_gradients(max_norm)    mean over processes if that is still to do, scaled to a global norm of at most
                                       max_norm; returns the norm before
    policy.full_shapes()               released name -> an empty tensor of the parameter's shape and type
    policy.full_tensors()              (name, parameter) in that order, on process 0; all must run through it
    policy.every_process_writes, state_shapes(), to_full(x), read(...)     for training states (train/state.py)

`Sharded` is erv_min/fsdp.py; `FullyShard` is the way out for clusters that outgrow it, and there to compare with. Left
out: checkpoints of PyTorch's distributed format.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from erv_min.base.processes import rank_and_size
from erv_min.base.progress import Progress
from erv_min.checkpoint import save_humanomni
from erv_min.fsdp import Sharded, unit_modules


def shard(model: nn.Module, sharding: str, device: str | torch.device, compute: torch.dtype, frozen: bool = False):
    """The model on the processes of the job: `sharding` is none, hand or torch; a frozen one is kept in `compute`."""
    with Progress("the model is put on its devices"):
        if sharding == "hand":
            return Sharded(model, device, compute, compute if frozen else torch.float32)
        return {"none": Replicated, "torch": FullyShard}[sharding](model, device, compute)


class _ByName:
    """Parameters that stand under their own names; their states are whole in one file that process 0 writes."""

    every_process_writes = False

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def full_shapes(self) -> dict[str, Tensor]:
        return {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in self.model.named_parameters()}

    def state_shapes(self) -> dict[str, list[int]]:
        return {name: list(p.shape) for name, p in self.named_parameters().items()}

    def to_full(self, tensor: Tensor) -> Tensor:
        return tensor

    def read(self, files: list, key: str, name: str) -> Tensor:
        value = files[0].get_tensor(key)
        if list(value.shape) != self.state_shapes()[name]:
            raise ValueError(f"{key} has shape {list(value.shape)}")
        return value


class Replicated(_ByName):
    """The whole model on every process; bf16 by autocast, gradients averaged by one flat all-reduce."""

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", compute: torch.dtype = torch.bfloat16):
        self.model, self.compute, self.device = model, compute, torch.device(device)

    def forward_pass(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute == torch.bfloat16)

    @contextlib.contextmanager
    def unsharded(self, *parts: str):
        with torch.no_grad(), self.forward_pass():
            yield

    def clip_gradients(self, max_norm: float) -> float:
        params = list(self.named_parameters().values())
        average_gradients(params)
        return float(nn.utils.clip_grad_norm_(params, max_norm))

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in self.model.named_parameters())


def average_gradients(params: list[Tensor]) -> None:
    """Mean of the gradients over processes, as one flat all-reduce; a missing gradient counts as zeros."""
    size = rank_and_size()[1]
    if size == 1:
        return
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in params]
    flat = nn.utils.parameters_to_vector(grads)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat.div_(size), grads)


class _Root(nn.Module):
    """Holds the model, so that fully_shard's root can be called with nothing once: that is where it finds its units."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self) -> None:
        return None


class FullyShard(_ByName):
    """PyTorch's fully_shard with the units and types of `Sharded`. Every process holds the whole model at the start."""

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", compute: torch.dtype = torch.bfloat16):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        # It warns of in-place writes to outputs that are views (here keys and values); none are written to.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.model = model
        how = {"mesh": init_device_mesh(torch.device(device).type, (dist.get_world_size(),)),
               "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)}
        for _, module in unit_modules(model):
            fully_shard(module, **how)
        self.root = fully_shard(_Root(model), **how)
        self.modules = [m for m in self.root.modules() if isinstance(m, FSDPModule)]
        self.root()
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
        for module in self.modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in self.modules:
                module.set_reshard_after_forward(module is not self.root, recurse=False)
                module.reshard()

    def clip_gradients(self, max_norm: float) -> float:
        return float(nn.utils.clip_grad_norm_(self.named_parameters().values(), max_norm).full_tensor())

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for module in self.modules:
            module.reshard()
        for name, p in self.model.named_parameters():
            full = self.to_full(p.detach())
            if dist.get_rank() == 0:
                yield name, full

    def to_full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def read(self, files: list, key: str, name: str) -> Tensor:
        like = self.named_parameters()[name]
        value = super().read(files, key, name).to(like.device)
        return distribute_tensor(value, like.device_mesh, like.placements)


def save_model(policy, folder: str | Path) -> None:
    """Writes the model in the released layout from process 0; all must call it, and it is there when they return."""
    tensors = policy.full_tensors()
    if rank_and_size()[0] == 0:
        save_humanomni(policy.model, folder, torch.float32, policy.full_shapes(), tensors)
    for _ in tensors:  # on the others: what the gathering of full tensors needs of them
        pass
    if dist.is_initialized():
        dist.barrier()
