"""Settings of each stage: table 8 and section 4.3 as presets, and one command-line style for every script.

A setting is a dataclass field with a help text that names its equation, table or divergence; the preset gives its
value and the command line overrides it. `paper-0.5b` and `paper-7b` hold the paper's values, `toy` the embedded
default's (a model a thousand times smaller needs larger steps). What is not an ablation of the paper, a divergence of
the release or a matter of the user's hardware is not an option.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field

from erv_min.errors import SettingsError


def setting(default, help: str, choices: tuple = ()):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Common:
    """What every training stage takes."""

    preset: str = setting("toy", "toy: the embedded world, nothing to download; paper-0.5b, paper-7b: table 8",
                          ("toy", "paper-0.5b", "paper-7b"))
    out: str = setting("", "folder of this run: config.json, metrics.jsonl, model.safetensors (default: runs/...)")
    data: str = setting("", "training clips, 'dfew:/path,mafw:/path', 'json:/file.json', 'toy:/world' (default: the "
                            "embedded world, rendered where it is not there yet)")
    model: str = setting("", "starting checkpoint: a folder or a hub repository")
    random_weights: bool = setting(False, "start from random weights of the preset's dimensions (to try a machine)")
    world: str = setting("", "folder of the embedded world (default: OUT/world)")
    steps: int = setting(0, "optimizer steps; 0: as many as the epochs give")
    epochs: int = setting(5, "passes over the data (table 8)")
    batch_size: int = setting(32, "samples (GRPO: prompts) an optimizer step, over all processes (table 8)")
    micro_batch: int = setting(4, "samples (GRPO: prompts) a forward pass on one process; lower it when out of memory")
    lr: float = setting(2e-5, "peak learning rate (table 8)")
    warmup: float = setting(0.03, "share of the steps with a rising learning rate (table 8)")
    schedule: str = setting("cosine", "learning rate after the warm-up (table 8: cosine)", ("cosine", "linear", "constant"))
    max_grad_norm: float = setting(1.0, "global norm that gradients are clipped to")
    weight_decay: float = setting(0.0, "AdamW's weight decay (release: 0)")
    seed: int = setting(17, "seed of data order, sampling and random weights")
    resume: bool = setting(False, "go on from the last checkpoint in OUT")
    save_every: int = setting(100, "steps between checkpoints")
    keep: int = setting(2, "checkpoints kept, the newest ones; where one is damaged the one before it is used")
    device: str = setting("", "cpu, cuda, cuda:1 (default: cuda where there is one)")
    dtype: str = setting("float32", "compute type; weights and optimizer stay float32", ("float32", "bfloat16"))
    sharding: str = setting("none", "how weights lie on several processes: none (whole on each), hand (fsdp.py), torch "
                                    "(PyTorch's fully_shard)", ("none", "hand", "torch"))
    recompute: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    workers: int = setting(2, "processes that decode clips ahead of the model")
    cache_features: str = setting("", "folder for the frozen towers' features, so that later epochs skip decoding "
                                      "and towers; 'memory' keeps them in memory")
    geometry: str = setting("pad", "frames to a square: padded, or stretched as in the released inference "
                                   "(divergence 11)", ("pad", "stretch"))
    prompt_stage: str = setting("inference", "which released prompt to render (divergence 10)",
                                ("inference", "sft", "grpo"))
    num_frames: int = setting(8, "frames a clip (table 8)")
    modality: str = setting("video_audio", "what the model is given", ("video_audio", "video", "audio"))


@dataclass
class SFTSettings(Common):
    """Eq. 2."""

    loss_reduction: str = setting("mean", "Eq. 2 as a mean over label tokens (release) or their sum (paper); "
                                          "divergence 8", ("mean", "sum"))
    targets_per_clip: int = setting(1, "targets of one clip that share its prompt in a step")
    train_vision_tower: bool = setting(False, "train the vision tower too, as table 8 says and the release does not "
                                              "(divergence 12)")


@dataclass
class GRPOSettings(Common):
    """Eq. 3 to 5, algorithm 1."""

    erv: str = setting("", "the verifier: a folder or a hub repository")
    group_size: int = setting(16, "G, completions a prompt (section 4.3)")
    beta: float = setting(0.04, "weight of the KL term (Eq. 3)")
    epsilon: float = setting(0.2, "clip range of the ratio; has no effect while mu is 1")
    mu: int = setting(1, "updates a batch of completions (divergence 6)")
    temperature: float = setting(1.0, "sampling temperature of the rollouts (divergence 9)")
    top_k: int = setting(0, "cut the rollouts' distribution to the k best tokens; 0: no cut, release: 50 (divergence 9)")
    max_new_tokens: int = setting(512, "longest completion in tokens")
    w_format: float = setting(1.0, "weight of R_format (Eq. 5)")
    w_answer: float = setting(1.0, "weight of R_answer (Eq. 5)")
    w_explanation: float = setting(1.0, "weight of R_E (Eq. 5); 0 is the paper's Baseline")
    tau: float = setting(0.5, "threshold of algorithm 1 (release: 0.1; divergence 1)")
    k: int = setting(2, "labels a sentence at most (algorithm 1)")
    neutral_rule: str = setting("only", "a sentence is neutral where neutral is its only label, or any of its labels "
                                        "(divergence 2)", ("only", "any"))
    answer_rule: str = setting("paper", "how an answer is read (divergence 18)", ("paper", "released"))
    ablate: str = setting("", "table 2: leave one part of R_E out (augmentation: give --erv a verifier trained "
                              "without it)", ("", "neutral-filtering", "sentence-level"))
    gate_on_answer: bool = setting(False, "R_E only where format and answer are right (remedy, FG-CE)")
    phase_in_steps: int = setting(0, "R_E grows linearly over the first steps (remedy, EmotionThinker)")
    length_target: int = setting(0, "length term on the explanation, in words (remedy, AffectGPT-R1)")
    repeat_discount: float = setting(0.0, "discount of repeated sentences, 1: they do not count (remedy)")
    sample_every: int = setting(20, "steps between completions that are printed and kept in completions.jsonl")
    baseline: bool = setting(False, "also train and evaluate GRPO without R_E, the paper's Baseline")
    eval_temperature: float = setting(0.3, "temperature of the evaluation (section 4.3)")
    eval_clips: int = setting(0, "held-out clips of the final table; 0: all")


# Trainable parts, table 8 (divergence 13): named sets, see model.humanomni.trainable.
TRAINABLE = {
    "sft": ("language_model", "visual_projector", "audio_projector", "gate_mlp"),
    "grpo": ("language_model", "visual_projector", "audio_projector", "text_encoder"),
}

_TOY = dict(num_frames=4, cache_features="memory", seed=0, workers=2, save_every=50)
_PAPER = dict(dtype="bfloat16", recompute=True, sharding="hand")
_BIG = dict(_PAPER, micro_batch=1)
PRESETS = {
    "sft": {
        "toy": dict(_TOY, epochs=1, batch_size=32, micro_batch=32, targets_per_clip=4, lr=4e-3),
        "paper-0.5b": dict(_PAPER, epochs=5, batch_size=32, micro_batch=4, lr=2e-5),
        "paper-7b": dict(_BIG, epochs=10, batch_size=32, lr=2e-5),
    },
    "grpo": {
        "toy": dict(_TOY, steps=180, epochs=2, batch_size=16, micro_batch=16, lr=7e-4, schedule="linear", warmup=0.05,
                    group_size=8, max_new_tokens=72),
        "paper-0.5b": dict(_BIG, epochs=2, batch_size=16, lr=1e-6, warmup=0.0),
        "paper-7b": dict(_BIG, epochs=2, batch_size=16, lr=1e-6, warmup=0.0),
    },
}
# Where a stage starts from when --model is not given (section 4.3): a hub repository for the paper's presets.
STARTS = {
    "sft": {"paper-0.5b": "StarJiaxing/HumanOmni-0.5B", "paper-7b": "StarJiaxing/HumanOmni-7B"},
    "grpo": {"paper-0.5b": "StarJiaxing/EMER-SFT-0.5B"},
}
DIMENSIONS = {"toy": "toy", "paper-0.5b": "0.5b", "paper-7b": "7b"}


def parser_for(cls: type, description: str) -> argparse.ArgumentParser:
    """An argument parser with one option a field of the settings dataclass `cls`; defaults are left to the preset."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(cls):
        option = "--" + f.name.replace("_", "-")
        kwargs = dict(dest=f.name, default=argparse.SUPPRESS, help=f.metadata["help"].replace("%", "%%"))
        if isinstance(f.default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, **kwargs)
        else:
            choices = f.metadata.get("choices") or None
            metavar = None if choices else f.name.rsplit("_", 1)[-1].upper()
            parser.add_argument(option, type=type(f.default), choices=choices, metavar=metavar, **kwargs)
    return parser


def parse(cls: type, presets: dict[str, dict], description: str, argv: list[str] | None = None):
    """Settings from the command line: the preset's values, overridden by what is given. Exits with a usage error."""
    parser = parser_for(cls, description)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "toy")
    settings = cls(**{**presets[preset], **given, "preset": preset})
    try:
        check(settings)
    except SettingsError as error:
        parser.error(str(error))
    return settings


def check(settings) -> None:
    """Raises SettingsError on values that cannot work together."""
    for name in ("batch_size", "micro_batch", "group_size", "max_new_tokens", "mu", "num_frames", "k", "save_every", "keep"):
        if getattr(settings, name, 1) < 1:
            raise SettingsError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(settings, name)}")
    for name in ("lr", "beta", "epsilon", "temperature", "steps"):
        if getattr(settings, name, 0) < 0:
            raise SettingsError(f"--{name} must not be negative, not {getattr(settings, name)}")
    if getattr(settings, "temperature", 1) == 0:
        raise SettingsError("--temperature 0 samples the same completion G times: no group would have a spread")
