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

from erv_min.base.errors import DataError, SettingsError
from erv_min.base.onednn import use_onednn
from erv_min.config import AUDIO, VIDEO, HumanOmniConfig
from erv_min.model.bert import BertEncoder
from erv_min.model.projector import VisualProjector, mlp
from erv_min.model.qwen2 import Qwen2, RMSNorm
from erv_min.model.siglip import SiglipVision
from erv_min.model.whisper import WhisperEncoder, sinusoids

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
class Prompts:
    """X_m of Eq. 1 for B clips, right-padded."""

    embeds: Tensor  # [B, P, D]
    mask: Tensor  # [B, P] bool, True at real positions
    labels: Tensor | None = None  # [B, P] int64, -100 where there is no loss; None where none were given

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)  # [B]

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(self.embeds[rows], self.mask[rows])


@dataclass
class Output:
    """`loss`: next-token cross entropy, mean over label tokens, None without labels. `logits` [B, L', V]."""

    loss: Tensor | None
    logits: Tensor


def pad_rows(rows: list[list[int]], value: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids, right-padded with `value`: ids [B, L] int64, and mask [B, L] bool, True at what is no padding."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


class HumanOmni(nn.Module):
    """The whole model. Inputs of its methods may lie on another device or in another dtype: they are moved. One whose
    shape does not fit is a DataError that names it.

    The released names put towers and projectors under `model.`, beside the language model's own `model.layers`. So the
    language model is built first, whatever its class, and they are registered on it.
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
        siglip, audio = SiglipVision(vision, config.select_layer), config.audio
        self.model.vision_tower = nn.ModuleDict({"vision_tower": nn.ModuleDict({"vision_model": siglip})})
        self.model.audio_tower = nn.ModuleDict({"audio_tower": nn.ModuleDict({  # Whisper's classifier, as released
            "encoder": WhisperEncoder(audio), "projector": nn.Linear(audio.d_model, audio.classifier_proj_size),
            "classifier": nn.Linear(audio.classifier_proj_size, audio.num_labels)})})
        self.model.mm_projector = VisualProjector(vision.hidden_size, width, config.projector)
        self.model.audio_projector = mlp(audio.d_model, width)
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
        return self.lm_head.weight  # [V, D]

    def unused_parameters(self) -> set[str]:
        """Names of the parameters that no forward pass reads: they are loaded and saved, and never trained."""
        siglip, audio = self.siglip, self.model.audio_tower["audio_tower"]
        modules = (*siglip.encoder["layers"][siglip.layers_run :], siglip.post_layernorm, siglip.head,
                   audio["projector"], audio["classifier"], self.model.bert_model.pooler)
        unused = {p for module in modules for p in module.parameters()}
        return {name for name, p in self.named_parameters() if p in unused}

    def _take(self, name: str, x: Tensor, **shape: int | range | None) -> Tensor:
        """The input `x` on the model's device, floating point in its dtype; one clip alone becomes a batch of one.

        `shape` names the dimensions in order, each with the one size or the range of sizes that fits, None for any.
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
        """The vision tower alone. video [B, T, 3, S, S] or [T, 3, S, S] in [-1, 1] -> [B, T, N, C]."""
        size = self.config.vision.image_size
        video = self._take("video", video, clips=None, frames=None, channels=3, rows=size, columns=size)
        return self.siglip(video.flatten(0, 1)).unflatten(0, video.shape[:2])

    def audio_features(self, audio: Tensor) -> Tensor:
        """The audio tower and its average pool. audio [B, mels, F] or [mels, F], log-mel -> [B, F / 2 // 3, C]."""
        frames = range(5, 2 * self.config.audio.max_source_positions + 1)
        audio = self._take("audio", audio, clips=None, mels=self.config.audio.num_mel_bins, frames=frames)
        return F.avg_pool1d(self.whisper(audio).transpose(1, 2), kernel_size=3, stride=3).transpose(1, 2)

    # ---- projectors: once per clip and question ---------------------------------------------------------------------

    def gate_weights(self, gate_ids: Tensor, gate_mask: Tensor | None = None) -> Tensor:
        """softmax(MLP(BERT [CLS])): weights of the branches video, body, face. gate_ids, gate_mask [B, Q] -> [B, 3].

        gate_mask is 1 at real tokens; None means that all are.
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
        x = self._take("vision_features", vision_features, clips=None, frames=None, patches=grid**2, channels=channels)
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
               labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Prompts:
        """X_m of Eq. 1: modality tokens in the place of -201 and -202, text embeddings around them.

        input_ids, labels, attention_mask [B, L]; video_embeds [clips, N_v, D], audio_embeds [clips, N_a, D], the i-th
        placeholder of the batch (row by row) taking the i-th clip, so that rows may differ in modality. Positions where
        attention_mask is 0 are dropped; labels are -100 at modality tokens and padding.
        Raises DataError where placeholders and clips differ in number, or an id is outside the vocabulary.
        """
        ids = self._take("input_ids", input_ids, rows=None, tokens=None)
        shape, vocabulary = dict(zip(("rows", "tokens"), ids.shape)), self.config.text.vocab_size
        keep = torch.ones_like(ids) if attention_mask is None else self._take("attention_mask", attention_mask, **shape)
        keep, clips = keep.bool(), (("video", VIDEO, video_embeds), ("audio", AUDIO, audio_embeds))
        sizes = keep.long()  # [B, L]: how many positions an id takes, 1, N_v, N_a, or 0 where it is dropped
        holders = [keep & (ids == placeholder) for _, placeholder, _ in clips]  # [B, L] each
        for held, (_, _, x) in zip(holders, clips):
            sizes = sizes.masked_fill(held, 0 if x is None else x.shape[1])
        lengths = sizes.sum(1)  # [B]
        foreign = keep & ~holders[0] & ~holders[1] & ((ids < 0) | (ids >= vocabulary))
        counts = [*map(torch.sum, (*holders, foreign, lengths)), lengths.max()]
        *wanted, errors, total, longest = torch.stack(counts).tolist()  # the one place that waits for the device
        for (name, placeholder, x), count in zip(clips, wanted):
            if count != (given := 0 if x is None else len(x)):
                raise DataError(f"input_ids holds {count} <{name}> ({placeholder}), but {name} holds {given} clips")
        if errors:
            row, at = foreign.nonzero()[0].tolist()
            raise DataError(f"input_ids row {row} holds {ids[row, at]}: neither {VIDEO} nor {AUDIO} nor one of the "
                            f"vocabulary's {vocabulary} ids (another model's tokenizer?)")
        mask = torch.arange(longest, device=ids.device) < lengths[:, None]  # [B, L']

        def expand(x: Tensor) -> Tensor:
            """Each position `sizes` times: [B, L] -> [B, L']."""
            repeated = x.flatten().repeat_interleave(sizes.flatten(), output_size=total)
            return x.new_full(mask.shape, IGNORE).masked_scatter(mask, repeated)

        places = expand(ids)  # an id of the vocabulary, VIDEO, AUDIO, or IGNORE at padding
        words = self.model.embed_tokens(places[places >= 0])
        inputs_embeds = words.new_zeros(*mask.shape, words.shape[-1])  # [B, L', D]
        inputs_embeds[places >= 0] = words
        for _, placeholder, x in clips:
            if x is not None:
                inputs_embeds[places == placeholder] = x.flatten(0, 1).to(words)
        if labels is not None:
            labels = self._take("labels", labels, **shape)
            labels = expand(labels.masked_fill(holders[0] | holders[1], IGNORE))
        return Prompts(inputs_embeds, mask, labels)

    def prompt_embeds(self, input_ids: Tensor, vision: Tensor | None = None, audio: Tensor | None = None,
                      gate_ids: Tensor | None = None, gate_mask: Tensor | None = None, labels: Tensor | None = None,
                      attention_mask: Tensor | None = None) -> Prompts:
        """All between towers and language model: their features `vision` [clips, T, N, C] and `audio` [clips, N_a, C],
        projected and spliced into the text. The other arguments as `forward`'s."""
        if vision is not None and gate_ids is not None and len(gate_ids) == len(input_ids) > 1:
            held = input_ids == VIDEO if attention_mask is None else (input_ids == VIDEO) & attention_mask.bool()
            rows = held.nonzero()[:, 0].to(gate_ids.device)  # each row's question gates its videos
            gate_ids, gate_mask = gate_ids[rows], None if gate_mask is None else gate_mask[rows]
        video_embeds = None if vision is None else self.project_video(vision, gate_ids, gate_mask)
        audio_embeds = None if audio is None else self.project_audio(audio)
        return self.splice(input_ids, video_embeds, audio_embeds, labels, attention_mask)

    def forward(self, input_ids: Tensor, video: Tensor | None = None, audio: Tensor | None = None,
                gate_ids: Tensor | None = None, gate_mask: Tensor | None = None, labels: Tensor | None = None,
                attention_mask: Tensor | None = None) -> Output:
        """Logits at every position after splicing, and the loss of Eq. 2 (mean) where labels are given.

        input_ids [B, L] with -201 / -202; video [clips, T, 3, S, S] and audio [clips, mels, F]; gate_ids, gate_mask
        [B, Q], one row per row of input_ids, or [clips, Q], or [1, Q]; labels [B, L] with -100 where there is no loss;
        attention_mask [B, L]. Raises DataError on labels without a single target.
        """
        vision = None if video is None else self.vision_features(video)
        audio = None if audio is None else self.audio_features(audio)
        prompts = self.prompt_embeds(input_ids, vision, audio, gate_ids, gate_mask, labels, attention_mask)
        hidden, _ = self.model(prompts.embeds)  # causal: padding on the right is out of every real token's sight
        logits = self.lm_head(hidden)
        if labels is None:
            return Output(None, logits)
        targets = prompts.labels[:, 1:]
        learned = targets != IGNORE
        if not learned.any():
            raise DataError("labels holds no target: every position after the first is -100")
        return Output(F.cross_entropy(logits[:, :-1][learned].float(), targets[learned]), logits)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Random weights in place, a function of `seed` and of the kind of device alone. Linear layers are normal with
    0.6 / sqrt(inputs), which is Qwen2's 0.02 at its width of 896."""
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
    """A model with `init_weights`, in eval mode, filled where it will lie; on the meta device shapes alone."""
    with torch.device("meta"):
        model = HumanOmni(config).to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        model.tie_weights()
        init_weights(model, seed)
    return use_onednn(model).eval()


def freeze_except(model: HumanOmni, names) -> list[tuple[str, nn.Parameter]]:
    """Makes exactly the parts `names` of table 8 trainable, without their unused parameters; returns their (name,
    parameter) pairs. Raises SettingsError on a name that is not in PARTS."""
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in PARTS]:
        raise SettingsError(f"trainable part {unknown[0]!r} is unknown; choose from {', '.join(PARTS)}")
    prefixes, unused = tuple(prefix for name in names for prefix in PARTS[name]), model.unused_parameters()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(prefixes) and name not in unused)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
