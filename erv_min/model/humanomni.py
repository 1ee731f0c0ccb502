"""HumanOmni, the policy pi_theta of Eq. 1: towers -> projectors -> tokens spliced into the text -> language model.

    video -> SigLIP -> three-branch projector, mixed by the text gate (BERT on the question) --+
    audio -> Whisper -> average pool 3 -> MLP -------------------------------------------------+-> splice -> Qwen2
    text, with -201 in the video's place and -202 in the audio's ------------------------------+

Names and shapes of the parameters are those of the released checkpoints, `HumanOmni.unused_parameters` included.
Left out: images (-200), several projector kinds of the release, generation (generate.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erv_min.config import AUDIO, VIDEO, HumanOmniConfig
from erv_min.model.bert import BertEncoder
from erv_min.model.projector import VisualProjector, mlp
from erv_min.model.qwen2 import Qwen2, RMSNorm
from erv_min.model.siglip import SiglipVision
from erv_min.model.whisper import WhisperEncoder, sinusoids, whisper_classifier
from erv_min.run.errors import DataError, SettingsError
from erv_min.run.onednn import use_onednn

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


class HumanOmni(nn.Module):
    """The whole model. Inputs of its methods may lie on another device or in another dtype: they are moved.

    The released names put towers and projectors under `model.`, beside the language model's own `model.layers`. So the
    language model is built first, whatever its class (its contract: qwen2.Qwen2), and they are registered on it.
    """

    def __init__(self, config: HumanOmniConfig):
        """Raises SettingsError where the projector cannot take the vision tower's patch grid."""
        super().__init__()
        vision, odd, width = config.vision, config.vision.grid % 2 == 1, config.text.hidden_size
        if odd != (config.projector == "all_in_one"):
            raise SettingsError(f"projector {config.projector!r} needs an {'even' if odd else 'odd'} patch grid, "
                                f"image_size {vision.image_size} / patch_size {vision.patch_size} gives {vision.grid}")
        self.config = config
        self.model = Qwen2(config.text)
        siglip = SiglipVision(vision, config.select_layer)
        self.model.vision_tower = nn.ModuleDict({"vision_tower": nn.ModuleDict({"vision_model": siglip})})
        self.model.audio_tower = nn.ModuleDict({"audio_tower": whisper_classifier(config.audio)})
        self.model.mm_projector = VisualProjector(vision.hidden_size, width, config.projector)
        self.model.audio_projector = mlp(config.audio.d_model, width)
        self.model.bert_model = BertEncoder(config.gate)
        self.model.bert_gate = mlp(config.gate.hidden_size, config.gate_hidden_size, 3)
        self.lm_head = nn.Linear(width, config.text.vocab_size, bias=False)
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
    def whisper(self) -> WhisperEncoder:
        return self.model.audio_tower["audio_tower"]["encoder"]

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.lm_head.weight

    def unused_parameters(self) -> set[str]:
        """Names of the parameters that no forward pass reads: they are loaded and saved, and never trained.

        SigLIP's last layer, post layer norm and pooling head; the Whisper classifier's two layers; BERT's pooler.
        """
        siglip, whisper = "model.vision_tower.vision_tower.vision_model.", "model.audio_tower.audio_tower."
        layers = range(self.siglip.layers_run, self.config.vision.num_hidden_layers)
        unused = (*(f"{siglip}encoder.layers.{i}." for i in layers), siglip + "post_layernorm.", siglip + "head.",
                  whisper + "projector.", whisper + "classifier.", "model.bert_model.pooler.")
        return {name for name, _ in self.named_parameters() if name.startswith(unused)}

    def _take(self, name: str, x: Tensor, **shape: int | range | None) -> Tensor:
        """The input `x` on the model's device, floating point in its dtype; one clip alone becomes a batch of one.

        `shape` names the dimensions in order, each with the one size or the range of sizes that fits, None for any.
        Raises DataError where `x` has another shape. Every input of every method comes through here.
        """
        if "clips" in shape and x.dim() == len(shape) - 1:
            x = x[None]
        fits = (n in size if isinstance(size, range) else size in (None, n) for n, size in zip(x.shape, shape.values()))
        if x.dim() != len(shape) or not all(fits):
            takes = (f"{n[0]} to {n[-1]} {k}" if isinstance(n, range) else k if n is None else f"{n} {k}"
                     for k, n in shape.items())
            raise DataError(f"{name} has shape {list(x.shape)}, the model takes [{', '.join(takes)}]")
        weight = self.model.embed_tokens.weight
        return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

    # ---- towers: once per clip --------------------------------------------------------------------------------------

    def vision_features(self, video: Tensor) -> Tensor:
        """The vision tower alone. video [B, T, 3, S, S] or [T, 3, S, S] in [-1, 1] -> [B, T, N, C].

        Raises DataError where the shape does not fit the tower.
        """
        size = self.config.vision.image_size
        video = self._take("video", video, clips=None, frames=None, channels=3, rows=size, columns=size)
        return self.siglip(video.flatten(0, 1)).unflatten(0, video.shape[:2])

    def audio_features(self, audio: Tensor) -> Tensor:
        """The audio tower and its average pool. audio [B, mels, F] or [mels, F], log-mel -> [B, F / 2 // 3, C].

        Raises DataError where the shape does not fit the tower.
        """
        config = self.config.audio
        frames = range(5, 2 * config.max_source_positions + 1)
        audio = self._take("audio", audio, clips=None, mels=config.num_mel_bins, frames=frames)
        x = self.whisper(audio)  # [B, F / 2, C]
        return F.avg_pool1d(x.transpose(1, 2), kernel_size=3, stride=3).transpose(1, 2)

    # ---- projectors: once per clip and question ---------------------------------------------------------------------

    def gate_weights(self, gate_ids: Tensor, gate_mask: Tensor | None = None) -> Tensor:
        """softmax(MLP(BERT [CLS])): weights of the branches video, body, face. gate_ids, gate_mask [B, Q] -> [B, 3].

        gate_mask is 1 at real tokens; None means that all are. Raises DataError on a wrong shape or length.
        """
        lengths = range(1, self.config.gate.max_position_embeddings + 1)
        gate_ids = self._take("gate_ids", gate_ids, questions=None, tokens=lengths)
        if gate_mask is not None:
            gate_mask = self._take("gate_mask", gate_mask, questions=gate_ids.shape[0], tokens=gate_ids.shape[1])
        return self.model.bert_gate(self.model.bert_model(gate_ids, gate_mask)[:, 0]).softmax(-1)

    def project_video(self, vision_features: Tensor, gate_ids: Tensor, gate_mask: Tensor | None = None) -> Tensor:
        """[B, T, N, C] and gate_ids [B, Q] (or [1, Q] for one question to all clips) -> visual tokens [B, N_v, D]."""
        if gate_ids is None:
            raise DataError("a video needs gate_ids: the question as the text gate's BERT reads it")
        grid, channels = self.config.vision.grid, self.config.vision.hidden_size
        x = self._take("video_features", vision_features, clips=None, frames=None, patches=grid**2, channels=channels)
        if gate_ids.shape[0] not in (1, len(x)):
            raise DataError(f"gate_ids has {gate_ids.shape[0]} rows for {len(x)} videos")
        gate = self.gate_weights(gate_ids, gate_mask).expand(len(x), -1)
        return self.model.mm_projector(x.unflatten(2, (grid, grid)), gate)

    def project_audio(self, audio_features: Tensor) -> Tensor:
        """[B, N_a, C] -> audio tokens [B, N_a, D]."""
        x = self._take("audio_features", audio_features, clips=None, positions=None, channels=self.config.audio.d_model)
        return self.model.audio_projector(x)

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
        ids = self._take("input_ids", input_ids, rows=None, tokens=None)
        (rows, tokens), device, vocabulary = ids.shape, ids.device, self.config.text.vocab_size
        keep = torch.ones_like(ids) if attention_mask is None else attention_mask
        keep = self._take("attention_mask", keep, rows=rows, tokens=tokens).bool()
        clips = (("video", VIDEO, video_embeds), ("audio", AUDIO, audio_embeds))
        holders = [keep & (ids == placeholder) for _, placeholder, _ in clips]  # [B, L] each
        sizes = keep.long()  # [B, L]: how many positions an id takes, 1, N_v, N_a, or 0 where it is dropped
        for held, (_, _, embeds) in zip(holders, clips):
            sizes = sizes.masked_fill(held, 0 if embeds is None else embeds.shape[1])
        lengths = sizes.sum(1)  # [B]
        foreign = keep & ~holders[0] & ~holders[1] & ((ids < 0) | (ids >= vocabulary))
        counts = [*map(torch.sum, (*holders, foreign, lengths)), lengths.max()]
        *wanted, errors, total, longest = torch.stack(counts).tolist()  # the one place that waits for the device
        for (name, placeholder, embeds), count in zip(clips, wanted):
            given = 0 if embeds is None else len(embeds)
            if count != given:
                raise DataError(f"input_ids holds {count} <{name}> ({placeholder}), but {name} holds {given} clips")
        if errors:
            row, at = foreign.nonzero()[0].tolist()
            raise DataError(f"input_ids row {row} holds {ids[row, at]}: neither {VIDEO} nor {AUDIO} nor one of the "
                            f"vocabulary's {vocabulary} ids (another model's tokenizer?)")
        mask = torch.arange(longest, device=device) < lengths[:, None]  # [B, L']

        def expand(x: Tensor, padding: int) -> Tensor:
            """Each position `sizes` times: [B, L] -> [B, L']."""
            repeated = x.flatten().repeat_interleave(sizes.flatten(), output_size=total)
            return x.new_full(mask.shape, padding).masked_scatter(mask, repeated)

        places = expand(ids, IGNORE)  # [B, L']: an id of the vocabulary, VIDEO, AUDIO, or IGNORE at padding
        words = self.model.embed_tokens(places[places >= 0])
        inputs_embeds = words.new_zeros(*mask.shape, words.shape[-1])  # [B, L', D]
        inputs_embeds[places >= 0] = words
        for _, placeholder, embeds in clips:
            if embeds is not None:
                inputs_embeds[places == placeholder] = embeds.flatten(0, 1).to(words)
        if labels is not None:
            labels = self._take("labels", labels, rows=rows, tokens=tokens)
            labels = expand(labels.masked_fill(holders[0] | holders[1], IGNORE), IGNORE)
        return inputs_embeds, labels, mask

    def _clip_tokens(self, input_ids, attention_mask, gate_ids, gate_mask, video, audio, video_features,
                     audio_features) -> tuple[Tensor | None, Tensor | None]:
        """video_embeds [clips, N_v, D] and audio_embeds [clips, N_a, D] for `splice`, None for what is absent."""
        for name, raw, features in (("video", video, video_features), ("audio", audio, audio_features)):
            if raw is not None and features is not None:
                raise DataError(f"{name} and {name}_features are two forms of one thing: give one")
        video = video_features if video is None else self.vision_features(video)  # one form from here on
        audio = audio_features if audio is None else self.audio_features(audio)
        if video is not None and gate_ids is not None and len(gate_ids) == len(input_ids) > 1:
            held = input_ids == VIDEO if attention_mask is None else (input_ids == VIDEO) & attention_mask.bool()
            rows = held.nonzero()[:, 0].to(gate_ids.device)  # each row's question gates its videos
            gate_ids, gate_mask = gate_ids[rows], None if gate_mask is None else gate_mask[rows]
        return (None if video is None else self.project_video(video, gate_ids, gate_mask),
                None if audio is None else self.project_audio(audio))

    def prompt_embeds(self, input_ids: Tensor, video: Tensor | None = None, audio: Tensor | None = None,
                      gate_ids: Tensor | None = None, gate_mask: Tensor | None = None,
                      attention_mask: Tensor | None = None, video_features: Tensor | None = None,
                      audio_features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All before the language model: inputs_embeds [B, L', D] and mask [B, L'] bool. Arguments as `forward`."""
        clips = self._clip_tokens(input_ids, attention_mask, gate_ids, gate_mask, video, audio, video_features,
                                  audio_features)
        embeds, _, mask = self.splice(input_ids, *clips, attention_mask=attention_mask)
        return embeds, mask

    def forward(self, input_ids: Tensor, video: Tensor | None = None, audio: Tensor | None = None,
                gate_ids: Tensor | None = None, gate_mask: Tensor | None = None, labels: Tensor | None = None,
                attention_mask: Tensor | None = None, video_features: Tensor | None = None,
                audio_features: Tensor | None = None) -> Output:
        """Logits at every position after splicing, and the loss of Eq. 2 (mean) where labels are given.

        input_ids [B, L] with -201 / -202; video [clips, T, 3, S, S] and audio [clips, mels, F], or in their place the
        towers' outputs video_features [clips, T, N, C] and audio_features [clips, N_a, C]; gate_ids, gate_mask [B, Q],
        one row per row of input_ids, or [clips, Q], or [1, Q]; labels [B, L] with -100 where there is no loss;
        attention_mask [B, L]. Raises DataError on shapes that do not fit, and on labels without a single target.
        """
        clips = self._clip_tokens(input_ids, attention_mask, gate_ids, gate_mask, video, audio, video_features,
                                  audio_features)
        embeds, targets, _ = self.splice(input_ids, *clips, labels, attention_mask)
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
    generator, done = torch.Generator(next(model.parameters()).device).manual_seed(seed), set()
    for module in model.modules():
        if isinstance(module, WhisperEncoder):
            positions = module.embed_positions.weight
            done.add(positions.copy_(sinusoids(*positions.shape)))
        for name, p in module.named_parameters(recurse=False):
            if p in done:
                continue
            done.add(p)
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


def random_humanomni(config: HumanOmniConfig, seed: int = 0, dtype: torch.dtype = torch.float32,
                     device: str | torch.device = "cpu") -> HumanOmni:
    """A model with `init_weights`, in eval mode, filled where it will lie: nothing is written twice or moved."""
    with torch.device("meta"):
        model = HumanOmni(config)
    if torch.device(device).type == "meta":  # shapes alone
        return use_onednn(model.to(dtype)).eval()
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    init_weights(model, seed)
    return use_onednn(model).eval()


def trainable(model: HumanOmni, names) -> list[tuple[str, nn.Parameter]]:
    """Makes exactly the parts `names` of table 8 trainable (requires_grad) and returns their (name, parameter) pairs.

    Unused parameters never train: no loss reaches them. Raises SettingsError on a name that is not in PARTS.
    """
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in PARTS]:
        raise SettingsError(f"trainable part {unknown[0]!r} is unknown; choose from {', '.join(PARTS)}")
    prefixes = tuple(prefix for name in names for prefix in PARTS[name])
    unused = model.unused_parameters()
    chosen = [(k, p) for k, p in model.named_parameters() if k.startswith(prefixes) and k not in unused]
    model.requires_grad_(False)
    for _, p in chosen:
        p.requires_grad_(True)
    return chosen
