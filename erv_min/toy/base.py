"""The toy's base model, in the place of the released HumanOmni: it sees, hears, describes and reads; it recognises no
emotion in a clip.

1. `train_towers`: SigLIP and Whisper at tiny dimensions, with their projectors, regress the generator's parameters
   (mouth, brows, pitch, tempo, ..., and what the clip looks like), read through the same media code as every clip.
2. `train_reading`: the language model learns from text alone to answer what the explanation before says. Without it
   SFT would have to teach this, too, and does in one seed and not in another.
3. `train_captions`: the language model alone learns to describe the clips (Eq. 2 on pretrain.json); with projectors
   that train from the start it would learn the texts and never look.
Towers are frozen from here on. Without this base the explanations are not grounded, and no reward can find them.
"""

import shutil
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min.base.errors import ClipError
from erv_min.base.files import read_jsonl
from erv_min.base.onednn import use_onednn
from erv_min.base.processes import rank_and_size
from erv_min.base.progress import Progress
from erv_min.checkpoint import save_humanomni
from erv_min.config import humanomni
from erv_min.data.loader import batch_of_step, clip_inputs
from erv_min.data.readers import read_training_json
from erv_min.logps import Completions, completion_logps
from erv_min.model.humanomni import HumanOmni, pad_rows
from erv_min.model.parameters import freeze_except, init_weights
from erv_min.prompts import gate_text, render, sft_target
from erv_min.sft import sft_loss
from erv_min.tokenizer import EncoderTokenizer, Tokenizer
from erv_min.toy.render import HAIRS, ROOMS, SHIRTS
from erv_min.train.optimizer import learning_rate, make_optimizer, update
from erv_min.train.sharding import Replicated


def look_targets(look: dict) -> list[float]:
    """What a clip shows besides the expression, as numbers: room, shirt and hair one-hot, woman, glasses, long hair."""
    shown = [look["room"] == room for room in ROOMS] + [look["shirt"] == shirt for shirt in SHIRTS]
    shown += [look["hair"] == hair for hair in HAIRS] + [look["woman"], look["glasses"], look["long_hair"]]
    return [float(value) for value in shown]


def train(name: str, module: nn.Module, losses: Callable[[int], dict[str, Tensor]], steps: int, lr: float,
          warmup: float) -> None:
    """Descends the sum of `losses(step)`, named losses of this process's share, in place; a line every 50 steps."""
    learner, started = Replicated(module, compute=torch.float32), time.time()
    optimizer = make_optimizer(learner.named_parameters().values())
    with Progress(name, steps, "step") as progress:
        for step in range(steps):
            found = losses(step)
            sum(found.values()).backward()
            update(learner, optimizer, learning_rate(step, steps, lr, warmup), 1.0)
            progress.add()
            if (step + 1) % 50 == 0 and rank_and_size()[0] == 0:
                print(f"{name}: step {step + 1}/{steps} " + " ".join(f"{k} {v.item():.4f}" for k, v in found.items())
                      + f", {time.time() - started:.1f} s", flush=True)


