"""From examples to prompts: decode ahead, towers once a clip, the text around them (Eq. 1, left half).

    examples in training order -> clip_inputs (worker processes, feature cache) -> Inputs
    Inputs of a batch -> PromptBuilder.prompts -> Prompts (embeddings [B, P, D]) for policy, reference and sampling alike
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from erv_min.data.cache import FeatureCache
from erv_min.data.loader import clip_loader, counts_silent
from erv_min.data.readers import Example
from erv_min.run.errors import ClipError
from erv_min.media import Clip, load_clip
from erv_min.model.humanomni import HumanOmni
from erv_min.logps import Completions, Prompts, completion_logps
from erv_min.prompts import QUESTION, REASONING_SUFFIX, gate_text, question_with_subtitle, render
from erv_min.tokenizer import EncoderTokenizer, Tokenizer


@dataclass
class Inputs:
    """One clip on its way to the model: decoded, or already as features of the frozen towers."""

    example: Example
    clip: Clip | None = None
    vision: Tensor | None = None  # [T, N, C]
    audio: Tensor | None = None  # [P, C]
    silent: bool = False  # the clip has no sound and was heard as silence (divergence 19)


@dataclass
class Job:
    """A visit of an example, for the decoding workers: nothing to decode where its features are cached."""

    example: Example
    cached: bool

    @property
    def path(self):
        return self.example.path


def load_job(job: Job, **dimensions) -> Clip | None:
    """Decodes one clip for a model of these `dimensions` (media.load_clip's); runs in the worker processes."""
    return None if job.cached else pack(load_clip(job.path, **dimensions))


def pack(clip: Clip) -> Clip:
    """The same clip in a quarter of the bytes or less, for the pipe between processes, which is slower than decoding:
    frames as the 8-bit values that they are made of, and the log-mel up to where it repeats its last column."""
    video, audio = clip.video, clip.audio
    if video is not None:
        video = ((video + 1) * 127.5).round().to(torch.uint8)
    if audio is not None:
        changes = (audio != audio[:, -1:]).any(0).nonzero()  # [columns, 1]
        audio = audio[:, : int(changes.max()) + 2 if len(changes) else 1].clone()
    return replace(clip, video=video, audio=audio)


def unpack(clip: Clip, n_frames: int) -> Clip:
    """What `pack` was given, exactly; `n_frames` columns of log-mel."""
    video, audio = clip.video, clip.audio
    if video is not None:
        video = (video.float() / 255 - 0.5) / 0.5  # as media.pixel_values
    if audio is not None:
        audio = torch.cat([audio, audio[:, -1:].expand(-1, n_frames - audio.shape[1])], 1)
    return replace(clip, video=video, audio=audio)


@counts_silent
def clip_inputs(order: list[Example], model: HumanOmni, cache: FeatureCache | None, modality: str = "video_audio",
                num_frames: int = 8, geometry: str = "pad", workers: int = 2,
                silence: str = "hear") -> Iterator[Inputs | ClipError]:
    """Yields one item for each example of `order`, decoded ahead by `workers` processes unless its features are cached.

    A clip that cannot be decoded comes as its ClipError: the caller leaves it out of the batch and lists it. One without
    sound is heard as silence, said at the first and counted at the end, or a ClipError (`silence`, divergence 19).
    """
    config = model.config
    load = partial(load_job, modality=modality, num_frames=num_frames, image_size=config.vision.image_size,
                   n_mels=config.audio.num_mel_bins, n_frames=2 * config.audio.max_source_positions, geometry=geometry,
                   silence=silence)
    jobs = (Job(example, cache is not None and cache.has(example)) for example in order)
    for job, clip in clip_loader(jobs, load, workers=workers):
        if job.cached:
            if (features := cache.get(job.example)) is not None:
                yield Inputs(job.example, None, *features)
                continue
            ((_, clip),) = clip_loader([Job(job.example, False)], load, workers=0)  # damaged in the cache: made again
        yield clip if isinstance(clip, ClipError) else Inputs(
            job.example, unpack(clip, 2 * config.audio.max_source_positions), silent=clip.silent)


class PromptBuilder:
    """Turns a batch of `Inputs` into `Prompts`; holds the tokenizers and the rendered question."""

    def __init__(self, model: HumanOmni, tokenizer: Tokenizer, gate_tokenizer: EncoderTokenizer,
                 cache: FeatureCache | None = None, modality: str = "video_audio", stage: str = "inference",
                 question: str = f"{QUESTION} {REASONING_SUFFIX}"):
        self.model, self.tokenizer, self.gate_tokenizer, self.cache = model, tokenizer, gate_tokenizer, cache
        self.modality, self.stage, self.question = modality, stage, question

    def text(self, example: Example) -> tuple[list[int], str]:
        """input_ids with placeholders, and what the text gate reads, of one example."""
        question = question_with_subtitle(self.question, example.subtitle)
        prompt = render(question, self.modality, self.stage, system=self.tokenizer.system)
        return self.tokenizer.encode(prompt), gate_text(question, self.modality, self.stage)

    def features(self, inputs: list[Inputs]) -> None:
        """Runs the towers on the clips that do not have their features yet, and fills the cache.

        In one batch, but clip by clip where they are kept: a batch's other clips change a clip's last bits, and which
        they are depends on where a run was stopped and resumed.
        """
        todo = [x for x in inputs if x.clip is not None]
        for part in [[x] for x in todo] if self.cache is not None else [todo] if todo else []:
            self._features(part)

    def _features(self, todo: list[Inputs]) -> None:
        device, dtype = self.model.head_weight.device, self.model.head_weight.dtype
        trains = any(p.requires_grad for p in self.model.model.vision_tower.parameters())
        if todo[0].clip.video is not None:
            with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
                vision = self.model.vision_features(torch.stack([x.clip.video for x in todo]).to(device, dtype))
            for x, v in zip(todo, vision):
                x.vision = v
        if todo[0].clip.audio is not None:
            with torch.no_grad():
                audio = self.model.audio_features(torch.stack([x.clip.audio for x in todo]).to(device, dtype))
            for x, a in zip(todo, audio):
                x.audio = a
        for x in todo:
            x.clip = None
            if self.cache is not None:
                self.cache.put(x.example, x.vision, x.audio, x.silent)

    def logps(self, inputs: list[Inputs], completions: Completions, with_entropy: bool = False):
        """policy.completion_logps of `completions` on the prompts of `inputs`: one pass from features to log-probs."""
        return completion_logps(self.model, self.prompts(inputs), completions, with_entropy=with_entropy)

    def prompts(self, inputs: list[Inputs]) -> Prompts:
        """X_m of Eq. 1 for each clip: projectors and text gate on the towers' features, spliced into the text."""
        self.features(inputs)
        model = self.model
        device, dtype = model.head_weight.device, model.head_weight.dtype
        rows, gates = zip(*(self.text(x.example) for x in inputs))
        width = max(map(len, rows))
        input_ids = torch.tensor([r + [self.tokenizer.pad_id] * (width - len(r)) for r in rows], device=device)
        attention = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
        one_question = len(set(gates)) == 1  # the usual case: the gate reads one text, not B times the same
        gate_ids, gate_mask = self.gate_tokenizer.encode_batch(list(gates[:1] if one_question else gates))
        stacked = {}
        for name, features in (("video_features", [x.vision for x in inputs]), ("audio_features", [x.audio for x in inputs])):
            if features[0] is not None:
                stacked[name] = torch.stack(features).to(device, dtype)
        embeds, mask = model.prompt_embeds(input_ids, gate_ids=gate_ids.to(device), gate_mask=gate_mask.to(device),
                                           attention_mask=attention, **stacked)
        return Prompts(embeds, mask)
