"""Every option of every script is named by some test; what an answering model is given; where a judge's answers lie."""

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain_step import drawn, logps_of, token_logits
from test_judge import good, serve  # noqa: F401  (serve is a fixture)
from tiny_runs import command, input_of, record, script

from erv_min import checkpoint
from erv_min.base.errors import DiskError, ErvMinError, SettingsError
from erv_min.checkpoint import load_humanomni
from erv_min.data.examples import load_examples
from erv_min.toy import chain

SCRIPTS = ("grpo", "sft", "erv", "evaluate", "infer", "augment")


# ---- every option is named -------------------------------------------------------------------------------------------


def help_of(name: str, capsys, *before: str) -> str:
    """What `scripts/NAME.py [STEP] --help` prints; of a help that is told in two parts, both."""
    printed = ""
    for words in (["--help"], ["--help", "all"]):
        if words == ["--help"] or "--help all" in printed:
            with pytest.raises(SystemExit):
                script(name).main([*before, *words])
            printed += capsys.readouterr().out
    return printed


def options_of(name: str, capsys) -> set[str]:
    printed = help_of(name, capsys)
    if name == "augment":
        for step in ("annotated", "describe", "label", "complement", "stats"):
            assert re.search(rf"^ +{step}\b", printed, re.MULTILINE), step
            printed += help_of(name, capsys, step)
    found = set(re.findall(r"^ +(?:-\w, )?(--[a-z][\w-]*)", printed, re.MULTILINE))
    return found - {"--help"}


def named_in(path: Path) -> set[str]:
    """Options that a test file names: in a text, as a word of a command; or as a keyword of a call or key of a dict."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {word.partition("=")[0] for word in re.findall(r"(?<![\w-])--[a-z][\w=-]*", node.value)}
        elif isinstance(node, ast.keyword) and node.arg:
            found.add("--" + node.arg.replace("_", "-"))
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_some_test_names_each_option(name, capsys):
    tests = [path for path in Path(__file__).parent.rglob("*.py") if path != Path(__file__)]
    named = set().union(*map(named_in, tests), ONLY_HERE)
    assert sorted(options_of(name, capsys) - named) == []


def test_a_new_option_would_be_missed(tmp_path):
    """The reader of test files finds what is a command or a keyword, and no part of another word."""
    file = tmp_path / "test_it.py"
    file.write_text("run('--beta=0.5 --no-watch', mu=2)\n'--top-k'\n# --tau\n'a--b'\n")
    assert named_in(file) == {"--beta", "--no-watch", "--top-k", "--mu"}


# ---- what an answering model is given --------------------------------------------------------------------------------

ONLY_HERE = {"--subtitle", "--judge-cache"}  # options whose one test stands below
GIVEN = dict(num_frames=2, modality="video_audio", prompt_stage="inference", geometry="pad", subtitles=True)
ANSWER = dict(num_frames=2, temperature=0.7, max_new_tokens=10, seed=3, workers=0, device="cpu")


def answered(tiny, name: str, out: Path, changes: dict) -> list[dict]:
    """Calls of `rollout` by infer.py on one clip, or by evaluate.py on MERR's four."""
    options = command(ANSWER | {"model": tiny.folder / "policy"} | changes)
    clip, data = str(tiny.folder / "merr/m0.mp4"), f"merr:{tiny.folder / 'merr'}"
    where = {"infer": [clip, "--json"], "evaluate": [
        "--data", data, "--split", "train", "--judge", "lexicon", "--bootstrap", "0", "--out", str(out)]}[name]
    main = script(name).main
    with pytest.MonkeyPatch.context() as patch:
        calls = record(patch, judged_by_table=False)
        main([*where, *options])
    return calls


def apart(tiny, calls: list[dict], examples: list, o: SimpleNamespace, **towers) -> float:
    """The largest distance of the sampler's log-probs from those of the whole model on the clips as `o` gives them."""
    policy, distances = tiny.folder / "policy", []
    model = load_humanomni(policy, **towers)
    rows = [row for call in calls for row in zip(call["sampled"], call["logps"], call["noise"].tolist())]
    assert len(rows) == len(examples)
    for example, (ids, logps, noise) in zip(examples, rows):
        with torch.no_grad():
            logits = token_logits(model, input_of(example, model, policy, o), ids) / ANSWER["temperature"]
        distances += (logps_of(logits, ids) - torch.tensor(logps)).abs().tolist()
        if max(distances) < 1e-4:
            assert drawn(logits, ids, noise[: len(ids)], SimpleNamespace(top_k=0))
    return max(distances)


