"""Dimensions of HumanOmni (Eq. 1) and of the verifier, and the two files that hold them: config.json and towers.json.

Only sizes live here; the settings of the training stages are in settings.py. Field names are those of the released
files. A released config.json describes the language model and the projector; the towers' sizes come from towers.json
where a folder has one, else from the tower's own repository, or, for the known towers, from TOWERS below.
"""

from dataclasses import asdict, dataclass, field, fields

from erv_min.run.errors import CheckpointError, SettingsError


@dataclass(frozen=True)
class Qwen2Config:
    """The language model."""

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

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class WhisperConfig:
    """The audio tower: Whisper's encoder. classifier_proj_size and num_labels size two leftovers that nothing reads."""

    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    num_mel_bins: int
    max_source_positions: int
    classifier_proj_size: int = 256
    num_labels: int = 2


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


@dataclass(frozen=True)
class HumanOmniConfig:
    """The whole model. `extra` keeps keys of a loaded config.json that nothing here reads, so that they are saved."""

    text: Qwen2Config
    vision: SiglipConfig
    audio: WhisperConfig
    gate: BertConfig
    projector: str = "all_in_one_small"  # or "all_in_one"
    num_frames: int = 8
    select_layer: int = -2
    gate_hidden_size: int = 3584
    image_aspect_ratio: str = "pad"
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    pad_token_id: int | None = 151643
    extra: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def video_tokens(self) -> int:
        """N_v: visual tokens a clip of num_frames takes (the branches halve the patch grid, 7B's odd one upwards)."""
        half = (self.vision.grid + 1) // 2
        return self.num_frames * half * half

    @property
    def audio_tokens(self) -> int:
        """N_a: audio tokens a clip of full length takes (an average pool of 3 over the encoder's positions)."""
        return self.audio.max_source_positions // 3


SIGLIP_BASE = SiglipConfig()
SIGLIP_SO400M = SiglipConfig(1152, 4304, 27, 16, image_size=384, patch_size=14)
WHISPER_LARGE_V3 = WhisperConfig(1280, 32, 20, 5120, num_mel_bins=128, max_source_positions=1500)
BERT_BASE = BertConfig(30522, 768, 12, 12, 3072, max_position_embeddings=512)

# The towers that released checkpoints name: last path component -> hub repository, dimensions.
TOWERS = {
    "siglip-base-patch16-224": ("google/siglip-base-patch16-224", SIGLIP_BASE),
    "siglip-so400m-patch14-384": ("google/siglip-so400m-patch14-384", SIGLIP_SO400M),
    "whisper-large-v3": ("openai/whisper-large-v3", WHISPER_LARGE_V3),
    "bert-base-uncased": ("google-bert/bert-base-uncased", BERT_BASE),
}


