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
from erv_min.remedies import Remedies
from erv_min.toy import render
from erv_min.toy.text import CUES, appearances, fill
from erv_min.train.settings import ERVSettings, GRPOSettings, SFTSettings

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
import erv  # noqa: E402

spec = importlib.util.spec_from_file_location("reproduce", SCRIPTS / "reproduce.py")
reproduce = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reproduce)


def test_each_row_has_its_commands_and_each_command_parses(tmp_path, monkeypatch):
    monkeypatch.setattr("erv_min.base.options.missing_path", lambda text, kind: None)  # made by the commands before
    jobs = reproduce.plan(tmp_path, 3, "test", 1000, 7, False)
    assert set(reproduce.wanted(jobs, list(reproduce.ROWS))) == set(jobs)
    assert set(reproduce.wanted(jobs, ["answers"])) == {"world", "sft-answers", "answers", "evaluate answers"}
    assert set(reproduce.wanted(jobs, ["ours", "hardened"])) == {
        "world", "text", "sft", "erv", "erv-2", "erv-hard", "erv-unseen", "ours", "hardened", "evaluate ours",
        "evaluate hardened", "score ours", "score hardened"}
    seen = []
    for name, (before, product, words) in jobs.items():
        assert set(before) <= set(jobs) and str(product).startswith(str(tmp_path))
        if words[0].endswith("grpo.py"):
            seen.append(parse(GRPOSettings, "", words[1:]))
            assert (seen[-1].seed, seen[-1].steps, seen[-1].eval_clips) == (3, 7, -1)
        if words[0].endswith("sft.py"):
            assert parse(SFTSettings, "", words[1:]).answers_only == (name == "sft-answers")
        if words[0].endswith("/erv.py"):
            harden = name == "erv-hard"
            verifier = parse(ERVSettings, "", words[1 + harden:])
            assert (words[1] == "harden") == harden and verifier.seed == (1003 if name == "erv-2" else 3)
    # What separates the rows of tables 1 and 2, and nothing else.
    rows, variants = seen[:6], {Path(s.out).name: s for s in seen[6:]}
    assert [(Path(s.out).name, bool(s.w_explanation), s.ablate, Path(s.erv).name) for s in rows] == [
        ("ours", True, "", "erv"), ("baseline", False, "", ""), ("no-augmentation", True, "", "erv-human"),
        ("no-filtering", True, "neutral-filtering", "erv"), ("no-sentences", True, "sentence-level", "erv"),
        ("answers", False, "", "")]
    # A remedy or a variant of Eq. 3 differs from Ours in one setting: its verifiers, or what its words say.
    plain = dataclasses.asdict(rows[0])
    differs = {row: {k: v for k, v in dataclasses.asdict(s).items() if plain[k] != v and k != "out"}
               for row, s in variants.items()}
    assert list(differs) == list(reproduce.VARIANTS) and all(differs.values())
    two = f"{tmp_path / 'erv'},{tmp_path / 'erv-2'}"
    assert differs["minimum"] == {"erv": two}
    assert differs["hardened"] == {"erv": str(tmp_path / "erv-hard")} and differs["k2"] == {"kl": "k2"}
    assert {k for d in differs.values() for k in d} == {f.name for f in dataclasses.fields(Remedies)} | {
        "erv", "advantages", "loss_type", "kl", "mask_truncated"}


def write(path: Path, after: Path | None = None) -> list[str]:
    """A command that writes `path`, and fails unless `after` is there."""
    check = f"assert open({str(after)!r}).read(); " if after else ""
    return ["-c", f"{check}f = open({str(path)!r}, 'a'); f.write('x'); print('wrote')"]


