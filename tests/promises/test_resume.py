"""Nothing lost: kill -9, SIGTERM, damaged and unwritable states. tests/promises/kills.py does the killing (ERV_MIN_KILLS=20: all of it)."""

import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from erv_min.base.errors import STOPPED, CheckpointError, DiskError
from erv_min.base.files import append_jsonl, atomic_write
from erv_min.base.processes import Processes
from erv_min.train.folder import Run, check_disk
from erv_min.train.optimizer import make_optimizer, update
from erv_min.train.settings import SFTSettings
from erv_min.train.sharding import Replicated
from erv_min.train.state import load_state, save_state, saved_states

ROOT = Path(__file__).parents[2]
ALONE = Processes(0, 1, torch.device("cpu"))
KILLS = int(os.environ.get("ERV_MIN_KILLS", 1))


def kill(folder: Path, *options: str) -> dict:
    result = subprocess.run([sys.executable, str(ROOT / "tests/promises/kills.py"), str(folder), *options], text=True,
                            capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    print(result.stdout)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the world that every test here runs on, whichever runs first."""
    folder = tmp_path_factory.mktemp("kills")
    runpy.run_path(str(ROOT / "tests/promises/kills.py"))["prepare"](folder / "world")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "erv", "grpo", "sft2"])
def test_a_killed_run_resumes_to_the_same_bits(folder, stage):
    report = kill(folder, "--stages", stage, "--kills", str(KILLS))[stage]
    assert sum(report["kills"].values()) == KILLS and report["differences"] == []


@pytest.mark.slow
def test_the_comparison_sees_a_sampling_state_that_was_left_out(folder):
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken/world").symlink_to(folder / "world")
    report = kill(folder / "broken", "--stages", "grpo", "--kills", "1", "--broken")["grpo"]
    assert report["differences"] and all("metrics.jsonl" in found for found in report["differences"])
    assert all(any("state-" in line for line in found) for found in report["differences"])


@pytest.mark.slow
def test_sigterm_to_torchrun_writes_a_state_on_all_processes(folder, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "scripts/sft.py",
               "--world", str(folder / "world"), "--model", str(folder / "world/base"), "--out", str(out),
               "--sharding", "hand", "--steps", "100000", "--save-every", "100000", "--batch-size", "8", "--workers", "0"]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while not (out / "metrics.jsonl").exists() and job.poll() is None:
                time.sleep(0.1)
            job.send_signal(signal.SIGTERM)
            job.wait(100)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    printed = (tmp_path / "log").read_text()
    assert f"go on with --resume (exit code {STOPPED})" in printed, printed[-3000:]
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    assert [path.name for path in saved_states(out)] == [f"state-{steps:06d}"]
    assert sorted(path.name for path in saved_states(out)[0].iterdir()) == [
        "00000.safetensors", "00001.safetensors", "state.json"]


def small(seed: int = 0):
    torch.manual_seed(seed)
    policy = Replicated(torch.nn.Linear(3, 2), compute=torch.float32)
    return policy, make_optimizer(list(policy.named_parameters().values()))


def train_steps(policy, optimizer, steps) -> None:
    for step in steps:
        policy.model(torch.full((1, 3), float(step + 1))).pow(2).sum().backward()
        update(policy, optimizer, 0.1, 1.0)


def states_of(out: Path, steps=(1, 2, 3), keep: int = 2):
    """A run with a state after each of `steps`; returns the parameters at each."""
    policy, optimizer = small()
    kept = {}
    for step in steps:
        train_steps(policy, optimizer, [step])
        save_state(out, step, policy, optimizer, keep)
        kept[step] = {name: p.detach().clone() for name, p in policy.named_parameters().items()}
    return kept


def equal(policy, kept) -> bool:
    return all(torch.equal(policy.named_parameters()[name], value) for name, value in kept.items())


def test_the_last_k_states_are_kept(tmp_path):
    states_of(tmp_path, (1, 2, 3, 10), keep=3)
    assert [path.name for path in saved_states(tmp_path)] == ["state-000010", "state-000003", "state-000002"]


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "json", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_used(tmp_path, damage, capsys):
    kept = states_of(tmp_path)
    path = tmp_path / "state-000003/00000.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "bit":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "gone":
        path.unlink()
    else:
        (path.parent / "state.json").write_text({"json": '{"step": 3', "empty": "[]"}[damage])
    policy, optimizer = small(1)
    assert load_state(tmp_path, policy, optimizer) == 2
    assert equal(policy, kept[2]) and len(optimizer.state) == 2
    assert "state-000003: damaged" in (printed := capsys.readouterr().out) and "the state before it is used" in printed
    save_state(tmp_path, 4, policy, optimizer)  # the damaged one counts as older here: two whole ones must stay
    save_state(tmp_path, 5, policy, optimizer)
    assert [path.name for path in saved_states(tmp_path)] == ["state-000005", "state-000004"]


def test_a_run_that_went_back_does_not_meet_its_damaged_future_again(tmp_path):
    states_of(tmp_path)
    (tmp_path / "state-000003/00000.safetensors").write_bytes(b"")
    policy, optimizer = small()
    assert load_state(tmp_path, policy, optimizer) == 2
    shutil.copytree(tmp_path / "state-000003", tmp_path / "state-000009")
    save_state(tmp_path, 3, policy, optimizer)
    assert [path.name for path in saved_states(tmp_path)] == ["state-000003", "state-000002"]
    assert load_state(tmp_path, policy, optimizer) == 3


def test_no_whole_state_is_an_error_and_not_a_new_start(tmp_path):
    states_of(tmp_path)
    for path in tmp_path.glob("*/*.safetensors"):
        path.write_bytes(b"rubbish")
    policy, optimizer = small()
    with pytest.raises(CheckpointError, match="damaged.*no state before it is whole; delete"):
        load_state(tmp_path, policy, optimizer)


def test_a_state_of_other_parameters_is_refused(tmp_path):
    states_of(tmp_path)
    model = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(CheckpointError, match="other parameters"):
        load_state(tmp_path, Replicated(model, compute=torch.float32), make_optimizer(list(model.parameters())))


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_full_disk_keeps_the_state_before_and_says_what_is_needed(tmp_path, monkeypatch, at):
    kept = states_of(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    policy, optimizer = small()
    load_state(tmp_path, policy, optimizer)
    train_steps(policy, optimizer, [4])
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((DiskError, OSError)) as caught:
        save_state(tmp_path, 4, policy, optimizer)
    monkeypatch.undo()
    if at == 1:
        assert "the disk is full" in str(caught.value) and "GB are needed" in str(caught.value)
        assert "GB are free" in str(caught.value) and not [*tmp_path.glob(".state-*/*")]
    assert {path: path.read_bytes() for path in before} == before
    assert load_state(tmp_path, policy, optimizer) == 3 and equal(policy, kept[3])


def test_no_room_is_seen_before_the_run(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 80, 80)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="3 states of 9.6e-08 GB and the model.*are free: make room.*--keep"):
        check_disk(tmp_path, 2, small()[0].model)


def test_logs_and_small_files_name_a_full_disk(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(DiskError, match="the disk is full"):
        atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    if Path("/dev/full").exists():
        (tmp_path / "log").symlink_to("/dev/full")
        with pytest.raises(DiskError, match="the disk is full"):
            append_jsonl(tmp_path / "log", {"step": 1})


# ---- SIGTERM and the log ---------------------------------------------------------------------------------------------


def test_sigterm_writes_a_state_and_has_its_own_exit_code(tmp_path, capsys):
    policy, optimizer = small()
    run = Run(tmp_path, SFTSettings(save_every=100), ALONE, 10)
    run.begin(policy, optimizer)
    train_steps(policy, optimizer, [0])
    run.log(0, {"loss": 1.0})
    run.checkpoint(1)
    assert not saved_states(tmp_path)
    os.kill(os.getpid(), signal.SIGTERM)
    run.log(1, {"loss": 1.0})
    with pytest.raises(SystemExit) as ended:
        run.checkpoint(2)
    assert ended.value.code == STOPPED == 75
    assert capsys.readouterr().out.splitlines()[-1].startswith("SIGTERM: the state after step 2 of 10 is in")
    assert [path.name for path in saved_states(tmp_path)] == ["state-000002"]


def test_logs_are_cut_to_the_state_that_was_found(tmp_path):
    states_of(tmp_path)
    (tmp_path / "state-000003/state.json").unlink()
    for name in ("metrics", "completions", "failed_clips"):
        text = "".join(json.dumps({"step": step, "skipped": 0, "x": "ü"}) + "\n" for step in range(5)) + '{"step": 5, "sk'
        (tmp_path / f"{name}.jsonl").write_text(text)
    policy, optimizer = small()
    assert Run(tmp_path, SFTSettings(resume=True), ALONE, 10).begin(policy, optimizer) == 2
    for name in ("metrics", "completions", "failed_clips"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1]
