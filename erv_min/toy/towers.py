"""The toy preset's towers: they learn the small world, then are frozen, as the released ones learnt the real one.

SigLIP and Whisper at tiny dimensions regress the generator's parameters (mouth, brows, pitch, tempo, ..., and what the
clip looks like) from the pre-training clips alone, read through the same media code as every clip. No emotion label is
used. The rest of the model keeps its random weights; `scripts/sft.py` on pretrain.json then teaches it to caption.
"""

import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min.checkpoint import save_humanomni
from erv_min.config import humanomni
from erv_min.data import Example
from erv_min.errors import ClipError
from erv_min.files import read_jsonl
from erv_min.inputs import clip_inputs
from erv_min.model.humanomni import HumanOmni, init_weights
from erv_min.toy.render import HAIRS, ROOMS, SHIRTS
from erv_min.train import World, batch_of_step, learning_rate, make_optimizer, update


def look_targets(look: dict) -> list[float]:
    """What a clip shows besides the expression, as numbers: room, shirt and hair one-hot, woman, glasses, long hair."""
    one_hot = [float(look[key] == value) for key, values in (("room", ROOMS), ("shirt", SHIRTS), ("hair", HAIRS))
               for value in values]
    return one_hot + [float(look[key]) for key in ("woman", "glasses", "long_hair")]


def train_towers(folder: Path, seed: int = 0, steps: int = 400, batch_size: int = 64, lr: float = 2e-3,
                 workers: int = 2) -> Path:
    """Trains both towers on the world in `folder` and saves a whole HumanOmni in `folder`/towers; returns that folder."""
    started, config = time.time(), humanomni("toy")
    model = HumanOmni(config)
    init_weights(model, seed)
    rows = [row for row in read_jsonl(folder / "params.jsonl") if row["split"] == "pretrain"]
    clips = [Example(str(r["number"]), folder / "clip" / f"{r['number']}.mp4", r["label"], "dfew") for r in rows]
    video, audio = [], []
    for x in clip_inputs(clips, model, None, num_frames=config.num_frames, workers=workers):
        if isinstance(x, ClipError):
            raise x
        video.append(x.clip.video)
        audio.append(x.clip.audio)
    print(f"towers: {len(rows)} clips decoded in {time.time() - started:.1f} s", flush=True)
    video, audio = torch.stack(video), torch.stack(audio)
    seen = torch.tensor([r["face"] + look_targets(r["look"]) for r in rows])  # [clips, F]
    heard = torch.tensor([r["voice"] + [float(r["look"]["woman"])] for r in rows])

    # Linear heads on all positions, so that what the projectors will read stays where it was seen; dropped afterwards.
    see = nn.Linear(config.vision.hidden_size * config.vision.grid**2, seen.shape[1])
    hear = nn.Linear(config.audio.d_model * (config.audio.max_source_positions // 3), heard.shape[1])
    params = [*model.model.vision_tower.parameters(), *model.model.audio_tower.parameters(), *see.parameters(),
              *hear.parameters()]
    optimizer, alone = make_optimizer(params, weight_decay=0.01), World(0, 1, torch.device("cpu"))
    for step in range(steps):
        batch = torch.tensor(batch_of_step(len(rows), batch_size, seed, step))
        shown = see(model.vision_features(video[batch]).flatten(2)).mean(1)  # [B, T, N, C] -> mean over frames [B, F]
        sounds = hear(model.audio_features(audio[batch]).flatten(1))
        losses: tuple[Tensor, Tensor] = F.mse_loss(shown, seen[batch]), F.mse_loss(sounds, heard[batch])
        sum(losses).backward()
        update(optimizer, params, learning_rate(step, steps, lr, 0.1), 1.0, alone)
        if step % 100 == 0 or step + 1 == steps:
            print(f"towers: step {step + 1}/{steps} video loss {losses[0]:.4f} audio loss {losses[1]:.4f} "
                  f"| {time.time() - started:.1f} s", flush=True)
    out = folder / "towers"
    out.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "tokenizers" / "lm" / name, out / name)
    shutil.copytree(folder / "tokenizers" / "text_gate", out / "text_gate", dirs_exist_ok=True)
    save_humanomni(model, out)
    return out
