"""Model folders and hub repositories -> models, and back in the released layout.

A HumanOmni folder: config.json, towers.json (ours: the towers' sizes; a released folder has none and its towers' own
repositories, or config.TOWERS, give them), weights (model.safetensors, or sharded, or pytorch_model*.bin), tokenizer
files, text_gate/tokenizer.json. A verifier folder is Hugging Face's RobertaForSequenceClassification.

Models are built on the meta device and filled tensor by tensor, so that weights are never in memory twice. A
checkpoint's own towers are loaded (divergence 12); `model.tower_source` says where each came from. Left out:
quantised weights, saving in shards, training state (run/state.py).
"""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from erv_min.config import (TOWERS, BertConfig, SiglipConfig, WhisperConfig, config_json, read_humanomni, read_part,
                            read_roberta, towers_json)
from erv_min.model.bert import RobertaClassifier
from erv_min.model.humanomni import PARTS, HumanOmni
from erv_min.run.errors import CheckpointError, SettingsError
from erv_min.run.files import atomic_write, read_object, write_json
from erv_min.run.onednn import use_onednn
from erv_min.run.weights import BIN_FILES, SAFE_FILES, Stored, by_part, fill, open_weights, write_safetensors

TEXT_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
              "added_tokens.json", "generation_config.json", "chat_template.jinja", "text_gate/tokenizer.json",
              "text_gate/tokenizer_config.json"]

# ---- HumanOmni ------------------------------------------------------------------------------------------------------


def load_humanomni(folder_or_repo: str | Path, dtype: torch.dtype = torch.float32,
                   device: str | torch.device = "cpu", revision: str | None = None, vision_tower: str | None = None,
                   audio_tower: str | None = None, text_tower: str | None = None) -> HumanOmni:
    """Reads a HumanOmni checkpoint into a model in eval mode; on the device "meta" its names and shapes alone.

    A tower's weights are the checkpoint's own where it has them, else those of the repository that config.json names;
    `vision_tower`, `audio_tower`, `text_tower` (folder or repository) override both. `model.tower_source` tells which
    for each; unused parameters that were absent (zeros, never read) are counted under its key "unused_parameters".
    Raises CheckpointError naming the file and field, or listing the tensors that do not fit by part.
    """
    folder = resolve(folder_or_repo, revision)
    raw, stored = read_object(folder / "config.json"), open_weights(folder)
    told = read_object(folder / "towers.json") if (folder / "towers.json").exists() else {}
    sizes, source = {}, {}
    for tower, override in zip(ALL_TOWERS, (vision_tower, audio_tower, text_tower)):
        own, place = [k for k in stored if k.startswith(tower.prefix)], override
        if not override and not (own and tower.name in told):
            place = tower_place(raw.get(tower.key), tower, folder / "config.json")
        if tower.name in told and not override:
            sizes[tower.name] = read_part(tower.kind, told[tower.name], f"{folder}/towers.json, {tower.name}")
        elif place in TOWERS:
            sizes[tower.name] = TOWERS[place]
        else:
            file = resolve(place, weights=False) / "config.json"
            sizes[tower.name] = read_part(tower.kind, read_object(file), str(file))
        source[tower.name] = f"checkpoint {folder_or_repo}"
        if override or not own:
            stored = {k: v for k, v in stored.items() if k not in own} | tower_weights(place, tower)
            source[tower.name] = f"{'override' if override else 'repository'} {place}"
            if not override and raw.get(tower.key) not in (None, place):
                source[tower.name] += f" (config.json names {raw[tower.key]}, which is not here: {place} is meant)"
    if (last := stored.get("model.audio_tower.audio_tower.classifier.weight")) and len(last.shape) == 2:
        # Unused, and no released file states its size.
        sizes["audio"] = replace(sizes["audio"], num_labels=last.shape[0], classifier_proj_size=last.shape[1])
    config = read_humanomni(raw, sizes["vision"], sizes["audio"], sizes["text"], f"{folder}/config.json")
    try:
        with torch.device("meta"):
            model = HumanOmni(config)
    except SettingsError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if config.text.tie_word_embeddings and (head := stored.pop("lm_head.weight", None)):
        stored.setdefault("model.embed_tokens.weight", head)  # where a file holds both, the embedding's counts
    absent = fill(model, stored, model.unused_parameters(), dtype, device, PARTS, folder)
    model.tie_weights()
    if absent:
        counts = ", ".join(f"{len(names)} absent in {part}" for part, names in by_part(absent, PARTS).items())
        source["unused_parameters"] = f"zeros ({counts}; never read)"
    model.tower_source, model.source_folder = source, folder
    return use_onednn(model).eval()