@pytest.mark.parametrize("name", ["infer", "evaluate"])
@pytest.mark.parametrize("changes", [
    dict(geometry="stretch"),
    dict(prompt_stage="sft"),
    dict(prompt_stage="grpo"),
    dict(modality="video"),
    dict(num_frames=3),
    dict(vision_tower="vision"),
    dict(audio_tower="audio"),
    dict(text_tower="text"),
], ids=str)
def test_the_model_is_given_what_the_options_say(tiny, tmp_path, name, changes):
    examples = load_examples(f"merr:{tiny.folder / 'merr'}")
    if name == "infer":
        examples = [replace(examples[0], subtitle="")]
    changes = {option: tiny.folder / "towers" / x if option.endswith("tower") else x for option, x in changes.items()}
    towers = {option: x for option, x in changes.items() if option.endswith("tower")}
    calls = answered(tiny, name, tmp_path, changes)
    o = SimpleNamespace(**GIVEN | {option: x for option, x in changes.items() if option not in towers})
    assert apart(tiny, calls, examples, o, **towers) < 2e-5
    assert apart(tiny, calls, examples, SimpleNamespace(**GIVEN)) > 1e-4


def test_a_subtitle_that_is_given_stands_in_the_prompt(tiny, tmp_path):
    example = replace(load_examples(f"merr:{tiny.folder / 'merr'}")[0], subtitle="She is angry.")
    calls = answered(tiny, "infer", tmp_path, dict(subtitle="She is angry."))
    assert apart(tiny, calls, [example], SimpleNamespace(**GIVEN)) < 2e-5
    assert apart(tiny, calls, [replace(example, subtitle="")], SimpleNamespace(**GIVEN)) > 1e-4


# ---- what is cheap is checked first ----------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """No weight of any checkpoint may be read, and none be made."""
    monkeypatch.setattr(chain, "run", lambda commands, _: pytest.fail(f"{commands} are run"))
    monkeypatch.setattr(checkpoint, "open_weights", lambda folder: pytest.fail(f"the weights of {folder} are read"))


def broken(tiny, tmp_path) -> dict:
    """Folders and files that lack something, by what they lack."""
    for kind, file in (("policy", "tokenizer.json"), ("policy", "text_gate/tokenizer.json"),
                       ("verifier", "tokenizer.json")):
        shutil.copytree(tiny.folder / kind, tmp_path / f"{kind} {Path(file).parent}")
        (tmp_path / f"{kind} {Path(file).parent}" / file).unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"erv_min": {"settings": {}}}')
    shutil.copytree(tiny.folder / "world", tmp_path / "world")
    for clip in (tmp_path / "world/clip").iterdir():
        clip.unlink()
    return {"policy": tiny.folder / "policy", "no_tokenizer": tmp_path / "policy .", "world": tiny.folder / "world",
            "no_gate": tmp_path / "policy text_gate", "erv": tiny.folder / "verifier", "unfinished": tmp_path / "run",
            "erv_no_tokenizer": tmp_path / "verifier .", "no_clips": tmp_path / "world", "out": tmp_path / "out",
            "clip": tiny.folder / "merr/m0.mp4", "rows": tiny.folder / "world/erv_train.jsonl"}


TRAIN = "--world {world} --device cpu --out {out} "
GRPO = "grpo " + TRAIN + "--steps 1 --batch-size 4 --no-baseline "
ASK = "--model {policy} --device cpu "


