"""Three ways to spread a run over processes, with one interface.

`Sharded` (fsdp.py, by hand), `FullyShard` (PyTorch's own, for clusters that outgrow a teaching implementation, and to
compare with) and `Replicated` (whole on every process). What they share: `run(function, *args)` is a forward pass,
`with run.whole():` is for sampling, `parameters()` for the optimizer, `clip(max_norm)` before its step, `tensors()` for
saving. Left out: checkpoints of PyTorch's distributed format.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from erv_min.checkpoint import save_humanomni
from erv_min.run.errors import SettingsError
from erv_min.fsdp import Sharded, unit_modules
from erv_min.run.processes import rank_and_size
from erv_min.model.humanomni import AUDIO, VIDEO, HumanOmni
from erv_min.logps import Completions, Prompts, completion_logps
from erv_min.run.state import full


def spread(model: nn.Module, sharding: str, device: str | torch.device, compute: torch.dtype, frozen: bool = False):
    """The model spread over the processes: `sharding` is none, hand or torch; a frozen one is kept in `compute`."""
    if sharding == "hand":
        return Sharded(model, device, compute, compute if frozen else torch.float32)
    return {"none": Replicated, "torch": FullyShard}[sharding](model, device, compute)


class Replicated:
    """The whole model on every process; bf16 by autocast, gradients averaged by one flat all-reduce."""

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", compute: torch.dtype = torch.bfloat16):
        self.model, self.compute, self.size = model, compute, rank_and_size()[1]
        self.device = torch.device(device)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute == torch.bfloat16)

    def __call__(self, function, *args, **kwargs):
        with self._autocast():
            return function(*args, **kwargs)

    @contextlib.contextmanager
    def whole(self, *parts: str):
        with torch.no_grad(), self._autocast():
            yield

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def clip(self, max_norm: float) -> float:
        params = list(self.parameters().values())
        average_gradients(params)
        return float(nn.utils.clip_grad_norm_(params, max_norm))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in self.model.named_parameters())


def average_gradients(params: list[Tensor]) -> None:
    """Mean of the gradients over processes, as one flat all-reduce; a missing gradient counts as zeros."""
    size = rank_and_size()[1]
    if size == 1:
        return
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    flat /= size
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(g.view_as(p))


class _Call(nn.Module):
    """A root whose forward pass is any function of the model: what fully_shard needs to know where a pass begins."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function, *args, **kwargs):
        return function(*args, **kwargs)


class FullyShard:
    """PyTorch's fully_shard with the units and types of `Sharded`. Every process holds the whole model at the start."""

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", compute: torch.dtype = torch.bfloat16):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        # It fears in-place writes to outputs that are views (here keys and values), and there are none.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        if not dist.is_initialized():
            raise SettingsError("--sharding torch needs processes to shard over: start the script with torchrun")
        self.model, self.rank, self.device = model, dist.get_rank(), torch.device(device)
        how = {"mesh": init_device_mesh(torch.device(device).type, (dist.get_world_size(),)),
               "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)}
        for _, module in unit_modules(model):
            fully_shard(module, **how)
        self.run = fully_shard(_Call(model), **how)
        self.modules = [m for m in self.run.modules() if isinstance(m, FSDPModule)]
        self.run(lambda: None)  # lets it find its units, before one of them runs outside a pass
        self.run.reshard()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def __call__(self, function, *args, **kwargs):
        return self.run(function, *args, **kwargs)

    @contextlib.contextmanager
    def whole(self, *parts: str):
        for module in self.modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in self.modules:
                module.set_reshard_after_forward(module is not self.run, recurse=False)
                module.reshard()

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.trained

    def clip(self, max_norm: float) -> float:
        return float(nn.utils.clip_grad_norm_(self.trained.values(), max_norm).full_tensor())

    def shapes(self) -> dict[str, Tensor]:
        return {name: torch.empty(p.shape, device="meta") for name, p in self.model.named_parameters()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for module in self.modules:
            module.reshard()
        for name, p in self.model.named_parameters():
            whole = full(p.detach())
            if self.rank == 0:
                yield name, whole


def rounds(run, passes: int) -> int:
    """How many passes each process makes where this one has data for `passes`: with shards as many as the busiest."""
    if isinstance(run, Replicated) or rank_and_size()[1] == 1:
        return passes
    most = torch.tensor(passes, device=run.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def idle_loss(model: HumanOmni, modality: str = "video_audio") -> Tensor:
    """A loss of zero that gathers what a pass on a clip gathers: for a process whose data ran out, inside `run()`."""
    config, like = model.config, model.head_weight
    ids = [[*([VIDEO] if "video" in modality else []), *([AUDIO] if "audio" in modality else []), 0]]
    given = {"gate_ids": torch.zeros(1, 2, dtype=torch.long, device=like.device)}
    if "video" in modality:
        given["video_features"] = like.new_zeros(1, config.num_frames, config.vision.grid**2, config.vision.hidden_size)
    if "audio" in modality:
        given["audio_features"] = like.new_zeros(1, config.audio_tokens, config.audio.d_model)
    tower, frames = model.model.vision_tower, 2 * config.audio.max_source_positions
    if tower is not None and any(p.requires_grad for p in tower.parameters()):  # then both towers run in the pass
        given["video_features"] = model.vision_features(like.new_zeros(1, 1, 3, *[config.vision.image_size] * 2))
        if "audio" in modality:
            with torch.no_grad():
                model.audio_features(like.new_zeros(1, config.audio.num_mel_bins, frames))
    prompt = Prompts(*model.prompt_embeds(torch.tensor(ids, device=like.device), **given))
    two = torch.zeros(1, 2, dtype=torch.long, device=like.device)  # one token would leave the second pass out
    return completion_logps(model, prompt, Completions(two, two == 0))[0].sum() * 0


def save_model(run, folder: str | Path) -> None:
    """Writes the model in the released layout from process 0; all must call it, and it is there when they return."""
    if isinstance(run, Replicated):
        if rank_and_size()[0] == 0:
            save_humanomni(run.model, folder)
    elif run.rank == 0:
        save_humanomni(run.model, folder, torch.float32, run.shapes(), run.tensors())
    else:
        for _ in run.tensors():
            pass
    if rank_and_size()[1] > 1:
        dist.barrier()
