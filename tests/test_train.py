"""Schedule, data order, settings, the run's folder and resume, gradients over processes."""

import dataclasses
import errno
import faulthandler
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from erv_min.base.errors import ClipError, DataError, SettingsError
from erv_min.base.files import read_jsonl
from erv_min.base.options import check, file_list, parse, preset_values
from erv_min.base.processes import (Processes, all_gather_object, all_reduce_sum, gather_lists, join_processes, leave,
                                    part)
from erv_min.data.loader import batch_of_step
from erv_min.inputs import Example
from erv_min.rewards import RewardSettings
from erv_min.train import answers, folder, hooks
from erv_min.train.folder import FREE_ON_RESUME, LOCKS, Run, changed_settings, open_folder
from erv_min.train.hooks import TrainingClips
from erv_min.train.optimizer import learning_rate, make_optimizer, update
from erv_min.train.settings import (AnswerSettings, ERVSettings, GRPOSettings, PredictionSettings, SFTSettings,
                                    trained_parts)
from erv_min.train.sharding import Replicated
from erv_min.train.start import data_of
from erv_min.train.state import save_state, saved_states

ALONE = Processes(0, 1, torch.device("cpu"))


def test_learning_rate_by_hand():
    # 10 steps, warm-up 20% = 2 steps: 0, 1/2, then 8 from 1 down: cosine 0.5 (1 + cos(pi x / 8)), linear 1 - x / 8.
    rates = [learning_rate(s, 10, 1.0, 0.2) for s in range(10)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[6] == pytest.approx(0.5) and rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate(6, 10, 1.0, 0.2, "linear") == pytest.approx(0.5)
    assert learning_rate(9, 10, 3.0, 0.0, "constant") == 3.0


def test_the_warm_up_rounds_up_and_the_last_step_has_a_rate():
    # 3% of 7 steps is 0.21: one step of warm-up. A warm-up of the whole run: 0 to 3/4. Linear without one: 1 to 1/4.
    assert [learning_rate(s, 7, 2.0) for s in (0, 1)] == [0.0, 2.0]
    assert [learning_rate(s, 4, 1.0, 1.0) for s in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert [learning_rate(s, 4, 1.0, 0.0, "linear") for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(1, 3, 1.0, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))  # 0.75: no half of 1 - x


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rates_are_those_of_transformers(schedule):
    """Those of the Trainer that made the released checkpoints: its number of warm-up steps, its schedules."""
    transformers = pytest.importorskip("transformers")
    name = schedule + "_with_warmup" * (schedule == "constant")
    for total, warmup in ((55, 0.03), (2088, 0.0), (7, 0.03), (100, 0.15), (1, 0.5)):
        rising = transformers.TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=warmup), total)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2e-5)
        scheduler = transformers.get_scheduler(name, optimizer, rising, total)
        for step in range(total):
            assert learning_rate(step, total, 2e-5, warmup, schedule) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
            optimizer.step()
            scheduler.step()


def test_an_epoch_is_whole_steps_that_visit_every_item_and_a_step_knows_its_batch():
    """7 items, 3 a step: an epoch is 3 steps, and its last two places hold the first two items of its order again."""
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in batch_of_step(7, 3, seed=1, step=step)] for e in range(4)]
    for places in epochs:
        assert sorted(places[:7]) == list(range(7)) and places[7:] == places[:2]
    assert len({tuple(places) for places in epochs}) == 4
    assert epochs[0] != [i for step in range(3) for i in batch_of_step(7, 3, seed=2, step=step)]
    assert sorted(batch_of_step(2, 5, 0, 0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])  # fewer items than places
    assert batch_of_step(2, 5, 0, 0)[:2] == batch_of_step(2, 5, 0, 0)[2:4]


