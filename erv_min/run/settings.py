"""Settings of each stage: table 8 and section 4.3 as presets, and one command-line style for every script.

A setting is a dataclass field with a help text that names its equation, table or divergence; the preset gives its
value and the command line overrides it. `paper-0.5b` and `paper-7b` hold the paper's values, `toy` the embedded
default's (a model a thousand times smaller needs larger steps). What is not an ablation of the paper, a divergence of
the release or a matter of the user's hardware is not an option.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field

from erv_min.run.errors import SettingsError


def setting(default, help: str, choices: tuple = ()):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Policy:
    """What every script takes that shows clips to a HumanOmni."""

    model: str = setting("", "checkpoint: a folder or a hub repository")
    revision: str = setting("", "branch, tag or commit of that hub repository")
    vision_tower: str = setting("", "take this tower (folder or hub repository) in place of the checkpoint's own or of "
                                    "the one its config.json names (divergence 12)")
    audio_tower: str = setting("", "the same for Whisper's encoder")
    text_tower: str = setting("", "the same for the text gate's BERT and its tokenizer.json")
    modality: str = setting("video_audio", "what the model is given", ("video_audio", "video", "audio"))
    prompt_stage: str = setting("inference", "which released prompt to render (divergence 10)",
                                ("inference", "sft", "grpo"))
    num_frames: int = setting(0, "frames a clip; 0: as the checkpoint says")
    geometry: str = setting("pad", "frames to a square: padded, or stretched as in the released inference "
                                   "(divergence 11)", ("pad", "stretch"))
    seed: int = setting(0, "seed of the sampling (training: also of data order and random weights)")
    device: str = setting("", "cpu, cuda, cuda:1 (default: cuda where there is one)")
    dtype: str = setting("float32", "type of weights and compute (training: of compute alone)", ("float32", "bfloat16"))
    workers: int = setting(2, "processes that decode clips ahead of the model")


@dataclass
class Clips:
    """What every script takes that reads data sets."""

    data: str = setting("", "clips with labels, 'dfew:/path,mafw:/path', 'json:/file.json', 'toy:/world' (training, toy: "
                            "the embedded world, rendered where it is not there yet)")
    allow_missing: float = setting(0.01, "share of the clips (or of given predictions) that may be missing")


@dataclass
class Answers(Policy):
    """What every script takes that lets a policy answer (divergence 9)."""

    question: str = setting("", "another question than the paper's; it is asked as it stands")
    temperature: float = setting(0.3, "sampling temperature; 0 is greedy (section 4.3)")
    top_p: float = setting(1.0, "nucleus of the sampling (release: 0.9)")
    max_new_tokens: int = setting(512, "longest output in tokens")


@dataclass
class PredictionSettings(Clips, Answers):
    """Predictions over data sets: scripts/evaluate.py and `scripts/augment.py describe`."""

    out: str = setting("", "folder of the results")
    limit: int = setting(0, "the first so many clips only; 0: all")
    batch_size: int = setting(8, "clips at once on one process")
    resume: bool = setting(False, "go on with the predictions that OUT holds")


@dataclass
class Common(Clips, Policy):
    """What every training stage takes."""

    preset: str = setting("toy", "toy: the embedded world, nothing to download; paper-0.5b, paper-7b: table 8",
                          ("toy", "paper-0.5b", "paper-7b"))
    out: str = setting("", "folder of this run: config.json, metrics.jsonl, model.safetensors (default: runs/...)")
    random_weights: bool = setting(False, "start from random weights of the preset's dimensions (to try a machine)")
    world: str = setting("", "folder of the embedded world (default: OUT/world)")
    subtitles: bool = setting(True, "what is said in the clip enters the prompt where the data set has it (EMER, MERR)")
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
    sharding: str = setting("none", "how weights lie on several processes: none (whole on each), hand (fsdp.py), torch "
                                    "(PyTorch's fully_shard)", ("none", "hand", "torch"))
    recompute: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    cache_features: str = setting("", "folder for the frozen towers' features, so that later epochs and runs skip "
                                      "decoding and towers; 'memory' keeps them in memory")
    num_frames: int = setting(8, "frames a clip (table 8)")


@dataclass
class SFTSettings(Common):
    """Eq. 2."""

    loss_reduction: str = setting("mean", "Eq. 2 as a mean over label tokens (release) or their sum (paper); "
                                          "divergence 8", ("mean", "sum"))
    targets_per_clip: int = setting(1, "targets of one clip that share its prompt in a step")
    answers_only: bool = setting(False, "leave every <think> empty: a policy that answers without explaining, to see "
                                        "what the reasoning is worth")
    train_projectors: bool = setting(True, "train the projectors and the gate's MLP too (table 8); the toy's would forget "
                                           "what its base model sees")
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
    sentence_rule: str = setting("released", "how an explanation is split (sentences.py)", ("released", "extended"))
    ablate: str = setting("", "table 2: leave one part of R_E out (augmentation: of the verifier's data)",
                          ("", "neutral-filtering", "sentence-level", "augmentation"))
    gate_on_answer: bool = setting(False, "R_E only where format and answer are right (remedy, as GRPO-CARE's bonus)")
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
        "toy": dict(_TOY, steps=120, epochs=2, batch_size=16, micro_batch=16, lr=5e-4, schedule="linear", warmup=0.25,
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
    add_options(parser, cls)
    return parser


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """One option a field of the settings dataclass `cls`; what is not given does not appear in the parsed arguments."""
    for f in dataclasses.fields(cls):
        option = "--" + f.name.replace("_", "-")
        kwargs = dict(dest=f.name, default=argparse.SUPPRESS, help=f.metadata["help"].replace("%", "%%"))
        if isinstance(f.default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, **kwargs)
        else:
            choices = f.metadata.get("choices") or None
            metavar = None if choices else f.name.rsplit("_", 1)[-1].upper()
            parser.add_argument(option, type=type(f.default), choices=choices, metavar=metavar, **kwargs)


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
    for name in ("lr", "beta", "epsilon", "temperature", "steps", "allow_missing"):
        if getattr(settings, name, 0) < 0:
            raise SettingsError(f"--{name.replace('_', '-')} must not be negative, not {getattr(settings, name)}")
    if getattr(settings, "temperature", 1) == 0:
        raise SettingsError("--temperature 0 samples the same completion G times: no group would have a spread")