def test_jobs_run_once_in_order_and_a_failure_names_its_log(tmp_path):
    a, b, c = (tmp_path / x for x in "abc")
    jobs = {"last": (("first",), b, write(b, a)), "first": ((), a, write(a))}
    reproduce.run_all({0: jobs}, tmp_path, 2)
    reproduce.run_all({0: jobs}, tmp_path, 2)
    assert (a.read_text(), b.read_text()) == ("x", "x")
    assert "wrote" in (tmp_path / "seed-0" / "log" / "first.txt").read_text()
    with pytest.raises(SettingsError, match=r"(?s)seed 0, bad: status 3.*bad\.txt ends with.*told why"):
        reproduce.run_all({0: jobs | {"bad": (("last",), c, ["-c", "import sys; print('told why'); sys.exit(3)"])}},
                          tmp_path, 1)


def test_sigterm_ends_the_commands_too(tmp_path):
    """A command that outlives reproduce.py would write into the folder of the next try."""
    pid = tmp_path / "pid"
    sleeper = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(120)"
    parent = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
                               "import reproduce\nreproduce.plan = lambda *_: {'evaluate sft': "
                               f"((), reproduce.Path('never'), ['-c', {sleeper!r}])}}\n"
                               f"reproduce.main(['--rows', 'sft', '--seeds', '1', '--out', {str(tmp_path / 'out')!r}])"])
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


LOOK = appearances(render.Look(False, "red", "dark", True, True, "office", 0))[0][0]
CUE = {emotion: fill(CUES["voice"][emotion][1], False) for emotion in ("happy", "surprise")}


