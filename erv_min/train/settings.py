"""Settings of each stage, each in one place: its default, and beside it the values of presets that differ.

`paper-0.5b` and `paper-7b` hold table 8 and section 4.3, `toy` the embedded world's values (a model a thousand times
smaller needs larger steps). What is no ablation of the paper, divergence of the release, named variant or matter of the
user's hardware is no option.
"""

from dataclasses import dataclass
from functools import partial

from erv_min.base.options import PRESETS, option
from erv_min.rewards import RewardSettings, variant

data_option = partial(option, group="data")
machine = partial(option, group="machine")
toy_option = partial(option, group="toy")
SCHEDULES = ("cosine", "linear", "constant")
RUN = "folder of this run: config.json, metrics.jsonl, model.safetensors"
CLIPS = "clips with labels, 'dfew:/path,mafw:/path', 'json:mafw:/file.json', 'toy:/world'"
MISSING = "share of the clips (or of given predictions) that may be missing"


@dataclass
class MachineSettings:
    """What every script takes that runs a network."""

    seed: int = option(0, "seed of sampling, data order and random weights", least=0, most=2**44 - 1)
    device: str = machine("", "cpu, cuda, cuda:1 (default: cuda if there is one)")
    dtype: str = machine("float32", "type of weights and compute (training: of compute alone)", ("float32", "bfloat16"),
                         paper="bfloat16")


@dataclass
class ModelSettings(MachineSettings):
    """What every script takes that shows clips to a HumanOmni."""

    model: str = option("", "checkpoint: a folder or a hub repository")
    revision: str = data_option("", "branch, tag or commit of that hub repository")
    vision_tower: str = data_option("", "another vision tower than the checkpoint's (divergence 12)")
    audio_tower: str = data_option("", "another Whisper encoder than the checkpoint's")
    text_tower: str = data_option("", "another BERT of the text gate, with its tokenizer.json")
    modality: str = data_option("video_audio", "what the model is given", ("video_audio", "video", "audio"))
    prompt_stage: str = data_option("inference", "the prompt (divergence 10)", ("inference", "sft", "grpo"))
    num_frames: int = data_option(0, "frames per clip (table 8); 0: as the checkpoint says", least=0, toy=4, paper=8)
    geometry: str = data_option("pad", "how frames become squares (divergence 11)", ("pad", "stretch"))
    silence: str = data_option("hear", "what a clip without sound is (divergence 19)", ("hear", "error"))
    workers: int = machine(2, "processes that decode clips ahead of the model; 0: none", least=0, toy=0)


@dataclass
class AnswerSettings(ModelSettings):
    """What every script takes that lets a policy answer (divergence 9)."""

    question: str = option("", "another question than the paper's; it is asked as it stands")
    without: str = option("", "take this away from every clip: black frames, or silence", ("", "video", "audio"))
    temperature: float = option(0.3, "sampling temperature; 0 is greedy (section 4.3)", least=0)
    top_p: float = option(1.0, "nucleus of the sampling; 1: no cut (release: 0.9)", over=0, most=1)
    max_new_tokens: int = option(512, "longest output in tokens", least=1)


@dataclass
class PredictionSettings(AnswerSettings):
    """Predictions over data sets: scripts/evaluate.py and `scripts/augment.py describe`."""

    data: str = option("", CLIPS)
    allow_missing: float = data_option(0.01, MISSING, least=0, most=1)
    out: str = option("", "folder of the results")
    limit: int = option(0, "the first so many clips only; 0: all", least=0)
    batch_size: int = machine(8, "clips at once on one process", least=1)
    resume: bool = option(False, "go on with the predictions that OUT holds")


@dataclass
class TrainingSettings(MachineSettings):
    """What every training script takes: GRPO, SFT, and the verifier's."""

    preset: str = option("toy", "toy: the embedded world, nothing to download; paper-*: table 8", PRESETS)
    resume: bool = option(False, "go on from the last checkpoint in OUT")
    steps: int = machine(0, "optimizer steps; 0: as many as the epochs give", least=0)
    max_grad_norm: float = machine(1.0, "global norm that gradients are clipped to", over=0)
    save_every: int = machine(100, "steps between checkpoints", least=1, toy=50)
    keep: int = machine(2, "checkpoints kept, the newest; if one is damaged the one before it is used", least=1)
    deterministic: bool = machine(False, "on CUDA the same bits in every run, slower: an exact resume needs it")
    random_weights: bool = machine(False, "start from random weights of the preset's dimensions (to try a machine)")
    world: str = toy_option("", "folder of the embedded world (default: OUT/world, or beside OUT)")


