"""Model folders and hub repositories -> models, and back in the released layout.

A HumanOmni folder: config.json, towers.json (ours: the towers' sizes; a released folder has none and its towers' own
repositories, or config.TOWERS, give them), weights (base/weights.py), tokenizer files, text_gate/tokenizer.json.
A verifier folder is Hugging Face's RobertaForSequenceClassification.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from erv_min.base.errors import CheckpointError
from erv_min.base.fields import read_part
from erv_min.base.files import atomic_write, read_object, write_json
from erv_min.base.hub import TEXT_FILES, resolve
from erv_min.base.onednn import use_onednn
from erv_min.base.weights import WEIGHTS, fill, open_weights, write_safetensors
from erv_min.config import (TOWERS, BertConfig, HumanOmniConfig, SiglipConfig, WhisperConfig, config_json, read_qwen2,
                            read_roberta)
from erv_min.model.bert import RobertaClassifier
from erv_min.model.humanomni import HumanOmni
from erv_min.model.parameters import unused_parameters
from erv_min.tokenizer import EncoderTokenizer, Tokenizer

BERT = "google-bert/bert-base-uncased"


@dataclass(frozen=True)
class Tower:
    name: str  # in towers.json; mm_NAME_tower in config.json, --NAME-tower on a command line
    kind: type
    prefix: str  # of its parameters in a HumanOmni checkpoint
    strip: str  # their prefix in the tower's own repository


ALL_TOWERS = (Tower("vision", SiglipConfig, "model.vision_tower.vision_tower.", ""),
              Tower("audio", WhisperConfig, "model.audio_tower.audio_tower.", "model."),
              Tower("text", BertConfig, "model.bert_model.", "bert."))


def check_checkpoint(name: str | Path, kind: str, revision: str | None = None) -> None:
    """Before weights are fetched or read: raises CheckpointError if there is no such folder or repository, if its
    config.json is not of that kind ("humanomni" or "erv"), or if its tokenizer cannot be read."""
    folder = resolve(name, revision, weights=False)
    read, tokenizer = {"humanomni": (read_qwen2, Tokenizer), "erv": (read_roberta, EncoderTokenizer)}[kind]
    read(config_of(folder), f"{folder}/config.json")
    tokenizer(folder)


def load_humanomni(folder_or_repo: str | Path, dtype: torch.dtype = torch.float32,
                   device: str | torch.device = "cpu", revision: str | None = None, vision_tower: str | None = None,
                   audio_tower: str | None = None, text_tower: str | None = None) -> HumanOmni:
    """Reads a HumanOmni checkpoint into a model in eval mode; on the device "meta" its names and shapes alone.

    A tower's weights are the checkpoint's own if it has them, else those of the repository that config.json names
    (divergence 12); `vision_tower`, `audio_tower`, `text_tower` (folder or repository) override both.
    `model.tower_source` says where each came from. Raises CheckpointError naming file and field, or the tensors."""
    folder, overrides = resolve(folder_or_repo, revision), (vision_tower, audio_tower, text_tower)
    tensors, config, source, where = open_weights(folder), humanomni_config(folder, *overrides), {}, str(folder)
    if (last := tensors.get("model.audio_tower.audio_tower.classifier.weight")) is not None and last.dim() == 2:
        # Unused, and no released file states its size.
        audio = replace(config.audio, num_labels=last.shape[0], classifier_proj_size=last.shape[1])
        config = replace(config, audio=audio)
    with torch.device("meta"):
        model = HumanOmni(config)
    expected = {name for name, _ in model.named_parameters()}
    for tower, override in zip(ALL_TOWERS, overrides):
        if not override and any(name.startswith(tower.prefix) for name in tensors):
            source[tower.name] = f"checkpoint {folder_or_repo}"
            continue
        place = override or tower_place(config.extra, tower, folder)
        source[tower.name] = f"{'override' if override else 'repository'} {place}"
        where += f" with the tower of {place}"
        tensors = {name: x for name, x in tensors.items() if not name.startswith(tower.prefix)}
        for name, x in open_weights(resolve(place)).items():
            name = name.removeprefix(tower.strip)
            for full in (tower.prefix + name, f"{tower.prefix}vision_model.{name}"):  # transformers 5 leaves that out
                if full in expected:  # not SigLIP's text half, nor Whisper's decoder
                    tensors[full] = x
    if config.text.tie_word_embeddings and (head := tensors.pop("lm_head.weight", None)) is not None:
        tensors.setdefault("model.embed_tokens.weight", head)  # if a file holds both, the embedding's counts
    absent = fill(model, tensors, unused_parameters(model), dtype, device, where)
    model.tie_weights()
    if absent:
        source["unused_parameters"] = f"zeros ({len(absent)} absent; never read)"
    model.tower_source, model.source_folder = source, folder
    return use_onednn(model).eval()


def save_humanomni(model: HumanOmni, folder: str | Path, dtype: torch.dtype | None = None, shapes=None,
                   stream=None) -> None:
    """Writes a folder that `load_humanomni` and the released code read, by default in the model's dtype. A sharded
    model is written from `shapes` and `stream` (sharding.save_model). Keys of the config.json that the model came from
    are kept, the tokenizer files of its folder and text gate copied."""
    folder, state = Path(folder), shapes or model.state_dict()
    if model.config.text.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    origin, gate = model.source_folder, model.gate_folder
    copies = [(Path(origin, name), folder / name) for name in TEXT_FILES] if origin else []
    copies += [(Path(gate, "tokenizer.json"), folder / "text_gate" / "tokenizer.json")] if gate else []
    for old, new in copies:
        if old.exists() and old.resolve() != new.resolve():
            atomic_write(new, old.read_bytes())
    parts = zip(ALL_TOWERS, (model.config.vision, model.config.audio, model.config.gate))
    write_json(folder / "towers.json", {tower.name: asdict(part) for tower, part in parts})
    stored_as = str(dtype or model.head_weight.dtype).removeprefix("torch.")
    config = config_json(model.config) | {"torch_dtype": stored_as}
    if "dtype" in config:  # transformers 5 reads this one
        config["dtype"] = stored_as
    write_config(folder, config)
    write_safetensors(folder / WEIGHTS, state, stream, dtype)  # last: if they are there, the rest is


def write_config(folder: Path, config: dict) -> None:
    """Writes config.json; what a run has written there of itself stays."""
    file = folder / "config.json"
    there = read_object(file) if file.exists() else {}
    write_json(file, config | {key: there[key] for key in there if key == "erv_min"})


def config_of(folder: Path) -> dict:
    """A checkpoint's config.json. Raises CheckpointError on that of a run that has not finished."""
    raw = read_object(folder / "config.json")
    if list(raw) == ["erv_min"]:
        raise CheckpointError(f"{folder}: a run that has not finished: go on with it (--resume), or name another")
    return raw