def humanomni(name: str) -> HumanOmniConfig:
    """The named model: "toy" (the embedded world), "0.5b" or "7b" (released). Raises SettingsError on another name."""
    if name == "toy":
        text = Qwen2Config(800, 96, 256, 3, 4, 2, max_position_embeddings=2048)
        vision = SiglipConfig(48, 96, 3, 4, image_size=48, patch_size=12)
        audio = WhisperConfig(48, 2, 4, 96, num_mel_bins=32, max_source_positions=50, classifier_proj_size=8)
        gate = BertConfig(256, 32, 1, 2, 64, max_position_embeddings=160)
        return HumanOmniConfig(text, vision, audio, gate, num_frames=4, gate_hidden_size=32,
                               bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if name == "0.5b":
        text = Qwen2Config(151936, 896, 4864, 24, 14, 2)
        return HumanOmniConfig(text, SIGLIP_BASE, WHISPER_LARGE_V3, BERT_BASE)
    if name == "7b":
        text = Qwen2Config(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False)
        return HumanOmniConfig(text, SIGLIP_SO400M, WHISPER_LARGE_V3, BERT_BASE, projector="all_in_one")
    raise SettingsError(f"model {name!r} is unknown; choose toy, 0.5b or 7b")


def roberta(name: str, num_labels: int = 11) -> BertConfig:
    """The verifier's encoder: "toy" or "base" (RoBERTa base). Raises SettingsError on another name."""
    shared = dict(type_vocab_size=1, layer_norm_eps=1e-5, num_labels=num_labels, roberta=True, pad_token_id=1)
    if name == "toy":
        return BertConfig(512, 64, 2, 4, 128, max_position_embeddings=130, **shared)
    if name == "base":
        return BertConfig(50265, 768, 12, 12, 3072, max_position_embeddings=514, **shared)
    raise SettingsError(f"verifier {name!r} is unknown; choose toy or base")


# ---- config.json and towers.json ------------------------------------------------------------------------------------

ACTIVATIONS = {SiglipConfig: ("hidden_act", "gelu_pytorch_tanh"), WhisperConfig: ("activation_function", "gelu"),
               BertConfig: ("hidden_act", "gelu"), Qwen2Config: ("hidden_act", "silu")}


def read_part(kind: type, values: dict, where: str, **given):
    """Builds the dataclass `kind` from a JSON object's keys of the same names; `given` overrides.

    Raises CheckpointError naming `where` and the field that is missing, of the wrong type, or unsupported.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(values).__name__}")
    name, activation = ACTIVATIONS[kind]
    if values.get(name, activation) != activation:
        raise CheckpointError(f"{where}: {name} is {values[name]!r}, only {activation!r} is supported")
    chosen = {f.name: values[f.name] for f in fields(kind) if f.name in values} | given
    for f in fields(kind):
        if f.name not in chosen:
            if f.default is f.default_factory:  # both MISSING: a required field
                raise CheckpointError(f"{where}: field {f.name!r} is missing")
            continue
        value = chosen[f.name]
        is_size = f.type is int
        numeric = not isinstance(value, bool) and (isinstance(value, int) or (not is_size and isinstance(value, float)))
        if not (isinstance(value, bool) if f.type is bool else numeric and value >= 0):
            raise CheckpointError(f"{where}: field {f.name!r} must be {f.type.__name__}, is {value!r}")
        if is_size and value > (1000 if "layers" in f.name else 2**24):
            raise CheckpointError(f"{where}: field {f.name!r} is {value}: no model is that large")
    part = kind(**chosen)
    if kind is BertConfig and part.pad_token_id >= part.vocab_size:
        raise CheckpointError(f"{where}: pad_token_id {part.pad_token_id} is outside the vocabulary of {part.vocab_size}")
    return part


def read_tower(kind: type, values: dict, where: str):
    """A tower's dataclass from its own repository's config.json (SigLIP nests the vision part) or from towers.json."""
    if kind is SiglipConfig and isinstance(values, dict) and isinstance(values.get("vision_config"), dict):
        values = values["vision_config"]
    given = {"num_labels": 0, "roberta": False} if kind is BertConfig else {}
    if kind is WhisperConfig:
        given["num_labels"] = values.get("num_labels", 2) if isinstance(values, dict) else 2
    if kind is BertConfig and isinstance(values, dict) and values.get("pad_token_id") is None:
        given["pad_token_id"] = 0
    return read_part(kind, values, where, **given)


def read_bert(values: dict, where: str) -> BertConfig:
    """The verifier's dataclass from a Hugging Face config.json of a RoBERTa or BERT sequence classifier."""
    labels = values.get("id2label")
    count = len(labels) if isinstance(labels, dict) else values.get("num_labels", 2)
    return read_part(BertConfig, values, where, num_labels=count, roberta=values.get("model_type") == "roberta",
                     pad_token_id=values.get("pad_token_id", 1))


def read_humanomni(raw: dict, vision: SiglipConfig, audio: WhisperConfig, gate: BertConfig,
                   where: str) -> HumanOmniConfig:
    """A released config.json and the towers' sizes -> HumanOmniConfig. Raises CheckpointError naming `where`, field."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(raw).__name__}")
    given = {}
    if "rope_theta" not in raw and isinstance(raw.get("rope_parameters"), dict):  # newer transformers nest it
        given["rope_theta"] = raw["rope_parameters"].get("rope_theta", 1e6)
    text = read_part(Qwen2Config, raw, where, tie_word_embeddings=raw.get("tie_word_embeddings", False), **given)
    if text.hidden_size % text.num_attention_heads or text.num_attention_heads % text.num_key_value_heads:
        raise CheckpointError(f"{where}: hidden_size {text.hidden_size}, num_attention_heads "
                              f"{text.num_attention_heads}, num_key_value_heads {text.num_key_value_heads} "
                              "do not divide")
    sizes = {"num_frames": raw.get("num_frames") or 8, "select_layer": raw.get("mm_vision_select_layer", -2),
             "gate_hidden_size": raw.get("gate_hidden_size", 3584)}
    if wrong := [key for key, value in sizes.items() if not isinstance(value, int)]:
        raise CheckpointError(f"{where}: {wrong[0]} must be an integer, is {sizes[wrong[0]]!r}")
    projector = raw.get("mm_projector_type", "all_in_one_small")
    if projector not in ("all_in_one_small", "all_in_one"):
        raise CheckpointError(f"{where}: mm_projector_type {projector!r} is not supported "
                              "(all_in_one_small or all_in_one)")
    if raw.get("mm_audio_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
        raise CheckpointError(f"{where}: mm_audio_projector_type {raw['mm_audio_projector_type']!r} is not supported")
    for key, width in (("mm_hidden_size", vision.hidden_size), ("audio_hidden_size", audio.d_model)):
        if raw.get(key, width) != width:
            raise CheckpointError(f"{where}: {key} is {raw[key]}, the tower's width is {width}: wrong tower?")
    eos = raw.get("eos_token_id", 151645)
    return HumanOmniConfig(
        text, vision, audio, gate, projector=projector, **sizes,
        image_aspect_ratio=raw.get("image_aspect_ratio") or "pad", bos_token_id=raw.get("bos_token_id"),
        eos_token_id=eos[0] if isinstance(eos, list) else eos, pad_token_id=raw.get("pad_token_id"), extra=dict(raw))


def config_json(config: HumanOmniConfig) -> dict:
    """HumanOmniConfig -> the released config.json, keys of the file it was read from first and kept."""
    large = config.projector == "all_in_one"
    released = {"model_type": "HumanOmni_qwen2", "architectures": ["HumanOmniQwen2ForCausalLM"], "hidden_act": "silu",
                "attention_dropout": 0.0, "use_cache": True, "use_mm_proj": True, "mm_use_x_start_end": True,
                "mm_vision_tower": f"google/siglip-{'so400m-patch14-384' if large else 'base-patch16-224'}",
                "mm_audio_tower": "openai/whisper-large-v3", "mm_vision_select_feature": "patch",
                "mm_audio_projector_type": "mlp2x_gelu"}
    own = asdict(config.text) | {
        "mm_projector_type": config.projector, "mm_hidden_size": config.vision.hidden_size,
        "audio_hidden_size": config.audio.d_model, "mm_vision_select_layer": config.select_layer,
        "num_frames": config.num_frames, "image_aspect_ratio": config.image_aspect_ratio,
        "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    if config.gate_hidden_size != 3584:  # our key: the released code has 3584 written into it
        own["gate_hidden_size"] = config.gate_hidden_size
    return released | config.extra | own


def towers_json(config: HumanOmniConfig) -> dict:
    """The three towers' sizes as towers.json holds them."""
    gate = {k: v for k, v in asdict(config.gate).items() if k not in ("num_labels", "roberta")}
    return {"vision": asdict(config.vision) | {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3},
            "audio": asdict(config.audio) | {"activation_function": "gelu"},
            "text": gate | {"hidden_act": "gelu"}}
