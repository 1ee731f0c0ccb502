"""Whether inputs are what HumanOmni takes: shapes, placeholders, ids. A DataError names the input that is not."""

import torch
from torch import Tensor

from erv_min.base.errors import DataError
from erv_min.config import AUDIO, VIDEO, HumanOmniConfig


def input_shapes(config: HumanOmniConfig) -> dict[str, dict[str, int | range | None]]:
    """The dimensions of each input in order, by name: its one size, the range of its sizes, or None for any."""
    vision, audio, gate, side = config.vision, config.audio, config.gate, config.vision.image_size
    mel_frames = range(5, 2 * audio.max_source_positions + 1)
    return {
        "video": {"clips": None, "frames": None, "channels": 3, "rows": side, "columns": side},
        "vision_features": {"clips": None, "frames": None, "patches": vision.grid**2, "channels": vision.hidden_size},
        "audio": {"clips": None, "mels": audio.num_mel_bins, "frames": mel_frames},
        "audio_features": {"clips": None, "positions": None, "channels": audio.d_model},
        "gate_ids": {"questions": None, "tokens": range(1, gate.max_position_embeddings + 1)},
        "input_ids": {"rows": None, "tokens": None},
    }


def check_shape(name: str, x: Tensor, shape: dict[str, int | range | None]) -> None:
    """Raises DataError unless `x` has the dimensions `shape`, given as in `input_shapes`."""
    fits, takes = x.dim() == len(shape), []
    for place, (dimension, sizes) in enumerate(shape.items()):
        if sizes is None:
            takes.append(dimension)
        elif isinstance(sizes, int):
            fits = fits and x.shape[place] == sizes
            takes.append(f"{sizes} {dimension}")
        else:
            fits = fits and x.shape[place] in sizes
            takes.append(f"{sizes[0]} to {sizes[-1]} {dimension}")
    if not fits:
        raise DataError(f"{name} has shape {list(x.shape)}, the model takes [{', '.join(takes)}]")


def positions_per_id(ids: Tensor, keep: Tensor, video_embeds: Tensor | None, audio_embeds: Tensor | None,
                     vocabulary: int) -> tuple[Tensor, int, int]:
    """How many positions of X_m each id of a prompt takes, int64 [B, L]: a word 1, a placeholder the tokens of its
    clip, a dropped id 0. With it the positions of all rows, and of the longest.

    ids [B, L]; keep [B, L] bool, False at ids to drop; video_embeds [clips, N_v, D]; audio_embeds [clips, N_a, D].
    Raises DataError if placeholders and clips differ in number, or if an id is outside the vocabulary.
    """
    clips = (("video", VIDEO, video_embeds), ("audio", AUDIO, audio_embeds))
    counts, known, held = keep.long(), (ids >= 0) & (ids < vocabulary), []
    for _, placeholder, embeds in clips:
        here = keep & (ids == placeholder)
        counts = counts.masked_fill(here, 0 if embeds is None else embeds.shape[1])
        known = known | here
        held.append(here.sum())
    foreign, lengths = keep & ~known, counts.sum(1)
    # All that is asked of the device, in one transfer.
    *held, errors, total, longest = torch.stack([*held, foreign.sum(), lengths.sum(), lengths.max()]).tolist()
    for (name, placeholder, embeds), wanted in zip(clips, held):
        given = 0 if embeds is None else len(embeds)
        if wanted != given:
            raise DataError(f"input_ids holds {wanted} <{name}> ({placeholder}), but {name} holds {given} clips")
    if errors:
        row, at = foreign.nonzero()[0].tolist()
        raise DataError(f"input_ids row {row} holds {ids[row, at]}: neither {VIDEO} nor {AUDIO} nor one of the "
                        f"vocabulary's {vocabulary} ids (another model's tokenizer?)")
    return counts, total, longest