@dataclass
class PolicySettings(TrainingSettings, ModelSettings):
    """What both stages take that train a policy. `starts`: a preset's hub repository if --model is not given."""

    data: str = option("", CLIPS + "; toy: without it the embedded world")
    allow_missing: float = data_option(0.01, MISSING, least=0, most=1)
    subtitles: bool = data_option(True, "what is said in the clip enters the prompt if the data set has it")
    cache_features: str = machine("", "folder for the frozen towers' features", toy="WORLD/features")
    train_projectors: bool = data_option(True, "train all of table 8, not the language model alone", toy=False)
    sharding: str = machine("none", "how weights lie on several processes (hand: fsdp.py; torch: fully_shard)",
                            ("none", "hand", "torch"), paper="hand")
    recompute: bool = machine(False, "recompute activations in the backward pass: less memory, more time", paper=True)


@dataclass
class SFTSettings(PolicySettings):
    """Eq. 2."""

    stage = "sft"
    starts = {"paper-0.5b": "StarJiaxing/HumanOmni-0.5B", "paper-7b": "StarJiaxing/HumanOmni-7B"}  # section 4.3
    out: str = option("", RUN, own_folder=True, toy="runs/toy/sft")
    epochs: int = option(5, "passes over the data (table 8)", least=1, toy=1, paper_7b=10)
    batch_size: int = option(32, "samples per optimizer step, over all processes (table 8)", least=1, toy=24)
    micro_batch: int = machine(4, "samples per forward pass on one process", least=1, toy=24, paper_7b=1)
    lr: float = option(2e-5, "peak learning rate (table 8)", least=0, toy=3e-3)
    warmup: float = option(0.03, "share of the steps with a rising learning rate (table 8)", least=0, most=1)
    schedule: str = option("cosine", "learning rate after the warm-up (table 8)", SCHEDULES)
    loss_reduction: str = option("mean", "Eq. 2 over label tokens (divergence 8)", ("mean", "sum"))
    targets_per_clip: int = option(1, "targets of one clip that share its prompt in a step", least=1, toy=3)
    answers_only: bool = variant(False, "leave every <think> empty, to see what the reasoning is worth")
    train_vision_tower: bool = variant(False, "train the vision tower too, as table 8 says (divergence 12)")