def save_humanomni(model: HumanOmni, folder: str | Path, dtype: torch.dtype | None = None, shapes=None,
                   stream=None) -> None:
    """Writes a folder that `load_humanomni` and the released code read: released names, tied head left out.

    `dtype` None keeps the model's. A sharded model is written from `shapes` and `stream` (sharding.save_model), in a
    dtype. Keys of the config.json that the model came from are kept, and the tokenizer files of its folder and of its
    text gate are copied. Each file is written whole or not at all, config.json last.
    """
    folder, state = Path(folder), shapes or model.state_dict()
    if model.config.text.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    write_safetensors(folder / "model.safetensors", state, dtype, stream)
    origin, gate = model.source_folder, model.gate_folder
    for name in TEXT_FILES if origin and Path(origin).resolve() != folder.resolve() else []:
        if (Path(origin) / name).exists():
            atomic_write(folder / name, (Path(origin) / name).read_bytes())
    if gate and Path(gate).resolve() != (folder / "text_gate").resolve():
        atomic_write(folder / "text_gate" / "tokenizer.json", (Path(gate) / "tokenizer.json").read_bytes())
    write_json(folder / "towers.json", towers_json(model.config))
    stored_as = str(dtype or model.head_weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", config_json(model.config) | {"torch_dtype": stored_as})


# ---- the verifier ---------------------------------------------------------------------------------------------------


def load_erv(folder_or_repo: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
             revision: str | None = None) -> RobertaClassifier:
    """Reads a RobertaForSequenceClassification folder or repository into a RobertaClassifier in eval mode.

    Raises CheckpointError on another architecture, and as `load_humanomni` does.
    """
    folder = resolve(folder_or_repo, revision)
    config = read_roberta(read_object(folder / "config.json"), f"{folder}/config.json")
    with torch.device("meta"):
        model = RobertaClassifier(config)
    stored = {k: v for k, v in open_weights(folder).items() if not k.startswith("roberta.pooler.")}  # never read
    fill(model, stored, set(), dtype, device, {}, folder)
    return use_onednn(model).eval()


def save_erv(model: RobertaClassifier, folder: str | Path, labels) -> None:
    """Writes a verifier as Hugging Face's RobertaForSequenceClassification; `labels` name its outputs in order.

    The caller puts tokenizer.json beside it. Raises CheckpointError where labels and outputs differ in number.
    """
    folder, labels = Path(folder), list(labels)
    if len(labels) != model.config.num_labels:
        raise CheckpointError(f"{folder}: {len(labels)} labels for a verifier of {model.config.num_labels} outputs")
    sizes = {k: v for k, v in asdict(model.config).items() if k not in ("num_labels", "roberta")}
    write_safetensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "config.json", sizes | {
        "architectures": ["RobertaForSequenceClassification"], "model_type": "roberta", "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "position_embedding_type": "absolute",
        "problem_type": "multi_label_classification", "bos_token_id": 0, "eos_token_id": 2,
        "id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)},
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")})


# ---- towers from elsewhere ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tower:
    """How a tower is named in towers.json and config.json, in a HumanOmni checkpoint and in its own repository."""

    name: str
    kind: type
    key: str  # of config.json
    prefix: str  # in the checkpoint
    strip: str  # in the tower's own repository, where it stands
    parts: tuple[str, ...]  # of the rest of a name, what HumanOmni has a place for
    usual: str = ""


ALL_TOWERS = (
    Tower("vision", SiglipConfig, "mm_vision_tower", "model.vision_tower.vision_tower.", "", ("vision_model.",)),
    Tower("audio", WhisperConfig, "mm_audio_tower", "model.audio_tower.audio_tower.", "model.",
          ("encoder.", "projector.", "classifier.")),
    Tower("text", BertConfig, "mm_text_tower", "model.bert_model.", "bert.", ("embeddings.", "encoder.", "pooler."),
          "google-bert/bert-base-uncased"),
)


def tower_place(name: str | None, tower: Tower, where: Path) -> str:
    """What config.json calls a tower -> folder or repository.

    Configs in the wild hold paths of their authors' machines: where a path is not here, a component of it that is a
    known tower's name stands for that tower. Raises CheckpointError where nothing is left to try.
    """
    name = name or tower.usual
    if not isinstance(name, str) or len(name) > 1000 or "\0" in name:
        raise CheckpointError(f"{where}: {tower.key} is {str(name)[:80]!r}, not a tower's folder or repository")
    if name and (Path(name) / "config.json").exists():
        return name
    known = {repository.split("/")[1]: repository for repository in TOWERS}
    for component in reversed(Path(name).parts):
        if (last := component.split("--")[-1]) in known:  # models--owner--name: a folder of the hub's cache
            return known[last]
    if not os.path.isabs(name) and name.count("/") == 1:
        return name
    raise CheckpointError(f"{where}: {tower.key} is {name!r}, which is not here; name the tower's folder or repository "
                          f"by --{tower.name}-tower")


def tower_weights(place: str | Path, tower: Tower) -> dict[str, Stored]:
    """The weights in a tower's own repository, under the names of a HumanOmni checkpoint."""
    stored = {k.removeprefix(tower.strip): v for k, v in open_weights(resolve(place)).items()}
    found = {tower.prefix + k: v for k, v in stored.items() if k.startswith(tower.parts)}
    if not found:
        raise CheckpointError(f"{place}: holds no {tower.name} tower (no tensor under {' or '.join(tower.parts)})")
    return found


# ---- where things lie -----------------------------------------------------------------------------------------------


def resolve(folder_or_repo: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """A local folder as it is; else a snapshot of the hub repository of that name, fetched or from the cache.

    `weights=False` fetches config and tokenizer alone. Raises CheckpointError naming repository, file and the way out.
    To publish a folder, one call: huggingface_hub.HfApi().upload_folder(repo_id="me/name", folder_path=folder).
    """
    name = str(folder_or_repo)
    if Path(name).is_dir():
        if revision:
            raise CheckpointError(f"{name} is a folder here, and has no revision {revision}")
        return Path(name)
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") != 1 or Path(name).exists():
        raise CheckpointError(f"{name}: no such folder, and not the name of a hub repository (owner/name)")

    at, option = (f"{name} at {revision}", f" --revision {revision}") if revision else (name, "")
    way = (f"Give a local folder, or where there is a network run 'hf download {name}{option}' "
           "and bring that folder (or the cache, HF_HOME) here")
    for files in (SAFE_FILES, BIN_FILES) if weights else ([],):  # .bin only where there are no safetensors
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[
                "config.json", "towers.json", *TEXT_FILES, *files]))
        except Exception as error:  # network, permission, name, revision, disk: one message for all, with its cause
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{at}: no such folder here, and the hub repository could not be fetched "
                                  f"({type(error).__name__}: {reason}). {way}") from error
        if found := not weights or any((folder / file).exists() for file in files[:2]):
            break
    if not found or not (folder / "config.json").exists():
        # the hub has it not, or the cache is a part of it and there is no network to fetch the rest
        absent = "config.json" if found else " or ".join(SAFE_FILES[:2] + BIN_FILES[:2])
        raise CheckpointError(f"{at}: {folder} has no {absent}. {way}")
    return folder


def text_gate_folder(folder_or_repo: str | Path, revision: str | None = None, text_tower: str | None = None) -> Path:
    """The folder whose tokenizer.json the text gate uses: text_gate/ inside, else that of `text_tower`, or of BERT."""
    own = resolve(folder_or_repo, revision, weights=False) / "text_gate"
    if (own / "tokenizer.json").exists() and not text_tower:
        return own
    try:
        return resolve(text_tower or ALL_TOWERS[2].usual, weights=False)
    except CheckpointError as error:
        raise CheckpointError(f"the text gate's tokenizer: {error}, or put its tokenizer.json into {own}") from None
