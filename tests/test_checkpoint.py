"""Model folders: released layout in and out, bit for bit; towers from elsewhere; damaged and misfitting files."""

import json
import os
import pickle
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GOLDEN
from erv_min import checkpoint
from erv_min.base.errors import CheckpointError
from erv_min.checkpoint import (ALL_TOWERS, check_checkpoint, humanomni_config, load_erv, load_humanomni, resolve, save_erv,
                                save_humanomni, text_gate_folder, tower_place)
from erv_min.config import TOWERS, humanomni, read_qwen2, roberta
from erv_min.model.bert import RobertaClassifier
from erv_min.model.parameters import random_humanomni

SMALL = GOLDEN / "humanomni_small"
VISION, AUDIO, TEXT = (tower.prefix for tower in ALL_TOWERS)


@pytest.fixture
def folder(tmp_path):
    """A copy of the small golden checkpoint to spoil."""
    for name in ("config.json", "towers.json", "model.safetensors"):
        shutil.copy(SMALL / name, tmp_path / name)
    return tmp_path


def tensors():
    return load_file(SMALL / "model.safetensors")


def change_json(path, **values):
    raw = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# ---- out and in again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["humanomni_small", "humanomni_large"])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
def test_released_weights_round_trip_byte_for_byte(layout, loaded, tmp_path):
    model = load_humanomni(GOLDEN / layout, dtype=loaded)
    assert {p.dtype for p in model.parameters()} == {loaded} and not model.training
    save_humanomni(model, tmp_path, dtype=torch.bfloat16)
    saved, released = load_file(tmp_path / "model.safetensors"), load_file(GOLDEN / layout / "model.safetensors")
    assert saved.keys() == released.keys()
    for name, tensor in released.items():
        assert saved[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(saved[name].view(torch.int16), tensor.view(torch.int16)), name
    config, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path, GOLDEN / layout))
    assert config == original
    assert same(load_humanomni(tmp_path, dtype=loaded), model)


def test_default_keeps_the_models_dtype_and_unknown_config_keys(folder, tmp_path):
    change_json(folder / "config.json", somebodys_key={"x": 1}, dtype="bfloat16")  # transformers 5's torch_dtype
    model = load_humanomni(folder)
    with torch.no_grad():
        model.model.norm.weight += 1e-6  # not a bfloat16 number
    out = tmp_path / "out"
    save_humanomni(model, out)
    config = json.loads((out / "config.json").read_text())
    assert config["somebodys_key"] == {"x": 1} and config["torch_dtype"] == config["dtype"] == "float32"
    assert same(load_humanomni(out), model)


