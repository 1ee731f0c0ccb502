"""The scripts as a user runs them, on a world of a few dozen clips: every stage, two processes, resume, real dimensions."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erv_min.base.errors import ClipError
from erv_min.base.files import read_jsonl
from erv_min.base.processes import Processes
from erv_min.checkpoint import load_humanomni
from erv_min.config import humanomni
from erv_min.inputs import Example
from erv_min.model.parameters import random_humanomni
from erv_min.toy import base
from erv_min.toy.world import WorldSettings, build_world
from erv_min.train.hooks import TrainingClips
from erv_min.train.settings import SFTSettings
from erv_min.train.start import weights_key
from test_data import walk

ROOT = Path(__file__).parent.parent
FIELDS = ("step", "loss", "reward", "reward_format", "reward_answer", "reward_explanation", "kl", "completion_length",
          "tokens_per_s")
pytestmark = pytest.mark.slow


def run(*command, processes: int = 0, ok: bool = True) -> str:
    """Runs a script alone or under torchrun, and returns what it printed."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    result = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (result.returncode == 0) == ok, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small world with a base model that has hardly learnt: enough to run every path."""
    folder = tmp_path_factory.mktemp("toy") / "world"
    build_world(folder, WorldSettings(train=24, test=8, pretrain=16, sft_clips=8, resamples=3, reading=64,
                                      erv_train=160, erv_valid=40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "TRAININGS", {"towers": (4, 8, 2e-3, 0.1), "reading": (4, 8, 3e-3, 0.05),
                                          "captions": (60, 8, 4e-3, 0.05)})
        base.train_base(folder)
    return folder


@pytest.fixture(scope="session")
def chain(world, tmp_path_factory):
    """SFT, verifier and two GRPO steps with evaluation, from the scripts' own preparation: the main command, made small."""
    out = tmp_path_factory.mktemp("chain")
    printed = run(ROOT / "scripts/sft.py", "--world", world, "--out", out / "sft", "--steps", 30, "--batch-size", 8)
    printed += run(ROOT / "scripts/erv.py", "--world", world, "--out", out / "erv", "--steps", 6)
    printed += run(ROOT / "scripts/grpo.py", "--world", world, "--out", out, "--steps", 3, "--batch-size", 4,
                   "--micro-batch", 2, "--group-size", 4, "--mu", 2, "--sample-every", 1, "--train-projectors", processes=1)
    return out, printed


def test_the_main_command_leaves_what_it_promises(chain):
    out, printed = chain
    metrics = rows(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2] and all(f in m for m in metrics for f in FIELDS)
    assert all(0 <= m["reward_format"] <= 1 and m["kl"] > -1e-6 and m["completion_length"] > 0 for m in metrics)
    assert "held-out clips, explanations judged by the lexicon" in printed and "GRPO with R_E over SFT" in printed
    assert "Rewards for answers alone" in printed
    assert f"$ torchrun --nproc_per_node=2 {ROOT / 'scripts/grpo.py'} --world" in printed
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "HumanOmni_qwen2" and config["erv_min"]["settings"]["group_size"] == 4
    assert len(rows(out / "completions.jsonl")) == 3 * 4
    scores = json.loads((out / "evaluation.json").read_text())
    assert list(scores) == ["SFT", "GRPO without R_E", "GRPO with R_E"] and all(0 <= s["WAR"] <= 100 for s in scores.values())


def test_grpo_moves_what_table_8_trains_and_nothing_else(chain):
    out, _ = chain
    before, after = load_file(out / "sft/model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [n for n in moved if "tower" in n or "bert_gate" in n]
    for part in ("model.layers.", "model.mm_projector.", "model.audio_projector.", "model.bert_model.", "model.embed_tokens"):
        assert [n for n in moved if n.startswith(part)], part


def test_the_result_loads_and_answers(chain, world):
    out, _ = chain
    assert load_humanomni(out).config.num_frames == 4
    clip = next((world / "clip").glob("*.mp4"))
    printed = run(ROOT / "scripts/infer.py", clip, "--model", out, "--max-new-tokens", 12, "--num-frames", 4, "--json")
    result = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert result["clip"].endswith(clip.name) and result["output"] and "emotion" in result


def test_two_processes_train_as_one(chain, world, tmp_path):
    """Same global batch, same noise: the first step's completions are the same, and the weights agree to reduction order.
    So do EEA and EPC of held-out clips; without them one process trains to the same bits."""
    out, _ = chain
    common = ("--world", world, "--model", out / "sft", "--erv", out / "erv", "--steps", 2, "--batch-size", 4,
              "--micro-batch", 2, "--group-size", 4, "--eval-clips", -1, "--sample-every", 1)
    for name, processes, sharding in (("1", 0, "none"), ("2", 2, "none"), ("2-hand", 2, "hand"), ("1-unwatched", 0, "none")):
        run(ROOT / "scripts/grpo.py", *common, "--out", tmp_path / name, "--sharding", sharding, "--watch-every",
            0 if "unwatched" in name else 2, processes=processes)
    one, a = rows(tmp_path / "1/metrics.jsonl"), load_file(tmp_path / "1/model.safetensors")
    start = load_file(out / "sft/model.safetensors")
    moved = sum((a[n] - start[n]).abs().sum() for n in a)
    alone, unwatched = rows(tmp_path / "1-unwatched/metrics.jsonl"), load_file(tmp_path / "1-unwatched/model.safetensors")
    assert all(torch.equal(a[n], unwatched[n]) for n in a) and "held_out_EEA" not in alone[0]
    for name in ("2", "2-hand"):
        two, b = rows(tmp_path / name / "metrics.jsonl"), load_file(tmp_path / name / "model.safetensors")
        assert "held_out_EEA" not in two[1]  # step 0 alone: every second one
        for field in ("reward", "reward_format", "reward_answer", "reward_explanation", "completion_length",
                      "held_out_EEA", "held_out_EPC"):
            assert one[0][field] == pytest.approx(two[0][field], abs=1e-9), field
        assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-3)
        apart = sum((a[n] - b[n]).abs().sum() for n in a)
        assert apart < 0.02 * moved  # Adam's first steps have size lr whatever the gradient: signs of zeros may differ


def test_a_broken_clip_is_replaced_in_its_place_listed_and_counted(chain, world, tmp_path):
    out, _ = chain
    entries = json.loads((world / "train.json").read_text())[:6:3]
    for i, entry in enumerate(entries):
        (tmp_path / f"{i}.mp4").write_bytes((world / entry["video"]).read_bytes())
        entry["video"] = f"{i}.mp4"
    (tmp_path / "1.mp4").write_bytes(b"not a clip")
    (tmp_path / "data.json").write_text(json.dumps(entries))
    command = (ROOT / "scripts/grpo.py", "--world", world, "--model", out / "sft", "--erv", out / "erv", "--steps", 1,
               "--batch-size", 2, "--group-size", 2, "--eval-clips", -1, "--watch-every", 0, "--data",
               f"json:dfew:{tmp_path / 'data.json'}")
    run(*command, "--out", tmp_path / "run", "--allow-missing", 0.5)
    assert "1.mp4" in rows(tmp_path / "run/failed_clips.jsonl")[0]["error"]
    assert rows(tmp_path / "run/metrics.jsonl")[0]["completion_length"] > 0
    printed = run(*command, "--out", tmp_path / "strict", ok=False)
    assert "1 of 2 clips cannot be decoded (50.0%)" in printed and "--allow-missing" in printed


def test_a_users_folder_goes_through_every_script(chain, tmp_path):
    """Clips of five containers, one mute, one of 10 bit, one rotated, one cut off, one missing, in the released JSON: SFT,
    evaluation and inference give a result for each, or say why not."""
    out, _ = chain
    written, path = walk(tmp_path)
    data = ("--data", f"json:dfew:{path}", "--allow-missing", 0.5, "--device", "cpu")
    printed = run(ROOT / "scripts/sft.py", "--model", out / "sft", *data, "--steps", 2, "--batch-size", 16,
                  "--out", tmp_path / "sft")
    assert f"{len(written) + 1} clips found, 1 missing" in printed and "no sound, heard as 10 s of silence" in printed
    assert {Path(row["error"].partition(": ")[0]).name for row in rows(tmp_path / "sft/failed_clips.jsonl")} == {"cut.mp4"}
    printed = run(ROOT / "scripts/evaluate.py", "--model", tmp_path / "sft", *data, "--split", "train", "--judge",
                  "lexicon", "--max-new-tokens", 40, "--bootstrap", 0, "--out", tmp_path / "eval")
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert metrics["missing"] == ["missing"] and len(metrics["failed"]) == 1 and "cut.mp4" in metrics["failed"][0]
    assert len(rows(tmp_path / "eval/predictions.jsonl")) == len(written)
    printed = run(ROOT / "scripts/infer.py", tmp_path / "clips", "--model", tmp_path / "sft", "--max-new-tokens", 40,
                  "--json", ok=False)  # the exit status tells of the clip that was cut off
    answers = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert {Path(row["clip"]).name for row in answers} == set(written) and "ClipError" in printed and "cut.mp4" in printed


def test_the_next_of_the_order_comes_in_a_broken_clips_place(world, tmp_path, monkeypatch):
    clips = sorted((world / "clip").glob("*.mp4"))[:4]
    examples = [Example(path.stem, path, "happy", "dfew") for path in clips]
    examples[1] = examples[2] = replace(examples[1], path=world / "no-such-clip.mp4")
    settings, alone = SFTSettings(out=str(tmp_path)), Processes(0, 1, torch.device("cpu"))
    how = dict(config=humanomni("toy"), cache=None, num_frames=4, workers=0)
    stream = TrainingClips(settings, alone, [[x] for x in examples], 1)
    monkeypatch.setattr(stream, "unit_at", lambda place: [examples[place % 4]])
    taken = [(place, x.example.video_id) for place, x in stream.inputs([0, 1, 3], **how)]
    assert taken == [(0, clips[0].stem), (3, clips[3].stem), (3, clips[3].stem)]
    assert [row["step"] for row in read_jsonl(tmp_path / "failed_clips.jsonl")] == [1, 1]
    with pytest.raises(ClipError, match="none of the 1 clips could be decoded"):
        next(TrainingClips(settings, alone, [[examples[1]]], 1).inputs([0], **how))


def test_kept_features_belong_to_their_towers():
    one, other = random_humanomni(humanomni("toy"), 0), random_humanomni(humanomni("toy"), 0)
    towers = [(model.model.vision_tower, model.model.audio_tower) for model in (one, other)]
    assert weights_key(*towers[0]) == weights_key(*towers[1]) and weights_key(one) == weights_key(other)
    with torch.no_grad():
        next(other.model.vision_tower.parameters()).mul_(-1)
    assert weights_key(*towers[0]) != weights_key(*towers[1]) and weights_key(one) != weights_key(other)


def test_a_second_run_in_the_same_folder_is_refused(chain, world):
    out, _ = chain
    printed = run(ROOT / "scripts/grpo.py", "--world", world, "--out", out, "--steps", 1, ok=False)
    assert "SettingsError" in printed and "--resume" in printed
