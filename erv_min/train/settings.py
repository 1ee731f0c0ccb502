"""Settings of each stage: table 8 and section 4.3 as presets, and one command-line style for every script.

A setting is a dataclass field; the preset gives its value and the command line overrides it (options.py). `paper-0.5b`
and `paper-7b` hold the paper's values, `toy` the embedded world's (a model a thousand times smaller needs larger
steps). What is no ablation of the paper, divergence of the release or matter of the user's hardware is no option.
"""

import dataclasses
from dataclasses import dataclass

from erv_min.rewards import RewardSettings
from erv_min.base.options import add_options, check, checked, parse, parser_for, option  # noqa: F401


@dataclass
class Compute:
    """What every script takes that runs a network."""

    seed: int = option(0, "seed of the sampling (training: also of data order and random weights)", least=0)
    device: str = option("", "cpu, cuda, cuda:1 (default: cuda where there is one)")
    dtype: str = option("float32", "type of weights and compute (training: of compute alone)", ("float32", "bfloat16"))


@dataclass
class ModelSettings(Compute):
    """What every script takes that shows clips to a HumanOmni."""

    model: str = option("", "checkpoint: a folder or a hub repository", path="hub")
    revision: str = option("", "branch, tag or commit of that hub repository")
    vision_tower: str = option("", "take this tower (folder or hub repository) in place of the checkpoint's own or of "
                                    "the one its config.json names (divergence 12)", path="hub")
    audio_tower: str = option("", "the same for Whisper's encoder", path="hub")
    text_tower: str = option("", "the same for the text gate's BERT and its tokenizer.json", path="hub")
    modality: str = option("video_audio", "what the model is given", ("video_audio", "video", "audio"))
    prompt_stage: str = option("inference", "which released prompt to render (divergence 10)",
                                ("inference", "sft", "grpo"))
    num_frames: int = option(0, "frames per clip; 0: as the checkpoint says", least=0)
    geometry: str = option("pad", "frames to a square: padded, or stretched as in the released inference "
                                   "(divergence 11)", ("pad", "stretch"))
    silence: str = option("hear", "a clip without sound: hear 10 s of silence as the release does, counted, logged, "
                                   "or error, the clip counts as one that cannot be decoded (divergence 19)",
                           ("hear", "error"))
    workers: int = option(2, "processes that decode clips ahead of the model; 0: none, the script does it", least=0)


@dataclass
class Clips:
    """What every script takes that reads data sets."""

    data: str = option("", "clips with labels, 'dfew:/path,mafw:/path', 'json:mafw:/file.json', 'toy:/world' "
                            "(training, toy: without it the embedded world, rendered where it is not there yet)",
                      path="data")
    allow_missing: float = option(0.01, "share of the clips (or of given predictions) that may be missing", least=0,
                                   most=1)


@dataclass
class AnswerSettings(ModelSettings):
    """What every script takes that lets a policy answer (divergence 9)."""

    question: str = option("", "another question than the paper's; it is asked as it stands")
    without: str = option("", "take this away from every clip: video gives black frames, audio silence; the prompt "
                               "and all else stay", ("", "video", "audio"))
    temperature: float = option(0.3, "sampling temperature; 0 is greedy (section 4.3)", least=0)
    top_p: float = option(1.0, "nucleus of the sampling; 1: no cut (release: 0.9)", over=0, most=1)
    max_new_tokens: int = option(512, "longest output in tokens", least=1)


@dataclass
class PredictionSettings(Clips, AnswerSettings):
    """Predictions over data sets: scripts/evaluate.py and `scripts/augment.py describe`."""

    out: str = option("", "folder of the results")
    limit: int = option(0, "the first so many clips only; 0: all", least=0)
    batch_size: int = option(8, "clips at once on one process", least=1)
    resume: bool = option(False, "go on with the predictions that OUT holds")


