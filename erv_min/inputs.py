"""From clips to prompts (Eq. 1, left half): frozen towers once per clip, the text around them.

    examples, in training order -> data/loader.py (decoded ahead, or from the feature cache) -> Inputs, one per clip
    Inputs -> Collator -> Batch: ids, gate ids and tower features, made once per step
    Batch -> embed(model, ...) -> Prompts: X_m [B, P, D], for policy, reference and sampling alike
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from erv_min.media import Clip
from erv_min.model.humanomni import HumanOmni, Prompts, pad_rows
from erv_min.prompts import QUESTION, REASONING_SUFFIX, gate_text, question_with_subtitle, render
from erv_min.tokenizer import EncoderTokenizer, Tokenizer


@dataclass(frozen=True)
class Example:
    """One labelled clip, or one of several explanations of it. `label` is in the list of `dataset`, lower case."""

    video_id: str
    path: Path
    label: str
    dataset: str
    explanation: str = ""
    subtitle: str = ""
    split: str = ""
    begun: str = ""  # how the policy's output begins, if it is to go on from there (answers.answers_after)


@dataclass
class Inputs:
    """One clip on its way to the model: decoded, or already as features of the frozen towers."""

    example: Example
    clip: Clip | None = None
    features: tuple[Tensor | None, Tensor | None] | None = None  # vision, audio: a row of Batch's
    silent: bool = False  # the clip has no sound and is heard as silence (divergence 19)


@dataclass
class Batch:
    """What a forward pass needs of B clips. Rows are right-padded; `batch[a:b]` is a Batch of some of them."""

    examples: list[Example]
    input_ids: Tensor  # [B, L] int64, -201 and -202 where the clip's tokens go
    attention_mask: Tensor  # [B, L] bool
    gate_ids: Tensor  # [B, Q] int64, or [1, Q] if all clips share one question
    gate_mask: Tensor  # like gate_ids
    vision: Tensor | None  # [B, T, N, C]: the vision tower's features; [B, T, 3, S, S] pixels if the tower trains
    audio: Tensor | None  # [B, P, C]: the audio tower's features, pooled

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, part: slice) -> "Batch":
        shared = ("gate_ids", "gate_mask") if len(self.gate_ids) == 1 else ()
        return Batch(**{name: value if value is None or name in shared else value[part]
                        for name, value in vars(self).items()})


def embed(model: HumanOmni, batch: Batch) -> Prompts:
    """X_m = Concat(X_v, X_a, X_p) of Eq. 1 for each clip: projectors and text gate on the features, spliced into the
    text."""
    vision = batch.vision
    if vision is not None and vision.dim() == 5:
        vision = model.vision_features(vision)
    return model.prompt_embeds(batch.input_ids, vision, batch.audio, batch.gate_ids, batch.gate_mask,
                               attention_mask=batch.attention_mask)


class Collator:
    """Clips -> Batch: the question as ids, and the frozen towers, run once per clip."""

    def __init__(self, model: HumanOmni, tokenizer: Tokenizer, gate_tokenizer: EncoderTokenizer,
                 cache=None, modality: str = "video_audio", stage: str = "inference",
                 question: str = f"{QUESTION} {REASONING_SUFFIX}"):
        self.model, self.tokenizer, self.gate_tokenizer, self.cache = model, tokenizer, gate_tokenizer, cache
        self.modality, self.stage, self.question = modality, stage, question

    def text(self, example: Example) -> tuple[list[int], str]:
        """input_ids with placeholders, and what the text gate reads."""
        question = question_with_subtitle(self.question, example.subtitle)
        prompt = render(question, self.modality, self.stage, system=self.tokenizer.system)
        return self.tokenizer.encode(prompt), gate_text(question, self.modality, self.stage)

    @torch.no_grad()
    def features(self, item: Inputs) -> tuple[Tensor | None, Tensor | None]:
        """(vision, audio) of a clip as in `Batch`: as it brings them, or from the towers, kept in the cache. One clip
        at a time, so that the others of a batch cannot change its last bits."""
        if item.features is not None:
            return item.features
        vision, audio = item.clip.video, item.clip.audio
        tower_trains = any(p.requires_grad for p in self.model.vision_tower.parameters())
        if vision is not None and not tower_trains:
            vision = self.model.vision_features(vision)[0]
        if audio is not None:
            audio = self.model.audio_features(audio)[0]
        if self.cache:
            self.cache.put(item.example, vision, audio, item.silent)
        return vision, audio

    def __call__(self, inputs: list[Inputs]) -> Batch:
        examples = [item.example for item in inputs]
        texts = [self.text(example) for example in examples]
        rows = [ids + self.tokenizer.encode(example.begun, placeholders=False)
                for (ids, _), example in zip(texts, examples)]
        gate_texts = [gate for _, gate in texts]
        if len(set(gate_texts)) == 1:  # one question for all clips
            gate_texts = gate_texts[:1]
        gate_ids, gate_mask = self.gate_tokenizer.encode_batch(gate_texts)
        device, dtype = self.model.head_weight.device, self.model.head_weight.dtype
        input_ids, attention_mask = pad_rows(rows, self.tokenizer.pad_id, device)
        vision, audio = (None if parts[0] is None else torch.stack([part.to(device, dtype) for part in parts])
                         for parts in zip(*map(self.features, inputs)))
        return Batch(examples, input_ids, attention_mask, gate_ids.to(device), gate_mask.to(device), vision, audio)
