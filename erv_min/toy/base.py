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

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min.base.errors import ClipError
from erv_min.base.files import read_jsonl
from erv_min.base.processes import rank_and_size
from erv_min.base.progress import Progress
from erv_min.checkpoint import save_humanomni
from erv_min.config import humanomni
from erv_min.data.loader import batch_of_step, clip_inputs
from erv_min.data.readers import read_training_json
from erv_min.logps import Completions, completion_logps
from erv_min.model.humanomni import HumanOmni, pad_rows
from erv_min.model.parameters import freeze_except, random_humanomni
from erv_min.prompts import gate_text, render, sft_target
from erv_min.sft import sft_loss
from erv_min.tokenizer import EncoderTokenizer, Tokenizer
from erv_min.toy.render import HAIRS, ROOMS, SHIRTS
from erv_min.train.optimizer import learning_rate, make_optimizer, update
from erv_min.train.sharding import Replicated

# Steps, clips or texts per step over all processes, peak learning rate, share of the steps that warm up.
TRAININGS = {"towers": (250, 32, 2e-3, 0.1), "reading": (250, 64, 3e-3, 0.05), "captions": (250, 16, 4e-3, 0.05)}


def train(name: str, module: nn.Module, loss_of: Callable[[list[int]], Tensor], count: int, seed: int) -> None:
    """Trains `module` in place, as TRAININGS[name] says: descends the loss of each step's batch, given as numbers of
    this process's `count` items."""
    steps, batch_size, lr, warmup = TRAININGS[name]
    (rank, size), learner = rank_and_size(), Replicated(module, compute=torch.float32)
    optimizer = make_optimizer(learner.named_parameters().values())
    with Progress(name, steps, "step") as progress:
        for step in range(steps):
            loss = loss_of(batch_of_step(count, batch_size // size, seed, step))
            loss.backward()
            update(learner, optimizer, learning_rate(step, steps, lr, warmup), 1.0)
            progress.add()
    if rank == 0:
        print(f"base model, {name}: loss {loss.item():.4f} after {steps} steps", flush=True)


def look_targets(look: dict) -> list[bool]:
    """What a clip shows besides the expression: room, shirt and hair one-hot, woman, glasses, long hair."""
    shown = [look["room"] == room for room in ROOMS] + [look["shirt"] == shirt for shirt in SHIRTS]
    return shown + [look["hair"] == hair for hair in HAIRS] + [look["woman"], look["glasses"], look["long_hair"]]


def train_towers(model: HumanOmni, rows: list[dict], video: Tensor, audio: Tensor, gate: tuple[Tensor, Tensor],
                 seed: int) -> None:
    """Regresses params.jsonl's `rows` from their clips' modality tokens; towers and projectors train, in place."""
    seen = torch.tensor([r["face"] + look_targets(r["look"]) for r in rows])  # [clips, F]
    heard = torch.tensor([r["voice"] + [r["look"]["woman"]] for r in rows])
    # Linear heads on the mean token, normalised as the language model's first layer will: what a head of attention that
    # looks at a whole modality finds. Dropped afterwards.
    width = model.config.text.hidden_size
    torch.manual_seed(seed)  # torch's own start seed differs from process to process (2.13)
    see, hear = nn.Linear(width, seen.shape[1]), nn.Linear(width, heard.shape[1])
    freeze_except(model, ("vision_tower", "visual_projector", "audio_projector"))
    model.model.audio_tower.requires_grad_()

    def loss_of(batch: list[int]) -> Tensor:
        shown = see(F.rms_norm(model.encode_video(video[batch], *gate), (width,)).mean(1))
        sounds = hear(F.rms_norm(model.encode_audio(audio[batch]), (width,)).mean(1))
        return F.mse_loss(shown, seen[batch]) + F.mse_loss(sounds, heard[batch])

    train("towers", nn.ModuleList([model, see, hear]), loss_of, len(rows), seed)


def train_reading(model: HumanOmni, texts: list[dict], tokenizer: Tokenizer, seed: int) -> None:
    """Eq. 2 on `texts` (rows of reading.jsonl), no clip before them; the language model alone trains, in place.

    The answer's tokens count a second time, as a mean of their own: among all tokens they would hardly weigh.
    """
    freeze_except(model, ("language_model",))
    targets = [tokenizer.encode(sft_target(t["explanation"], t["emotion"])) + tokenizer.turn_end for t in texts]
    ends = [len(tokenizer.encode(f"<answer>{t['emotion']}</answer>") + tokenizer.turn_end) for t in texts]
    ends, start = torch.tensor(ends), torch.tensor([[tokenizer.eos_id]])

    def loss_of(batch: list[int]) -> Tensor:
        y = Completions(*pad_rows([targets[i] for i in batch], tokenizer.pad_id, start.device))
        logps, _ = completion_logps(model, model.splice(start.expand(len(batch), -1)), y)
        left = y.mask.flip(1).cumsum(1).flip(1)  # tokens of the text from here on
        answers = y.mask & (left <= ends[batch][:, None])
        return sft_loss(logps, y.mask) + sft_loss(logps, answers)

    train("reading", model, loss_of, len(texts), seed)


def train_captions(model: HumanOmni, captions: list[list[str]], video: Tensor, audio: Tensor, tokenizer: Tokenizer,
                   seed: int) -> None:
    """Eq. 2 on `captions` (several per clip, sharing its prompt); the language model alone trains, in place.

    video, audio: the clips' tokens [clips, V, D], [clips, A, D].
    """
    freeze_except(model, ("language_model",))
    ids = torch.tensor([tokenizer.encode(render())])

    def loss_of(batch: list[int]) -> Tensor:
        prompts = model.splice(ids.expand(len(batch), -1), video[batch], audio[batch])
        targets = [tokenizer.encode(c) + tokenizer.turn_end for i in batch for c in captions[i]]
        targets = Completions(*pad_rows(targets, tokenizer.pad_id, prompts.embeds.device))
        return sft_loss(completion_logps(model, prompts, targets)[0], targets.mask)

    train("captions", model, loss_of, len(captions), seed)


def train_base(world: Path, seed: int = 0) -> None:
    """Trains the base model on the rendered world in `world` and saves it, tokenizers and all, as `world`/base.

    Each process of a group learns from its own share of the clips, and their gradients are averaged: another number of
    processes gives another model. The main command takes two.
    """
    rank, size = rank_and_size()
    model = random_humanomni(humanomni("toy"), seed)
    model.source_folder, model.gate_folder = (world / "tokenizers" / name for name in ("lm", "text_gate"))
    tokenizer, gate_tokenizer = Tokenizer(model.source_folder), EncoderTokenizer(model.gate_folder)
    params = {str(row["number"]): row for row in read_jsonl(world / "params.jsonl")}
    written = read_training_json(world / "pretrain.json", world, "dfew")
    units = [list(unit) for _, unit in groupby(written, key=lambda e: e.video_id)]  # captions of a clip stand together
    units, config = units[rank::size], model.config
    video = torch.empty(len(units), config.num_frames, 3, config.vision.image_size, config.vision.image_size)
    audio = torch.empty(len(units), config.audio.num_mel_bins, 2 * config.audio.max_source_positions)
    with Progress("clips are decoded", len(units), "clip") as progress:
        # Without decoding processes, which would stay, 0.1 GB each: the two that train share the cores.
        decoded = clip_inputs([unit[0] for unit in units], config, None, 0, num_frames=config.num_frames)
        for i, x in enumerate(decoded):
            if isinstance(x, ClipError):
                raise x
            video[i], audio[i] = x.clip.video, x.clip.audio
            progress.add()
    gate = gate_tokenizer.encode_batch([gate_text()])
    train_towers(model, [params[unit[0].video_id] for unit in units], video, audio, gate, seed)
    with torch.no_grad():  # nothing before the language model moves from here on: its tokens are computed once
        video = torch.cat([model.encode_video(v, *gate) for v in video.split(64)])
        audio = torch.cat([model.encode_audio(a) for a in audio.split(64)])
    train_reading(model, read_jsonl(world / "reading.jsonl")[rank::size], tokenizer, seed)
    captions = [[sft_target(e.explanation, e.label) for e in unit] for unit in units]
    train_captions(model, captions, video, audio, tokenizer, seed)
    if rank == 0:
        save_humanomni(model, world / "base")
