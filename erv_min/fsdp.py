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

`Gather` ties the first and the last together as one differentiable operation. In place of a weight that autograd would
save for the backward pass, `_pack` saves which unit it is a view of, and `_unpack` gathers that unit again. The root
stays gathered through a pass. The next unit's all-gather runs beside this one's compute, a reduce-scatter beside the
next unit's backward pass: at most two units are full at a time. On CUDA both run on NCCL's own stream, which waits for
the compute stream as they start; `work.wait()` makes the compute stream wait for them and holds their memory.

| what                                                                    | type                      |
|-------------------------------------------------------------------------|---------------------------|
| shards, their gradients, sums over processes and passes, AdamW, norm    | float32                   |
| gathered parameters, activations, matrix products, KV cache             | compute (bfloat16)        |
| one unit's gradients of one pass, before they are summed                | compute                   |
| statistics of norms, scores and their softmax, rotary angles            | float32 inside the layer  |
| log-softmax, log-probs, entropy, KL, rewards, advantages, loss          | float32                   |
| shards of a model of which nothing trains (the reference policy)        | compute                   |

Every process must use the units in the same order, in the same number of passes per step. A module is copied before
it is sharded, not after. Left out: tensor and sequence parallelism, CPU offload; train/sharding.FullyShard is the way
out, the same interface on PyTorch's own `fully_shard`.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate

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


def unit_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What is gathered at a time: each block of each stack of layers, and each stage of the visual projector."""
    return [(f"{name}.{child}", block) for name, stack in model.named_modules()
            if isinstance(stack, (nn.ModuleList, VisualProjector)) for child, block in stack.named_children()]


class Unit:
    """Parameters that are gathered together; a module with trainable and frozen ones holds two units."""

    def __init__(self, name: str, names: list[str], shapes: list[torch.Size]):
        """name: of the module, "" for the root; names: of the parameters, as released."""
        self.name, self.names, self.shapes = name, names, shapes
        # where each parameter begins in the flat vector, and where the last one ends
        *self.starts, self.numel = accumulate((-(-x.numel() // ALIGN) * ALIGN for x in shapes), initial=0)
        self.places: list[tuple[int, nn.Module, str]] = []  # which parameter stands where; a tied one stands twice
        self.shard: nn.Parameter = None  # [ceil(numel / N)]
        self.full, self.work = None, None  # the flat vector, and its all-gather while that is under way
        self.before, self.next = None, None  # in its stack of layers

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat[start : start + shape.numel()].view(shape) for start, shape in zip(self.starts, self.shapes))


class Gather(torch.autograd.Function):
    """shard -> the unit's parameters; gradients of the parameters -> gradient of the shard."""

    @staticmethod
    def forward(ctx, shard: Tensor, unit: Unit, sharded: "Sharded") -> tuple[Tensor, ...]:
        ctx.unit, ctx.sharded = unit, sharded
        ctx.set_materialize_grads(False)  # an unused parameter's gradient comes as None
        return unit.views(sharded._gather(unit))

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        ctx.sharded._reduce_scatter(ctx.unit, grads)  # adds to shard.grad itself, when the reduction is done
        return None, None, None