@dataclass
class Training(Compute):
    """What every training script takes: GRPO, SFT, and the verifier's."""

    preset: str = option("toy", "toy: the embedded world, nothing to download; paper-0.5b, paper-7b: table 8",
                          ("toy", "paper-0.5b", "paper-7b"))
    out: str = option("", "folder of this run: config.json, metrics.jsonl, model.safetensors (default: runs/...)")
    world: str = option("", "folder of the embedded world (default: OUT/world, or beside OUT)")
    random_weights: bool = option(False, "start from random weights of the preset's dimensions (to try a machine)")
    steps: int = option(0, "optimizer steps; 0: as many as the epochs give", least=0)
    epochs: int = option(5, "passes over the data (table 8)", least=1)
    batch_size: int = option(32, "samples (GRPO: prompts) per optimizer step, over all processes (table 8)", least=1)
    lr: float = option(2e-5, "peak learning rate (table 8)", least=0)
    warmup: float = option(0.03, "share of the steps with a rising learning rate (table 8)", least=0, most=1)
    schedule: str = option("cosine", "learning rate after the warm-up (table 8: cosine)",
                            ("cosine", "linear", "constant"))
    max_grad_norm: float = option(1.0, "global norm that gradients are clipped to", over=0)
    seed: int = option(17, "seed of data order, sampling and random weights (verifier: also of split and dropout)",
                        least=0)
    resume: bool = option(False, "go on from the last checkpoint in OUT")
    deterministic: bool = option(False, "on CUDA kernels that give the same bits in every run, slower: an exact "
                                         "resume needs them")
    save_every: int = option(100, "steps between checkpoints", least=1)
    keep: int = option(2, "checkpoints kept, the newest ones; where one is damaged the one before it is used", least=1)


@dataclass
class Common(Training, Clips, ModelSettings):
    """What both stages take that train a policy."""

    subtitles: bool = option(True, "what is said in the clip enters the prompt where the data set has it (EMER, MERR)")
    micro_batch: int = option(4, "samples (GRPO: prompts) per forward pass on one process; lower it when out of "
                                  "memory", least=1)
    sharding: str = option("none", "how weights lie on several processes: none (whole on each), hand (fsdp.py), torch "
                                    "(PyTorch's fully_shard)", ("none", "hand", "torch"))
    recompute: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    cache_features: str = option("", "folder for the frozen towers' features, so that later epochs and runs skip "
                                      "decoding and towers; 'memory' keeps them in memory")
    train_projectors: bool = option(True, "train what table 8 trains besides the language model: projectors, and the "
                                           "gate's MLP (SFT) or BERT (GRPO); the toy's would forget what they see")
    num_frames: int = option(8, "frames per clip (table 8)", least=1)


@dataclass
class SFTSettings(Common):
    """Eq. 2."""

    loss_reduction: str = option("mean", "Eq. 2 as a mean over label tokens (release) or their sum (paper); "
                                          "divergence 8", ("mean", "sum"))
    targets_per_clip: int = option(1, "targets of one clip that share its prompt in a step", least=1)
    answers_only: bool = option(False, "leave every <think> empty: a policy that answers without explaining, to see "
                                        "what the reasoning is worth")
    train_vision_tower: bool = option(False, "train the vision tower too, as table 8 says and the release does not "
                                              "(divergence 12)")


