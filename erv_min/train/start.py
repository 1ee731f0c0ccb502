"""What a stage starts from: model and tokenizers, clips, verifier. (The toy's stages before it: toy/chain.py.)"""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from erv_min.base.errors import SettingsError
from erv_min.base.hub import resolve
from erv_min.base.processes import Processes
from erv_min.base.progress import Progress
from erv_min.checkpoint import check_checkpoint, humanomni_config, load_humanomni, text_gate_folder
from erv_min.config import humanomni
from erv_min.data.cache import FEATURES, FeatureCache
from erv_min.data.examples import check_clips, load_examples, summary
from erv_min.data.loader import start_workers
from erv_min.emotions import ERV_LABELS
from erv_min.erv import Verifier, scratch
from erv_min.inputs import Collator, Example
from erv_min.model.parameters import freeze_except, frozen_reference, random_humanomni
from erv_min.prompts import QUESTION, REASONING_SUFFIX
from erv_min.tokenizer import EncoderTokenizer, Tokenizer
from erv_min.train.folder import check_disk
from erv_min.train.settings import GRPOSettings, ModelSettings, PolicySettings, trained_parts
from erv_min.train.sharding import shard


def check_names(settings) -> None:
    """Whether the models that the settings name are there, and of their kind, before any weights are fetched. Raises
    CheckpointError."""
    for option, kind in (("model", "humanomni"), ("erv", "erv"), ("watch_erv", "erv")):
        if name := getattr(settings, option, ""):
            check_checkpoint(name, kind, settings.revision if option == "model" else None)


def load_collator(settings: ModelSettings, processes: Processes, dtype=None, device=None) -> Collator:
    """The checkpoint that --model names, frozen, in eval mode, as `.model`, ready to be asked. Says on standard error
    which towers it runs with (divergence 12). dtype, device: others than the settings' own."""
    name, towers = settings.model, (settings.vision_tower, settings.audio_tower, settings.text_tower)
    folder = resolve(name, settings.revision, weights=False)
    tokenizer = Tokenizer(folder)  # the tokenizers come first: they are small
    gate_folder = text_gate_folder(name, settings.revision, settings.text_tower)
    gate = EncoderTokenizer(gate_folder, model_ids=humanomni_config(folder, *towers).gate.vocab_size)
    model = load_humanomni(name, dtype or getattr(torch, settings.dtype), device or processes.device, settings.revision,
                           *towers).requires_grad_(False)
    model.gate_folder = gate_folder
    if processes.main:
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; towers: "
              + ", ".join(f"{k} from {v}" for k, v in model.tower_source.items()), file=sys.stderr, flush=True)
    return Collator(model, tokenizer, gate, None, settings.modality, settings.prompt_stage,
                    getattr(settings, "question", "") or f"{QUESTION} {REASONING_SUFFIX}")


def check_start(settings: PolicySettings, processes: Processes) -> None:
    """Names in `settings` the preset's own start if the command names none (section 4.3). Raises SettingsError,
    CheckpointError and DiskError on what a stage would stumble over after minutes of loading."""
    if settings.sharding == "torch" and processes.size == 1:
        raise SettingsError("--sharding torch needs two processes or more: torchrun --nproc_per_node=2")
    if not settings.random_weights:
        settings.model = settings.model or settings.starts.get(settings.preset, "")
        if not settings.model:
            raise SettingsError(f"--preset {settings.preset} has no public start for {settings.stage}: name one by "
                                "--model (a folder or hub repository), or try the machine with --random-weights")
        if settings.stage == "grpo" and settings.w_explanation and not settings.erv:
            raise SettingsError("R_E needs a verifier: --erv FOLDER_OR_REPO (e.g. Rhatanii/Emo_Classifier; with "
                                "--ablate augmentation one of scripts/erv.py --sources), or --w-explanation 0")
    config = humanomni(settings.preset.removeprefix("paper-")) if settings.random_weights else humanomni_config(
        resolve(settings.model, settings.revision, weights=False), settings.vision_tower, settings.audio_tower,
        settings.text_tower)
    model = random_humanomni(config, device="meta")  # shapes alone
    freeze_except(model, trained_parts(settings))
    check_disk(settings.out, settings.keep, model)


