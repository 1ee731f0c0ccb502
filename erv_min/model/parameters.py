"""HumanOmni's parameters: which ones a stage trains (table 8), which ones nothing reads, and random initialisation."""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from erv_min.base.onednn import use_onednn
from erv_min.config import HumanOmniConfig
from erv_min.model.humanomni import HumanOmni
from erv_min.model.towers import sinusoids

# Table 8's names of what trains. The audio tower is in no stage's list.
PARTS = {
    "language_model": ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
    "vision_tower": ("model.vision_tower.",),
    "visual_projector": ("model.mm_projector.",),
    "audio_projector": ("model.audio_projector.",),
    "gate_mlp": ("model.bert_gate.",),
    "text_encoder": ("model.bert_model.",),
}


def freeze_except(model: HumanOmni, names: Iterable[str]) -> None:
    """Makes exactly the parts `names` of table 8 trainable, without their unused parameters."""
    prefixes, unused = tuple(prefix for name in names for prefix in PARTS[name]), unused_parameters(model)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(prefixes) and name not in unused)


def unused_parameters(model: HumanOmni) -> set[str]:
    """Names of the parameters that no forward pass reads: they are loaded and saved, and never trained."""
    siglip, whisper = model.vision_tower, model.model.audio_tower["audio_tower"]
    modules = (*siglip.encoder["layers"][siglip.layers_run :], siglip.post_layernorm, siglip.head,
               whisper["projector"], whisper["classifier"], model.model.bert_model.pooler)
    unused = {p for module in modules for p in module.parameters()}
    return {name for name, p in model.named_parameters() if p in unused}


def frozen_reference(model: HumanOmni) -> HumanOmni:
    """pi_ref of Eq. 3: a frozen copy of the policy without its towers, since both read the same frozen features."""
    towers = (model.model.vision_tower, model.model.audio_tower)
    reference = copy.deepcopy(model, {id(tower): tower for tower in towers})  # which are not copied
    reference.model.vision_tower = reference.model.audio_tower = None
    return reference.requires_grad_(False).eval()


@torch.no_grad()
def init_weights(model: HumanOmni, seed: int = 0) -> None:
    """Random weights in place, a function of `seed` and of the kind of device alone. Linear layers are normal with
    0.6 / sqrt(inputs), which is Qwen2's 0.02 at its width of 896."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("audio_tower.encoder.embed_positions.weight"):
            p.copy_(sinusoids(*p.shape))
        elif name.endswith("bias"):
            p.zero_()
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            p.fill_(1)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        elif isinstance(module, nn.Linear) and p is not model.head_weight:
            p.normal_(0, 0.6 * module.in_features**-0.5, generator=generator)
        else:
            p.normal_(0, 0.02, generator=generator)


def random_humanomni(config: HumanOmniConfig, seed: int = 0, dtype: torch.dtype = torch.float32,
                     device: str | torch.device = "cpu") -> HumanOmni:
    """A model with `init_weights`, in eval mode, filled where it will lie; on the meta device shapes alone."""
    with torch.device("meta"):
        model = HumanOmni(config).to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        model.tie_weights()
        init_weights(model, seed)
    return use_onednn(model).eval()
