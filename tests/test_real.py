"""From download to a row of table 1: the hub's cache, the released layout, the data sets' own files, a judge, the commands."""

import json
import math
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import augment  # noqa: E402
import evaluate  # noqa: E402
import infer  # noqa: E402
import sft  # noqa: E402
from test_augment import rows_of  # noqa: E402
from test_checkpoint import SMALL, tensors, tower_folder  # noqa: E402
from test_evaluate import world  # noqa: E402, F401  (a fixture)
from test_judge import good, serve  # noqa: E402, F401  (a fixture)

from erv_min.train import start as stages  # noqa: F401
from erv_min.checkpoint import ALL_TOWERS, load_humanomni, save_erv, text_gate_folder  # noqa: F401
from erv_min.base.fields import read_part
from erv_min.config import TOWERS, roberta  # noqa: F401
from erv_min.emotions import ERV_LABELS, GOEMOTIONS  # noqa: F401
from erv_min.base.errors import CheckpointError, DataError  # noqa: F401
from erv_min.erv import Verifier  # noqa: F401
from erv_min.base.files import append_jsonl, read_json, read_jsonl, write_json, write_jsonl  # noqa: F401
from erv_min.model.bert import RobertaClassifier  # noqa: F401
from erv_min.train.settings import SFTSettings  # noqa: F401
from erv_min.base import processes
from erv_min.base.processes import Processes  # noqa: F401

ROOT = Path(__file__).parent.parent
MODELS = ("StarJiaxing/HumanOmni-0.5B", "StarJiaxing/HumanOmni-7B", "StarJiaxing/EMER-SFT-0.5B",
          "StarJiaxing/MAFW-DFEW-0.5B", "StarJiaxing/R1-Omni-0.5B", "Rhatanii/ERV-0.5B", "Rhatanii/ERV-7B")
VERIFIERS = ("Rhatanii/Emo_Classifier", "SamLowe/roberta-base-go_emotions")
TOWER_REPOS = {"vision": "google/siglip-base-patch16-224", "audio": "openai/whisper-large-v3",
               "text": "google-bert/bert-base-uncased"}


# ---------------------------------------------------------------------------------------------------- the hub's cache

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """cache(name, folder, revision) puts a folder where `hf download` would; there is no network (HF_HUB_OFFLINE=1)."""
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def cache(name: str, folder: Path, revision: str = "main", commit: str = "0" * 40) -> Path:
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        return place / "snapshots" / commit
    return cache


def test_every_released_repository_loads_by_its_name(hub, world, tmp_path, monkeypatch):  # noqa: F811
    small = read_json(SMALL / "towers.json")
    for repo, part in zip(TOWERS, ("vision", "vision", "audio", "text")):  # known sizes, made tiny
        kind = next(tower.kind for tower in ALL_TOWERS if tower.name == part)
        monkeypatch.setitem(TOWERS, repo, read_part(kind, small[part], repo))
    for part, repo in TOWER_REPOS.items():
        hub(repo, tower_folder(tmp_path / part, part))
    own = tmp_path / "own"  # the released layout: no towers.json, paths of the authors' machines
    own.mkdir()
    config = read_json(SMALL / "config.json") | {"mm_vision_tower": "/nas/authors/siglip-base-patch16-224",
                                                 "mm_audio_tower": "/nas/authors/whisper-large-v3"}
    write_json(own / "config.json", config)
    without = tmp_path / "without"
    shutil.copytree(own, without)
    save_file(tensors(), own / "model.safetensors")
    prefixes = tuple(tower.prefix for tower in ALL_TOWERS)
    save_file({k: v for k, v in tensors().items() if not k.startswith(prefixes)}, without / "model.safetensors")
    expected = load_humanomni(SMALL).state_dict()
    for name in MODELS:
        hub(name, own)
        loaded = load_humanomni(name)
        assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items()), name
        assert loaded.tower_source["vision"] == f"checkpoint {name}"
    assert text_gate_folder(MODELS[0]).parts[-3] == "models--google-bert--bert-base-uncased"
    hub(MODELS[0], without, "no-towers", "1" * 40)  # the same name at another revision
    source = load_humanomni(MODELS[0], revision="no-towers").tower_source
    assert source["vision"] == "repository google/siglip-base-patch16-224"  # for the authors' own path
    assert source["text"] == "repository google-bert/bert-base-uncased"
    torch.manual_seed(0)
    save_erv(RobertaClassifier(roberta("toy", 28)), tmp_path / "erv", GOEMOTIONS)
    shutil.copy(world / "tokenizers" / "erv" / "tokenizer.json", tmp_path / "erv")
    for name in VERIFIERS:
        hub(name, tmp_path / "erv")
        assert Verifier.load(name).labels == GOEMOTIONS