def test_toy_round_trip_and_tokenizer_files(tmp_path):
    model = random_humanomni(humanomni("toy"), 2)
    (tmp_path / "a" / "text_gate").mkdir(parents=True)
    (tmp_path / "a" / "tokenizer.json").write_text("lm")
    (tmp_path / "a" / "text_gate" / "tokenizer.json").write_text("gate")
    save_humanomni(model, tmp_path / "a")
    again = load_humanomni(tmp_path / "a")
    assert again.config == model.config and same(again, model)
    save_humanomni(again, tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "lm"
    assert (tmp_path / "b" / "text_gate" / "tokenizer.json").read_text() == "gate"
    assert text_gate_folder(tmp_path / "b") == tmp_path / "b" / "text_gate"
    save_humanomni(again, tmp_path / "a")  # over itself
    assert same(load_humanomni(tmp_path / "a"), model)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json", "model.safetensors", "text_gate", "tokenizer.json", "towers.json"]  # no temporary file left


def test_tied_head_is_one_parameter(folder):
    model = load_humanomni(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" in model.state_dict() and "lm_head.weight" not in tensors()
    head = {"lm_head.weight": tensors()["model.embed_tokens.weight"].clone()}
    save_file(tensors() | head, folder / "model.safetensors")
    assert same(load_humanomni(folder), model)  # written twice, as older checkpoints do


def test_a_write_that_fails_leaves_the_old_file(folder, monkeypatch):
    model, before = load_humanomni(folder), (folder / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_humanomni(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert len(list(folder.iterdir())) == 3


def test_the_weights_are_written_last_and_what_a_run_says_of_itself_stays(tmp_path, monkeypatch):
    """A folder with weights is whole (toy/chain.py goes by them); a run that is stopped before can be resumed."""
    run = {"erv_min": {"settings": {"seed": 5}}}
    policy, verifier = random_humanomni(humanomni("toy"), 0), RobertaClassifier(roberta("toy", 3))
    for name, save in (("policy", partial(save_humanomni, policy)), ("erv", partial(save_erv, verifier, labels="abc"))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(run))
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_safetensors", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                save(folder)
        raw = json.loads((folder / "config.json").read_text())
        assert raw.keys() > run.keys() and raw["erv_min"] == run["erv_min"]
        assert (folder / "towers.json").exists() == (name == "policy")


def test_loaded_weights_are_no_view_of_the_file(folder):
    model = load_humanomni(folder, dtype=torch.bfloat16)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    with open(folder / "model.safetensors", "rb+") as f:  # overwritten in place, not replaced
        f.seek(200_000)
        f.write(b"\x55" * 500_000)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


# ---- the other layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["shards", "bin shards", "bin", "old bin"])
def test_other_weight_layouts(folder, layout):
    """The golden weights otherwise, with a buffer that older transformers saved; a shard that is missing is an error."""
    (folder / "model.safetensors").unlink()
    whole = tensors() | {"model.bert_model.embeddings.position_ids": torch.arange(64)}
    if "shards" in layout:
        save, stem, suffix = (torch.save, "pytorch_model", "bin") if "bin" in layout else (save_file, "model", "safetensors")
        for i in range(3):
            save({k: whole[k] for k in sorted(whole)[i::3]}, folder / f"{stem}-{i + 1:05}-of-00003.{suffix}")
    else:
        torch.save(whole, folder / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "bin")
    assert same(load_humanomni(folder), load_humanomni(SMALL))
    if "shards" in layout:
        (folder / f"{stem}-00002-of-00003.{suffix}").unlink()
        with pytest.raises(CheckpointError, match="2 of the 3 files .*model-.*are here"):
            load_humanomni(folder)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_names_of_what_wrapped_the_model_are_left_out(folder, prefix):
    """DDP, PEFT, torch.compile and FSDP put theirs before a name, some also into it."""
    named = {prefix + k.replace("layers.1.", "layers.1._orig_mod."): v for k, v in tensors().items()}
    save_file(named, folder / "model.safetensors")
    loaded = load_humanomni(folder)
    assert same(loaded, load_humanomni(SMALL)) and loaded.tower_source["vision"].startswith("checkpoint")


# ---- towers ---------------------------------------------------------------------------------------------------------


def tower_folder(path, part, scale=1.0, bare=False):
    """A tower's own repository made of the golden weights, under Hugging Face's names; `bare`: as transformers 5 saves
    the class that holds a tower alone."""
    path.mkdir()
    sizes = json.loads((SMALL / "towers.json").read_text())[part]
    prefix, rename, other = {
        "vision": (VISION, "{}", {"text_model.x": torch.zeros(2), "logit_scale": torch.zeros(1)}),
        "audio": (AUDIO, "model.{}", {"model.decoder.x": torch.zeros(2)}),
        "text": (TEXT, "bert.{}", {"cls.predictions.bias": torch.zeros(2)})}[part]
    own = {k.removeprefix(prefix): v * scale for k, v in tensors().items() if k.startswith(prefix)}
    own = {k: v for k, v in own.items() if not k.startswith(("projector.", "classifier."))}
    if part == "text":
        own = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
               for k, v in own.items()}
    if bare:
        rename, other, own = "{}", {}, {k.removeprefix("vision_model."): v for k, v in own.items()}
    save_file({rename.format(k): v for k, v in own.items()} | other, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"vision_config": sizes} if part == "vision" else sizes))
    return path


@pytest.mark.parametrize("bare", [False, True])
def test_towers_from_their_own_repositories(folder, tmp_path, bare):
    places = {part: str(tower_folder(tmp_path / part, part, bare=bare)) for part in ("vision", "audio", "text")}
    kept = {k: v for k, v in tensors().items() if not k.startswith((VISION, AUDIO, TEXT))}
    save_file(kept, folder / "model.safetensors")
    (folder / "towers.json").unlink()
    change_json(folder / "config.json", mm_vision_tower=places["vision"], mm_audio_tower=places["audio"])
    model, released = load_humanomni(folder, text_tower=places["text"]), load_humanomni(SMALL)
    a, b = model.state_dict(), released.state_dict()
    read = [k for k in b if not k.startswith((AUDIO + "projector", AUDIO + "classifier"))]
    assert all(torch.equal(a[k], b[k]) for k in read) and len(b) - len(read) == 4
    assert not a[AUDIO + "projector.weight"].any()
    source = model.tower_source
    assert source["vision"] == f"repository {places['vision']}" and source["text"] == f"override {places['text']}"
    assert source["unused_parameters"] == "zeros (4 absent; never read)"


def test_a_checkpoints_own_tower_is_loaded_unless_overridden(folder, tmp_path):
    other = tower_folder(tmp_path / "vision", "vision", scale=2.0)
    change_json(folder / "config.json", mm_vision_tower=str(other))
    name = VISION + "vision_model.encoder.layers.0.mlp.fc1.weight"
    own = load_humanomni(folder)
    assert torch.equal(own.state_dict()[name], tensors()[name].float())
    assert own.tower_source["vision"] == f"checkpoint {folder}"
    replaced = load_humanomni(folder, vision_tower=other)
    assert torch.equal(replaced.state_dict()[name], 2 * tensors()[name].float())
    assert replaced.tower_source["vision"] == f"override {other}"


@pytest.mark.parametrize("name, repository", [
    ("/nas/jiaxing/models/siglip-so400m-patch14-384", "google/siglip-so400m-patch14-384"),
    ("../models/whisper-large-v3/", "openai/whisper-large-v3"),
    ("bert-base-uncased", "google-bert/bert-base-uncased"),
    ("/nas/hub/models--openai--whisper-large-v3/snapshots/06f233fe", "openai/whisper-large-v3"),
    (None, "google-bert/bert-base-uncased")])
def test_paths_of_the_authors_machines(name, repository):
    tower = ALL_TOWERS[["google", "openai", "google-bert"].index(repository.split("/")[0])]
    assert tower_place({f"mm_{tower.name}_tower": name}, tower, SMALL) == repository and isinstance(TOWERS[repository], tower.kind)


def test_a_tower_that_nobody_knows(folder):
    """A name that only holds a known one is another tower's."""
    (folder / "towers.json").unlink()
    for name in ("/data/secret/tower", "/data/siglip-base-patch16-224-ours", "/data/siglip-base-patch16-224/ours", ""):
        change_json(folder / "config.json", mm_vision_tower=name)
        with pytest.raises(CheckpointError, match=f"config.json: mm_vision_tower is '{name}'.*--vision-tower"):
            load_humanomni(folder)
    for tower, name in zip(ALL_TOWERS, ("me/siglip-base-patch16-224", "openai/whisper-large-v3-turbo",
                                        "someone/bert-base-uncased-goemotions")):
        assert tower_place({f"mm_{tower.name}_tower": name}, tower, SMALL) == name
    with pytest.raises(CheckpointError, match="google/siglip-base-patch16-224"):
        humanomni_config(SMALL, None, "google/siglip-base-patch16-224", None)  # which is no audio tower


def test_weights_that_are_not_finite_are_named(folder):
    for value in (float("nan"), float("inf"), -float("inf")):
        t = tensors()
        t["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(t, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{folder}.*model.layers.1.mlp.up_proj.weight.*not finite"):
            load_humanomni(folder)
    t = tensors()
    t["model.bert_model.pooler.dense.bias"][0] = float("nan")  # which nothing reads
    save_file(t, folder / "model.safetensors")
    assert load_humanomni(folder)


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_misfits_are_counted(folder):
    t = tensors()
    del t["model.layers.1.mlp.up_proj.weight"], t["model.layers.2.mlp.up_proj.weight"], t["model.bert_gate.2.bias"]
    t["model.norm.weight"] = torch.ones(47)
    t["model.mystery.weight"] = torch.ones(3)
    save_file(t, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_humanomni(folder)
    assert str(caught.value) == (
        f"{folder}: the weights do not fit the config: 3 missing, such as model.bert_gate.2.bias; 1 unknown, such as "
        "model.mystery.weight; 1 of another shape, such as model.norm.weight [47], not [48]")


def test_absent_unused_parameters_are_zeros_and_told(folder):
    t = {k: v for k, v in tensors().items() if ".head." not in k and "pooler" not in k}
    save_file(t, folder / "model.safetensors")
    model = load_humanomni(folder)
    assert model.tower_source["unused_parameters"] == "zeros (13 absent; never read)"
    assert not model.vision_tower.head.probe.any()


def test_damaged_files_are_named(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"not a tensor file at all"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
            load_humanomni(folder)
    save_file(tensors() | {"model.norm.weight": torch.ones(48, dtype=torch.int32)}, file)
    with pytest.raises(CheckpointError, match="model.safetensors: tensor model.norm.weight is torch.int32"):
        load_humanomni(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_humanomni(folder)


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/erv_min_pwned",)


def test_pickled_code_is_refused(folder):
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="pytorch_model.bin: damaged, or holds code"):
        load_humanomni(folder)
    torch.save({"model.norm.weight": Payload()}, file)
    with pytest.raises(CheckpointError, match="pytorch_model.bin: damaged, or holds code"):
        load_humanomni(folder)
    assert not os.path.exists("/tmp/erv_min_pwned")
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="no dictionary of tensors"):
        load_humanomni(folder)


@pytest.mark.parametrize("file, values, message", [
    ("config.json", dict(hidden_size=None), "config.json: hidden_size is missing"),
    ("config.json", dict(hidden_size="48"), "config.json: hidden_size is '48', what can be read is int"),
    ("config.json", dict(num_attention_heads=5), "hidden_size 48 is no multiple of num_attention_heads 5"),
    ("config.json", dict(hidden_act="relu"), "hidden_act is 'relu'"),
    ("config.json", dict(mm_projector_type="stc"), "mm_projector_type is 'stc', what can be read is all_in_one_small or all_in_one"),
    ("config.json", dict(mm_hidden_size=99), "mm_hidden_size is 99.*32"),
    ("config.json", dict(num_frames="8"), "config.json: num_frames is '8', what can be read is int"),
    ("config.json", dict(mm_projector_type="all_in_one"), "grid of 4 patches.*needs an odd one"),
    ("towers.json", dict(vision={"hidden_act": "quick_gelu"}), "towers.json, vision: hidden_act is 'quick_gelu'"),
    ("towers.json", dict(audio={}), "towers.json, audio: d_model is missing"),
    ("towers.json", dict(vision={"patch_size": 0}), "towers.json, vision: patch_size is 0"),
    ("towers.json", dict(vision={"num_attention_heads": 5}), "towers.json, vision: .*num_attention_heads 5"),
    ("config.json", dict(num_attention_heads=0), "config.json: num_attention_heads is 0"),
    ("config.json", dict(gate_hidden_size=10**30), "config.json: gate_hidden_size is 10"),
])
def test_configs_that_cannot_be_right(folder, file, values, message):
    change_json(folder / file, **values)
    with pytest.raises(CheckpointError, match=message):
        load_humanomni(folder)
    (folder / file).write_text("{")
    with pytest.raises(CheckpointError, match=f"{file}: not a JSON"):
        load_humanomni(folder)


@pytest.mark.parametrize("values, theta", [
    ({}, 1e6),
    (dict(rope_theta=None), 1e4),  # of the format, Qwen2's own files name theirs
    (dict(rope_theta=5e5, rope_scaling={"type": "default"}), 5e5),
    (dict(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 2e5}), 2e5),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 3e5}), 3e5),
    (dict(rope_parameters={"rope_type": "default"}), 1e6),
    (dict(use_sliding_window=True, max_window_layers=3), 1e6),  # of 3 layers none
    (dict(use_sliding_window=False, max_window_layers=0), 1e6),
    (dict(use_sliding_window=True, max_window_layers=0, layer_types=["full_attention"] * 3), 1e6),
    (dict(tie_word_embeddings=None), 1e6),
])
def test_configs_in_the_spellings_of_transformers_4_and_5(folder, values, theta):
    change_json(folder / "config.json", **values)
    raw = json.loads((folder / "config.json").read_text())
    found = read_qwen2(raw, "config.json")
    assert (found.rope_theta, found.tie_word_embeddings) == (theta, raw.get("tie_word_embeddings", False))
    if found.tie_word_embeddings:  # written and read again
        save_humanomni(load_humanomni(folder), folder / "out")
        assert read_qwen2(json.loads((folder / "out" / "config.json").read_text()), "out") == found
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Config(**{k: v for k, v in raw.items() if k != "model_type"})
    assert (theirs.rope_parameters["rope_theta"], theirs.rope_parameters["rope_type"]) == (theta, "default")
    assert set(theirs.layer_types) == {"full_attention"} and theirs.tie_word_embeddings == found.tie_word_embeddings