def load_start(settings: PolicySettings, processes: Processes) -> Collator:
    """The model that a stage begins with, in float32, and how its inputs are made. It lies on the device, or, if it is
    to be sharded, on the CPU: with --sharding hand on the first process's alone."""
    if settings.workers:
        start_workers(settings.workers)
    device = {"none": processes.device, "torch": "cpu", "hand": "cpu" if processes.main else "meta"}[settings.sharding]
    if settings.random_weights:
        with Progress("random weights are drawn"):
            model = random_humanomni(humanomni(settings.preset.removeprefix("paper-")), settings.seed, device=device)
        model.source_folder, model.gate_folder = (Path(settings.world, "tokenizers", x) for x in ("lm", "text_gate"))
        collate = Collator(model, Tokenizer(model.source_folder), EncoderTokenizer(model.gate_folder), None,
                           settings.modality, settings.prompt_stage)
    else:
        collate = load_collator(settings, processes, dtype=torch.float32, device=device)
    model = collate.model
    model.model.recompute = settings.recompute
    settings.num_frames = settings.num_frames or model.config.num_frames
    if settings.cache_features:
        towers = (model.model.vision_tower, model.model.audio_tower)
        key = processes.from_main(lambda: weights_key(*towers))  # others may have shapes alone
        about = (settings.dtype, settings.num_frames, settings.modality, settings.geometry, settings.silence)
        config = model.config  # not all of it shows in weights
        shape = (config.vision, config.audio, config.mm_vision_select_layer)
        collate.cache = FeatureCache(settings.cache_features, ":".join(map(str, (FEATURES, key, *shape, *about))))
    return collate


def load_policies(settings: PolicySettings, processes: Processes):
    """(policy, reference, collator): pi_theta with table 8's parts trainable, as it lies on the processes, and for GRPO
    the frozen pi_ref, which shares its features. In eval mode: HumanOmni has no dropout, and nothing else asks."""
    collate = load_start(settings, processes)
    reference = frozen_reference(collate.model) if settings.stage == "grpo" else None
    freeze_except(collate.model, trained_parts(settings))
    how = (settings.sharding, processes.device, getattr(torch, settings.dtype))
    policy = shard(collate.model, *how)
    return policy, reference and shard(reference, *how), collate


def weights_key(*networks: nn.Module) -> str:
    """Names networks by their weights' bytes: the same folder may hold others tomorrow."""
    digest = hashlib.blake2b(digest_size=16)
    with Progress("the weights' bytes are read, to know them again"):
        for network in networks:
            for name, weight in network.state_dict().items():
                digest.update(name.encode())
                digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def training_examples(settings: PolicySettings, split: str, processes: Processes) -> list[Example]:
    """The clips to train on, as `clips_there` has them."""
    examples = clips_there(load_examples(settings.data or f"toy:{settings.world}", split), settings, processes)
    return examples if settings.subtitles else [replace(example, subtitle="") for example in examples]


def clips_there(examples: list[Example], settings, processes: Processes) -> list[Example]:
    """Counts the examples for the reader; those whose clip is there. OUT/missing_clips.txt lists the others."""
    if processes.main:
        print(summary(examples), flush=True)
    missing = Path(settings.out, "missing_clips.txt") if processes.main else None
    return check_clips(examples, settings.allow_missing, missing)


def data_of(examples: list[Example]) -> list[tuple]:
    """What training reads of each example, for folder.Run; of a clip its name, and its size if it is a file."""
    return [(x.dataset, x.video_id, x.label, x.subtitle, x.explanation, x.path.name,
             x.path.is_file() and x.path.stat().st_size) for x in examples]


def load_verifier(settings: GRPOSettings, device: torch.device) -> Verifier | None:
    """The verifier that R_E asks: --erv, or a random one with --random-weights; None if R_E is off."""
    if not settings.w_explanation:
        return None
    if settings.erv:
        return Verifier.load(settings.erv, device)
    tokenizer = EncoderTokenizer(Path(settings.world, "tokenizers", "erv"))
    return Verifier(scratch("base", tokenizer.vocab_size, len(ERV_LABELS)), tokenizer, ERV_LABELS, device)


def clip_options(settings: ModelSettings) -> dict:
    """How clips are decoded, as loader.clip_inputs takes it."""
    return {name: getattr(settings, name) for name in ("modality", "num_frames", "geometry", "workers", "silence")}