def test_an_incomplete_copy_is_named_with_the_way_out(hub, tmp_path):
    place = hub(MODELS[0], SMALL)
    with pytest.raises(CheckpointError, match="EMER-SFT-0.5B: no such folder.*'hf download StarJiaxing/EMER-SFT-0.5B'"):
        load_humanomni(MODELS[2])
    with pytest.raises(CheckpointError, match="HumanOmni-0.5B --revision v2: .*hf download StarJiaxing/HumanOmni-0.5B --revision v2"):
        load_humanomni(MODELS[0], revision="v2")
    with pytest.raises(CheckpointError, match="text gate's tokenizer: google-bert/bert-base-uncased.*put its tokenizer.json"):
        text_gate_folder(MODELS[0])
    (place / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="models--StarJiaxing--HumanOmni-0.5B.*no weights .neither model.safetensors nor"):
        load_humanomni(MODELS[0])


# ---------------------------------------------------------------------------------------------------- table 5

TABLE_5 = {"emer": {"angry": 115, "happy": 92, "sad": 43, "surprise": 23, "worried": 59},
           "merr": {"angry": 875, "happy": 476, "sad": 1091, "surprise": 213, "fear": 85, "neutral": 1352, "contempt": 40,
                    "doubt": 355}}


def test_files_with_the_papers_counts_give_the_papers_table_5(tmp_path, capsys):
    """332 and 4,487 clips (section 4.1); doubt, which table 5 has no column for, is left out."""
    labels = {name: [label for label, count in counts.items() for _ in range(count)] for name, counts in TABLE_5.items()}
    lines = [f"s{i},{label},,It is case {i}." for i, label in enumerate(labels["emer"])]
    (tmp_path / "EMER.csv").write_text("names,emotions,subtitles,reasons\n" + "\n".join(lines) + "\n")
    write_json(tmp_path / "MERR_fine_grained.json", {
        f"m{i}": {"pseu_emotion": label, "smp_reason_caption": f"It is instance {i}."}
        for i, label in enumerate(labels["merr"])})
    augment.main(["annotated", "--data", f"emer:{tmp_path},merr:{tmp_path}", "--out", f"{tmp_path}/human.jsonl"])
    assert "4464 rows; left out: 355 doubt" in capsys.readouterr().out
    augment.main(["stats", "--input", f"{tmp_path}/human.jsonl"])
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    for source, expected in (("emer", dict(anger=115, happiness=92, sadness=43, surprise=23, anxiety=59)),
                             ("merr", dict(anger=875, happiness=476, sadness=1091, surprise=213, fear=85, neutral=1352,
                                           contempt=40))):
        found = dict(zip(table["source"], table[source]))
        assert {name: int(found[name]) for name in expected} == expected
        assert all(found[name] in ("0", "-") for name in set(ERV_LABELS) - set(expected))


# ---------------------------------------------------------------------------------------------------- stop and resume

def test_a_stopped_evaluation_and_complement_ask_nothing_twice(serve, tmp_path, monkeypatch):  # noqa: F811
    api = serve(lambda prompt, times: good("sad") if "Reason:" in prompt else good(f"New text {len(api.bodies)}."))
    rows = [{"video_id": str(i), "output": f"<think>Case {i}.</think><answer>sad</answer>", "ground_truth": "sad",
             "dataset": "dfew"} for i in range(30)]
    write_jsonl(tmp_path / "p.jsonl", rows)
    write_jsonl(tmp_path / "pool.jsonl", rows_of("a", "b", labels=["fear"], prompt="figure 6"))
    judged = ["--predictions", f"{tmp_path}/p.jsonl", "--judge", "openai:gpt-4.1-mini,openai:gpt-4.1", "--out",
              f"{tmp_path}/out", "--bootstrap", "0", "--concurrency", "2"]
    more = ["complement", "--input", f"{tmp_path}/pool.jsonl", "--ask", "openai:gpt-4.1-mini", "--out",
            f"{tmp_path}/more.jsonl", "--per-class", "22", "--classes", "fear", "--concurrency", "2"]

    def keep_and_stop(path, row):
        append_jsonl(path, row)
        if len(read_jsonl(path)) >= 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("erv_min.base.chat.append_jsonl", keep_and_stop)
        for script, command in ((evaluate, judged), (augment, more)):
            with pytest.raises(KeyboardInterrupt):
                script.main(command)
    assert not (tmp_path / "out" / "metrics.json").exists() and not (tmp_path / "more.jsonl").exists()
    assert 22 <= len(api.bodies) < 60
    evaluate.main(judged)
    augment.main(more)
    asked = [(b["model"], b["messages"][0]["content"], b.get("seed")) for b in api.bodies]
    assert len(asked) == len(set(asked)) == 30 + 30 + 20
    result = read_json(tmp_path / "out" / "metrics.json")
    assert result["judges"]["openai:gpt-4.1"]["dfew"]["EEA"] == 100
    assert result["agreement"]["dfew"]["openai:gpt-4.1-mini and openai:gpt-4.1"]["n"] == 30
    assert len(read_jsonl(tmp_path / "more.jsonl")) == 20