def test_the_steps_of_the_papers_runs():
    """5 epochs of EMER's 332 clips at 32: 5 * 11. 2 of DFEW's and MAFW's 16,703 at 16: 2 * 1,044."""
    for settings, clips, per_step, steps in ((SFTSettings(), 332, 32, 55), (SFTSettings(epochs=10), 332, 32, 110),
                                             (GRPOSettings(), 16_703, 16, 2088), (SFTSettings(steps=9), 332, 32, 9)):
        assert TrainingClips(settings, ALONE, [[]] * clips, per_step).total_steps == steps


def test_presets_hold_table_8():
    small, large = (parse(SFTSettings, "", ["--preset", p, "--out", "x"]) for p in ("paper-0.5b", "paper-7b"))
    assert (small.lr, small.epochs, small.batch_size, small.warmup, small.schedule) == (2e-5, 5, 32, 0.03, "cosine")
    assert large.epochs == 10 and large.num_frames == 8
    grpo = parse(GRPOSettings, "", ["--preset", "paper-0.5b", "--out", "x"])
    assert (grpo.lr, grpo.epochs, grpo.batch_size, grpo.group_size, grpo.beta) == (1e-6, 2, 16, 16, 0.04)
    assert (grpo.max_new_tokens, grpo.temperature, grpo.eval_temperature) == (512, 1.0, 0.3)
    assert all(getattr(grpo, f.name) == f.default for f in dataclasses.fields(RewardSettings))


def test_what_a_stage_trains_by_hand():
    """Table 8, as divergence 13 reads it: SFT the gate's MLP, GRPO its BERT, both the projectors; no tower unasked."""
    both = ("language_model", "visual_projector", "audio_projector")
    assert trained_parts(SFTSettings()) == (*both, "gate_mlp")
    assert trained_parts(GRPOSettings()) == (*both, "text_encoder")
    assert trained_parts(GRPOSettings(train_projectors=False)) == ("language_model",)
    assert trained_parts(SFTSettings(train_vision_tower=True)) == (*both, "gate_mlp", "vision_tower")


def test_command_line_overrides_the_preset():
    settings = parse(GRPOSettings, "", ["--group-size", "4", "--recompute", "--w-explanation", "0"])
    assert settings.group_size == 4 and settings.recompute and settings.preset == "toy"
    assert settings.w_explanation == 0 and settings.tau == 0.5


def test_a_setting_stands_in_one_place():
    """Default and presets are on the option's own line; the flag, its help and its check come from there."""
    assert preset_values(GRPOSettings, "toy")["beta"] == 0.07 and preset_values(GRPOSettings, "paper-7b")["beta"] == 0.04
    assert [preset_values(SFTSettings, p)["epochs"] for p in ("toy", "paper-0.5b", "paper-7b")] == [1, 5, 10]
    assert [preset_values(SFTSettings, p)["micro_batch"] for p in ("toy", "paper-0.5b", "paper-7b")] == [24, 4, 1]
    assert preset_values(ERVSettings, "paper") == preset_values(ERVSettings, "paper-7b")


def test_a_paper_preset_names_its_folder(capsys):
    for cls in (SFTSettings, GRPOSettings, ERVSettings):
        assert parse(cls, "", []).out.startswith("runs/toy")
        with pytest.raises(SystemExit):
            parse(cls, "", ["--preset", "paper-0.5b"])
        assert "--out is needed" in capsys.readouterr().err


REFUSED = {GRPOSettings: ["--group-size 1", "--group-size 0", "--workers -1", "--sample-every 0", "--batch-size 0",
                          "--micro-batch 0", "--max-new-tokens 0", "--steps -5", "--tau 1.5", "--tau -0.1", "--tau nan",
                          "--k 0", "--temperature 0", "--beta -1", "--warmup 1.5", "--lr inf", "--eval-clips -2",
                          "--keep 0", "--top-k -1", "--allow-missing 2", "--seed -1", f"--seed {2**44}"],
           SFTSettings: ["--targets-per-clip 0", "--num-frames -1", "--epochs 0", "--max-grad-norm 0"],
           PredictionSettings: ["--limit -3", "--batch-size 0", "--top-p 0", "--top-p 1.1", "--temperature -1"]}


