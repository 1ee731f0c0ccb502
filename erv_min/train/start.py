"""What a stage starts from: model and tokenizers, clips, verifier. (The toy's stages before it: toy/chain.py.)"""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from erv_min.base.errors import SettingsError
from erv_min.base.hub import resolve
from erv_min.base.processes import Processes, gather_lists
from erv_min.base.progress import Progress
from erv_min.checkpoint import check_checkpoint, humanomni_config, load_humanomni, text_gate_folder
from erv_min.config import humanomni
from erv_min.data.cache import FEATURES, FeatureCache
from erv_min.data.examples import check_clips, load_examples, summary
from erv_min.data.loader import start_workers
from erv_min.emotions import ERV_LABELS
from erv_min.erv import Verifier, scratch
from erv_min.inputs import Collator, Example
from erv_min.model.humanomni import HumanOmni
from erv_min.model.parameters import freeze_except, frozen_reference, random_humanomni
from erv_min.prompts import QUESTION, REASONING_SUFFIX
from erv_min.tokenizer import EncoderTokenizer, Tokenizer
from erv_min.train.folder import check_disk
from erv_min.train.settings import (DIMENSIONS, STARTS, AnswerSettings, GRPOSettings, ModelSettings, PolicySettings,
                                    trained_parts)
from erv_min.train.sharding import shard


def load_model(settings: ModelSettings, name: str, dtype: torch.dtype, device, processes: Processes, show=print):
    """(model, tokenizer, gate tokenizer) of a folder or hub repository with the settings' revision and towers.

    The tokenizers come first: they are small. `show` gets a line that says which towers it runs with (divergence 12),
    on the main process.
    """
    folder = resolve(name, settings.revision, weights=False)
    towers = (settings.vision_tower, settings.audio_tower, settings.text_tower)
    tokenizer = Tokenizer(folder)
    gate_folder = text_gate_folder(name, settings.revision, settings.text_tower)
    gate = EncoderTokenizer(gate_folder, model_ids=humanomni_config(folder, *towers).gate.vocab_size)
    model = load_humanomni(name, dtype, device, settings.revision, *towers)
    model.gate_folder = gate_folder
    if processes.main:
        show(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; towers: "
             + ", ".join(f"{k} from {v}" for k, v in model.tower_source.items()))
    return model, tokenizer, gate


def check_names(settings) -> None:
    """Whether what the settings name is there, and a checkpoint of its kind: config.json and tokenizer alone are
    fetched. To be called before any weights are. Raises CheckpointError."""
    for option, kind in (("model", "humanomni"), ("erv", "erv"), ("watch_erv", "erv")):
        if name := getattr(settings, option, ""):
            check_checkpoint(name, kind, settings.revision if option == "model" else None)
    for option in ("vision_tower", "audio_tower", "text_tower"):
        if name := getattr(settings, option, ""):
            resolve(name, weights=False)


def load_collator(settings: AnswerSettings, processes: Processes, show=print) -> Collator:
    """The checkpoint that --model names, in eval mode, ready to be asked; its `.model` is it."""
    model, tokenizer, gate = load_model(settings, settings.model, getattr(torch, settings.dtype), processes.device,
                                        processes, show)
    return Collator(model.requires_grad_(False), tokenizer, gate, None, settings.modality, settings.prompt_stage,
                    settings.question or f"{QUESTION} {REASONING_SUFFIX}")


def check_start(settings: PolicySettings, stage: str, processes: Processes) -> None:
    """Names in `settings` what a stage starts from, if the command does not: the preset's own start (section 4.3).
    Raises SettingsError, CheckpointError and DiskError on what a stage would stumble over after minutes of loading."""
    if settings.sharding == "torch" and processes.size == 1:
        raise SettingsError("--sharding torch needs two processes or more: torchrun --nproc_per_node=2")
    if not settings.random_weights:
        settings.model = settings.model or STARTS[stage].get(settings.preset, "")
        if not settings.model:
            raise SettingsError(f"--preset {settings.preset} has no public {stage.upper()} start: name one by --model "
                                "(a folder or hub repository), or try the machine with --random-weights")
    if getattr(settings, "w_explanation", 0) and not settings.erv and not settings.random_weights:
        if settings.ablate == "augmentation":
            raise SettingsError("--ablate augmentation needs a verifier trained on the annotated sources alone: "
                                "scripts/erv.py --sources emer,merr --data ... --out runs/erv-unaugmented, given as "
                                "--erv")
        raise SettingsError("R_E needs a verifier: --erv FOLDER_OR_REPO (e.g. Rhatanii/Emo_Classifier), or "
                            "--w-explanation 0")
    check_names(settings)
    if settings.random_weights:
        config = humanomni(DIMENSIONS[settings.preset])
    else:
        folder = resolve(settings.model, settings.revision, weights=False)
        config = humanomni_config(folder, settings.vision_tower, settings.audio_tower, settings.text_tower)
    model = random_humanomni(config, device="meta")  # shapes alone
    freeze_except(model, trained_parts(stage, settings))
    check_disk(settings.out, settings.keep, model)


