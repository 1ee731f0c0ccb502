"""Every option of every script is named by some test; what an answering model is given; where a judge's answers lie."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain_step import drawn, logps_of, token_logits
from test_judge import good, serve  # noqa: F401  (serve is a fixture)
from tiny_runs import command, input_of, record, script

from erv_min.checkpoint import load_humanomni
from erv_min.data.examples import load_examples

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