@pytest.mark.parametrize("cls, given", [(cls, given) for cls, all_given in REFUSED.items() for given in all_given])
def test_a_value_out_of_its_range_is_a_usage_error_of_one_line(cls, given, capsys):
    with pytest.raises(SystemExit) as error:
        parse(cls, "", given.split())
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.count("\n") == 1 and given.split()[0] in line and "must be" in line


@pytest.mark.parametrize("script, given", [
    ("evaluate", "--bootstrap -5 --model m --data toy:."), ("infer", "x.mp4 --tau 2"), ("erv", "--holdout 1.5"),
    ("audit", "--limit -1"), ("augment", "describe --limit -3")])
def test_every_script_checks_its_settings_first(script, given, monkeypatch, capsys):
    with pytest.raises((SystemExit, SettingsError)) as error:
        main_of(script, monkeypatch)(given.split())
    assert "must be at" in capsys.readouterr().err + str(error.value)


@pytest.mark.parametrize("script, data", [("grpo", "dfew:gone"), ("sft", "json:dfew:gone.json"), ("erv", "gone.jsonl")])
def test_data_that_is_not_there_is_told_before_the_world_is_made(script, data, tmp_path, monkeypatch):
    main = main_of(script, monkeypatch)
    monkeypatch.setattr("erv_min.toy.chain.run", lambda *stage: pytest.fail(f"{stage} began"))
    with pytest.raises(DataError, match="gone"):
        main(["--data", data, "--out", str(tmp_path / "out")])
    LOCKS.pop().close()


def test_check_of_settings_made_in_python():
    with pytest.raises(SettingsError, match="--temperature must be more than 0, not 0.0"):
        check(GRPOSettings(temperature=0.0))
    with pytest.raises(SettingsError, match="--schedule must be one of"):
        check(SFTSettings(schedule="sine"))


def test_special_values_pass():
    parse(GRPOSettings, "", "--eval-clips -1 --steps 0 --workers 0 --top-k 0 --lr 0 --tau 1".split())
    parse(PredictionSettings, "", "--limit 0 --temperature 0 --num-frames 0".split())


SCRIPTS = sorted(path for path in Path(__file__).parent.parent.glob("scripts/**/*.py") if "def main(" in path.read_text())


def main_of(name: str, monkeypatch):
    root = Path(__file__).parent.parent / "scripts"
    monkeypatch.setattr(sys, "path", [str(root), str(root / "tools"), *sys.path])
    return importlib.import_module(name).main


@pytest.mark.parametrize("name, given", [
    *((path.stem, "--hel") for path in SCRIPTS), ("reproduce", "--seed 3"), ("report", "run --ou x"),
    ("annotate", "--ru x"), ("bench", "fsdp --siz toy"), ("gpu_check", "--devic cpu"), ("plan", "--gp h200"),
    ("survey", "make --first a --second b --data c --out d --clip 3"), ("survey", "score a --ke b"),
    ("augment", "stats --inpu x"), ("grpo", "--step 5"), ("sft", "--step 5"), ("erv", "--step 5")])