class Sharded:
    """A model whose parameters live as shards; `with sharded.forward_pass():` is a forward pass.

    The model's parameters are taken from process 0 (on the others the model may stand on the meta device) and replaced
    by one flat Parameter per unit, `shard`, or `frozen_shard` if requires_grad was off."""

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", compute: torch.dtype = torch.bfloat16):
        """compute: the type of gathered parameters; float32 makes all float32. Raises SettingsError if two units share
        a weight."""
        self.model, self.device, self.compute = model, torch.device(device), compute
        self.dtype = torch.float32 if any(p.requires_grad for p in model.parameters()) else compute  # of the shards
        self.rank, self.size = rank_and_size()
        self.units: list[Unit] = []
        self.attached: set[Unit] = set()  # whose parameters stand in their modules
        self.again = None  # the unit gathered last for the backward pass
        self.reducing = None  # (unit, gradient, buffer, work) of a reduce-scatter under way
        self.in_forward = False
        names = defaultdict(list)  # of each parameter that is in no unit yet: several if it is tied
        for name, p in model.named_parameters(remove_duplicate=False):
            names[p].append(name)
        for module_name, module in [*unit_modules(model), ("", model)]:
            own = {p: names.pop(p) for p in module.parameters() if p in names}
            for tied in own.values():
                if not all(name.startswith(module_name and f"{module_name}.") for name in tied):
                    raise SettingsError(f"{' and '.join(tied)} are one weight: sharding by hand gathers one layer at a "
                                        "time, and neither would find the other's; use --sharding none")
            parts = [{p: own[p] for p in own if p.requires_grad == trains} for trains in (True, False)]
            units = [self._cut(module_name, module, params) for params in parts if params]
            if module is not model:
                module.forward = self._attach(units)(module.forward)  # around each call
            self.units += units
        self.trained = {unit.name or "root": unit for unit in self.units if unit.shard.requires_grad}
        for unit, following in zip(self.units, self.units[1:]):
            if unit.name.rpartition(".")[0] == following.name.rpartition(".")[0]:
                unit.next, following.before = following, unit

    def _cut(self, module_name: str, module: nn.Module, params: dict[nn.Parameter, list[str]]) -> Unit:
        """Takes `params` out of where their names say they stand, and leaves this process's shard in `module`."""
        unit = Unit(module_name, [names[0] for names in params.values()], [p.shape for p in params])
        shard, parts = torch.empty(-(-unit.numel // self.size), dtype=self.dtype, device=self.device), None
        if self.rank == 0:
            flat = shard.new_zeros(self.size * len(shard))
            for view, p in zip(unit.views(flat), params):
                view.copy_(p.detach())
            parts = list(flat.chunk(self.size))
        if self.size > 1:
            dist.scatter(shard, parts)
        else:
            (shard,) = parts
        for i, (p, names) in enumerate(params.items()):
            for holder, _, attribute in (name.rpartition(".") for name in names):
                unit.places.append((i, self.model.get_submodule(holder), attribute))
                delattr(self.model.get_submodule(holder), attribute)
        unit.shard = nn.Parameter(shard, requires_grad=p.requires_grad)
        setattr(module, "shard" if p.requires_grad else "frozen_shard", unit.shard)
        return unit

    # ---- collectives ----------------------------------------------------------------------------------------------

    def _start(self, unit: Unit | None, dtype: torch.dtype | None = None) -> None:
        """Starts the all-gather of `unit`, unless it is full or under way."""
        if unit is not None and unit.full is None:
            shard = unit.shard.detach().to(dtype or self.compute)
            unit.full = torch.empty(self.size * len(shard), dtype=shard.dtype, device=self.device)
            if self.size > 1:
                unit.work = all_gather(unit.full, shard, async_op=True)
            else:
                unit.full.copy_(shard)

    def _gather(self, unit: Unit, dtype: torch.dtype | None = None) -> Tensor:
        """The full flat vector of `unit`, until `_reshard`."""
        self._start(unit, dtype)
        if unit.work is not None:
            unit.work.wait()
            unit.work = None
        return unit.full

    def _reshard(self, unit: Unit | None) -> None:
        if unit is not None and unit.full is not None:
            self._gather(unit)  # one that was prefetched in vain is still under way
            unit.full = None

    def _reduce_scatter(self, unit: Unit, grads: tuple[Tensor | None, ...]) -> None:
        """Starts the reduce-scatter of the mean gradient over processes, in float32; ends the one before it."""
        if self.again is unit:
            self._reshard(unit)  # its backward pass is done
            self.again = None
        self._end_reduce_scatter()
        mean = buffer = torch.zeros(self.size * len(unit.shard), device=self.device)  # padding included
        for view, grad in zip(unit.views(buffer), grads):
            if grad is not None:
                view.copy_(grad)
        work = None
        if self.size > 1:
            mean = torch.empty(len(unit.shard), device=self.device)
            work = reduce_scatter(mean, buffer, async_op=True)
        self.reducing = unit, mean, buffer, work
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
            if unit not in self.attached:
                self._reshard(unit)
        self.again = None

    # ---- a unit's life in a pass ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _attach(self, units: list[Unit]):
        """The parameters of `units` stand in their modules inside, where module.weight finds them; no longer after.
        Nothing is done for units that stand there already (in `unsharded`)."""
        units = [unit for unit in units if unit not in self.attached]
        try:
            for unit in units:
                params = Gather.apply(unit.shard, unit, self)
                self.attached.add(unit)
                for i, module, attribute in unit.places:
                    module.__dict__[attribute] = params[i]
                self._start(unit.next if self.in_forward else unit.before)
            yield
        finally:  # also when a recomputation ends early: checkpoint raises in it once its tensors are there
            for unit in units:
                self.attached.discard(unit)
                self._reshard(unit)
                for _, module, attribute in unit.places:
                    module.__dict__.pop(attribute, None)

    def _pack(self, saved: Tensor):
        """What autograd saves in place of a tensor: for a view of a unit's parameters, how to get it again."""
        unit = next((x for x in self.attached if x.full.untyped_storage() is saved.untyped_storage()), None)
        if unit is None or not unit.name:
            return saved.detach()
        return unit, saved.shape, saved.stride(), saved.storage_offset()

    def _unpack(self, kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        unit, *view = kept
        if self.again is not unit:
            self._reshard(self.again)  # a frozen unit, without a reduce-scatter that would have freed it
            self.again = unit
            self._gather(unit)
            self._start(unit.before)
        return unit.full.as_strided(*view)

    # ---- the interface that train/sharding.py describes --------------------------------------------------------------

    @contextlib.contextmanager
    def forward_pass(self):
        self._end_pass()
        root = [unit for unit in self.units if not unit.name]
        self.in_forward = True
        try:
            with self._attach(root), saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self.in_forward = False

    @contextlib.contextmanager
    def unsharded(self, *parts: str):
        self._end_pass()
        units = [unit for unit in self.units if not unit.name or not parts or unit.name.startswith(parts)]
        with torch.no_grad(), self._attach(units):
            yield

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: unit.shard for name, unit in self.trained.items()}

    def clip_gradients(self, max_norm: float) -> float:
        params = [p for p in self.named_parameters().values() if p.grad is not None]
        total = sum((p.grad.norm().square() for p in params), torch.zeros((), device=self.device))
        if self.size > 1:
            dist.all_reduce(total)
        norm = total.sqrt()
        for p in params:
            p.grad *= (max_norm / (norm + 1e-6)).clamp(max=1)
        return norm.item()

    def full_shapes(self) -> dict[str, Tensor]:
        return {name: torch.empty(shape, device="meta")
                for unit in self.units for name, shape in zip(unit.names, unit.shapes)}

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        self._end_pass()
        assert not self.attached  # what is, is of the compute type
        for unit in self.units:
            yield from zip(unit.names, unit.views(self._gather(unit, self.dtype)))
            self._reshard(unit)

    every_process_writes = True

    def state_shapes(self) -> dict[str, list[int]]:
        return {name: [unit.numel] for name, unit in self.trained.items()}  # whatever the number of processes

    def read(self, files: list, key: str, name: str) -> Tensor:
        unit = self.trained[name]
        if len(files) == self.size:
            return files[self.rank].get_tensor(key)
        whole = torch.zeros(self.size * len(unit.shard))
        whole[: unit.numel] = torch.cat([file.get_tensor(key) for file in files])[: unit.numel]
        return whole.chunk(self.size)[self.rank].clone()