def train_towers(model: HumanOmni, rows: list[dict], video: Tensor, audio: Tensor, gate: tuple[Tensor, Tensor],
                 seed: int = 0, steps: int = 250, batch_size: int = 32, lr: float = 2e-3) -> None:
    """Regresses params.jsonl's `rows` from their clips' modality tokens; towers and projectors train, in place."""
    seen = torch.tensor([r["face"] + look_targets(r["look"]) for r in rows])  # [clips, F]
    heard = torch.tensor([r["voice"] + [float(r["look"]["woman"])] for r in rows])
    # Linear heads on the mean token, normalised as the language model's first layer will: what a head of attention that
    # looks at a whole modality finds. Dropped afterwards.
    width = model.config.text.hidden_size
    torch.manual_seed(seed)  # torch's own start seed differs from process to process (2.13)
    see, hear = nn.Linear(width, seen.shape[1]), nn.Linear(width, heard.shape[1])
    freeze_except(model, ("vision_tower", "visual_projector", "audio_projector"))
    model.model.audio_tower.requires_grad_()

    def losses(step: int) -> dict[str, Tensor]:
        batch = torch.tensor(batch_of_step(len(rows), batch_size // rank_and_size()[1], seed, step))
        shown = see(F.rms_norm(model.encode_video(video[batch], *gate), (width,)).mean(1))
        sounds = hear(F.rms_norm(model.encode_audio(audio[batch]), (width,)).mean(1))
        return {"video loss": F.mse_loss(shown, seen[batch]), "audio loss": F.mse_loss(sounds, heard[batch])}

    train("towers", nn.ModuleList([model, see, hear]), losses, steps, lr, warmup=0.1)


def train_reading(model: HumanOmni, texts: list[dict], tokenizer: Tokenizer, seed: int = 0, steps: int = 250,
                  batch_size: int = 64, lr: float = 3e-3) -> None:
    """Eq. 2 on `texts` (rows of reading.jsonl), no clip before them; the language model alone trains, in place.

    The answer's tokens count a second time, as a mean of their own: among all tokens they would hardly weigh.
    """
    freeze_except(model, ("language_model",))
    targets = [tokenizer.encode(sft_target(t["explanation"], t["emotion"])) + tokenizer.turn_end for t in texts]
    ends = [len(tokenizer.encode(f"<answer>{t['emotion']}</answer>") + tokenizer.turn_end) for t in texts]
    ends, start = torch.tensor(ends), torch.tensor([[tokenizer.eos_id]])

    def losses(step: int) -> dict[str, Tensor]:
        batch = batch_of_step(len(texts), batch_size // rank_and_size()[1], seed, step)
        y = Completions(*pad_rows([targets[i] for i in batch], tokenizer.pad_id, start.device))
        logps, _ = completion_logps(model, model.splice(start.expand(len(batch), -1)), y)
        left = y.mask.flip(1).cumsum(1).flip(1)  # tokens of the text from here on
        answers = y.mask & (left <= ends[batch][:, None])
        return {"loss": sft_loss(logps, y.mask), "answer loss": sft_loss(logps, answers)}

    train("reading", model, losses, steps, lr, warmup=0.05)


def train_captions(model: HumanOmni, captions: list[list[str]], video: Tensor, audio: Tensor, tokenizer: Tokenizer,
                   seed: int = 0, steps: int = 250, batch_size: int = 16, lr: float = 4e-3) -> None:
    """Eq. 2 on `captions` (several per clip, sharing its prompt); the language model alone trains, in place.

    video, audio: the clips' tokens [clips, V, D], [clips, A, D].
    """
    freeze_except(model, ("language_model",))
    ids = torch.tensor([tokenizer.encode(render())])

    def losses(step: int) -> dict[str, Tensor]:
        batch = batch_of_step(len(captions), batch_size // rank_and_size()[1], seed, step)
        prompts = model.splice(ids.expand(len(batch), -1), video[batch], audio[batch])
        targets = [tokenizer.encode(c) + tokenizer.turn_end for i in batch for c in captions[i]]
        targets = Completions(*pad_rows(targets, tokenizer.pad_id, prompts.embeds.device))
        return {"loss": sft_loss(completion_logps(model, prompts, targets)[0], targets.mask)}

    train("captions", model, losses, steps, lr, warmup=0.05)


def train_base(world: Path, seed: int = 0) -> None:
    """Trains the base model on the rendered world in `world` and saves it, tokenizers and all, as `world`/base.

    Each process of a group learns from its own share of the clips, and their gradients are averaged: another number of
    processes gives another model. The main command takes two.
    """
    rank, size = rank_and_size()
    started, texts, out = time.time(), world / "tokenizers", world / "base"
    tokenizer, gate_tokenizer = Tokenizer(texts / "lm"), EncoderTokenizer(texts / "text_gate")
    model = use_onednn(HumanOmni(humanomni("toy")))
    init_weights(model, seed)
    params = {str(row["number"]): row for row in read_jsonl(world / "params.jsonl")}
    written = read_training_json(world / "pretrain.json", world, "dfew")
    units = [list(unit) for _, unit in groupby(written, key=lambda e: e.video_id)]  # captions of a clip stand together
    units = units[rank::size]
    decoded = clip_inputs([unit[0] for unit in units], model.config, None, num_frames=model.config.num_frames)
    with Progress("clips are decoded", len(units), "clip") as progress:
        for i, x in enumerate(decoded):
            if isinstance(x, ClipError):
                raise x
            if i == 0:  # [clips, T, 3, S, S], [clips, mels, F]; a list of clips, stacked, would hold them twice
                video, audio = (one.new_empty(len(units), *one.shape) for one in (x.clip.video, x.clip.audio))
            video[i], audio[i] = x.clip.video, x.clip.audio
            progress.add()
    if rank == 0:
        print(f"base model: {len(written)} captions, their clips decoded in {time.time() - started:.1f} s", flush=True)
    gate = gate_tokenizer.encode_batch([gate_text()])
    train_towers(model, [params[unit[0].video_id] for unit in units], video, audio, gate, seed)
    with torch.no_grad():  # nothing before the language model moves from here on: its tokens are computed once
        video = torch.cat([model.encode_video(v, *gate) for v in video.split(64)])
        audio = torch.cat([model.encode_audio(a) for a in audio.split(64)])
    train_reading(model, read_jsonl(world / "reading.jsonl")[rank::size], tokenizer, seed)
    captions = [[sft_target(e.explanation, e.label) for e in unit] for unit in units]
    train_captions(model, captions, video, audio, tokenizer, seed)
    if rank:
        return
    shutil.copytree(texts / "lm", out, dirs_exist_ok=True)
    shutil.copytree(texts / "text_gate", out / "text_gate", dirs_exist_ok=True)
    save_humanomni(model, out)