def test_options_are_not_abbreviated(name, given, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        main_of(name, monkeypatch)(given.split())
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert "unrecognized arguments: --" in printed or "are required: " in printed


def test_a_plans_help_lists_the_settings_of_its_stage(monkeypatch, capsys):
    for stage, of_stage in (("grpo", "--group-size"), ("sft", "--targets-per-clip")):
        with pytest.raises(SystemExit):
            main_of("plan", monkeypatch)(["--stage", stage, "--help", "all"])
        printed = capsys.readouterr().out
        assert all(option in printed for option in ("--preset", "--stage", "--gpus", "--micro-batch", of_stage))


@pytest.mark.parametrize("name, given", [
    ("reproduce", "--jobs 0"), ("reproduce", "--seeds 0"), ("reproduce", "--clips -1"), ("plan", "--gpus 0"),
    ("survey", "make --first a --second b --data c --out d --clips 0"), ("bench", "fsdp --repeats 0")])
def test_a_number_of_things_is_at_least_one(name, given, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        main_of(name, monkeypatch)(given.split())
    assert error.value.code == 2 and f"{given.split()[-2]}: must be at least 1, not" in capsys.readouterr().err


def test_the_largest_seed_is_one_for_every_use_of_it():
    settings = parse(SFTSettings, "", ["--seed", str(2**44 - 1)])
    assert sorted(batch_of_step(3, 3, settings.seed, 10**6)) == [0, 1, 2]


def test_a_runs_folder_is_none_that_it_reads(tmp_path, monkeypatch, capsys):
    """Whatever names it: the checkpoint there would be overwritten."""
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for cls, option in ((SFTSettings, "--model"), (SFTSettings, "--text-tower"), (GRPOSettings, "--erv"),
                        (GRPOSettings, "--watch-erv"), (ERVSettings, "--init")):
        for out in ("model", "./model/", str(tmp_path / "link")):
            with pytest.raises(SystemExit):
                parse(cls, "", ["--out", out, option, "model"])
            assert f"--out {out}: {option} names this folder, too" in capsys.readouterr().err
    assert parse(SFTSettings, "", ["--out", "model/sft", "--model", "model"]).out == "model/sft"


def test_a_comma_in_a_files_name_parts_nothing(tmp_path):
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a,b/rows.jsonl").touch()
    (tmp_path / "c.jsonl").touch()
    one, two = str(tmp_path / "a,b/rows.jsonl"), str(tmp_path / "c.jsonl")
    assert file_list(one) == [one] and file_list(f"{two},{two}") == [two, two]
    check(ERVSettings(data=one, valid=one))


def help_of(cls, *words, capsys) -> str:
    with pytest.raises(SystemExit):
        parse(cls, "what it does", ["--help", *words])
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_what_belongs_to_the_paper_and_help_all_the_rest(capsys):
    short, whole = help_of(GRPOSettings, capsys=capsys), help_of(GRPOSettings, "all", capsys=capsys)
    options = [set(re.findall(r"(?<!no)--([a-z]+(?:-[a-z]+)*)", text.partition("what it does")[2])) for text in (short, whole)]
    assert len(options[0]) <= 30 and {"beta", "tau", "group-size", "lr", "erv", "data"} <= options[0]
    every = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(GRPOSettings)}
    assert {f"--{name}" for name in options[1]} >= every and "--help all lists every option" in short
    assert "(table 8) [toy: 0.0005, paper-0.5b: 1e-06, paper-7b: 1e-06]" in whole  # --lr
    assert "threshold of algorithm 1 (release: 0.1; divergence 1) [0.5]" in short
    assert "--resume, --no-resume go on from the last checkpoint in OUT [off]" in short
    assert "0: all, -1: no table [0]" in whole and "0: all, -1: no table [0]" not in short


def small_run(out, steps=6, total=6, first_run=True):
    """A regression that trains through Run, from a seed; returns its parameters."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    policy, optimizer = Replicated(model, compute=torch.float32), make_optimizer(list(model.parameters()))
    run = Run(out, SFTSettings(save_every=2, resume=True), ALONE, total)
    first = run.begin(policy, optimizer)
    for step in range(first, steps):
        x = torch.tensor(batch_of_step(9, 3, 0, step)).float()[None]
        loss = (model(x) - 1).pow(2).sum()
        loss.backward()
        update(policy, optimizer, learning_rate(step, total, 0.1), 1.0)
        run.log(step, {"loss": loss.item()})
        run.checkpoint(step + 1)
    return policy.named_parameters()


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path):
    whole = small_run(tmp_path / "whole")
    small_run(tmp_path / "stopped", steps=3)  # saved after step 2; step 3 is logged but lost
    resumed = small_run(tmp_path / "stopped")
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "stopped/metrics.jsonl").read_text()
    rows = [json.loads(line) for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))


def test_states_that_a_kill_left_over_go_at_the_resume(tmp_path):
    small_run(tmp_path, steps=4)
    (tmp_path / "state-000001").mkdir()
    assert sorted(x.name for x in tmp_path.glob("state-*")) == ["state-000001", "state-000002", "state-000004"]
    small_run(tmp_path, steps=4)
    assert sorted(x.name for x in tmp_path.glob("state-*")) == ["state-000002", "state-000004"]


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    small_run(tmp_path)
    with pytest.raises(SettingsError, match="--resume"):
        open_folder(tmp_path, False, ALONE)
    LOCKS.pop().close()
    assert open_folder(tmp_path, True, ALONE)


def regression(out, **changes):
    """A run of two steps with these settings, resumed where one lies there."""
    model = torch.nn.Linear(3, 2)
    policy, optimizer = Replicated(model, compute=torch.float32), make_optimizer(model.parameters())
    run = Run(out, SFTSettings(**{"save_every": 1, "resume": True, **changes}), ALONE, 4)
    for step in range(run.begin(policy, optimizer), 2):
        model(torch.ones(1, 3)).sum().backward()
        run.log(step, {"grad_norm": update(policy, optimizer, 0.1, 1.0)})
        run.checkpoint(step + 1)
    return run


def test_a_resumed_run_keeps_what_changes_its_numbers(tmp_path, capsys):
    regression(tmp_path)
    assert "holds no state; starting at step 1" in capsys.readouterr().out
    config = (tmp_path / "config.json").read_text()
    with pytest.raises(SettingsError, match="other values of --batch-size, --lr, --seed; resume with the same"):
        regression(tmp_path, lr=1.0, seed=3, batch_size=2, workers=5)
    assert (tmp_path / "config.json").read_text() == config  # nothing is lost
    assert regression(tmp_path, workers=5, save_every=7).first_step == 2
    assert "holds a state after step 2 of 4" in capsys.readouterr().out


CHANGES = dict(  # another value of each setting that a step's numbers come from
    steps=9, epochs=9, beta=0.1, epsilon=0.1, mu=2, group_size=8, advantages="dr-grpo", loss_type="dapo", kl="k2", mask_truncated=True,
    temperature=0.9, top_k=50, max_new_tokens=9, erv="other/verifier", tau=0.1, k=3, neutral_rule="any",
    answer_rule="released", sentence_rule="extended", w_format=2.0,
    w_answer=2.0, w_explanation=2.0, ablate="sentence-level", lr=1.0, warmup=0.5, schedule="linear", max_grad_norm=9.0,
    batch_size=8, seed=1, dtype="bfloat16", sharding="hand", model="other/model", revision="x", vision_tower="other/v",
    audio_tower="other/a", text_tower="other/t", modality="video", prompt_stage="grpo", num_frames=4,
    geometry="stretch", silence="error", data="toy:other", subtitles=False, train_projectors=False)


@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_with_another_value_is_refused(name):
    before = dataclasses.asdict(GRPOSettings())
    assert changed_settings(before, {**before, name: CHANGES[name]}) == ["--" + name.replace("_", "-")]


def test_a_resume_may_change_nothing_else_that_counts():
    """Each setting of GRPO and SFT either may change, or stands above, or belongs to SFT alone."""
    names = {field.name for cls in (GRPOSettings, SFTSettings) for field in dataclasses.fields(cls)}
    alone = {"loss_reduction", "targets_per_clip", "answers_only", "train_vision_tower", "preset", "random_weights"}
    assert not FREE_ON_RESUME & (CHANGES.keys() | alone)
    assert names == (FREE_ON_RESUME & names) | CHANGES.keys() | alone


EXAMPLES = [(f"dfew {i}", "sad", "", "", f"{i}.mp4", 100) for i in range(4)]


@pytest.mark.parametrize("now", [
    EXAMPLES[:3], [*EXAMPLES, ("dfew 4", "sad", "", "", "4.mp4", 1)], EXAMPLES[::-1],
    [*EXAMPLES[:3], ("dfew 3", "happy", "", "", "3.mp4", 100)], [*EXAMPLES[:3], ("dfew 3", "sad", "", "", "3.mp4", 99)]])
@pytest.mark.parametrize("state", [True, False])
def test_a_resume_on_other_data_is_refused(tmp_path, now, state):
    """And leaves the run as it was, also one that has made no state yet."""
    def start(data):
        model = torch.nn.Linear(3, 2)
        policy = Replicated(model, compute=torch.float32)
        run = Run(tmp_path, SFTSettings(resume=True), ALONE, 4, data)
        return run, run.begin(policy, make_optimizer(model.parameters()))

    run, _ = start(EXAMPLES)
    run.log(0, {"loss": 1.0})
    if state:
        save_state(tmp_path, 1, run.policy, run.optimizer)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    said = f"config.json: this run was started on other data .4 examples of .*, now {len(now)} examples of .*; resume with the same"
    with pytest.raises(SettingsError, match=said):
        start(now)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json*")} == before
    assert start(list(EXAMPLES))[1] == state


def test_what_of_an_example_is_compared(tmp_path):
    """Label, subtitle, explanation, and the clip's name and size; not in which folder it lies."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.mp4").write_bytes(b"clip")
    example = Example("1", tmp_path / "a/1.mp4", "sad", "dfew", "Oh.", "He weeps.")
    assert data_of([example]) == data_of([dataclasses.replace(example, path=tmp_path / "b/1.mp4")])
    (tmp_path / "b/1.mp4").write_bytes(b"another")
    for changes in (dict(label="fear"), dict(subtitle=""), dict(explanation=""), dict(path=tmp_path / "b/1.mp4")):
        assert data_of([example]) != data_of([dataclasses.replace(example, **changes)])


@pytest.mark.parametrize("changes, said", [
    (dict(lr=1.0), "other values of --lr"), (dict(steps=9), "other values of --steps"),
    ({}, "metrics.jsonl: 2 steps were made, and the state-.* folders are gone")])
def test_no_log_is_emptied_when_the_states_are_gone(tmp_path, changes, said):
    regression(tmp_path)
    for path in saved_states(tmp_path):
        shutil.rmtree(path)
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(SettingsError, match=said):
        regression(tmp_path, **changes)
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows


def test_clips_that_failed_before_a_resume_still_count(tmp_path, monkeypatch):
    """2 of 10 with 10% allowed, one of them before the stop."""
    monkeypatch.setattr(hooks, "clip_inputs", lambda *_, **__: iter(()))
    policy = SimpleNamespace(model=SimpleNamespace(config=None), cache=None)
    for first_step in (0, 3):
        clips = TrainingClips(SFTSettings(out=str(tmp_path), allow_missing=0.1), ALONE, [[]] * 10, 4)
        clips.start(first_step, policy)
        clips._failed(first_step, ClipError(f"{first_step}.mp4: broken"))
        if not first_step:
            clips.check_failed()
    with pytest.raises(DataError, match="2 of 10 clips cannot be decoded .*the first: 0.mp4: broken"):
        clips.check_failed()


def restarted(monkeypatch, job: str, count: int) -> None:
    """As torchrun says it to its processes."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/{job}/none_x/attempt_{count}/0/error.json")


def test_a_restart_goes_on_with_its_own_run_alone(tmp_path, monkeypatch):
    restarted(monkeypatch, "first", 0)
    assert not open_folder(tmp_path, False, ALONE)
    LOCKS.pop().close()
    small_run(tmp_path)
    restarted(monkeypatch, "first", 1)
    assert open_folder(tmp_path, False, ALONE)
    LOCKS.pop().close()
    for job, count in (("second", 0), ("second", 1), ("second", 2)):
        restarted(monkeypatch, job, count)
        with pytest.raises(SettingsError, match="already holds a run: give --resume"):
            open_folder(tmp_path, False, ALONE)
        LOCKS.pop().close()
    restarted(monkeypatch, "first", 2)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")  # another launcher, which does not say what job this is
    with pytest.raises(SettingsError, match="already holds a run"):
        open_folder(tmp_path, False, ALONE)
    LOCKS.pop().close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder.fcntl, "lockf", lockf)
    assert not open_folder(tmp_path, False, ALONE)
    LOCKS.pop().close()
    assert "its file system has no locks" in caplog.text and str(tmp_path) in caplog.text


def test_a_folder_that_may_not_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(OSError) as error:  # which run_script answers in one line
            open_folder(out, False, ALONE)
        assert error.value.filename == str(out)


def test_one_run_at_a_time_writes_into_a_folder(tmp_path):
    code = ("import sys, torch\nfrom erv_min.train.folder import open_folder\n"
            "from erv_min.base.processes import Processes\n"
            "open_folder(sys.argv[1], True, Processes(0, 1, torch.device('cpu'))); print('open', flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(SettingsError, match="another run is writing into this folder"):
            open_folder(tmp_path, True, ALONE)
        other.kill()
    assert open_folder(tmp_path, True, ALONE)  # the lock ends with its process, however that ends
    LOCKS.pop().close()


def test_ctrl_c_writes_a_state_and_a_second_one_ends_at_once(tmp_path, capsys, monkeypatch):
    run = regression(tmp_path)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # torchrun hands on what the terminal sent already: the same one
    with pytest.raises(SystemExit) as ended:
        run.checkpoint(3)
    assert ended.value.code == 75 and (tmp_path / "state-000003").exists()
    assert "SIGINT: the state after step 3 of 4" in capsys.readouterr().out
    run.interrupted -= 3
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_what_a_user_did_ends_in_one_line():
    """A folder that cannot be made, a closed pipe: no traceback."""
    code = "from erv_min.base.processes import run_script; run_script(lambda: {})"
    for did, said in (("open('/dev/null/x', 'w')", "/dev/null/x: Not a directory\n"),
                      ("[print(i) for i in range(10**5)]", "")):
        with subprocess.Popen([sys.executable, "-c", code.format(did)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as process:
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == said and process.wait() == 1


def test_a_batch_that_does_not_divide_is_refused():
    assert Processes(1, 4, torch.device("cpu")).share(8) == [1, 5]
    with pytest.raises(SettingsError, match="6 prompts per step do not divide by the 4 processes"):
        Processes(0, 4, torch.device("cpu")).share(6)


def test_an_update_with_a_gradient_that_is_not_finite_leaves_the_weights():
    model = torch.nn.Module()
    model.p = p = torch.nn.Parameter(torch.ones(2))
    policy, optimizer = Replicated(model, compute=torch.float32), make_optimizer([p])
    p.grad = torch.tensor([1.0, float("nan")])
    assert math.isnan(update(policy, optimizer, 0.1, 1.0))
    assert p.tolist() == [1, 1]
    p.grad = torch.tensor([3.0, 4.0])
    assert update(policy, optimizer, 0.1, 1.0) == pytest.approx(5)
    assert p[0] < 1


def test_two_updates_of_adamw_by_hand():
    """Gradients 1 and 3 at rate 0.1, betas 0.9 and 0.999, no weight decay. First: m / v^0.5, corrected, is 1 / 1. Then
    m = 0.09 + 0.3 = 0.39, over 1 - 0.81 is 2.0526; v = 0.000999 + 0.009 = 0.009999, over 1 - 0.998001 is 5.002."""
    model = torch.nn.Module()
    model.p = p = torch.nn.Parameter(torch.tensor([10.0]))
    policy, optimizer = Replicated(model, compute=torch.float32), make_optimizer([p])
    for gradient, moved in ((1.0, 0.1), (3.0, 0.1 + 0.1 * 2.0526 / 5.002**0.5)):
        p.grad = torch.tensor([gradient])
        assert update(policy, optimizer, 0.1, 1e9) == gradient
        assert 10 - p.item() == pytest.approx(moved, abs=2e-5) and p.grad is None


def test_gradients_are_clipped_to_the_norm_that_was_asked_for():
    """A gradient of norm 5, clipped to 2: two fifths of it. Adam's step hides the scale; its first moment does not."""
    model = torch.nn.Module()
    model.p = p = torch.nn.Parameter(torch.zeros(2))
    policy, optimizer = Replicated(model, compute=torch.float32), make_optimizer([p])
    p.grad = torch.tensor([3.0, 4.0])
    assert update(policy, optimizer, 0.1, 2.0) == pytest.approx(5)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * torch.tensor([1.2, 1.6]))