@dataclass
class GRPOSettings(RewardSettings, PolicySettings):
    """Eq. 3 to 5 and algorithm 1."""

    stage = "grpo"
    starts = {"paper-0.5b": "StarJiaxing/EMER-SFT-0.5B"}
    out: str = option("", RUN, own_folder=True, toy="runs/toy")
    erv: str = option("", "the verifier: a folder or a hub repository")
    steps: int = machine(0, "optimizer steps; 0: as many as the epochs give", least=0, toy=100)
    epochs: int = option(2, "passes over the data (table 8)", least=1)
    batch_size: int = option(16, "prompts per optimizer step, over all processes (table 8)", least=1, toy=32)
    micro_batch: int = machine(1, "prompts per forward pass on one process", least=1, toy=8)
    group_size: int = option(16, "G, completions per prompt (section 4.3)", least=2, toy=8)
    beta: float = option(0.04, "weight of the KL term (Eq. 3)", least=0, toy=0.07)
    epsilon: float = option(0.2, "clip range of the ratio; has no effect while mu is 1", least=0)
    mu: int = option(1, "updates per batch of completions (divergence 6)", least=1)
    temperature: float = option(1.0, "sampling temperature of the rollouts (divergence 9)", over=0)
    max_new_tokens: int = option(512, "longest completion in tokens", least=1, toy=72)
    lr: float = option(1e-6, "peak learning rate (table 8)", least=0, toy=5e-4)
    warmup: float = option(0.0, "share of the steps with a rising learning rate", least=0, most=1, toy=0.15)
    schedule: str = option("cosine", "learning rate after the warm-up (table 8)", SCHEDULES, toy="linear")
    advantages: str = variant("grpo", "(R - mean) / std in the group; dr-grpo: not divided", ("grpo", "dr-grpo"))
    loss_type: str = variant("grpo", "mean over a completion's tokens; dapo: over the batch's; dr-grpo: no mean",
                             ("grpo", "dapo", "dr-grpo"))
    kl: str = variant("k3", "the KL term as a loss; k2: with KL's own gradient (divergence 21)", ("k3", "k2"))
    mask_truncated: bool = variant(False, "completions cut at --max-new-tokens leave the loss (DAPO's filtering)")
    top_k: int = variant(0, "the k best tokens in the rollouts; 0: no cut, release: 50 (divergence 9)", least=0)
    rollout_batch: int = machine(0, "prompts that a process samples at once; 0: all of its own", least=0)
    sample_every: int = toy_option(20, "steps between completions printed and kept in completions.jsonl", least=1)
    watch_every: int = toy_option(0, "steps between EEA and EPC of 64 held-out clips; 0: never", least=0, toy=20)
    watch_erv: str = toy_option("", "the verifier that judges them, not --erv (the world has its lexicon)")
    baseline: bool = toy_option(False, "the table's second row: GRPO without R_E, the paper's Baseline", toy=True)
    eval_temperature: float = toy_option(0.3, "temperature of the evaluation (section 4.3); 0 is greedy", least=0)
    eval_clips: int = toy_option(0, "held-out clips of the final table; 0: all, -1: no table", least=-1)


@dataclass
class ERVSettings(TrainingSettings):
    """Section 3.2: the verifier."""

    preset: str = option("toy", "toy: the embedded world; paper-*: section 4.3", ("toy", "paper", *PRESETS[1:]))
    out: str = option("", "folder of this run, which --erv takes", own_folder=True, toy="runs/toy/erv")
    data: str = option("", "JSONL files, separated by commas (toy: the world's)")
    valid: str = option("", "JSONL files to measure on (toy: the world's; else --holdout)")
    holdout: float = option(0.1, "share of clips held out if --valid gives no file", least=0, most=1)
    sources: str = option("", "train on rows of these sources only, e.g. emer,merr (table 2: without augmentation)")
    init: str = option("SamLowe/roberta-base-go_emotions", "starting weights: folder, hub repository, or random "
                       "ones, scratch:toy, scratch:base", toy="scratch:toy")
    tokenizer: str = option("", "folder of tokenizer.json, if --init is scratch (default: the world's)")
    head: int = option(11, "classes of the output layer: 11, or 28 to keep GoEmotions' (divergence 4)", (11, 28))
    epochs: int = option(10, "passes over the data (section 4.3)", least=1, toy=4)
    batch_size: int = option(64, "rows per optimizer step, over all processes (section 4.3)", least=1)
    lr: float = option(3e-5, "peak learning rate (section 4.3)", least=0, toy=3e-3)
    warmup: float = option(0.0, "share of the steps with a rising learning rate", least=0, most=1, toy=0.05)
    schedule: str = option("linear", "learning rate after the warm-up (the paper does not say)", SCHEDULES)
    dropout: float = option(0.1, "dropout rate, attention's included (RoBERTa: 0.1)", least=0, most=0.99, toy=0.0)
    save_every: int = machine(200, "steps between checkpoints", least=1)
    tau: float = option(0.5, "threshold of algorithm 1 that the report is for", least=0, most=1)
    k: int = option(2, "labels per sentence at most (algorithm 1)", least=1)


# Trainable parts, table 8 (divergence 13): named sets, see model.parameters.freeze_except.
TRAINABLE = {
    "sft": ("language_model", "visual_projector", "audio_projector", "gate_mlp"),
    "grpo": ("language_model", "visual_projector", "audio_projector", "text_encoder"),
}


def trained_parts(settings: SFTSettings | GRPOSettings) -> tuple[str, ...]:
    """The names of the parts that a run trains."""
    parts = TRAINABLE[settings.stage] if settings.train_projectors else ("language_model",)
    return parts + (("vision_tower",) if getattr(settings, "train_vision_tower", False) else ())
