"""Dimensions of HumanOmni (Eq. 1) and of the verifier, and the two files that hold them: config.json and towers.json.

Field names are those of the released files. Where the towers' sizes come from: checkpoint.py.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal

from erv_min.base.errors import CheckpointError
from erv_min.base.fields import read_part


@dataclass(frozen=True)
class Qwen2Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    hidden_act: Literal["silu"] = "silu"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class SiglipConfig:
    """The vision tower. The defaults are siglip-base-patch16-224, as in that repository's own shortened config.json."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class WhisperConfig:
    """The audio tower: Whisper's encoder. classifier_proj_size and num_labels size two layers that nothing reads."""

    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    num_mel_bins: int
    max_source_positions: int
    classifier_proj_size: int = 256
    num_labels: int = 2
    activation_function: Literal["gelu"] = "gelu"


@dataclass(frozen=True)
class BertConfig:
    """BERT (the text gate) and RoBERTa (the verifier), one encoder: `roberta` switches the positions and the head."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    num_labels: int = 0
    roberta: bool = False
    pad_token_id: int = 0
    hidden_act: Literal["gelu"] = "gelu"


@dataclass(frozen=True)
class HumanOmniConfig:
    """The whole model. `extra`: the other keys of config.json, which nothing here reads and which are saved again."""

    text: Qwen2Config
    vision: SiglipConfig
    audio: WhisperConfig
    gate: BertConfig
    mm_projector_type: Literal["all_in_one_small", "all_in_one"] = "all_in_one_small"
    mm_vision_select_layer: int = -2
    mm_audio_projector_type: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    num_frames: int = 8
    gate_hidden_size: int = 3584
    extra: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def video_tokens(self) -> int:
        """N_v of a clip of num_frames: the branches halve the patch grid, 7B's odd one upwards."""
        return self.num_frames * ((self.vision.grid + 1) // 2) ** 2

    @property
    def audio_tokens(self) -> int:
        """N_a of a clip of full length: an average pool of 3 over the encoder's positions."""
        return self.audio.max_source_positions // 3


VIDEO, AUDIO = -201, -202  # what <video> and <audio> of a prompt are in input_ids, until the model splices them (Eq. 1)

# The towers that released checkpoints name, by hub repository.
TOWERS = {
    "google/siglip-base-patch16-224": SiglipConfig(),
    "google/siglip-so400m-patch14-384": SiglipConfig(1152, 4304, 27, 16, image_size=384, patch_size=14),
    "openai/whisper-large-v3": WhisperConfig(1280, 32, 20, 5120, num_mel_bins=128, max_source_positions=1500),
    "google-bert/bert-base-uncased": BertConfig(30522, 768, 12, 12, 3072, max_position_embeddings=512),
}


def humanomni(name: str) -> HumanOmniConfig:
    """The named model: "toy" (the embedded world), "0.5b" or "7b" (released)."""
    siglip_base, siglip_so400m, whisper, bert = TOWERS.values()
    ids = {"eos_token_id": 151645, "bos_token_id": 151643, "pad_token_id": 151643}
    return {
        "toy": HumanOmniConfig(
            Qwen2Config(800, 96, 256, 3, 4, 2, max_position_embeddings=2048),
            SiglipConfig(48, 96, 3, 4, image_size=48, patch_size=12),
            WhisperConfig(48, 2, 4, 96, num_mel_bins=32, max_source_positions=50, classifier_proj_size=8),
            BertConfig(256, 32, 1, 2, 64, max_position_embeddings=160), num_frames=4, gate_hidden_size=32),
        "0.5b": HumanOmniConfig(Qwen2Config(151936, 896, 4864, 24, 14, 2), siglip_base, whisper, bert, extra=ids),
        "7b": HumanOmniConfig(Qwen2Config(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False),
                              siglip_so400m, whisper, bert, "all_in_one", extra=ids)}[name]


def roberta(name: str, num_labels: int = 11) -> BertConfig:
    """The verifier's encoder: "toy" or "base" (RoBERTa base)."""
    sizes = {"toy": (512, 64, 2, 4, 128, 130), "base": (50265, 768, 12, 12, 3072, 514)}  # the last: positions
    return BertConfig(*sizes[name], type_vocab_size=1, layer_norm_eps=1e-5, num_labels=num_labels, roberta=True,
                      pad_token_id=1)


def read_roberta(raw: dict, where: str) -> BertConfig:
    """The verifier's sizes from the config.json of a RobertaForSequenceClassification; errors as `read_part`."""
    if raw.get("model_type") != "roberta":
        raise CheckpointError(f"{where}: model_type is {raw.get('model_type')!r}, a verifier is 'roberta'")
    labels = raw.get("id2label")
    count = {"num_labels": len(labels)} if isinstance(labels, dict) else {}
    return read_part(BertConfig, {"num_labels": 2, "pad_token_id": 1} | raw | count, where, roberta=True)


def read_qwen2(raw: dict, where: str) -> Qwen2Config:
    """The language model's sizes from HumanOmni's config.json, as transformers 4 or 5 wrote it; errors as `read_part`,
    also for scaled rotary positions and sliding windows, which are not computed here."""
    if not any(key.startswith("mm_") for key in raw):
        raise CheckpointError(f"{where}: model_type is {raw.get('model_type')!r} without any mm_ key: not HumanOmni's")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # of transformers 4 and 5
    flat = isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values())  # else one per layer
    if not flat or (rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise CheckpointError(f"{where}: rope_scaling or rope_parameters is {rope}, only type 'default' is supported")
    text = read_part(Qwen2Config, raw | {"rope_theta": rope.get("rope_theta") or raw.get("rope_theta") or 1e4,
                                         "tie_word_embeddings": raw.get("tie_word_embeddings") or False}, where)
    layers = text.num_hidden_layers
    slides = raw.get("use_sliding_window") and raw.get("max_window_layers", 28) in range(layers)
    types = raw.get("layer_types") or ["sliding_attention" if slides else "full_attention"] * layers
    if types != ["full_attention"] * layers:
        raise CheckpointError(f"{where}: layer_types or use_sliding_window is a sliding window, which is not supported")
    return text


def config_json(config: HumanOmniConfig) -> dict:
    """HumanOmniConfig -> the released config.json, keys of the file it was read from first and kept."""
    siglip = "so400m-patch14-384" if config.mm_projector_type == "all_in_one" else "base-patch16-224"
    released = {"model_type": "HumanOmni_qwen2", "architectures": ["HumanOmniQwen2ForCausalLM"],
                "attention_dropout": 0.0, "use_cache": True, "use_mm_proj": True, "mm_use_x_start_end": True,
                "mm_vision_tower": f"google/siglip-{siglip}", "mm_audio_tower": "openai/whisper-large-v3",
                "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"}
    own = {key: getattr(config, key) for key in ("mm_projector_type", "mm_vision_select_layer",
                                                 "mm_audio_projector_type", "num_frames")}
    own |= {"mm_hidden_size": config.vision.hidden_size, "audio_hidden_size": config.audio.d_model}
    if config.gate_hidden_size != 3584:  # our key: the released code has 3584 written into it
        own["gate_hidden_size"] = config.gate_hidden_size
    return released | config.extra | asdict(config.text) | own