def load_start(settings: PolicySettings, processes: Processes) -> tuple[HumanOmni, Collator]:
    """The model that a stage begins with, in float32, and the collator of its inputs.

    It lies on the device, or, if it will be sharded, on the CPU: with --sharding hand on the first process's alone.
    With --random-weights the preset's dimensions are filled with seeded noise, and the tokenizers are the embedded
    world's.
    """
    if settings.workers:
        start_workers(settings.workers)
    device = {"none": processes.device, "torch": "cpu", "hand": "cpu" if processes.main else "meta"}[settings.sharding]
    if settings.random_weights:
        with Progress("random weights are drawn"):
            model = random_humanomni(humanomni(DIMENSIONS[settings.preset]), settings.seed, device=device)
        model.source_folder, model.gate_folder = (Path(settings.world, "tokenizers", x) for x in ("lm", "text_gate"))
        tokenizer, gate = Tokenizer(model.source_folder), EncoderTokenizer(model.gate_folder)
    else:
        model, tokenizer, gate = load_model(settings, settings.model, torch.float32, device, processes)
    model.model.recompute = settings.recompute
    settings.num_frames = settings.num_frames or model.config.num_frames
    cache = None
    if settings.cache_features:
        folder = None if settings.cache_features == "memory" else settings.cache_features
        towers = gather_lists([tower_key(model)] if processes.main else [])[0]  # others may have shapes alone
        about = (settings.dtype, settings.num_frames, settings.modality, settings.geometry, settings.silence)
        config = model.config  # not all of it shows in weights
        shape = (config.vision, config.audio, config.mm_vision_select_layer)
        cache = FeatureCache(folder, ":".join(map(str, (FEATURES, towers, *shape, *about))))
    return model, Collator(model, tokenizer, gate, cache, settings.modality, settings.prompt_stage)


def load_sharded_policy(settings: PolicySettings, stage: str, processes: Processes):
    """(policy, collator): pi_theta with table 8's parts trainable, as it lies on the processes.

    It is in eval mode, in training too: HumanOmni has no dropout, and nothing else in it asks."""
    model, collate = load_start(settings, processes)
    freeze_except(model, trained_parts(stage, settings))
    return shard(model, settings.sharding, processes.device, getattr(torch, settings.dtype)), collate


def load_policy_and_reference(settings: GRPOSettings, processes: Processes):
    """(policy, reference, collator): pi_theta, and the frozen pi_ref, which shares the frozen towers' features."""
    model, collate = load_start(settings, processes)
    frozen = frozen_reference(model)
    freeze_except(model, trained_parts("grpo", settings))
    compute = getattr(torch, settings.dtype)
    policy = shard(model, settings.sharding, processes.device, compute)
    return policy, shard(frozen, settings.sharding, processes.device, compute, frozen=True), collate


def tower_key(model: HumanOmni) -> str:
    """Names the frozen towers by their weights' bytes: kept features are never taken for those of other towers."""
    digest = hashlib.sha256()
    with Progress("the towers' weights are read, for the name of their kept features"):
        for tower in (model.model.vision_tower, model.model.audio_tower):
            for name, weight in tower.state_dict().items():
                digest.update(name.encode())
                digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def training_examples(settings: PolicySettings, split: str, processes: Processes) -> list[Example]:
    """The clips to train on, counted and checked; the list of missing ones is OUT/missing_clips.txt."""
    examples = load_examples(settings.data or f"toy:{settings.world}", split)
    if processes.main:
        print(summary(examples), flush=True)
    examples = examples if settings.subtitles else [replace(example, subtitle="") for example in examples]
    missing = Path(settings.out) / "missing_clips.txt" if processes.main else None
    return check_clips(examples, settings.allow_missing, missing)


def data_of(examples: list[Example]) -> list[tuple]:
    """What training reads of each example, as folder.Run compares it at a resume; of a clip its name and size."""
    sizes = [x.path.stat().st_size if x.path.is_file() else 0 for x in examples]  # 0: a folder of frames
    return [(f"{x.dataset} {x.video_id}", x.label, x.subtitle, x.explanation, x.path.name, size)
            for x, size in zip(examples, sizes)]


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
