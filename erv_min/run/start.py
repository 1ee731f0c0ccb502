"""How a stage gets what it starts from: model and tokenizers, clips, and, for the toy preset, the stages before it."""

import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from erv_min.checkpoint import load_humanomni, text_gate_folder
from erv_min.config import humanomni
from erv_min.data.cache import FeatureCache
from erv_min.data.examples import check_clips, load_examples, summary
from erv_min.data.readers import Example
from erv_min.emotions import ERV_LABELS
from erv_min.run.errors import SettingsError
from erv_min.erv import Verifier, scratch
from erv_min.inputs import PromptBuilder
from erv_min.model.humanomni import HumanOmni, random_humanomni
from erv_min.prompts import QUESTION, REASONING_SUFFIX
from erv_min.run.settings import DIMENSIONS, STARTS, Answers, Common, GRPOSettings, Policy
from erv_min.tokenizer import EncoderTokenizer, Tokenizer
from erv_min.run.folder import STOPPED
from erv_min.run.processes import Processes, gather_lists

SCRIPTS = Path(__file__).parents[2] / "scripts"


def start(*command: str) -> subprocess.Popen:
    """Starts `python command`, an earlier stage as a user would type it, outside this process's torchrun group."""
    group = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {k: v for k, v in os.environ.items() if k not in group and not k.startswith("TORCHELASTIC")}
    print("$ python", *command, flush=True)
    return subprocess.Popen([sys.executable, *command], env=environment)


def finish(process: subprocess.Popen) -> None:
    """Waits for an earlier stage, handing SIGTERM on to it; ends as it does if it stopped or failed."""
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    signal.signal(signal.SIGTERM, before)
    if status == STOPPED:
        raise SystemExit(STOPPED)
    if status:
        raise SystemExit(f"'{' '.join(process.args)}' ended with status {status}: its message stands above")


def world_folder(settings) -> Path:
    """Where the embedded world lies: --world, else in OUT or beside it, else (to be made) in OUT for GRPO, beside others."""
    if settings.world:
        return Path(settings.world)
    inside, beside = Path(settings.out) / "world", Path(settings.out).parent / "world"
    found = next((path for path in (inside, beside) if (path / "world.json").exists()), None)
    return found or (inside if isinstance(settings, GRPOSettings) else beside)


def prepare_world(world: Path, seed: int, base: bool) -> None:
    """Renders the embedded world, and trains its base model if `base`, where they are not there yet."""
    if not (world / ("base/model.safetensors" if base else "world.json")).exists():
        finish(start("-m", "erv_min.toy", str(world), "--seed", str(seed), *([] if base else ["--clips-only"])))


def load_model(settings: Policy, name: str, dtype: torch.dtype, device, show=print):
    """(model, tokenizer, gate tokenizer) of a folder or hub repository with the settings' revision and towers.

    `show` gets a line that says which towers it runs with (divergence 12).
    """
    revision, text_tower = settings.revision or None, settings.text_tower or None
    model = load_humanomni(name, dtype, device, revision, settings.vision_tower or None,
                           settings.audio_tower or None, text_tower)
    model.gate_folder = text_gate_folder(name, revision, text_tower)
    show(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; towers: "
         + ", ".join(f"{k} from {v}" for k, v in model.tower_source.items()))
    return model, Tokenizer(model.source_folder), EncoderTokenizer(model.gate_folder)


def load_policy(settings: Answers, processes: Processes, show=print) -> PromptBuilder:
    """The checkpoint that --model names, in eval mode, ready to be asked; `.model` is it."""
    model, tokenizer, gate = load_model(settings, settings.model, getattr(torch, settings.dtype), processes.device,
                                        show if processes.main else lambda line: None)
    return PromptBuilder(model.requires_grad_(False), tokenizer, gate, None, settings.modality, settings.prompt_stage,
                         settings.question or f"{QUESTION} {REASONING_SUFFIX}")


def start_model(settings: Common, stage: str, processes: Processes) -> tuple[HumanOmni, PromptBuilder]:
    """The model that a stage begins with, in float32, and the builder of its prompts.

    It lies on the device, or, where it will be sharded, on the CPU: with --sharding hand on the first process's alone.

    --model names a folder or hub repository; without it the preset's own start (section 4.3). With --random-weights
    the preset's dimensions are filled with seeded noise, and the tokenizers are the embedded world's.
    """
    device = {"none": processes.device, "torch": "cpu", "hand": "cpu" if processes.main else "meta"}[settings.sharding]
    if settings.random_weights:
        model = random_humanomni(humanomni(DIMENSIONS[settings.preset]), settings.seed, device=device)
        model.source_folder, model.gate_folder = (world_folder(settings) / "tokenizers" / x for x in ("lm", "text_gate"))
        tokenizer, gate = Tokenizer(model.source_folder), EncoderTokenizer(model.gate_folder)
    else:
        name = settings.model or STARTS[stage].get(settings.preset)
        if not name:
            raise SettingsError(f"--preset {settings.preset} has no public {stage.upper()} start: name one by --model "
                                "(a folder or hub repository), or try the machine with --random-weights")
        model, tokenizer, gate = load_model(settings, name, torch.float32, device,
                                            lambda line: print(line, flush=True) if processes.main else None)
    model.model.recompute = settings.recompute
    cache = None
    if settings.cache_features:
        folder = None if settings.cache_features == "memory" else settings.cache_features
        towers = gather_lists([tower_key(model)] if processes.main else [])[0]  # others may have shapes alone
        key = f"{towers}:{settings.dtype}:{settings.num_frames}:{settings.modality}:{settings.geometry}"
        cache = FeatureCache(folder, key)
    return model, PromptBuilder(model, tokenizer, gate, cache, settings.modality, settings.prompt_stage)


def tower_key(model: HumanOmni) -> str:
    """Names the frozen towers by their weights' bytes: features kept on disk are never taken for those of other towers."""
    digest = hashlib.sha256()
    for tower in (model.model.vision_tower, model.model.audio_tower):
        for name, weight in tower.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def training_examples(settings: Common, split: str, processes: Processes) -> list[Example]:
    """The clips to train on, counted and checked; the list of missing ones is OUT/missing_clips.txt."""
    examples = load_examples(settings.data or f"toy:{world_folder(settings)}", split)
    if processes.main:
        print(summary(examples), flush=True)
    examples = examples if settings.subtitles else [replace(example, subtitle="") for example in examples]
    return check_clips(examples, settings.allow_missing, Path(settings.out) / "missing_clips.txt" if processes.main else None)


def start_verifier(settings: GRPOSettings, device: torch.device) -> Verifier | None:
    """The verifier that R_E asks: --erv, random weights of RoBERTa base with --random-weights, None where R_E is off."""
    if not settings.rewards.w_explanation:
        return None
    if settings.erv:
        return Verifier.load(settings.erv, device)
    tokenizer = EncoderTokenizer(world_folder(settings) / "tokenizers" / "erv")
    return Verifier(scratch("base", tokenizer.vocab_size, len(ERV_LABELS)).to(device).eval(), tokenizer, ERV_LABELS)
