"""From clips to prompts (Eq. 1, left half): decode ahead, frozen towers once per clip, the text around them.

    examples, in training order -> clip_inputs / training_inputs (workers, feature cache) -> Inputs, one per clip
    Inputs -> Collator -> Batch: ids, gate ids and tower features, made once per step
    Batch -> embed(model, ...) -> Prompts: X_m [B, P, D], for policy, reference and sampling alike
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from erv_min.config import HumanOmniConfig
from erv_min.data.cache import FeatureCache
from erv_min.data.loader import clip_loader, counts_silent
from erv_min.data.readers import Example
from erv_min.media import Clip, load_clip
from erv_min.model.humanomni import HumanOmni, Prompts, pad_rows
from erv_min.prompts import QUESTION, REASONING_SUFFIX, gate_text, question_with_subtitle, render
from erv_min.run.errors import ClipError
from erv_min.tokenizer import EncoderTokenizer, Tokenizer


@dataclass
class Inputs:
    """One clip on its way to the model: decoded, or already as features of the frozen towers."""

    example: Example
    clip: Clip | None = None
    features: tuple[Tensor | None, Tensor | None] | None = None  # vision, audio: a row of Batch's
    silent: bool = False  # the clip has no sound and is heard as silence (divergence 19)


@dataclass
class Batch:
    """What a forward pass needs of B clips. Rows are right-padded; `part[a:b]` is a Batch of some of them."""

    examples: list[Example]
    input_ids: Tensor  # [B, L] int64, -201 and -202 where the clip's tokens go
    attention_mask: Tensor  # [B, L] bool
    gate_ids: Tensor  # [B, Q] int64, or [1, Q] where all clips share one question
    gate_mask: Tensor  # like gate_ids
    vision: Tensor | None  # [B, T, N, C]: the vision tower's features; [B, T, 3, S, S] pixels where the tower trains
    audio: Tensor | None  # [B, P, C]: the audio tower's features, pooled

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, part: slice) -> "Batch":
        return Batch(*(x if x is None or name.startswith("gate") and len(x) == 1 else x[part]
                       for name, x in vars(self).items()))


def embed(model: HumanOmni, batch: Batch) -> Prompts:
    """X_m = Concat(X_v, X_a, X_p) of Eq. 1 for each clip: projectors and text gate on the features, spliced into the
    text."""
    vision = batch.vision
    if vision is not None and vision.dim() == 5:
        vision = model.vision_features(vision)
    return model.prompt_embeds(batch.input_ids, vision, batch.audio, batch.gate_ids, batch.gate_mask,
                               attention_mask=batch.attention_mask)


class Collator:
    """Clips -> Batch: the question as ids, tokenised once per text, and the frozen towers, run once per clip."""

    def __init__(self, model: HumanOmni, tokenizer: Tokenizer, gate_tokenizer: EncoderTokenizer,
                 cache: FeatureCache | None = None, modality: str = "video_audio", stage: str = "inference",
                 question: str = f"{QUESTION} {REASONING_SUFFIX}"):
        self.model, self.tokenizer, self.gate_tokenizer, self.cache = model, tokenizer, gate_tokenizer, cache
        self.modality, self.stage, self.question, self.texts = modality, stage, question, {}

    def text(self, example: Example) -> tuple[list[int], str]:
        """input_ids with placeholders, and what the text gate reads."""
        if example.subtitle not in self.texts:
            question = question_with_subtitle(self.question, example.subtitle)
            prompt = render(question, self.modality, self.stage, system=self.tokenizer.system)
            self.texts[example.subtitle] = (self.tokenizer.encode(prompt),
                                            gate_text(question, self.modality, self.stage))
        return self.texts[example.subtitle]

    @torch.no_grad()
    def features(self, x: Inputs) -> tuple[Tensor | None, Tensor | None]:
        """(vision, audio) of a clip as in `Batch`: what its cache holds, or from the towers, clip by clip, so that the
        other clips of a batch cannot change its last bits."""
        if x.features is None:
            vision, audio = x.clip.video, x.clip.audio
            trains = any(p.requires_grad for p in self.model.model.vision_tower.parameters())
            if vision is not None and not trains:
                vision = self.model.vision_features(vision)[0]
            if audio is not None:
                audio = self.model.audio_features(audio)[0]
            if self.cache is not None:
                self.cache.put(x.example, vision, audio, x.silent)
            x.features, x.clip = (vision, audio), None
        return x.features

    def __call__(self, inputs: list[Inputs]) -> Batch:
        device, dtype = self.model.head_weight.device, self.model.head_weight.dtype
        rows, gates = zip(*(self.text(x.example) for x in inputs))
        rows = [row + self.tokenizer.encode(x.example.begun) for row, x in zip(rows, inputs)]
        gate_ids, gate_mask = self.gate_tokenizer.encode_batch(list(gates[:1] if len(set(gates)) == 1 else gates))
        vision, audio = (None if part[0] is None else torch.stack([x.to(device, dtype) for x in part])
                         for part in zip(*map(self.features, inputs)))
        return Batch([x.example for x in inputs], *pad_rows(rows, self.tokenizer.pad_id, device), gate_ids.to(device),
                     gate_mask.to(device), vision, audio)


# ---- decoding ahead of the model -------------------------------------------------------------------------------------


@dataclass
class Job:
    """A visit of an example, for the decoding workers: nothing to decode where its features are cached."""

    example: Example
    cached: bool

    @property
    def path(self):
        return self.example.path


def load_job(job: Job, **how) -> Clip | None:
    """Decodes one clip, as media.load_clip; runs in the worker processes. Frames go through the pipe, which is slower
    than decoding, as the 8-bit values that they are made of."""
    clip = None if job.cached else load_clip(job.path, **how)
    if clip and clip.video is not None:
        clip.video = ((clip.video + 1) * 127.5).round().to(torch.uint8)
    return clip


@counts_silent
def clip_inputs(order: Iterable[Example], config: HumanOmniConfig, cache: FeatureCache | None, workers: int = 2,
                **how) -> Iterator[Inputs | ClipError]:
    """Yields one item for each example of `order`, decoded ahead by `workers` processes unless its features are cached.

    A clip that cannot be decoded comes as its ClipError, never as another clip. `how`: media.load_clip's arguments that
    are not the model's dimensions.
    """
    load = partial(load_job, image_size=config.vision.image_size, n_mels=config.audio.num_mel_bins,
                   n_frames=2 * config.audio.max_source_positions, **how)
    jobs = (Job(example, cache is not None and cache.has(example)) for example in order)
    for job, clip in clip_loader(jobs, load, workers=workers):
        if job.cached and (features := cache.get(job.example)) is not None:
            yield Inputs(job.example, None, features[:2], features[2])
            continue
        if job.cached:  # damaged in the cache: made again
            ((_, clip),) = clip_loader([Job(job.example, False)], load, workers=0)
        if isinstance(clip, ClipError):
            yield clip
            continue
        if clip.video is not None:
            clip.video = (clip.video.float() / 255 - 0.5) / 0.5  # as media.pixel_values, to the last bit
        yield Inputs(job.example, clip, silent=clip.silent)


def training_inputs(places: Iterable[int], example_at: Callable[[int], Example], count: int,
                    on_error: Callable[[int, ClipError], None], **how) -> Iterator[tuple[int, Inputs]]:
    """(place, Inputs) for each of `places` in the order of training: every process has equal work, whatever breaks.

    `example_at(place)` is the example at a place of the endless order. Where its clip cannot be decoded, `on_error` is
    told, and the next of the order stands in its place: the place that comes out is the one whose example it is. Raises
    ClipError where none of the `count` examples can be decoded. `how`: `clip_inputs`' other arguments.
    """
    places = list(places)
    for place, x in zip(places, clip_inputs(map(example_at, places), **how)):
        taken = place
        while isinstance(x, ClipError):
            on_error(place, x)
            if (taken := taken + 1) - place == 2 * count:  # among so many places stands every example
                raise ClipError(f"none of the {count} clips could be decoded, the last: {x}")
            (x,) = clip_inputs([example_at(taken)], **{**how, "workers": 0})
        yield taken, x
