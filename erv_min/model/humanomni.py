"""HumanOmni, the policy pi_theta of Eq. 1: towers -> projectors -> tokens spliced into the text -> language model.

    video -> SigLIP -> three-branch projector, mixed by the text gate (BERT on the question) --+
    audio -> Whisper -> average pool 3 -> MLP -------------------------------------------------+-> splice -> Qwen2
    text, with -201 in the video's place and -202 in the audio's ------------------------------+

Names and shapes of the parameters are those of the released checkpoints, with those that no pass reads
(parameters.unused_parameters). Left out: images (-200), several projector kinds of the release.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from erv_min.base.errors import DataError
from erv_min.config import AUDIO, VIDEO, HumanOmniConfig
from erv_min.model.bert import BertEncoder
from erv_min.model.projector import VisualProjector, mlp
from erv_min.model.qwen2 import Qwen2
from erv_min.model.towers import SiglipVision, WhisperEncoder

IGNORE = -100  # label of a position that carries no loss


@dataclass
class Prompts:
    """X_m of Eq. 1 for B clips, right-padded."""

    embeds: Tensor  # [B, P, D]
    mask: Tensor  # [B, P] bool, True at real positions
    labels: Tensor | None = None  # [B, P] int64, -100 if a position has no loss; None if no labels were given

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)  # [B]

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(self.embeds[rows], self.mask[rows])


@dataclass
class Output:
    loss: Tensor | None  # next-token cross entropy, mean over label tokens; None without labels
    logits: Tensor  # [B, L', V]


def pad_rows(rows: list[list[int]], value: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids, right-padded with `value`: ids [B, L] int64, and mask [B, L] bool, True at what is no padding."""
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids.to(device), torch.arange(ids.shape[1], device=device) < lengths[:, None]


def positions_per_id(ids: Tensor, keep: Tensor, clips: dict[int, Tensor], vocabulary: int) -> tuple[Tensor, int, int]:
    """How many positions of X_m each id takes, [B, L]: a word 1, a placeholder the tokens of its clip, a dropped id 0;
    the sum of all, and that of the longest row. ids, keep (False: dropped) [B, L]; clips: placeholder -> [clips, N, D].

    Raises DataError if placeholders and clips differ in number, or an id is outside the vocabulary."""
    counts, foreign, held = keep.long(), keep & ((ids < 0) | (ids >= vocabulary)), []
    for placeholder, tokens in clips.items():
        here = keep & (ids == placeholder)
        counts, foreign = counts.masked_fill(here, tokens.shape[1]), foreign & ~here
        held.append(here.sum())
    lengths = counts.sum(1)
    # All that is asked of the device, in one transfer.
    *held, errors, total, longest = torch.stack([*held, foreign.sum(), lengths.sum(), lengths.max()]).tolist()
    for placeholder, tokens, wanted in zip(clips, clips.values(), held):
        if wanted != len(tokens):
            name = "video" if placeholder == VIDEO else "audio"
            raise DataError(f"input_ids holds {wanted} <{name}> ({placeholder}), but {name} holds {len(tokens)} clips")
    if errors:
        raise DataError(f"input_ids holds {ids[foreign][0]}: neither {VIDEO} nor {AUDIO} nor one of the vocabulary's "
                        f"{vocabulary} ids (another model's tokenizer?)")
    return counts, total, longest