def predictions(folder: Path, right: int, clips: int = 10) -> None:
    """Every answer right; `right` of the explanations judged as the truth, the others as fear (truth: happy).

    Each explanation has one sentence out of the grammar, one of it about the look, and one cue, true where it is right.
    """
    rows = [{"video_id": str(i), "dataset": "dfew", "ground_truth": "happy", "judge_status": "ok",
             "judged_emotion": "happy" if i < right else "fear",
             "output": f"<think>She freeurprised. {LOOK} {CUE['happy' if i < right else 'surprise']}</think>"
                       "<answer>happy</answer>"} for i in range(clips)]
    world = folder.parents[1] / "world"
    world.mkdir(parents=True, exist_ok=True)
    (world / "params.jsonl").write_text("".join(json.dumps(
        {"number": i, "look": {"woman": False}, "face_shows": "happy", "voice_shows": "happy"}) + "\n"
        for i in range(clips)))
    folder.mkdir(parents=True)
    (folder / "judged-1.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    scores = {judge: {"dfew": score(rows, "dfew")} for judge in reproduce.JUDGES}
    (folder / "metrics.json").write_text(json.dumps({"judges": scores}))


def test_tables_by_hand(tmp_path):
    """Two seeds of ten clips: EEA of ours 80 and 60, of the baseline 30 and 20; FCR the same, WAR 100."""
    for seed, ours, baseline in ((0, 8, 3), (1, 6, 2)):
        predictions(tmp_path / f"seed-{seed}" / "evaluation" / "ours", ours)
        predictions(tmp_path / f"seed-{seed}" / "evaluation" / "baseline", baseline)
        for row, R_E in (("ours", 0.02), ("baseline", 0.0)):  # 20 steps: R_E 0.02 x step, the rest constant
            (tmp_path / f"seed-{seed}" / row).mkdir()
            (tmp_path / f"seed-{seed}" / row / "metrics.jsonl").write_text("".join(json.dumps(
                {"step": i, "reward_explanation": R_E * i, "sentences": 4, "distinct_sentence_rate": 1.0 if i else None,
                 "kl": 0.1, "neutral_share": 0.5}) + "\n" for i in range(20)))
    text = reproduce.tables(tmp_path, [0, 1], ["baseline", "ours"], "test", 10)
    assert "  Ours: R_E 0.01 -> 0.37; sentences 4.00 -> 4.00; distinct 1.00 -> 1.00" in text  # steps 0-1, 18-19
    assert "R_E): R_E" not in text  # the baseline never saw R_E
    lines = {line[:28].strip(): line[28:].split() for line in reversed(text.splitlines()) if "lexicon" not in line[28:]}
    assert lines["Ours"][:2] == ["70.0", "±14.1"]  # mean of 80 and 60; sqrt(((80-70)^2 + (60-70)^2) / 1)
    assert lines["Baseline (GRPO without R_E)"][:2] == ["25.0", "±"]
    # Gaps 50 and 40: mean 45, standard error 5, t of one degree of freedom 12.706; two seeds resolve nothing.
    assert "EEA +45.0  (-18.5 to +108.5) [+40.0, +50.0]" in text and "WAR +0.0  (+0.0 to +0.0)" in text
    said = text[text.index("Sentences, percent"):].splitlines()[2:4]  # 20 of 30; cues true in 3, 2; 8, 6 of 10
    assert [line[28:].split() for line in said] == [["66.7", "±", "0.0", "25.0", "±", "7.1"],
                                                    ["66.7", "±", "0.0", "70.0", "±14.1"]]
    assert "(48.93)" in text and "(75.79)" in text  # the paper's EEA, and 43.57 / 57.49
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["rows"]["ours"]["paraphrases"]["FCR"] == [80, 60]


def test_the_table_of_variants_by_hand(tmp_path):
    """Two seeds of ten clips. Calm claims count: EEA 80, 80 beside Ours' 70, 60; R_E 75, 75 beside 80, 90."""
    for seed, right, R_E in ((0, (7, 8), (0.8, 0.75)), (1, (6, 8), (0.9, 0.75))):
        for row, k, paid in zip(("ours", "calm"), right, R_E):
            out = tmp_path / f"seed-{seed}" / "evaluation" / row
            predictions(out, k)
            (out / "R_E.json").write_text(json.dumps({
                "own": {"reward_explanation": paid, "sentences": 3.0, "explanation_words": 11.0},
                "unseen": {"reward_explanation": paid - 0.1, "sentences": 3.0, "explanation_words": 11.0}}))
            (tmp_path / f"seed-{seed}" / row).mkdir()
            (tmp_path / f"seed-{seed}" / row / "metrics.jsonl").write_text("".join(json.dumps(
                {"step": i, "reward_explanation": 0.5, "sentences": 3, "distinct_sentence_rate": 1.0, "kl": 0.01 * i,
                 "neutral_share": 0.5, "completion_length": 30 + i}) + "\n" for i in range(20)))
    text = reproduce.tables(tmp_path, [0, 1], ["ours", "calm"], "test", 10)
    lines = {line[:17].strip(): line[17:].split() for line in reversed(text[text.index("Remedies and"):].splitlines())}
    # mean and 12.706 * sd / sqrt(2): of 80, 90: 85 ± 63.53; KL: the mean of 0.18 and 0.19; tokens of 48 and 49
    assert lines["Ours"][:6] == ["85.00", "±63.53", "75.00", "±63.53", "65.00", "±63.53"]
    assert lines["calm claims count"][:6] == ["75.00", "±", "0.00", "65.00", "±", "0.00"]
    kept = json.loads((tmp_path / "results.json").read_text())["rows"]["calm"]["variant"]
    assert kept["100 KL"] == pytest.approx([18.5] * 2) and kept["length"] == [48.5] * 2 and kept["EEA"] == [80, 80]
    assert "  Ours: widest gap 30.0\n" in text
    assert "calm claims count: widest gap -5.0; R_E own -10.0  (-73.5 to +53.5) [-15.0, -5.0]; R_E unseen" in text
    assert "EEA +15.0  (-48.5 to +78.5) [+10.0, +20.0]; FCR" in text


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
    about = {"clips": 5, "split": "test", "steps": 0, "exploitable": False}
    (tmp_path / "reproduce.json").write_text(json.dumps(about))
    with pytest.raises(SettingsError, match="other settings.*another --out"):
        reproduce.main(["--out", str(tmp_path)])
    with pytest.raises(SettingsError, match="--rows theirs: there are base"):
        reproduce.main(["--out", str(tmp_path / "new"), "--rows", "theirs,ours"])
    assert not (tmp_path / "new").exists()
