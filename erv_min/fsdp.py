"""Fully sharded data parallelism and bf16 by hand (ZeRO stage 3, arXiv 1910.02054; FSDP, arXiv 2304.11277).

Each of N processes keeps 1/N of every parameter, of its gradient and of its optimizer state, and computes on its own
part of the batch. A unit is a decoder layer, a tower's block or a stage of the projector; what remains (embeddings,
head, norms) is the root. A unit's parameters lie behind each other in one flat vector, padded and cut into N equal
shards, which are all that stays. The life of a unit in a pass:

    all_gather      its shards, in the compute type, become one flat vector;
    attach          views of that vector stand in the modules while the unit runs;
    reshard         the views are removed from the modules, and the vector is freed;
    all_gather      once more, where the backward pass asks for a weight (or recomputes the layer);
    reduce_scatter  its gradients, in float32, become the mean over processes of this process's shard.

`Gather` ties the first and the last together as one differentiable operation. Nothing full outlives its unit: in place
of a weight that autograd would save for the backward pass, `_pack` saves which unit it is a view of, and `_unpack`
gathers that unit again. The root stays gathered through a pass. The next unit's all-gather runs beside this one's
compute, a reduce-scatter beside the next unit's backward pass, so that at most two units are full at a time. On CUDA
both run on NCCL's own stream, which waits for the compute stream as they start; `work.wait()` makes the compute stream
wait for them and holds their memory.

| what                                                                    | type                      |
|-------------------------------------------------------------------------|---------------------------|
| shards, their gradients, sums over processes and passes, AdamW, norm    | float32                   |
| gathered parameters, activations, matrix products, KV cache             | compute (bfloat16)        |
| one unit's gradients of one pass, before they are summed                | compute                   |
| statistics of norms, scores and their softmax, rotary angles            | float32 inside the layer  |
| log-softmax, log-probs, entropy, KL, rewards, advantages, loss          | float32                   |
| shards of the reference policy (frozen, never exported)                 | compute                   |

compute=torch.float32 is the switch for float32 everywhere. Attention's kernels are PyTorch's own, not cuDNN's
(processes.exact_kernels). Every process must use the units in the same order, in the
same number of passes per step. A module is copied before it is sharded, not after. Left out: tensor and sequence
parallelism, CPU offload; train/sharding.FullyShard is the way out, the same interface on PyTorch's own `fully_shard`.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from erv_min.base.errors import SettingsError
from erv_min.base.processes import rank_and_size
from erv_min.model.projector import VisualProjector

# torch 2.13 renamed these two and warns of the old names
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALIGN = 64  # elements: each parameter starts at a multiple, for a GPU's aligned vector loads


def storage_of(tensor: Tensor) -> int:
    """Which memory a tensor looks into: equal for views of one vector, and not a pointer into that memory."""
    return tensor.untyped_storage()._cdata


def unit_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What is gathered at a time: each block of each stack of layers, and each stage of the visual projector."""
    return [(f"{name}.{child}", block) for name, stack in model.named_modules()
            if isinstance(stack, (nn.ModuleList, VisualProjector)) for child, block in stack.named_children()]


@dataclass(eq=False)
class Unit:
    """Parameters that are gathered together; a module with trainable and frozen ones holds two units."""

    name: str
    names: list[str]  # of the parameters, as released
    shapes: list[torch.Size]
    places: list[list[tuple[nn.Module, str]]]  # of each parameter: one, or several if it is tied
    shard: nn.Parameter = None  # [ceil(numel / N)]
    pending: tuple | None = None  # (flat vector, work) of an all-gather under way
    attached: int = 0  # the storage whose views stand in the modules

    def __post_init__(self):
        self.starts, self.numel = [], 0  # of each parameter in the flat vector, of all without the padding at the end
        for shape in self.shapes:
            self.starts.append(self.numel)
            self.numel += -(-shape.numel() // ALIGN) * ALIGN

    @property
    def stack(self) -> str:
        """The stack of layers that it stands in."""
        return self.name.rpartition(".")[0]

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat[start : start + shape.numel()].view(shape) for start, shape in zip(self.starts, self.shapes))


class Gather(torch.autograd.Function):
    """shard -> the unit's parameters; gradients of the parameters -> gradient of the shard."""

    @staticmethod
    def forward(ctx, shard: Tensor, unit: Unit, sharded: "Sharded") -> tuple[Tensor, ...]:
        ctx.unit, ctx.sharded = unit, sharded
        ctx.set_materialize_grads(False)  # an unused parameter's gradient comes as None
        return unit.views(sharded._all_gather(unit))

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        ctx.sharded._reduce_scatter(ctx.unit, grads)  # adds to shard.grad itself, when the reduction is done
        return None, None, None