# ---------------------------------------------------------------------------------------------------- the whole way

def released_folder(world: Path, folder: Path) -> dict[str, str]:  # noqa: F811
    """The toy as the release lays a model out: two shards, no towers.json, tower paths of another machine; its towers
    as folders of their own. Returns the options that name them."""
    weights, config = load_file(world / "model" / "model.safetensors"), read_json(world / "model" / "config.json")
    names, sizes, options = sorted(weights), read_json(world / "model" / "towers.json"), {}
    (folder / "model").mkdir(parents=True)
    for part in (0, 1):
        save_file({k: weights[k] for k in names[part::2]}, folder / "model" / f"model-0000{part + 1}-of-00002.safetensors")
    write_json(folder / "model" / "config.json", config | {"mm_vision_tower": "/nas/authors/siglip-tiny",
                                                           "mm_audio_tower": "/nas/authors/whisper-tiny"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world / "model" / name, folder / "model")
    for tower in ALL_TOWERS:
        place = folder / tower.name
        place.mkdir()
        own = {k.removeprefix(tower.prefix): v for k, v in weights.items() if k.startswith(tower.prefix)}
        save_file({tower.strip + k: v for k, v in own.items()}, place / "model.safetensors")
        write_json(place / "config.json", sizes[tower.name])
        options[f"--{tower.name}-tower"] = str(place)
    shutil.copy(world / "tokenizers" / "text_gate" / "tokenizer.json", folder / "text")
    return options


def command(script: str, *options, processes: int = 0, **more) -> str:
    launcher = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
                                   if processes else [])
    result = subprocess.run([*launcher, f"scripts/{script}.py", *map(str, options)], cwd=ROOT, text=True, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}, **(
                                more or {"capture_output": True}))
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"[-3000:]
    return f"{result.stdout}{result.stderr}"


def test_a_process_without_weights_takes_the_towers_key_from_the_first(world, tmp_path, monkeypatch):  # noqa: F811
    """With --sharding hand only the first process holds weights: the others cannot name the towers by themselves."""
    def start(rank):
        settings = SFTSettings(model=str(world / "model"), sharding="hand", cache_features=str(tmp_path / "cache"))
        return stages.load_start(settings, Processes(rank, 2, torch.device("cpu"))).cache.key

    said = []
    monkeypatch.setattr(processes, "all_gather_object", lambda value: said.append(value) or [value])
    first = start(0)
    monkeypatch.setattr(processes, "all_gather_object", lambda value: said)
    assert start(1) == first