class HumanOmni(nn.Module):
    """The whole model. Inputs of its methods may lie on another device or in another dtype: they are moved. One that
    does not fit is a DataError that names it.

    The released names put towers and projectors under `model.`, beside the language model's own `model.layers`: they
    are registered on it, whatever its class."""

    def __init__(self, config: HumanOmniConfig):
        super().__init__()
        vision, audio, width = config.vision, config.audio, config.text.hidden_size
        self.config = config
        self.model = Qwen2(config.text)
        siglip = SiglipVision(vision, config.mm_vision_select_layer)
        self.model.vision_tower = nn.ModuleDict({"vision_tower": nn.ModuleDict({"vision_model": siglip})})
        self.model.audio_tower = nn.ModuleDict({"audio_tower": nn.ModuleDict({  # Whisper's classifier, as released
            "encoder": WhisperEncoder(audio), "projector": nn.Linear(audio.d_model, audio.classifier_proj_size),
            "classifier": nn.Linear(audio.classifier_proj_size, audio.num_labels)})})
        self.model.mm_projector = VisualProjector(vision.hidden_size, width, config.mm_projector_type)
        self.model.audio_projector = mlp(audio.d_model, width, width)
        self.model.bert_model = BertEncoder(config.gate)
        self.model.bert_gate = mlp(config.gate.hidden_size, config.gate_hidden_size, 3)
        self.lm_head = nn.Linear(width, config.text.vocab_size, bias=False)
        self.tie_weights()
        self.source_folder = None  # where checkpoint.load_humanomni read it from
        self.gate_folder = None  # where the text gate's tokenizer.json lies, if a caller knows
        self.tower_source: dict[str, str] = {}  # part -> where its weights came from

    def tie_weights(self) -> None:
        """Makes lm_head.weight and model.embed_tokens.weight one parameter, if the config ties them."""
        if self.config.text.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def vision_tower(self) -> SiglipVision:
        return self.model.vision_tower["vision_tower"]["vision_model"]

    @property
    def language_model(self) -> Qwen2:
        return self.model

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight  # [V, D]

    def _input(self, name: str, x: Tensor, *sizes: int | range | str) -> Tensor:
        """`x` on the model's device, floating point in its dtype, one clip alone as a batch of one. `sizes`: of each
        dimension its one size, the range of its sizes, or a name if any will do."""
        if sizes[0] == "clips" and x.dim() == len(sizes) - 1:
            x = x[None]
        fits = [n == size or isinstance(size, str) or isinstance(size, range) and n in size
                for n, size in zip(x.shape, sizes)]
        if x.dim() != len(sizes) or not all(fits):
            takes = ", ".join(f"{n[0]} to {n[-1]}" if isinstance(n, range) else str(n) for n in sizes)
            raise DataError(f"{name} has shape {list(x.shape)}, the model takes [{takes}]")
        weight = self.model.embed_tokens.weight
        return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

    def vision_features(self, video: Tensor) -> Tensor:
        """The vision tower alone. video [B, T, 3, S, S] or [T, 3, S, S] in [-1, 1] -> [B, T, N, C]."""
        side = self.config.vision.image_size
        video = self._input("video", video, "clips", "frames", 3, side, side)
        return self.vision_tower(video.flatten(0, 1)).unflatten(0, video.shape[:2])

    def audio_features(self, audio: Tensor) -> Tensor:
        """The audio tower and its average pool. audio [B, mels, F] or [mels, F], log-mel -> [B, F / 2 // 3, C]."""
        sizes = self.config.audio
        audio = self._input("audio", audio, "clips", sizes.num_mel_bins, range(5, 2 * sizes.max_source_positions + 1))
        heard = self.model.audio_tower["audio_tower"]["encoder"](audio)  # [B, F / 2, C]
        return F.avg_pool1d(heard.transpose(1, 2), kernel_size=3, stride=3).transpose(1, 2)

    def gate_weights(self, gate_ids: Tensor, gate_mask: Tensor | None = None) -> Tensor:
        """softmax(MLP(BERT [CLS])): weights of the branches video, body, face. gate_ids, gate_mask [B, Q] (1 at real
        tokens, None if all are) -> [B, 3]."""
        most = self.config.gate.max_position_embeddings
        gate_ids = self._input("gate_ids", gate_ids, "questions", range(1, most + 1))
        if gate_mask is not None:
            gate_mask = self._input("gate_mask", gate_mask, *gate_ids.shape)
        return self.model.bert_gate(self.model.bert_model(gate_ids, gate_mask)[:, 0]).softmax(-1)

    def project_video(self, vision_features: Tensor, gate_ids: Tensor, gate_mask: Tensor | None = None) -> Tensor:
        """[B, T, N, C] and gate_ids [B, Q] (or [1, Q] for one question to all clips) -> visual tokens [B, N_v, D]."""
        if gate_ids is None:
            raise DataError("a video needs gate_ids: the question as the text gate's BERT reads it")
        grid, width = self.config.vision.grid, self.config.vision.hidden_size
        features = self._input("vision_features", vision_features, "clips", "frames", grid**2, width)
        if len(gate_ids) not in (1, len(features)):
            raise DataError(f"gate_ids has {len(gate_ids)} rows for {len(features)} videos")
        gate = self.gate_weights(gate_ids, gate_mask).expand(len(features), -1)
        return self.model.mm_projector(features.unflatten(2, (grid, grid)), gate)

    def project_audio(self, audio_features: Tensor) -> Tensor:
        """[B, N_a, C] -> audio tokens [B, N_a, D]."""
        width = self.config.audio.d_model
        return self.model.audio_projector(self._input("audio_features", audio_features, "clips", "positions", width))

    def encode_video(self, video: Tensor, gate_ids: Tensor, gate_mask: Tensor | None = None) -> Tensor:
        """video [B, T, 3, S, S] -> visual tokens [B, N_v, D]."""
        return self.project_video(self.vision_features(video), gate_ids, gate_mask)

    def encode_audio(self, audio: Tensor) -> Tensor:
        """audio [B, mels, F] -> audio tokens [B, N_a, D]."""
        return self.project_audio(self.audio_features(audio))

    def splice(self, input_ids: Tensor, video_embeds: Tensor | None = None, audio_embeds: Tensor | None = None,
               labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Prompts:
        """X_m = Concat(X_v, X_a, X_p) of Eq. 1: modality tokens in the place of -201 and -202, text embeddings around.

        input_ids, labels, attention_mask [B, L]; video_embeds [clips, N_v, D], audio_embeds [clips, N_a, D]. The i-th
        placeholder of the batch (row by row) takes the i-th clip. Positions whose attention_mask is 0 are dropped;
        labels are -100 at modality tokens and padding."""
        ids = self._input("input_ids", input_ids, "rows", "tokens")
        keep = torch.ones_like(ids) if attention_mask is None else attention_mask
        keep = self._input("attention_mask", keep, *ids.shape).bool()
        none = self.head_weight.new_zeros(0, 0, self.config.text.hidden_size)
        clips = {VIDEO: none if video_embeds is None else video_embeds,
                 AUDIO: none if audio_embeds is None else audio_embeds}
        counts, total, longest = positions_per_id(ids, keep, clips, self.config.text.vocab_size)
        mask = torch.arange(longest, device=ids.device) < counts.sum(1)[:, None]  # [B, L']

        def expand(x: Tensor) -> Tensor:
            """Each position `counts` times: [B, L] -> [B, L']."""
            repeated = x.flatten().repeat_interleave(counts.flatten(), output_size=total)
            return x.new_full(mask.shape, IGNORE).masked_scatter(mask, repeated)

        expanded = expand(ids)  # an id of the vocabulary, VIDEO, AUDIO, or IGNORE at padding
        words = self.language_model.embed_tokens(expanded[expanded >= 0])
        embeds = words.new_zeros(*mask.shape, words.shape[-1])  # [B, L', D]
        embeds[expanded >= 0] = words
        for placeholder, tokens in clips.items():
            embeds[expanded == placeholder] = tokens.flatten(0, 1).to(words)
        if labels is not None:
            labels = expand(self._input("labels", labels, *ids.shape).masked_fill(ids < 0, IGNORE))
        return Prompts(embeds, mask, labels)

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
        """Logits at every position after splicing, and the loss of Eq. 2 (mean) if labels are given.

        input_ids [B, L] with -201 / -202; video [clips, T, 3, S, S] and audio [clips, mels, F]; gate_ids, gate_mask
        [B, Q], one row per row of input_ids, or [clips, Q], or [1, Q]; labels [B, L] with -100 at positions without
        loss; attention_mask [B, L]."""
        vision = None if video is None else self.vision_features(video)
        audio = None if audio is None else self.audio_features(audio)
        prompts = self.prompt_embeds(input_ids, vision, audio, gate_ids, gate_mask, labels, attention_mask)
        hidden, _ = self.language_model(prompts.embeds)  # causal: no real token sees the padding on its right
        logits = self.lm_head(hidden)
        if labels is None:
            return Output(None, logits)
        targets = prompts.labels[:, 1:]
        learned = targets != IGNORE
        if not learned.any():
            raise DataError("labels holds no target: every position after the first is -100")
        return Output(F.cross_entropy(logits[:, :-1][learned].float(), targets[learned]), logits)
