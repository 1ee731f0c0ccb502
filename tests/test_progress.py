"""Nothing works in silence: a line comes in the midst of long work, none before or behind it, and rates can be read."""

import time

import pytest
import torch

from erv_min.base import progress
from erv_min.base.files import read_jsonl
from erv_min.base.processes import Processes, run_script
from erv_min.base.progress import Progress
from erv_min.train.folder import Run
from erv_min.train.settings import SFTSettings

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    monkeypatch.setattr(progress, "RUNNING", [])  # what a test's run has left


def heard(capsys, what: str) -> str:
    """Waits for a line on standard error that holds `what`; all that was said until then."""
    said = ""
    while what not in said:
        time.sleep(0.01)
        said += capsys.readouterr().err
    return said


def test_lines_come_in_the_midst_of_work_from_the_innermost_and_end_with_it(quick, capsys):
    with Progress("outer", 4, "clip") as outer:
        outer.add()
        said = heard(capsys, "outer: 1/4 clips, 0:00:00 so far")
        assert said.endswith("left\n") and "\r" not in said
        with Progress("inner"):
            heard(capsys, "inner: 0:00:00 so far\n")
            assert "outer" not in heard(capsys, "inner")
        heard(capsys, "outer")
    time.sleep(0.2)
    assert capsys.readouterr().err == "" and progress.RUNNING == []


def test_short_work_and_other_processes_say_nothing(capsys, monkeypatch):
    with Progress("short", 1, "clip") as short:
        short.add()
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setenv("RANK", "1")
    with Progress("second process"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_no_line_follows_an_error(quick, capsys):
    def main():
        Progress("left running").start()
        raise ValueError("the end")

    with pytest.raises(ValueError):
        run_script(main)
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == "" and progress.RUNNING == []


@pytest.mark.parametrize("done,first,seconds,pace", [
    (4, 0, 2.0, "2.0 steps/s, 0:00:03 left"), (4, 2, 70.0, "35.0 s/step, 0:03:30 left"), (2, 2, 5.0, "")])
def test_pace_by_hand(done, first, seconds, pace, monkeypatch):
    """Ten steps: six more at 2 per second; six more at 35 seconds each, since two of the four were made before."""
    counted = Progress("training", 10, "step")
    counted.first, counted.done = first, done
    monkeypatch.setattr(time, "time", lambda: counted.started + seconds)
    assert counted.pace() == pace


def test_every_step_that_takes_seconds_has_its_line(tmp_path, capsys, monkeypatch):
    """Twelve steps of 6 s each stand there with seconds per step; of steps of 0.1 s the first, the eleventh, the last."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for seconds, shown, rate in ((6.0, range(1, 13), "6.0 s/step"), (0.1, (1, 11, 12), "10.0 steps/s")):
        run = Run(tmp_path / str(seconds), SFTSettings(), ALONE, 12)
        for step in range(12):
            now[0] += seconds
            run.progress.last = now[0] - 0.5  # a line of the thread has just been shown
            run.log(step, {"loss": 1.0})
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(" ")[:3] for line in lines] == [[str(seconds), "step", f"{n}/12"] for n in shown]
        assert all(f"| {rate}, " in line for line in lines)
        assert len(read_jsonl(run.metrics)) == 12
