"""scripts/reproduce.py: the plan of commands, running them in order and again, and tables of known predictions."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from erv_min.base.errors import SettingsError
from erv_min.base.options import parse
from erv_min.metrics import score
from erv_min.train.settings import ERVSettings, GRPOSettings, SFTSettings

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

spec = importlib.util.spec_from_file_location("reproduce", SCRIPTS / "reproduce.py")
reproduce = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reproduce)


def test_each_row_has_its_commands_and_each_command_parses(tmp_path):
    def plan(*rows: str) -> dict:
        return reproduce.plan(tmp_path, 3, list(rows), "test", 1000, 7)

    assert set(plan("answers")) == {"world", "sft-answers", "answers", "evaluate answers"}
    assert set(plan("base", "k2")) == {"world", "sft", "erv", "k2", "evaluate base", "evaluate k2"}
    jobs = plan(*reproduce.ROWS)
    seen = []
    for name, (before, product, words) in jobs.items():
        assert set(before) <= set(jobs) and str(product).startswith(str(tmp_path))
        if words[0].endswith("grpo.py"):
            seen.append(parse(GRPOSettings, "", words[1:]))
            assert (seen[-1].seed, seen[-1].steps, seen[-1].eval_clips) == (3, 7, -1)
        if words[0].endswith("sft.py"):
            assert parse(SFTSettings, "", words[1:]).answers_only == (name == "sft-answers")
        if words[0].endswith("/erv.py"):
            verifier = parse(ERVSettings, "", words[1:])
            assert verifier.seed == 3 and verifier.sources == ("human" if name == "erv-human" else "")
    # What separates the rows of tables 1 and 2, and nothing else.
    plain = dataclasses.asdict(next(s for s in seen if Path(s.out).name == "ours"))
    differs = {Path(s.out).name: {k: v for k, v in dataclasses.asdict(s).items() if plain[k] != v and k != "out"}
               for s in seen}
    none = {"erv": "", "w_explanation": 0.0}
    assert differs == {
        "ours": {}, "baseline": none, "no-augmentation": {"erv": str(tmp_path / "erv-human")},
        "no-filtering": {"ablate": "neutral-filtering"}, "no-sentences": {"ablate": "sentence-level"},
        "answers": none | {"model": str(tmp_path / "sft-answers")},
        "a-dr-grpo": {"advantages": "dr-grpo"}, "l-dapo": {"loss_type": "dapo"}, "l-dr-grpo": {"loss_type": "dr-grpo"},
        "k2": {"kl": "k2"}, "masked": {"mask_truncated": True}}
    assert plain["erv"] == str(tmp_path / "erv") and plain["model"] == str(tmp_path / "sft")
    for row, job in ((row, jobs[f"evaluate {row}"]) for row in reproduce.ROWS):
        model = tmp_path / ("world/base" if row == "base" else row)
        assert job.command[job.command.index("--model") + 1] == str(model)
        assert job.before == (("world",) if row == "base" else (row,))


def write(path: Path, after: Path | None = None) -> list[str]:
    """A command that writes `path`, and fails unless `after` is there."""
    check = f"assert open({str(after)!r}).read(); " if after else ""
    return ["-c", f"{check}f = open({str(path)!r}, 'a'); f.write('x'); print('wrote')"]


def test_jobs_run_once_in_order_and_a_failure_names_its_log(tmp_path):
    a, b, c = (tmp_path / x for x in "abc")
    jobs = {"last": reproduce.Job(("first",), b, write(b, a)), "first": reproduce.Job((), a, write(a))}
    reproduce.run_all({0: jobs}, tmp_path, 2)
    reproduce.run_all({0: jobs}, tmp_path, 2)
    assert (a.read_text(), b.read_text()) == ("x", "x")
    assert "wrote" in (tmp_path / "seed-0" / "log" / "first.txt").read_text()
    with pytest.raises(SettingsError, match=r"(?s)seed 0, bad: status 3.*bad\.txt ends with.*told why"):
        fails = reproduce.Job(("last",), c, ["-c", "import sys; print('told why'); sys.exit(3)"])
        reproduce.run_all({0: jobs | {"bad": fails}}, tmp_path, 1)


def test_sigterm_ends_the_commands_too(tmp_path):
    """A command that outlives reproduce.py would write into the folder of the next try."""
    pid = tmp_path / "pid"
    sleeper = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(120)"
    code = (f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
            "import reproduce\n"
            f"job = reproduce.Job((), reproduce.Path('never'), ['-c', {sleeper!r}])\n"
            "reproduce.plan = lambda *_, **__: {'evaluate sft': job}\n"
            f"reproduce.main(['--rows', 'sft', '--seeds', '1', '--out', {str(tmp_path / 'out')!r}])")
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not (pid.exists() and pid.read_text()):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.terminate()
        assert parent.wait(60) == 143
        assert not Path(f"/proc/{pid.read_text()}").exists()
    finally:
        parent.kill()
        if pid.exists() and Path(f"/proc/{pid.read_text()}").exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)


def predictions(folder: Path, right: int) -> None:
    """What evaluate.py says of ten clips: every answer right, `right` of the explanations judged as the truth, and of
    three sentences two of the grammar, one a cue, which is true if the explanation is right. (A recall of 40 is put
    beside that of the only class.)"""
    rows = [{"video_id": str(i), "dataset": "dfew", "ground_truth": "happy", "judge_status": "ok",
             "judged_emotion": "happy" if i < right else "fear",
             "output": "<think>He laughs.</think><answer>happy</answer>"} for i in range(10)]
    scores = score(rows, "dfew")
    scores["recall"]["fear"] = 40.0
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({
        "judges": {judge: {"dfew": scores} for judge in reproduce.JUDGES},
        "sentences": {"sentences": 3.0, "formed": 2.0, "cues": 1.0, "true": right / 10}}))


def test_tables_by_hand(tmp_path):
    """Two seeds of ten clips: EEA of ours 80 and 60, of the baseline 30 and 20; FCR the same, WAR 100."""
    for seed, ours, baseline in ((0, 8, 3), (1, 6, 2)):
        predictions(tmp_path / f"seed-{seed}" / "evaluation" / "ours", ours)
        predictions(tmp_path / f"seed-{seed}" / "evaluation" / "baseline", baseline)
        for row, R_E in (("ours", 0.02), ("baseline", 0.0)):  # 20 steps: R_E 0.02 x step, KL 0.01 x step
            (tmp_path / f"seed-{seed}" / row).mkdir()
            (tmp_path / f"seed-{seed}" / row / "metrics.jsonl").write_text("".join(json.dumps(
                {"step": i, "reward_explanation": R_E * i, "sentences": 4, "neutral_share": None if i < 19 else 0.5,
                 "kl": 0.01 * i, "completion_length": 30 + i + 10 * (seed == 1 and row == "ours")}) + "\n"
                for i in range(20)))
    predictions(tmp_path / "seed-0" / "evaluation" / "sft", 8)
    predictions(tmp_path / "seed-1" / "evaluation" / "sft", 6)
    text = reproduce.tables(tmp_path, [0, 1], ["sft", "baseline", "ours"], "test", 10)
    blocks = [{line[:27].strip(): line[27:].split() for line in block.splitlines()} for block in text.split("\n\n")]
    assert blocks[0]["Ours"][:2] == ["70.0", "±14.1"]  # mean of 80 and 60; sqrt(((80-70)^2 + (60-70)^2) / 1)
    assert blocks[0]["Baseline (GRPO without R_E)"][:3] == ["25.0", "±", "7.1"]
    assert blocks[1]["Ours"] == "48.93 43.57 68.58 57.49 39.12 75.79".split()  # the paper's; the last is 43.57 / 57.49
    # Gaps 50 and 40: mean 45, standard error 5, t of one degree of freedom 12.706; two seeds resolve nothing.
    assert "EEA +45.0  (-18.5 to +108.5) [+40.0, +50.0]" in text and "WAR +0.0  (+0.0 to +0.0)" in text
    assert "100 KL +0.0  (+0.0 to +0.0) [+0.0, +0.0]; tokens +5.0  (-58.5 to +68.5) [+0.0, +10.0]" in text
    (sft,) = [line for line in text.splitlines() if line.startswith("  Ours minus SFT: ")]
    assert "EEA +0.0" in sft and "KL" not in sft  # SFT has no KL to compare
    assert "  Baseline (GRPO without R_E) minus SFT: EEA -45.0  (-108.5 to +18.5)" in text
    assert "  seed 1: EEA 60.0 -> 20.0 -> 60.0; " in text and "WAR 100.0 -> 100.0 -> 100.0; no\n" in text
    # Of three sentences two are of the grammar; the cue is true in 8 and 6 of ten. Last tenth: steps 18 and 19.
    beside = blocks[4]["Ours"]
    assert beside == "40.0 ± 0.0 66.7 ± 0.0 70.0 ±14.1 37.0 ± 0.0 4.0 ± 0.0 50.0 ± 0.0 18.5 ± 0.0 53.5 ± 7.1".split()
    assert blocks[4]["SFT"] == "40.0 ± 0.0 66.7 ± 0.0 70.0 ±14.1 - - - - -".split()
    assert blocks[5]["Ours"][:2] == ["70.0", "±14.1"]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["rows"]["ours"]["FCR again"] == [80, 60] and kept["rows"]["baseline"]["tokens"] == [48.5, 48.5]


def test_intervals_over_seeds_by_hand():
    """Gaps 1, 2, 3: mean 2, standard error 1 / sqrt(3), t of two degrees of freedom 4.303; one seed says nothing."""
    assert reproduce.interval([1, 2, 3]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert reproduce.difference([10, 20, 30], [9, 18, 27]) == "+2.0  (-0.5 to +4.5) [+1.0, +3.0]"
    assert reproduce.difference([10, 20, 30], [7, 18, 27.5]).startswith("+2.5* (+1.3 to +3.7)")
    assert reproduce.difference([10], [7]) == "+3.0  (-inf to +inf) [+3.0, +3.0]"
    rng = np.random.default_rng(0)  # 95% of such intervals hold the truth, of five seeds and of forty
    for seeds in (5, 40):
        inside = [low < 0 < high for low, high in (reproduce.interval(rng.standard_normal(seeds)) for _ in range(4000))]
        assert abs(np.mean(inside) - 0.95) < 0.012


def test_a_folder_of_other_settings_and_an_unknown_row_are_refused(tmp_path):
    about = {"clips": 5, "split": "test", "steps": 0}
    (tmp_path / "reproduce.json").write_text(json.dumps(about))
    with pytest.raises(SettingsError, match="other settings.*another --out"):
        reproduce.main(["--out", str(tmp_path)])
    with pytest.raises(SettingsError, match="--rows theirs: there are table-1, tables, objective, base"):
        reproduce.main(["--out", str(tmp_path / "new"), "--rows", "theirs,ours"])
    assert not (tmp_path / "new").exists()