@pytest.mark.parametrize("values, message", [
    (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling.*'yarn'"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 4.0}), "rope_scaling.*'linear'"),
    (dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}), "rope_parameters.*'dynamic'"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope_parameters.*'full_attention'"),
    (dict(rope_parameters="yarn"), "rope_parameters is yarn"),
    (dict(use_sliding_window=True, sliding_window=32, max_window_layers=1), "sliding window"),
    (dict(use_sliding_window=True, max_window_layers=0), "sliding window"),  # of the format's 4096
    (dict(layer_types=["full_attention", "sliding_attention", "full_attention"]), "sliding window"),
])
def test_attention_that_is_not_computed_here_is_refused_by_name(folder, values, message):
    change_json(folder / "config.json", **values)
    with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
        load_humanomni(folder)


def test_folders_that_are_none():
    with pytest.raises(CheckpointError, match="/no/such/folder: no such folder"):
        resolve("/no/such/folder")
    with pytest.raises(CheckpointError, match="is a folder here, and has no revision abc"):
        resolve(SMALL, "abc")


def test_a_checkpoint_is_checked_before_its_weights_are_there(folder, tmp_path, monkeypatch):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{folder}: its tokenizer.json, or vocab.json"):
        check_checkpoint(folder, "humanomni")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "chat" / name, folder)
    check_checkpoint(folder, "humanomni")
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr("erv_min.checkpoint.resolve", lambda *given, weights: asked.append((*given, weights)) or folder)
        check_checkpoint("a/b", "humanomni", "main")
    assert asked == [("a/b", "main", False)]
    with pytest.raises(CheckpointError, match="model_type is 'HumanOmni_qwen2', a verifier is 'roberta'"):
        check_checkpoint(folder, "erv")
    with pytest.raises(CheckpointError, match="typo: no such folder"):
        check_checkpoint(tmp_path / "typo", "erv")
    (tmp_path / "erv").mkdir()
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        check_checkpoint(tmp_path / "erv", "erv")
    shutil.copy(GOLDEN / "roberta" / "config.json", tmp_path / "erv")
    with pytest.raises(CheckpointError, match="tokenizer.json: no such file"):
        check_checkpoint(tmp_path / "erv", "erv")
    with pytest.raises(CheckpointError, match="model_type is 'roberta' without any mm_ key: not HumanOmni's"):
        check_checkpoint(tmp_path / "erv", "humanomni")