def test_config_says_what_made_the_run(tmp_path):
    model = torch.nn.Linear(1, 1)
    Run(tmp_path, GRPOSettings(), ALONE, 1).begin(Replicated(model), make_optimizer(model.parameters()))
    made = json.loads((tmp_path / "config.json").read_text())["erv_min"]
    assert made["settings"]["group_size"] == 16 and made["settings"]["tau"] == 0.5
    assert made["versions"]["torch"] == torch.__version__ and "git_commit" in made


def _process(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    p, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((2, 2), float(rank + 1))
    if rank == 1:
        unused.grad = torch.tensor([2.0, 4.0, 6.0])
    Replicated(torch.nn.ParameterList([p, unused])).clip_gradients(1e9)
    assert torch.equal(p.grad, torch.full((2, 2), 1.5)) and unused.grad.tolist() == [1, 2, 3]
    assert all_reduce_sum({"a": rank, "b": 1.0}) == {"a": 1, "b": 2}
    assert gather_lists([rank, str(rank)]) == [0, "0", 1, "1"]
    each = Processes(rank, size, torch.device("cpu"))

    # Each sees another folder by that name, as two machines without a shared one: both say so.
    with pytest.raises(SettingsError, match="own: process 1 does not see the folder of process 0"):
        os.chdir(Path(folder, str(rank)))
        open_folder("own", False, each)
    assert open_folder(folder, True, each)
    dist.barrier()
    with pytest.raises(SettingsError, match="processes of this job read different data"):
        Run(folder, SFTSettings(), each, 4, EXAMPLES[: 3 - rank])

    # What one of them could not decode counts for both: 0.mp4 and 1.mp4 of 4 are half, 2.mp4 is one too many.
    clips = TrainingClips(SFTSettings(out=folder, allow_missing=0.5), each, [[]] * 4, 2)
    clips._failed(rank, ClipError(f"{rank}.mp4: broken"))
    clips.check_failed()
    if rank == 1:
        clips._failed(3, ClipError("2.mp4: broken"))
    with pytest.raises(DataError, match="3 of 4 clips cannot be decoded"):
        clips.check_failed()

    # Predictions of both, in order; clip i belongs to process i % 2.
    clips = [Example(str(i), Path(f"{i}.mp4"), "sad", "dfew") for i in range(5)]
    answers.outputs = lambda _, mine, numbers, *rest: (f"{rank} says {x.video_id}" for x in mine)
    rows, _ = answers.predict(None, clips, each, AnswerSettings())
    assert [row["output"] for row in rows] == [f"{i % 2} says {i}" for i in range(5)]

    # A skipped step is explained by the clips of all, whichever process writes the log.
    run = Run(folder, SFTSettings(), each, 4)
    run.track_rows([f"clip {rank}"], torch.tensor([[math.nan if rank else 0.0]], requires_grad=True))
    run.log(0, {"grad_norm": math.nan})
    leave()


def test_gradients_and_sums_over_two_processes(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    mp.spawn(_process, (2, str(tmp_path)), nprocs=2)
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["skipped_because"] == "not finite: log-probabilities or their gradient of clip 1"


def _part_often(rank: int, folder: str) -> None:
    faulthandler.dump_traceback_later(60, exit=True)
    for number in range(30):
        dist.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=2)
        all_gather_object(["text"] * 100)
        part()
    leave()


def test_processes_part_without_a_deadlock(tmp_path):
    """Under torch 2.6 one of about four used to wait for a thread of its own that waited for it."""
    mp.spawn(_part_often, (str(tmp_path),), nprocs=2)


def test_start_world_alone():
    assert join_processes("cpu") == ALONE
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no CUDA device"):
            join_processes("cuda")