def humanomni_config(folder: Path, *overrides: str | None) -> HumanOmniConfig:
    """The sizes that a folder's config.json and towers.json give, or those of its towers' own repositories;
    `overrides`: other towers for vision, audio and text."""
    raw, sizes = config_of(folder), []
    told = read_object(folder / "towers.json") if (folder / "towers.json").exists() else {}
    for tower, override in zip(ALL_TOWERS, overrides):
        if tower.name in told and not override:
            sizes.append(read_part(tower.kind, told[tower.name], f"{folder}/towers.json, {tower.name}"))
            continue
        place = override or tower_place(raw, tower, folder)
        if isinstance(TOWERS.get(place), tower.kind):
            sizes.append(TOWERS[place])
        else:
            file = resolve(place, weights=False) / "config.json"
            own = read_object(file)
            sizes.append(read_part(tower.kind, own.get("vision_config", own), str(file)))  # SigLIP's nests that half
    (vision, audio, gate), where = sizes, f"{folder}/config.json"
    text = read_qwen2(raw, where)
    for key, width in ("mm_hidden_size", vision.hidden_size), ("audio_hidden_size", audio.d_model):
        if raw.get(key, width) != width:
            raise CheckpointError(f"{where}: {key} is {raw[key]}, the tower's width is {width}: wrong tower?")
    config = read_part(HumanOmniConfig, raw, where, text=text, vision=vision, audio=audio, gate=gate, extra=raw)
    if vision.grid % 2 != (config.mm_projector_type == "all_in_one"):
        raise CheckpointError(f"{where}: mm_projector_type {config.mm_projector_type} does not fit a grid of "
                              f"{vision.grid} patches: all_in_one needs an odd one, all_in_one_small an even one")
    return config


def tower_place(raw: dict, tower: Tower, folder: Path) -> str:
    """The folder or repository of a tower that the config.json `raw` of `folder` names. Configs in the wild hold paths
    of their authors' machines: one that is not here and ends in a known tower's name stands for that tower."""
    key = f"mm_{tower.name}_tower"
    name = str(raw.get(key) or (BERT if tower.name == "text" else ""))
    if name and os.path.exists(os.path.join(name, "config.json")):
        return name
    place = re.sub(r".*/models--([\w.-]+)--([\w.-]+)/snapshots/\w+$", r"\1/\2", name.rstrip("/"))  # the hub's cache
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
        return place
    for repository in TOWERS:
        if place.split("/")[-1] == repository.split("/")[1]:
            return repository
    raise CheckpointError(f"{folder}/config.json: {key} is {name[:200]!r}, which is not here; name the tower's folder "
                          f"or repository by --{tower.name}-tower")


def load_erv(folder_or_repo: str | Path) -> RobertaClassifier:
    """Reads a RobertaForSequenceClassification folder or repository in eval mode; errors as `load_humanomni`."""
    folder = resolve(folder_or_repo)
    config = read_roberta(config_of(folder), f"{folder}/config.json")
    with torch.device("meta"):
        model = RobertaClassifier(config)
    tensors = {k: v for k, v in open_weights(folder).items() if not k.startswith("roberta.pooler.")}  # never read
    fill(model, tensors, set(), torch.float32, "cpu", str(folder))
    return use_onednn(model).eval()


def save_erv(model: RobertaClassifier, folder: str | Path, labels: Sequence[str]) -> None:
    """Writes a verifier as Hugging Face's RobertaForSequenceClassification; `labels` name its outputs in order."""
    folder = Path(folder)
    sizes = {k: v for k, v in asdict(model.config).items() if k not in ("num_labels", "roberta")}
    write_config(folder, sizes | {
        "architectures": ["RobertaForSequenceClassification"], "model_type": "roberta",
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "position_embedding_type": "absolute",
        "problem_type": "multi_label_classification", "bos_token_id": 0, "eos_token_id": 2,
        "id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)},
        "torch_dtype": "float32"})
    write_safetensors(folder / WEIGHTS, model.state_dict())


def text_gate_folder(folder_or_repo: str | Path, revision: str | None = None, text_tower: str | None = None) -> Path:
    """The folder whose tokenizer.json the text gate uses: text_gate/ inside, else that of `text_tower`, or of BERT."""
    own = resolve(folder_or_repo, revision, weights=False) / "text_gate"
    if (own / "tokenizer.json").exists() and not text_tower:
        return own
    try:
        return resolve(text_tower or BERT, weights=False)
    except CheckpointError as error:
        raise CheckpointError(f"the text gate's tokenizer: {error}, or put its tokenizer.json into {own}") from None
