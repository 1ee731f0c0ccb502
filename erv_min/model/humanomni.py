"""HumanOmni, the policy pi_theta of Eq. 1: towers -> projectors -> tokens spliced into the text -> language model.

    video -> SigLIP -> three-branch projector, mixed by the text gate (BERT on the question) --+
    audio -> Whisper -> average pool 3 -> MLP -------------------------------------------------+-> splice -> Qwen2
    text, with -201 in the video's place and -202 in the audio's ------------------------------+

Names and shapes of the parameters are those of the released checkpoints, three leftovers that nothing reads included
(`HumanOmni.leftovers`). Left out: images (-200), several projector kinds of the release, generation (generate.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from erv_min.config import AUDIO, VIDEO, HumanOmniConfig
from erv_min.run.errors import DataError, SettingsError
from erv_min.model.bert import BertEncoder
from erv_min.model.projector import VisualProjector, mlp
from erv_min.model.qwen2 import Qwen2, RMSNorm
from erv_min.model.siglip import SiglipVision
from erv_min.model.whisper import WhisperClassifier, WhisperEncoder, sinusoids

IGNORE = -100  # label of a position that carries no loss

# Table 8's names of what trains. The audio tower is in no stage's list.
PARTS = {
    "language_model": ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
    "vision_tower": ("model.vision_tower.",),
    "visual_projector": ("model.mm_projector.",),
    "audio_projector": ("model.audio_projector.",),
    "gate_mlp": ("model.bert_gate.",),
    "text_encoder": ("model.bert_model.",),
}


@dataclass
class Output:
    """`loss`: next-token cross entropy, mean over label tokens, None without labels. `logits` [B, L', V]."""

    loss: Tensor | None
    logits: Tensor


class MultimodalQwen2(Qwen2):
    """Qwen2 with towers and projectors beside its layers: what the released names call `model`."""

    def __init__(self, config: HumanOmniConfig):
        super().__init__(config.text)
        width = config.text.hidden_size
        siglip = SiglipVision(config.vision, config.select_layer)
        self.vision_tower = nn.ModuleDict({"vision_tower": nn.ModuleDict({"vision_model": siglip})})
        self.audio_tower = nn.ModuleDict({"audio_tower": WhisperClassifier(config.audio)})
        self.mm_projector = VisualProjector(config.vision.hidden_size, width, config.projector)
        self.audio_projector = mlp(config.audio.d_model, width)
        self.bert_model = BertEncoder(config.gate)
        self.bert_gate = mlp(config.gate.hidden_size, config.gate_hidden_size, 3)


class HumanOmni(nn.Module):
    """The whole model. Inputs of its methods may lie on another device or in another dtype: they are moved."""

    def __init__(self, config: HumanOmniConfig):
        """Raises SettingsError where the projector cannot take the vision tower's patch grid."""
        super().__init__()
        vision, odd = config.vision, config.vision.grid % 2 == 1
        if odd != (config.projector == "all_in_one"):
            raise SettingsError(f"projector {config.projector!r} needs an {'even' if odd else 'odd'} patch grid, "
                                f"image_size {vision.image_size} / patch_size {vision.patch_size} gives {vision.grid}")
        self.config = config
        self.model = MultimodalQwen2(config)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie_weights()
        self.source_folder = None  # where checkpoint.load_humanomni read it from
        self.gate_folder = None  # where the text gate's tokenizer.json lies, if a caller knows
        self.tower_source: dict[str, str] = {}  # part -> where its weights came from

    def tie_weights(self) -> None:
        """Makes lm_head.weight and model.embed_tokens.weight one parameter, where the config ties them."""
        if self.config.text.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def siglip(self) -> SiglipVision:
        return self.model.vision_tower["vision_tower"]["vision_model"]

    @property
    def whisper(self) -> WhisperClassifier:
        return self.model.audio_tower["audio_tower"]

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.lm_head.weight

    def leftovers(self) -> set[str]:
        """Parameters that no forward pass reads: they are loaded and saved, and never trained.

        SigLIP's last layer, post layer norm and pooling head; the Whisper classifier's two layers; BERT's pooler.
        """
        parts = (("model.vision_tower.vision_tower.vision_model.", self.siglip.leftovers()),
                 ("model.audio_tower.audio_tower.", self.whisper.leftovers()),
                 ("model.bert_model.", ["pooler.dense.weight", "pooler.dense.bias"]))
        return {prefix + name for prefix, names in parts for name in names}

    def _moved(self, x: Tensor) -> Tensor:
        weight = self.model.embed_tokens.weight
        return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

    # ---- towers: once a clip ----------------------------------------------------------------------------------------

    def vision_features(self, video: Tensor) -> Tensor:
        """The vision tower alone. video [B, T, 3, S, S] or [T, 3, S, S] in [-1, 1] -> [B, T, N, C].

        Raises DataError where the shape does not fit the tower.
        """
        size = self.config.vision.image_size
        if video.dim() == 4:
            video = video[None]
        if video.dim() != 5 or video.shape[2:] != (3, size, size):
            raise DataError(f"video has shape {list(video.shape)}, the model takes [clips, frames, 3, {size}, {size}] "
                            f"(image_size {size}, patches of {self.config.vision.patch_size})")
        return self.siglip(self._moved(video).flatten(0, 1)).unflatten(0, video.shape[:2])

    def audio_features(self, audio: Tensor) -> Tensor:
        """The audio tower and its average pool. audio [B, mels, F] or [mels, F], log-mel -> [B, F / 2 // 3, C].

        Raises DataError where the shape does not fit the tower.
        """
        config = self.config.audio
        if audio.dim() == 2:
            audio = audio[None]
        most = 2 * config.max_source_positions
        if audio.dim() != 3 or audio.shape[1] != config.num_mel_bins or not 5 <= audio.shape[2] <= most:
            raise DataError(f"audio has shape {list(audio.shape)}, the model takes "
                            f"[clips, {config.num_mel_bins} mels, up to {most} frames]")
        x = self.whisper(self._moved(audio))  # [B, F / 2, C]
        return F.avg_pool1d(x.transpose(1, 2), kernel_size=3, stride=3).transpose(1, 2)

    # ---- projectors: once a clip and question -----------------------------------------------------------------------

    def gate_weights(self, gate_ids: Tensor, gate_mask: Tensor | None = None) -> Tensor:
        """softmax(MLP(BERT [CLS])): weights of the branches video, body, face. gate_ids, gate_mask [B, Q] -> [B, 3].

        gate_mask is 1 at real tokens; None means that all are. Raises DataError on a wrong shape or length.
        """
        most = self.config.gate.max_position_embeddings
        if gate_ids.dim() != 2 or gate_ids.shape[1] > most or gate_ids.shape[1] == 0:
            raise DataError(f"gate_ids has shape {list(gate_ids.shape)}, the text gate takes [rows, 1 to {most}]")
        if gate_mask is not None and gate_mask.shape != gate_ids.shape:
            raise DataError(f"gate_mask has shape {list(gate_mask.shape)}, gate_ids {list(gate_ids.shape)}")
        gate_mask = None if gate_mask is None else self._moved(gate_mask)
        cls = self.model.bert_model(self._moved(gate_ids), gate_mask)[:, 0]  # [B, C]
        return self.model.bert_gate(cls).softmax(-1)

    def project_video(self, vision_features: Tensor, gate_ids: Tensor, gate_mask: Tensor | None = None) -> Tensor:
        """[B, T, N, C] and gate_ids [B, Q] (or [1, Q] for one question to all clips) -> visual tokens [B, N_v, D]."""
        if gate_ids is None:
            raise DataError("a video needs gate_ids: the question as the text gate's BERT reads it")
        if vision_features.dim() == 3:
            vision_features = vision_features[None]
        clips, grid = vision_features.shape[0], self.config.vision.grid
        if vision_features.dim() != 4 or vision_features.shape[2:] != (grid**2, self.config.vision.hidden_size):
            raise DataError(f"video_features has shape {list(vision_features.shape)}, the projector takes "
                            f"[clips, frames, {grid**2}, {self.config.vision.hidden_size}]")
        if gate_ids.shape[0] not in (1, clips):
            raise DataError(f"gate_ids has {gate_ids.shape[0]} rows for {clips} videos")
        gate = self.gate_weights(gate_ids, gate_mask).expand(clips, -1)
        return self.model.mm_projector(self._moved(vision_features).unflatten(2, (grid, grid)), gate)

    def project_audio(self, audio_features: Tensor) -> Tensor:
        """[B, N_a, C] -> audio tokens [B, N_a, D]."""
        if audio_features.dim() == 2:
            audio_features = audio_features[None]
        if audio_features.dim() != 3 or audio_features.shape[-1] != self.config.audio.d_model:
            raise DataError(f"audio_features has shape {list(audio_features.shape)}, the projector takes "
                            f"[clips, positions, {self.config.audio.d_model}]")
        return self.model.audio_projector(self._moved(audio_features))

    def encode_video(self, video: Tensor, gate_ids: Tensor, gate_mask: Tensor | None = None) -> Tensor:
        """video [B, T, 3, S, S] -> visual tokens [B, N_v, D]."""
        return self.project_video(self.vision_features(video), gate_ids, gate_mask)

    def encode_audio(self, audio: Tensor) -> Tensor:
        """audio [B, mels, F] -> audio tokens [B, N_a, D]."""
        return self.project_audio(self.audio_features(audio))

    # ---- the prompt and the language model --------------------------------------------------------------------------

    def splice(self, input_ids: Tensor, video_embeds: Tensor | None = None, audio_embeds: Tensor | None = None,
               labels: Tensor | None = None, attention_mask: Tensor | None = None):
        """X_m of Eq. 1: modality tokens in the place of -201 and -202, text embeddings around them.

        input_ids, labels, attention_mask [B, L]; video_embeds [clips, N_v, D], audio_embeds [clips, N_a, D], the i-th
        placeholder of the batch (row by row) taking the i-th clip, so that rows may differ in modality. Positions where
        attention_mask is 0 are dropped. Returns inputs_embeds [B, L', D], labels [B, L'] or None (-100 at modality
        tokens and padding), mask [B, L'] bool; shorter rows are padded on the right with zeros.
        Raises DataError where placeholders and clips differ in number, or an id is outside the vocabulary.
        """
        if input_ids.dim() != 2:
            raise DataError(f"input_ids has shape {list(input_ids.shape)}, the model takes [rows, length]")
        for name, x in (("labels", labels), ("attention_mask", attention_mask)):
            if x is not None and x.shape != input_ids.shape:
                raise DataError(f"{name} has shape {list(x.shape)}, input_ids {list(input_ids.shape)}")
        device, vocabulary = self.head_weight.device, self.config.text.vocab_size
        input_ids = input_ids.to(device)
        keep = (torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device)).bool()
        ids = [row[k].tolist() for row, k in zip(input_ids.cpu(), keep.cpu())]
        clips = {VIDEO: ("video", video_embeds), AUDIO: ("audio", audio_embeds)}
        for placeholder, (name, embeds) in clips.items():
            wanted = sum(row.count(placeholder) for row in ids)
            given = 0 if embeds is None else len(embeds)
            if wanted != given:
                raise DataError(f"input_ids holds {wanted} <{name}> ({placeholder}), but {name} holds {given} clips")
        text = self.model.embed_tokens(input_ids.clamp(0, vocabulary - 1))  # [B, L, D]
        clips = {k: iter(embeds.to(text)) for k, (_, embeds) in clips.items() if embeds is not None}
        rows, targets = [], []
        for b, row in enumerate(ids):
            words, pieces, start = text[b][keep[b]], [], 0
            target = None if labels is None else labels[b].to(device)[keep[b]]
            spans = []
            for i, token in enumerate(row):
                if token in clips:
                    pieces += [words[start:i], next(clips[token])]
                    if labels is not None:
                        spans += [target[start:i], target.new_full((len(pieces[-1]),), IGNORE)]
                    start = i + 1
                elif not 0 <= token < vocabulary:
                    raise DataError(f"input_ids row {b} holds {token}: neither {VIDEO} nor {AUDIO} nor one of the "
                                    f"vocabulary's {vocabulary} ids (another model's tokenizer?)")
            rows.append(torch.cat([*pieces, words[start:]]))
            if labels is not None:
                targets.append(torch.cat([*spans, target[start:]]))
        inputs_embeds = pad_sequence(rows, batch_first=True)  # [B, L', D]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(inputs_embeds.shape[1], device=device) < lengths[:, None]
        return inputs_embeds, pad_sequence(targets, True, IGNORE) if targets else None, mask

    def _spliced(self, input_ids, video, audio, gate_ids, gate_mask, labels, attention_mask, video_features,
                 audio_features):
        """Encodes what is given raw, projects, and splices; the arguments of `forward`."""
        for name, raw, features in (("video", video, video_features), ("audio", audio, audio_features)):
            if raw is not None and features is not None:
                raise DataError(f"{name} and {name}_features are two forms of one thing: give one")
        if video is not None:
            video_features = self.vision_features(video)
        if audio is not None:
            audio_features = self.audio_features(audio)
        video_embeds = audio_embeds = None
        if video_features is not None:
            if gate_ids is not None and len(gate_ids) == len(input_ids) > 1:  # a row's question gates its videos
                holders = input_ids == VIDEO if attention_mask is None else (input_ids == VIDEO) & attention_mask.bool()
                rows = holders.nonzero()[:, 0].to(gate_ids.device)
                gate_ids, gate_mask = gate_ids[rows], None if gate_mask is None else gate_mask[rows]
            video_embeds = self.project_video(video_features, gate_ids, gate_mask)
        if audio_features is not None:
            audio_embeds = self.project_audio(audio_features)
        return self.splice(input_ids, video_embeds, audio_embeds, labels, attention_mask)

    def prompt_embeds(self, input_ids: Tensor, video: Tensor | None = None, audio: Tensor | None = None,
                      gate_ids: Tensor | None = None, gate_mask: Tensor | None = None,
                      attention_mask: Tensor | None = None, video_features: Tensor | None = None,
                      audio_features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All before the language model: inputs_embeds [B, L', D] and mask [B, L'] bool. Arguments as `forward`."""
        embeds, _, mask = self._spliced(input_ids, video, audio, gate_ids, gate_mask, None, attention_mask,
                                        video_features, audio_features)
        return embeds, mask

    def forward(self, input_ids: Tensor, video: Tensor | None = None, audio: Tensor | None = None,
                gate_ids: Tensor | None = None, gate_mask: Tensor | None = None, labels: Tensor | None = None,
                attention_mask: Tensor | None = None, video_features: Tensor | None = None,
                audio_features: Tensor | None = None) -> Output:
        """Logits at every position after splicing, and the loss of Eq. 2 (mean) where labels are given.

        input_ids [B, L] with -201 / -202; video [clips, T, 3, S, S] and audio [clips, mels, F], or in their place the
        towers' outputs video_features [clips, T, N, C] and audio_features [clips, N_a, C]; gate_ids, gate_mask [B, Q],
        one row a row of input_ids, or [clips, Q], or [1, Q]; labels [B, L] with -100 where there is no loss;
        attention_mask [B, L]. Raises DataError on shapes that do not fit, and on labels without a single target.
        """
        embeds, targets, _ = self._spliced(input_ids, video, audio, gate_ids, gate_mask, labels, attention_mask,
                                           video_features, audio_features)
        hidden, _ = self.model(embeds)  # causal: padding on the right is out of every real token's sight
        logits = self.lm_head(hidden)
        if targets is None:
            return Output(None, logits)
        targets = targets[:, 1:]
        learned = targets != IGNORE
        if not learned.any():
            raise DataError("labels holds no target: every position after the first is -100")
        return Output(F.cross_entropy(logits[:, :-1][learned].float(), targets[learned]), logits)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Random weights in place, a function of `seed` and of the kind of device alone.

    Linear layers normal with 0.6 / sqrt(inputs), which is Qwen2's 0.02 at its width of 896; embeddings normal 0.02;
    convolutions normal with fan-in scale; norms one; biases zero; Whisper's positions its sinusoids.
    """
    generators, done = {}, set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p in done:
                continue
            done.add(p)
            generator = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(seed))
            if name.endswith("bias"):
                p.zero_()
            elif isinstance(module, (nn.LayerNorm, RMSNorm)):
                p.fill_(1)
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
            elif isinstance(module, nn.Linear) and p is not getattr(model, "head_weight", None):
                p.normal_(0, 0.6 * module.in_features**-0.5, generator=generator)
            else:
                p.normal_(0, 0.02, generator=generator)
        if isinstance(module, WhisperEncoder):
            done.add(module.embed_positions.weight)
            module.embed_positions.weight.copy_(sinusoids(*module.embed_positions.weight.shape))


def random_humanomni(config: HumanOmniConfig, seed: int = 0, dtype: torch.dtype = torch.float32,
                     device: str | torch.device = "cpu") -> HumanOmni:
    """A model with `init_weights`, in eval mode, filled where it will lie: nothing is written twice or moved."""
    with torch.device("meta"):
        model = HumanOmni(config)
    if torch.device(device).type == "meta":  # shapes alone
        return model.to(dtype).eval()
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    init_weights(model, seed)
    return model.eval()


def trainable(model: HumanOmni, names) -> list[tuple[str, nn.Parameter]]:
    """Makes exactly the parts `names` of table 8 trainable (requires_grad) and returns their (name, parameter) pairs.

    Leftovers never train: no loss reaches them. Raises SettingsError on a name that is not in PARTS.
    """
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in PARTS]:
        raise SettingsError(f"trainable part {unknown[0]!r} is unknown; choose from {', '.join(PARTS)}")
    prefixes = tuple(prefix for name in names for prefix in PARTS[name])
    leftovers = model.leftovers()
    chosen = []
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(prefixes) and name not in leftovers)
        if p.requires_grad:
            chosen.append((name, p))
    return chosen
