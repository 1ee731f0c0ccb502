"""report.py: what stands on the page, that no text of a model runs in it, its bounds, and errors that name the file."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages_material import ROOT, lines, make_run, prediction, run, truths, world  # noqa: F401

from erv_min.base.errors import DataError, SettingsError
from erv_min.base.files import read_jsonl
from erv_min.base.options import preset_values

from erv_min.metrics import bootstrap, score
from erv_min.train.settings import GRPOSettings

import report
import report_parts


def page_of(folders: list[Path], data: str = "") -> str:
    runs = [report.read_run(str(folder)) for folder in folders]
    for run in runs:
        report.find_clips(run, data)
    return report.build(runs)


def test_a_report_holds_every_part_and_runs_no_text(run):
    page = page_of([run])
    for part in ("Held-out results", "Confusion matrices",
                 "Entropy", "R_answer", "KL to the reference", "Completions over the training",
                 "sadness, anxiety", "group_size", "soundfile", "data:image/jpeg;base64,",
                 "data:video/mp4;base64,"):
        assert part in page, part
    assert "&lt;script&gt;document.title" in page and "<script" not in page and "onerror=\"" not in page
    assert not re.search(r'(?:src|href|poster)="(?!data:|#)', page) and "@import" not in page
    assert "var(--run0)" in page  # the SVGs take the page's colours
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "She smiles &amp; waves" in page


def test_the_shipped_curve_is_the_main_commands_and_lies_under_a_run(run):
    folder = ROOT / "erv_min" / "toy" / "reference"
    rows = read_jsonl(folder / "metrics.jsonl")
    steps = preset_values(GRPOSettings, "toy")["steps"]  # other settings need another recording
    assert [row["step"] for row in rows] == list(range(steps)) and math.isclose(
        max(row["lr"] for row in rows), preset_values(GRPOSettings, "toy")["lr"], rel_tol=0.05)
    assert "reference" in page_of([run, folder])


def test_sentences_are_marked_as_eq_4_counts_them():
    html = report_parts.sentence("He cries.", ["anxiety", "sadness"], "sad")
    assert '--h:212' in html and "anxiety, sadness ✓" in html  # the colour of the label that counts
    html = report_parts.sentence("A room.", ["neutral"], "sad")
    assert "plain" in html and "✓" not in html
    html = report_parts.sentence("A room.", ["neutral"], "neutral")
    assert "grey" in html and "neutral ✓" in html
    html = report_parts.sentence("Well.", ["amusement"], "happy")  # of GoEmotions' 28, not among the paper's 11
    assert "plain" in html and "amusement" in html and "✓" not in html


def test_curves_by_hand():
    """The corners of a plot are its extremes; a running mean of three; 400 of 800 points, the first and the last too;
    of one value a line in the middle."""
    steps, values = np.arange(4), np.array([5.0, 5, 5, 9])
    drawn = report_parts.panel({0: (steps, values)})
    assert re.search(r'd="([^"]*)" fill="none"', drawn)[1] == "M44.0 180.0L140.0 180.0L236.0 180.0L332.0 8.0"
    assert re.findall(r">([^<]+)</text>", drawn) == ["5", "7", "9", "0", "3"]
    assert report_parts.smooth(values).tolist() == pytest.approx([5, 5, 19 / 3, 7])
    assert report_parts.smooth(values[:1]).tolist() == [5]
    few = report_parts.spread(range(800), 400)
    assert (len(few), few[0], few[-1]) == (400, 0, 799) and report_parts.spread([3, 4], 5) == [3, 4]
    assert 'd="M44.0 94.0L332.0 94.0"' in report_parts.panel({0: (np.array([0, 9]), np.array([2.0, 2.0]))})


def test_several_runs_are_overlaid_and_a_common_system_stands_once(run, tmp_path, world, truths):
    other = make_run(tmp_path / "baseline", world, truths, w_explanation=0.0)
    rows = map(json.loads, (other / "metrics.jsonl").read_text().splitlines())
    lines(other / "metrics.jsonl", [{**row, "reward_explanation": 0.0} for row in rows])
    lines(other / "predictions-GRPO-with-R_E.jsonl",
          [prediction(i, t, "No.", "fear", "fear") for i, t in truths["test"].items()])
    page = page_of([run, other])
    table = page[page.index('class="scores"') : page.index("Confusion matrices")]
    assert table.count("<th scope=row>") == 3
    assert all(f"{name}: GRPO with R_E" in table for name in ("ours", "baseline"))
    assert "ours: SFT" in table and "baseline: SFT" not in table
    assert page.index(">w_explanation<") < page.index(">preset<")  # what differs comes first
    assert "var(--run1)" in page and "not rewarded" in page


def test_missing_parts_are_named_and_damage_is_an_error(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(DataError, match="no run in it: expected config.json, metrics.jsonl"):
        report.read_run(str(bare))
    shutil.copy(run / "metrics.jsonl", bare)
    page = page_of([bare])
    for file in ("config.json", "completions.jsonl", "evaluation.json"):
        assert f"{file} is not there" in page
    assert "KL to the reference" in page and "Held-out results" not in page
    shutil.copy(run / "completions.jsonl", bare)
    assert "bare: no frames of its train clips; --data says where they are" in page_of([bare])
    shutil.copy(run / "evaluation.json", bare)
    assert "predictions-SFT.jsonl is not there: nothing of SFT" in page_of([bare])
    for name, content, message in (
            ("metrics.jsonl", '{"step": 0}\n{"step": 1', None),  # a row whose write was cut is no damage
            ("metrics.jsonl", '{"step": 0\n{"step": 1}\n', "metrics.jsonl, line 1"),
            ("metrics.jsonl", '[1]\n', "metrics.jsonl, line 1: not a JSON object"),
            ("metrics.jsonl", '{"step": "0"}\n', "metrics.jsonl, row 1: field 'step' is '0'; was it edited?"),
            ("completions.jsonl", '{"step": 3, "video_id": "1"}\n', "completions.jsonl, row 1: field 'dataset' is 'None'"),
            ("evaluation.json", "{", "evaluation.json: not a JSON file"),
            ("evaluation.json", "[3]", "evaluation.json: expected a JSON object, found [3]"),
            ("predictions-SFT.jsonl", (run / "predictions-SFT.jsonl").read_text() * 2, "predictions-SFT.jsonl, row 5: a second output of clip 10004"),
            ("config.json", '{"erv_min": 3}', "config.json: field 'erv_min' is '3'; was it edited?")):
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(run, damaged)
        (damaged / name).write_text(content)
        if message is None:
            assert len(report.read_run(str(damaged)).metrics) == 1
        else:
            with pytest.raises(DataError, match=re.escape(message)):
                report.read_run(str(damaged))


def test_an_evaluation_folder_is_a_run_too(run, tmp_path):
    rows = [json.loads(line) for line in (run / "predictions-SFT.jsonl").read_text().splitlines()]
    lines(tmp_path / "judged-1.jsonl", rows)
    result = {"dfew": {**score(rows, "dfew"), "intervals": bootstrap(rows, "dfew", 50)}}
    metrics = {"system": "R1", "settings": {"data": ""}, "judges": {"lexicon": result}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = page_of([f"Mine={tmp_path}"])
    assert "R1<small>dfew, 4 clips" in page and "She smiles &amp; waves SFT." in page and " to " in page


def test_a_long_run_makes_no_longer_page(tmp_path, world, truths, monkeypatch):
    long = make_run(tmp_path / "long", world, truths, steps=40)
    rows = [json.loads(line) for line in (long / "completions.jsonl").read_text().splitlines()]
    endless = {**rows[0], "completion": "w " * 9000, "sentences": ["w " * 9000], "labels": [["neutral"]]}
    lines(long / "completions.jsonl", [{**endless, "step": step} for step in range(200)])
    lines(long / "metrics.jsonl", [{"step": s, "kl": s % 7} for s in range(5000)])
    page = page_of([long])
    assert page.count('<span>Step <b>') == report.STEPS and "<b>1</b>" in page and "<b>200</b>" in page
    assert len(page) < 800_000 and "cut after 6000 of 18000 characters" in page
    assert page.count('src="data:video') == 4  # of the four held-out clips
    monkeypatch.setattr(report, "CLIP_BYTES", 1000)
    assert "frames only: the clip has" in page_of([long])
    with pytest.raises(SettingsError, match="9 runs: a page holds at most 8"):
        report.main([str(long)] * 9)


def test_the_command_writes_the_page(run, tmp_path, capsys):
    report.main([f"A run={run}", "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "A run" in page and page.count("She smiles &amp; waves SFT.") == 4
    assert "not on the page" not in capsys.readouterr().out


def test_a_run_that_skipped_steps_is_shown(run, tmp_path):
    """As Run.log writes them: what is not finite is null, and the row says why."""
    rows = read_jsonl(run / "metrics.jsonl")
    for number, row in enumerate(rows):
        row["skipped"] = min(number, 2)
    for row in rows[1:3]:
        row |= {"loss": None, "grad_norm": None, "skipped_because": "not finite: log-probabilities of 10003"}
    shutil.copytree(run, tmp_path / "skipped")
    lines(tmp_path / "skipped" / "metrics.jsonl", rows)
    page = page_of([tmp_path / "skipped"])
    assert "KL to the reference" in page and "<th scope=row>steps skipped</th><td>2</td>" in page


def test_a_clip_of_another_data_set_with_the_same_id_is_not_shown(run, world, tmp_path, monkeypatch):
    """MAFW's 10001 and 10004 beside DFEW's: each row has the frames of its own, in training as held out."""
    entries = [{"video": f"{i}.mp4", "conversations": [{"from": "gpt", "value": "anger"}]} for i in (10001, 10004)]
    (tmp_path / "mafw.json").write_text(json.dumps(entries))
    data = f"json:mafw:{tmp_path / 'mafw.json'}@/mafw,toy:{world}"
    monkeypatch.setattr(report_parts, "clip", lambda path, *_: f"frames of {path}")
    page = page_of([run], data)
    assert "frames of /mafw" not in page and f"frames of {world}/clip/10004.mp4" in page
    shown = report.read_run(str(run))
    report.find_clips(shown, data)
    for video_id, said in (("10001", "frames of /mafw/10001.mp4"), ("1", "clip 1 is not in the train data")):
        assert said in report.clip_of(shown, "train", {"video_id": video_id, "dataset": "mafw"})


def test_scripts_end_with_a_named_error():
    result = subprocess.run([sys.executable, ROOT / "scripts/tools/report.py", "nowhere"], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 1 and result.stderr.startswith("DataError: nowhere: no run in it")