@pytest.mark.parametrize("given, said", [
    (GRPO + "--model {policy} --erv ./gone", "./gone"),
    (GRPO + "--erv gone/typo", "gone/typo"),  # before SFT is made
    (GRPO + "--model {policy} --erv {policy}", "policy"),
    (GRPO + "--model {policy} --erv {erv_no_tokenizer}", "tokenizer"),
    (GRPO + "--model {policy} --erv {erv} --watch-erv {erv_no_tokenizer}", "tokenizer"),
    (GRPO + "--model {no_tokenizer} --erv {erv}", "tokenizer"),
    (GRPO + "--model {erv} --erv {erv}", "verifier"),
    (GRPO + "--model {unfinished} --erv {erv}", "has not finished"),
    (GRPO + "--model {policy} --erv {unfinished}", "has not finished"),
    (GRPO + "--model {policy} --erv {erv} --data toy:{no_clips}", "are missing"),
    (GRPO + "--model {policy} --erv {erv} --sharding torch", "--sharding torch needs two processes or more"),
    (GRPO + "--model {policy} --erv {erv} --vision-tower {unfinished}", "config.json"),
    ("sft " + TRAIN + "--model {no_tokenizer}", "tokenizer"),
    ("sft " + TRAIN + "--model {no_gate}", "text gate"),
    ("sft " + TRAIN + "--model {unfinished}", "has not finished"),
    ("sft " + TRAIN + "--model {policy} --data dfew:{world}", "have no explanation"),
    ("sft " + TRAIN + "--model {policy} --data toy:{no_clips}", "are missing"),
    ("sft " + TRAIN + "--preset paper-7b --data toy:{world}", "paper-7b has no|StarJiaxing"),
    ("erv " + TRAIN + "--data {rows} --init {erv_no_tokenizer}", "tokenizer"),
    ("erv " + TRAIN + "--data {rows} --init {unfinished}", "has not finished"),
    ("erv " + TRAIN + "--data {rows} --init {policy}", "policy"),
    ("infer {clip} {out}/gone.mp4 " + ASK, "gone.mp4: no such file .1 of 2 clips"),
    ("infer {clip} --model {no_tokenizer}", "tokenizer"),
    ("infer {clip} --explain-reward happy --erv {erv_no_tokenizer} " + ASK, "tokenizer"),
    ("infer {clip} --explain-reward happy --erv gone/typo " + ASK, "gone/typo"),
    ("evaluate --data toy:{world} --out {out} --model {no_tokenizer}", "tokenizer"),
    ("evaluate --data toy:{no_clips} --out {out} " + ASK, "are missing"),
    ("augment describe --data toy:{world} --out {out} --model {no_tokenizer}", "tokenizer"),
])
def test_what_is_cheap_is_checked_before_weights_are_read(tiny, tmp_path, no_weights, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    where = {name: str(path).replace(" ", "\0") for name, path in broken(tiny, tmp_path).items()}
    name, *words = (word.replace("\0", " ") for word in given.format(**where).split())
    with pytest.raises((ErvMinError, SystemExit)) as error:
        script(name).main(words)
    assert re.search(said, f"{error.value} {capsys.readouterr().err}"), error.value


@pytest.mark.parametrize("changes, said", [
    (dict(lr=0.5), "other values of --lr"), (dict(steps=3), "other values of --steps"),
    (dict(world="world-1"), "started on other data")])
def test_a_resume_is_refused_before_weights_are_read(tiny, tmp_path, request, monkeypatch, changes, said):
    options = dict(model=tiny.folder / "policy", steps=2, batch_size=4, world=tiny.folder / "world", cache_features="")
    shutil.copytree(tiny.run("sft", options).out, tmp_path / "out")
    request.getfixturevalue("no_weights")
    shutil.copytree(tiny.folder / "world", tmp_path / "world-1")
    entries = json.loads((tmp_path / "world-1/train.json").read_text())
    entries[0]["conversations"][1]["value"] = "<think>Another.</think>\n<answer>sad</answer>"
    (tmp_path / "world-1/train.json").write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    with pytest.raises(SettingsError, match=said):
        script("sft").main(command(options | changes | {"out": tmp_path / "out", "device": "cpu", "resume": True}))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_the_disk_is_looked_at_before_weights_are_read(tiny, tmp_path, no_weights, monkeypatch, name):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 80, 80))
    options = dict(model=tiny.folder / "policy", world=tiny.folder / "world", batch_size=3, out=tmp_path / "out", device="cpu")
    with pytest.raises(DiskError, match="3 states of .* GB and the model.*8e-08 GB are free"):
        script(name).main(command(options | ({"erv": tiny.folder / "verifier", "baseline": False} if name == "grpo" else {})))


# ---- a hosted judge's answers ----------------------------------------------------------------------------------------


def test_two_evaluations_share_a_judges_answers(serve, tmp_path):  # noqa: F811
    """--judge-cache: what stands in it is not asked again, whatever the folder of the results."""
    api, kept = serve(lambda prompt, times: good("happy")), tmp_path / "kept.jsonl"
    row = {"video_id": "1", "output": "<think>He smiles.</think>\n<answer>happy</answer>", "ground_truth": "happy",
           "dataset": "dfew"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    for out in ("a", "b"):
        script("evaluate").main(["--predictions", str(tmp_path / "p.jsonl"), "--judge", "openai:m", "--bootstrap", "0",
                                 "--judge-cache", str(kept), "--out", str(tmp_path / out)])
        assert not (tmp_path / out / "judge-cache.jsonl").exists()
        assert json.loads((tmp_path / out / "metrics.json").read_text())["judges"]["openai:m"]["dfew"]["EEA"] == 100
    assert list(api.asked.values()) == [1] and len(kept.read_text().splitlines()) == 1