class Sharded:
    """A model whose parameters live as shards; `with sharded.forward_pass():` is a forward pass.

    The model's parameters are taken from process 0 (on the others the model may stand on the meta device) and replaced
    by one flat Parameter per unit, `shard`, or `frozen_shard` if requires_grad was off. `compute` is the type of
    gathered parameters, `master` that of the shards.
    """

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", compute: torch.dtype = torch.bfloat16,
                 master: torch.dtype = torch.float32):
        self.model, self.device, self.compute = model, torch.device(device), compute
        self.rank, self.size = rank_and_size()
        self.units, self.root = [], []  # those of a stack of layers stand behind each other, in its order
        self.attached = {}  # storage of a gathered vector -> its unit, while it stands in its modules
        self.again = None, None  # the unit gathered last for the backward pass, and its flat vector
        self.reducing = None  # (unit, gradient, buffer, work) of a reduce-scatter under way
        self.in_forward = False
        modules = [*unit_modules(model), ("", model)]
        owners = {p: module for _, module in reversed(modules) for p in module.parameters()}  # the first that holds it
        names = {p: name for name, p in model.named_parameters()}
        places = {p: [] for p in names}
        for name, p in model.named_parameters(remove_duplicate=False):
            prefix, _, attribute = name.rpartition(".")
            holder = model.get_submodule(prefix)
            if owners[p] is not model and holder not in set(owners[p].modules()):
                raise SettingsError(f"{names[p]} is tied to {name}: sharding by hand gathers one layer at a time, and "
                                    "neither would find the other's weight; use --sharding none")
            places[p].append((holder, attribute))
        for name, module in modules:
            units = []
            for trains in (True, False):
                params = [p for p in names if owners[p] is module and p.requires_grad == trains]
                if params:
                    units.append(Unit(name, [names[p] for p in params], [p.shape for p in params],
                                      [places[p] for p in params]))
                    self._cut(units[-1], params, module, master)
            self.units += units
            if module is model:
                self.root = units
            elif units:
                module.forward = self._around(module.forward, units)
        self.trained = {unit.name or "root": unit for unit in self.units if unit.shard.requires_grad}

    def _cut(self, unit: Unit, params: list[nn.Parameter], owner: nn.Module, master: torch.dtype) -> None:
        """Takes the unit's `params` out of their modules and leaves this process's shard in `owner`."""
        length = -(-unit.numel // self.size)
        shard, flat = torch.empty(length, dtype=master, device=self.device), None
        if self.rank == 0:
            flat = shard.new_zeros(self.size * length)
            for view, p in zip(unit.views(flat), params):
                view.copy_(p.detach())
        if self.size > 1:
            dist.scatter(shard, list(flat.chunk(self.size)) if self.rank == 0 else None)
        else:
            shard = flat
        for places in unit.places:
            for module, attribute in places:
                del module._parameters[attribute]
        unit.shard = nn.Parameter(shard, requires_grad=params[0].requires_grad)
        owner.register_parameter("shard" if unit.shard.requires_grad else "frozen_shard", unit.shard)

    # ---- collectives ----------------------------------------------------------------------------------------------

    def _start_all_gather(self, unit: Unit, dtype: torch.dtype | None = None) -> None:
        """Starts the all-gather of `unit`, unless it is under way."""
        if unit.pending is None:
            shard = unit.shard.detach().to(dtype or self.compute)
            full = torch.empty(self.size * len(shard), dtype=shard.dtype, device=self.device)
            if self.size > 1:
                unit.pending = full, all_gather(full, shard, async_op=True)
            else:
                unit.pending = full.copy_(shard), None

    def _all_gather(self, unit: Unit, dtype: torch.dtype | None = None) -> Tensor:
        """The full flat vector of `unit`; it is freed when the caller drops it."""
        self._start_all_gather(unit, dtype)
        (full, work), unit.pending = unit.pending, None
        if work is not None:
            work.wait()
        return full

    def _reduce_scatter(self, unit: Unit, grads: tuple[Tensor | None, ...]) -> None:
        """Starts the reduce-scatter of the mean gradient over processes, in float32; ends the one before it."""
        if self.again[0] is unit:
            self.again = None, None  # this unit's backward pass is done: its flat vector is freed
        self._end_reduce_scatter()
        buffer = torch.zeros(self.size * len(unit.shard), device=self.device)  # padding included
        for view, grad in zip(unit.views(buffer), grads):
            if grad is not None:
                view.copy_(grad)
        if self.size == 1:
            self.reducing = unit, buffer, None, None
        else:
            mean = torch.empty(len(unit.shard), device=self.device)
            self.reducing = unit, mean, buffer, reduce_scatter(mean, buffer, async_op=True)
        torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)

    def _end_reduce_scatter(self) -> None:
        """Waits for the reduce-scatter under way and adds its result to the shard's gradient."""
        if self.reducing is not None:
            (unit, mean, _, work), self.reducing = self.reducing, None
            if work is not None:
                work.wait()
                mean /= self.size
            unit.shard.grad = mean if unit.shard.grad is None else unit.shard.grad.add_(mean)

    def _end_pass(self) -> None:
        """Ends every collective under way: gradients are complete; nothing full is left but what stands attached."""
        self._end_reduce_scatter()
        for unit in self.units:
            if unit.pending is not None:
                self._all_gather(unit)  # prefetched for a pass that ended before it was used
        self.again = None, None

    # ---- a unit's life in a pass ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _attached(self, units: list[Unit]):
        """The parameters of `units` stand in their modules inside, where module.weight finds them; no longer after."""
        try:
            for unit in units:
                params = Gather.apply(unit.shard, unit, self)
                unit.attached = storage_of(params[0])
                self.attached[unit.attached] = unit
                for param, places in zip(params, unit.places):
                    for module, attribute in places:
                        module.__dict__[attribute] = param
                self._prefetch_after(unit)
            yield
        finally:  # also when a recomputation ends early: checkpoint raises in it once its tensors are there
            for unit in units:
                self.attached.pop(unit.attached, None)
                unit.attached = 0
                for places in unit.places:
                    for module, attribute in places:
                        module.__dict__.pop(attribute, None)

    def _around(self, forward: Callable, units: list[Unit]) -> Callable:
        """A module's `forward` with its units attached around it, unless they stand there already (in `unsharded`)."""
        def attached_forward(*args, **kwargs):
            with self._attached([] if units[0].attached else units):
                return forward(*args, **kwargs)
        return attached_forward

    def _prefetch_after(self, unit: Unit) -> None:
        """Starts the all-gather of the next unit of the stack, or in the backward pass of the one before."""
        at = self.units.index(unit)
        for coming in self.units[at + 1 : at + 2] if self.in_forward else self.units[max(at - 1, 0) : at]:
            if coming.stack == unit.stack and not coming.attached:
                self._start_all_gather(coming)

    def _pack(self, saved: Tensor):
        """What autograd saves in place of a tensor: for a view of a unit's parameters, how to get it again."""
        unit = self.attached.get(storage_of(saved))
        if unit is None or unit in self.root:
            return saved.detach()
        return unit, saved.shape, saved.stride(), saved.storage_offset()

    def _unpack(self, kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        unit, shape, stride, offset = kept
        if self.again[0] is not unit:
            self.again = None, None  # a frozen unit has no reduce-scatter that would have freed it
            self.again = unit, self._all_gather(unit)
            self._prefetch_after(unit)
        return self.again[1].as_strided(shape, stride, offset)

    # ---- the interface that train/sharding.py describes --------------------------------------------------------------

    @contextlib.contextmanager
    def forward_pass(self):
        if self.root and self.root[0].attached:  # inside `unsharded`
            yield
            return
        self._end_pass()
        self.in_forward = True
        saving = saved_tensors_hooks(self._pack, self._unpack) if torch.is_grad_enabled() else contextlib.nullcontext()
        try:
            with self._attached(self.root), saving:
                yield
        finally:
            self.in_forward = False

    @contextlib.contextmanager
    def unsharded(self, *parts: str):
        self._end_pass()
        units = [unit for unit in self.units if unit in self.root or not parts or unit.name.startswith(parts)]
        with torch.no_grad(), self._attached(units):
            yield

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: unit.shard for name, unit in self.trained.items()}

    def clip_gradients(self, max_norm: float) -> float:
        grads = [p.grad for p in self.named_parameters().values() if p.grad is not None]
        total = torch.zeros((), device=self.device)
        for grad in grads:
            total += grad.norm().square()
        if self.size > 1:
            dist.all_reduce(total)
        norm = total.sqrt()
        for grad in grads:
            grad *= (max_norm / (norm + 1e-6)).clamp(max=1)
        return norm.item()

    def full_shapes(self) -> dict[str, Tensor]:
        return {name: torch.empty(shape, dtype=unit.shard.dtype, device="meta")
                for unit in self.units for name, shape in zip(unit.names, unit.shapes)}

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        self._end_pass()
        for unit in self.units:
            full = self._all_gather(unit, unit.shard.dtype)
            if self.rank == 0:
                yield from zip(unit.names, unit.views(full))

    every_process_writes = True

    def state_shapes(self) -> dict[str, list[int]]:
        return {name: [unit.numel] for name, unit in self.trained.items()}  # whatever the number of processes

    def to_full(self, tensor: Tensor) -> Tensor:
        return tensor

    def read(self, files: list, key: str, name: str) -> Tensor:
        """This process's shard of `key`, whose flat vector was cut into len(files) pieces, one per process then."""
        unit = self.trained[name]
        length, old = len(unit.shard), -(-unit.numel // len(files))
        start, stop = self.rank * length, min((self.rank + 1) * length, unit.numel)
        shard = torch.zeros(length)
        for i, file in enumerate(files):
            first, last = max(start, i * old), min(stop, (i + 1) * old)  # what this piece has of the shard
            if first < last:
                shard[first - start : last - start] = file.get_slice(key)[first - i * old : last - i * old]
        return shard