@pytest.mark.slow
def test_from_a_released_folder_to_a_row_of_table_1(world, serve, tmp_path, capsys):  # noqa: F811
    towers = released_folder(world, tmp_path / "hub")
    model = ["--model", tmp_path / "hub" / "model"]
    named = [x for pair in towers.items() for x in pair]
    emer = tmp_path / "EMER"
    (emer / "video").mkdir(parents=True)
    clips = sorted((world / "clip").glob("*.mp4"))[:4]
    for i, clip in enumerate(clips):
        shutil.copy(clip, emer / "video" / f"s{i}.avi")
    (emer / "EMER.csv").write_text("names,emotions,subtitles,reasons\n" + "".join(
        f's{i},happy,"Well, well.",The man smiles.\n' for i in range(5)))  # one clip of five is not there

    # SFT, table 8's preset at tiny dimensions, on EMER's own files.
    start = [*model, "--preset", "paper-0.5b", "--data", f"emer:{emer}", "--device", "cpu", "--dtype", "float32",
             "--no-subtitles", "--batch-size", 4, "--lr", 0.005, "--warmup", 0, "--cache-features", tmp_path / "cache"]
    with pytest.raises(CheckpointError, match="'/nas/authors/siglip-tiny', which is not here; .* by --vision-tower"):
        sft.main([*map(str, start), "--allow-missing", "0.2", "--out", f"{tmp_path}/no"])
    with pytest.raises(DataError, match=r"1 of 5 clips are missing \(20.0%\).*--allow-missing"):
        sft.main([*map(str, start), *named, "--out", f"{tmp_path}/no"])
    assert "emer train: 4 clips found, 1 missing, 5 examples (angry 0, happy 5," in capsys.readouterr().out
    assert (tmp_path / "no" / "missing_clips.txt").read_text() == f"{emer}/s4.avi\n"
    command("sft", *start, *named, "--allow-missing", 0.2, "--steps", 100, "--out", tmp_path / "sft")
    about = read_json(tmp_path / "sft" / "config.json")["erv_min"]
    assert about["towers"] == {tower.name: f"override {towers[f'--{tower.name}-tower']}" for tower in ALL_TOWERS}
    losses = [row["loss"] for row in read_jsonl(tmp_path / "sft" / "metrics.jsonl")]
    assert len(losses) == 100 and losses[-1] < 0.2 * losses[0]

    # Another run finds the features on the disk: the clips, now no clips but of the same size and time, are not decoded.
    for i in range(4):
        path = emer / "video" / f"s{i}.avi"
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = [*start, *named, "--allow-missing", 0.2, "--steps", 2]
    sft.main([*map(str, again), "--out", f"{tmp_path}/again"])
    assert not (tmp_path / "again" / "failed_clips.jsonl").exists()
    assert math.isclose(read_jsonl(tmp_path / "again" / "metrics.jsonl")[0]["loss"], losses[0], rel_tol=1e-6)

    # A row of table 1 and of table 4, by two processes and by one; the saved folder needs no tower options any more.
    api = serve(lambda prompt, times: good("happy"))
    options = ["--model", tmp_path / "sft", "--data", f"dfew:{world}", "--judge", "openai:gpt-4.1-mini,openai:gpt-4.1",
               "--device", "cpu", "--max-new-tokens", 40, "--batch-size", 2, "--bootstrap", 10]
    said = command("evaluate", *options, "--out", tmp_path / "two", processes=2)
    assert "dfew test: 6 clips found, 0 missing" in said and "the judges agree on 100.0%" in said
    evaluate.main([*map(str, options), "--out", f"{tmp_path}/one"])
    one, two = (read_jsonl(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert one == two and len(one) == 6
    assert "The man smiles." in one[0]["output"] and api.asked, "SFT has not learnt its one sentence"
    assert read_json(tmp_path / "one" / "metrics.json")["towers"]["vision"] == f"checkpoint {tmp_path}/sft"

    # A folder of clips on a terminal, with its reward taken apart.
    torch.manual_seed(0)
    size = len(read_json(world / "tokenizers" / "erv" / "tokenizer.json")["model"]["vocab"])
    config = roberta("toy")
    save_erv(RobertaClassifier(config), tmp_path / "erv", ERV_LABELS)
    assert size <= config.vocab_size
    shutil.copy(world / "tokenizers" / "erv" / "tokenizer.json", tmp_path / "erv")
    (tmp_path / "clips").mkdir()
    for clip in clips[:2]:
        shutil.copy(clip, tmp_path / "clips")
    master, terminal = pty.openpty()
    command("infer", tmp_path / "clips", "--model", tmp_path / "sft", "--device", "cpu", "--max-new-tokens", 40,
            "--explain-reward", "happy", "--erv", tmp_path / "erv", stdout=terminal, stderr=subprocess.PIPE)
    os.close(terminal)
    shown = os.read(master, 100_000).decode()
    os.close(master)
    assert shown.count("== ") == 2 and shown.count("R_E for happy: ") == 2 and "] The man smiles." in shown
    capsys.readouterr()
    infer.main([f"{tmp_path}/clips", "--model", f"{tmp_path}/sft", "--device", "cpu", "--json", "--modality", "audio",
                "--max-new-tokens", "4"])
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 2