@dataclass
class GRPOSettings(RewardSettings, Common):
    """Eq. 3 to 5 and algorithm 1 (RewardSettings), and named variants of Eq. 3."""

    erv: str = option("", "the verifier: a folder or a hub repository", path="hub")
    group_size: int = option(16, "G, completions per prompt (section 4.3)", least=2,
                            why="no group would have a spread")
    beta: float = option(0.04, "weight of the KL term (Eq. 3)", least=0)
    epsilon: float = option(0.2, "clip range of the ratio; has no effect while mu is 1", least=0)
    mu: int = option(1, "updates per batch of completions (divergence 6)", least=1)
    advantages: str = option("grpo", "grpo: (R - mean) / std in the group; dr-grpo: without the division",
                             ("grpo", "dr-grpo"))
    loss_type: str = option("grpo", "grpo: mean over a completion's tokens, then over completions; dapo: over all "
                                     "tokens of the batch; dr-grpo: sum over tokens / --max-new-tokens",
                             ("grpo", "dapo", "dr-grpo"))
    kl: str = option("k3", "the KL term as a loss: k3 (release; divergence 21), or k2, which has KL's gradient",
                      ("k3", "k2"))
    mask_truncated: bool = option(False, "completions cut at --max-new-tokens leave the loss (DAPO's filtering)")
    temperature: float = option(1.0, "sampling temperature of the rollouts (divergence 9)", over=0,
                                 why="at 0 all G completions are the same, and no group would have a spread")
    top_k: int = option(0, "cut the rollouts' distribution to the k best tokens; 0: no cut, release: 50 "
                          "(divergence 9)", least=0)
    max_new_tokens: int = option(512, "longest completion in tokens", least=1)
    rollout_batch: int = option(0, "prompts that a process samples at once; 0: all, on CUDA as many as memory holds",
                                 least=0)
    ablate: str = option("", "table 2: leave one part of R_E out (augmentation: of the verifier's data)",
                          ("", "neutral-filtering", "sentence-level", "augmentation"))
    sample_every: int = option(20, "steps between completions that are printed and kept in completions.jsonl", least=1)
    watch_every: int = option(0, "steps between EEA and EPC of 64 held-out clips in metrics.jsonl, where reward "
                                  "hacking shows while it happens; 0: never", least=0)
    watch_erv: str = option("", "the verifier that judges them, not the one trained against (the embedded world has "
                                 "its lexicon)", path="hub")
    baseline: bool = option(False, "also train and evaluate GRPO without R_E, the paper's Baseline")
    eval_temperature: float = option(0.3, "temperature of the evaluation (section 4.3); 0 is greedy", least=0)
    eval_clips: int = option(0, "held-out clips of the final table; 0: all, -1: no table", least=-1)


ABLATIONS = {"neutral-filtering": {"neutral_filter": False}, "sentence-level": {"sentence_level": False}}  # table 2


def reward_settings(settings: GRPOSettings) -> RewardSettings:
    """The rewards that a run is trained with: its settings, and what --ablate takes away."""
    own = {field.name: getattr(settings, field.name) for field in dataclasses.fields(RewardSettings)}
    return RewardSettings(**own | ABLATIONS.get(settings.ablate, {}))


# Trainable parts, table 8 (divergence 13): named sets, see model.humanomni.freeze_except.
TRAINABLE = {
    "sft": ("language_model", "visual_projector", "audio_projector", "gate_mlp"),
    "grpo": ("language_model", "visual_projector", "audio_projector", "text_encoder"),
}

def trained_parts(stage: str, settings: Common) -> tuple[str, ...]:
    """The names of the parts that a run trains."""
    parts = TRAINABLE[stage] if settings.train_projectors else ("language_model",)
    return parts + (("vision_tower",) if getattr(settings, "train_vision_tower", False) else ())


_TOY = dict(num_frames=4, cache_features="memory", seed=0, workers=0, save_every=50, train_projectors=False)
_PAPER = dict(dtype="bfloat16", recompute=True, sharding="hand")
_BIG = dict(_PAPER, micro_batch=1)
PRESETS = {
    "sft": {
        "toy": dict(_TOY, epochs=1, batch_size=24, micro_batch=24, targets_per_clip=3, lr=3e-3),
        "paper-0.5b": dict(_PAPER, epochs=5, batch_size=32, micro_batch=4, lr=2e-5),
        "paper-7b": dict(_BIG, epochs=10, batch_size=32, lr=2e-5),
    },
    "grpo": {
        "toy": dict(_TOY, steps=100, epochs=2, batch_size=32, micro_batch=16, lr=5e-4, schedule="linear", warmup=0.15,
                    group_size=8, max_new_tokens=72, beta=0.07, watch_every=20),
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