# ---- the verifier ---------------------------------------------------------------------------------------------------


def test_verifier_round_trip(tmp_path):
    torch.manual_seed(0)
    model = RobertaClassifier(roberta("toy", 3)).eval()
    save_erv(model, tmp_path, ["anger", "joy", "neutral"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "anger", "1": "joy", "2": "neutral"} and config["model_type"] == "roberta"
    again = load_erv(tmp_path)
    assert again.config == model.config and same(again, model) and not again.training
    change_json(tmp_path / "config.json", model_type="bert")
    with pytest.raises(CheckpointError, match="model_type is 'bert'"):
        load_erv(tmp_path)


def test_verifier_without_its_head(tmp_path):
    save_erv(RobertaClassifier(roberta("toy", 3)), tmp_path, "abc")
    t = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in t.items() if "out_proj" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="2 missing, such as classifier.out_proj.bias"):
        load_erv(tmp_path)


# ---- shapes alone ---------------------------------------------------------------------------------------------------


def test_the_meta_device_checks_names_and_shapes(folder):
    """Processes that take their shards from the first hold shapes alone: 19 GB less to read at 7B, on each."""
    whole = load_humanomni(folder, torch.bfloat16)
    shapes = load_humanomni(folder, torch.bfloat16, "meta")
    assert {p.device.type for p in shapes.parameters()} == {"meta"}
    assert [(k, p.shape, p.dtype) for k, p in shapes.named_parameters()] == [
        (k, p.shape, p.dtype) for k, p in whole.named_parameters()]
    assert shapes.lm_head.weight is shapes.model.embed_tokens.weight and shapes.tower_source == whole.tower_source
    t = tensors()
    save_file(t | {"model.norm.weight": torch.ones(47)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of another shape, such as model.norm.weight \[47\]"):
        load_humanomni(folder, device="meta")
    save_file({k: v for k, v in t.items() if k != "model.norm.weight"}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 missing, such as model.norm.weight"):
        load_humanomni(folder, device="meta")
