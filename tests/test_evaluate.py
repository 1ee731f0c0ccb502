"""Predictions in every form -> judge -> metrics.json; one clip in, explanation out (section 4.2, tables 1 and 4)."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import augment  # noqa: E402
import evaluate  # noqa: E402
import infer  # noqa: E402
from conftest import GOLDEN  # noqa: E402
from test_judge import good, reason, serve  # noqa: E402, F401  (serve is a fixture)

from erv_min.base.errors import ClipError, DataError, JudgeError, SettingsError
from erv_min.base.files import read_json, read_jsonl
from erv_min.base.processes import Processes
from erv_min.checkpoint import load_humanomni, save_erv, save_humanomni
from erv_min.config import humanomni
from erv_min.data.examples import load_examples
from erv_min.data.results import clip_key, read_predictions
from erv_min.emotions import ERV_LABELS
from erv_min.erv import scratch
from erv_min.inputs import Collator, Example, Inputs
from erv_min.judge import Judgement
from erv_min.model.humanomni import HumanOmni
from erv_min.model.parameters import init_weights
from erv_min.rewards import RewardSettings
from erv_min.toy.text import CUES
from erv_min.toy.world import WorldSettings, build_world
from erv_min.train import answers as predictions, hooks
from erv_min.train.settings import GRPOSettings

ROOT = Path(__file__).parent.parent


def clips(*labels: str, dataset: str = "dfew") -> list[Example]:
    return [Example(f"{i}", Path(f"/d/{i}.mp4"), label, dataset) for i, label in enumerate(labels, 1)]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# ---------------------------------------------------------------------------------------------------- prediction files

def test_clip_names():
    assert [clip_key(x) for x in ("/a/00012.mp4", "12", "x\\012.AVI", "sample_0007.avi", "01-02.mp4")] == [
        "12", "12", "12", "sample_0007", "01-02"]


def test_released_text_with_outputs_over_several_lines(tmp_path):
    path = write(tmp_path / "r1.txt", "00001.mp4|<think>He smiles.\n\nA | B\n3|</think>\n<answer>happy</answer>\n"
                                      "/data/clip/2.mp4|sad\n9.mp4|of another split\n|x|\n")
    rows, lost = read_predictions(path, clips("happy", "fear", "sad", "angry")[:2])
    assert rows == [{"video_id": "1", "output": "<think>He smiles.\n\nA | B\n3|</think>\n<answer>happy</answer>",
                     "ground_truth": "happy", "dataset": "dfew"},
                    {"video_id": "2", "output": "sad", "ground_truth": "fear", "dataset": "dfew"}]
    assert lost == {"missing": [], "unknown": ["9.mp4"]}


def test_released_judged_json_alone_and_joined(tmp_path):
    judged = write(tmp_path / "judged.json", json.dumps([{"1.mp4": {"reason": "He smiles.", "gpt_response": "Happy"}},
                                                         {"2.mp4": {"reason": "Hm.", "gpt_response": "bored"}}]))
    rows, lost = read_predictions(judged, clips("happy", "fear", "sad"))
    assert [(r["output"], r["judged_emotion"], r["judge_status"]) for r in rows] == [
        ("<think>He smiles.</think>", "happy", "ok"), ("<think>Hm.</think>", None, "outside")]
    assert lost["missing"] == ["3"]
    text = write(tmp_path / "r1.txt", "1.mp4|<think>He smiles.</think><answer>sad</answer>\n2.mp4|fear\n")
    for files in (f"{text},{judged}", f"{judged},{text}"):
        rows, _ = read_predictions(files, clips("happy", "fear"))
        assert [(r["output"][-12:], r["judged_emotion"]) for r in rows] == [("sad</answer>", "happy"), ("fear", None)]


def test_our_rows_with_and_without_data(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"video_id": 1, "output": "x", "ground_truth": "Happy", "dataset": "dfew"}\n')
    assert read_predictions(path,
                            [])[0] == [{"video_id": "1", "output": "x", "ground_truth": "happy", "dataset": "dfew"}]
    assert read_predictions(path, clips("fear"))[0][0]["ground_truth"] == "fear"  # the data's own label


@pytest.mark.parametrize("text, message", [
    ("no record at all", "line 1: expected `clip|output`"),
    ("1.mp4|a\n1.mp4|b", "line 2: a second output of clip 1, after .*line 1"),
    ("7.mp4|a", "no prediction for a clip of --data; the first there: 7.mp4"),
    ('[{"1": "happy"}]', "entry 0: expected"),
    ('[{"1": {"reason": "a", "gpt_response": "b"}}, {"1": {"reason": "a", "gpt_response": "b"}}]',
     "entry 1: a second judgement of clip 1, after .*entry 0"),
    ('{"video_id": "1", "output": "a"}\n{"video_id": "01", "output": "b"}',
     "row 2: a second output of clip 1, after .*row 1"),
    ("[{]", "not a JSON file"), ('{"video_id": "1"}', "row 1: expected fields video_id and output"),
])
def test_damaged_predictions(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_predictions(write(tmp_path / "p", text), clips("happy", "sad"))


def test_clips_of_two_data_sets_with_the_same_numbers_stay_apart(tmp_path):
    """100 DFEW rows and 100 MAFW rows of the same numbers are 200 predictions."""
    def row(i, dataset, label):
        return {"video_id": f"{i:05d}", "output": f"{dataset} {i}", "ground_truth": label, "dataset": dataset}

    rows = [row(i, "dfew", "sad") for i in range(1, 101)] + [row(i, "mafw", "fear") for i in range(1, 101)]
    path = write(tmp_path / "p.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert read_predictions(path, [])[0] == rows
    examples = [Example(r["video_id"], Path(f"/{r['dataset']}/{r['video_id']}.mp4"), r["ground_truth"], r["dataset"])
                for r in rows]
    found, lost = read_predictions(path, examples[::-1])
    assert found == rows[::-1] and lost == {"missing": [], "unknown": []}
    found, lost = read_predictions(path, examples[:150])
    assert found == rows[:150] and len(lost["unknown"]) == 50
    only = write(tmp_path / "mafw.jsonl", "".join(json.dumps(r) + "\n" for r in rows[100:]))
    with pytest.raises(DataError, match="no prediction for a clip of --data"):  # they are of another data set
        read_predictions(only, examples[:100])
    evaluate.main(["--predictions", path, "--judge", "lexicon", "--out", f"{tmp_path}/out", "--bootstrap", "0"])
    figures = read_json(tmp_path / "out" / "metrics.json")["judges"]["lexicon"]
    assert {name: result["n"] for name, result in figures.items()} == {"dfew": 100, "mafw": 100}


def test_predictions_need_labels_and_one_data_set(tmp_path):
    text = write(tmp_path / "r1.txt", "1.mp4|a")
    with pytest.raises(DataError, match="line 1: clip 1.mp4 has no ground_truth and dataset; give --data"):
        read_predictions(text, [])
    with pytest.raises(DataError, match="one data set at a time"):
        read_predictions(text, clips("happy") + [Example("00001", Path("/m/00001.mp4"), "fear", "mafw")])
    with pytest.raises(DataError, match="ground_truth and dataset"):
        read_predictions(write(tmp_path / "p.jsonl", '{"video_id": "1", "output": "x"}\n'), [])


# ---------------------------------------------------------------------------------------------------- figures

def golden_files(folder: Path, dataset: str) -> dict:
    """The golden rows as the release keeps them: a results text, a judged JSON, and the data set's own files."""
    rows = json.loads((GOLDEN / "text" / "metrics.json").read_text())[dataset]
    write(folder / "results.txt", "".join(f"{r['video_id']}.mp4|{r['output']}\n" for r in rows["rows"]))
    write(folder / "judged.json",
          json.dumps([{f"{r['video_id']}.mp4": {"reason": "?", "gpt_response": r["judged_emotion"]}}
                                              for r in rows["rows"]]))
    ids = rows["label_ids"]
    if dataset == "DFEW":
        write(folder / "single_testset_5.csv", "order,label\n" + "".join(
            f"{r['video_id']},{ids[r['ground_truth']]}\n" for r in rows["rows"]))
    else:
        (folder / "set_5").mkdir()
        write(folder / "set_5" / "test.txt",
              "".join(f"{r['video_id']}.mp4 {r['ground_truth']}\n" for r in rows["rows"]))
    return rows["released"]


@pytest.mark.parametrize("dataset", ["DFEW", "MAFW"])
def test_released_files_give_the_released_figures(tmp_path, dataset):
    expected = golden_files(tmp_path, dataset)
    evaluate.main(["--predictions", f"{tmp_path}/results.txt,{tmp_path}/judged.json", "--data",
                   f"{dataset.lower()}:{tmp_path}",
                   "--rule", "released", "--out", f"{tmp_path}/out", "--bootstrap", "50", "--name", "golden"])
    metrics = read_json(tmp_path / "out" / "metrics.json")
    result = metrics["judges"]["as in the file"][dataset.lower()]
    for name in ("WAR", "UAR", "EEA", "FCR", "EPC"):
        assert result[name] == pytest.approx(expected[name], abs=1e-9), name
        low, high = result["intervals"][name]
        assert low <= result[name] <= high
    assert f"{expected['WAR']:.2f}" in (tmp_path / "out" / "table.txt").read_text()


def test_two_judges_and_their_agreement(serve, tmp_path, capsys):  # noqa: F811
    said = {"He smiles.": "happy", "She weeps.": "sad", "A wall.": "none"}
    api = serve(lambda prompt, times: good(said[reason(prompt)]))
    rows = [("1", "He smiles.", "happy", "happy"), ("2", "She weeps.", "sad", "fear"), ("3", "A wall.", "sad", "sad")]
    path = write(tmp_path / "p.jsonl", "".join(json.dumps({
        "video_id": i, "output": f"<think>{text}</think><answer>{answer}</answer>", "ground_truth": truth,
        "dataset": "dfew"}) + "\n" for i, text, answer, truth in rows))
    command = ["--predictions", path, "--judge", "openai:gpt-4.1-mini", "--judge", "lexicon", "--out",
               f"{tmp_path}/out"]
    evaluate.main(command)
    metrics = read_json(tmp_path / "out" / "metrics.json")
    hosted = metrics["judges"]["openai:gpt-4.1-mini"]["dfew"]
    # by hand: EEA 1 of 3 (row 1), EPC rows 1 and 2, FCR row 1, WAR rows 1 and 3; "none" is outside, not neutral
    assert [round(hosted[m], 2) for m in ("EEA", "FCR", "EPC", "WAR")] == [33.33, 33.33, 66.67, 66.67]
    assert hosted["judge_outside"] == 1 and hosted["judge_errors"] == 0
    agreed = metrics["agreement"]["dfew"]["openai:gpt-4.1-mini and lexicon"]
    assert (agreed["n"], agreed["left_out"], agreed["accuracy"]) == (2, 1, 1.0)
    assert [r["judge_status"] for r in read_jsonl(tmp_path / "out" / "judged-1.jsonl")] == ["ok", "ok", "outside"]
    assert "the judges agree on 100.0% of 2 explanations" in capsys.readouterr().out
    evaluate.main(command)  # again: everything is in the cache
    assert set(api.asked.values()) == {1}
    assert "right answers with an incoherent explanation (1 - FCR/WAR) 50.00" in capsys.readouterr().out
    evaluate.main(["--predictions", path, "--judge", "lexicon", "--out", f"{tmp_path}/out"])
    assert [p.name for p in (tmp_path / "out").glob("judged-*")] == ["judged-1.jsonl"]  # no second judge's, from before


def test_an_unreachable_judge_is_no_table_of_zeros(tmp_path, monkeypatch):
    monkeypatch.setenv("ERV_JUDGE_BASE_URL", "http://127.0.0.1:9/v1")  # nobody listens there
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setattr("erv_min.base.chat.BACKOFF", 0.01)
    rows = [{"video_id": str(i), "output": f"<think>{i}</think><answer>sad</answer>", "ground_truth": "sad",
             "dataset": "dfew"} for i in range(3)]
    path = write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(JudgeError, match="nothing more can be asked of http://127.0.0.1:9/v1: .*[Cc]onnect"):
        evaluate.main(["--predictions", path, "--judge", "openai:m", "--out", f"{tmp_path}/out"])
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("script, options, told", [
    (evaluate, ["--limit", "-3"], "--limit must be at least 0"),
    (evaluate, ["--batch-size", "0"], "--batch-size must be"),
    (evaluate, ["--max-new-tokens", "0"], "--max-new-tokens must be"),
    (evaluate, ["--bootstrap", "-5"], "--bootstrap must be"),
    (evaluate, ["--workers", "-1"], "--workers must be"), (evaluate, ["--concurrency", "0"], "--concurrency must be"),
    (evaluate, ["--predict", "x"], "unrecognized arguments: --predict"),
    (infer, ["clip.mp4", "--max-new-tokens", "0"], "--max-new-tokens must be"),
    (infer, ["clip.mp4", "--max-new", "5"], "unrecognized arguments: --max-new"),
    (augment, ["describe", "--batch-size", "0"], "--batch-size must be"),
    (augment, [*"label --input a --out b --ask openai:m --concurrency 0".split()], "--concurrency must be"),
    (augment, [*"complement --input a --out b --ask openai:m --per-class -1".split()], "--per-class must be"),
    (augment, ["label", "--out", "b", "--ask", "openai:m"], "label needs --input"),
    (augment, ["stats", "--inp", "a"], "unrecognized arguments: --inp"),
])
def test_a_wrong_option_is_one_line_before_anything_is_loaded(script, options, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(options)
    assert stopped.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]


def test_answers_without_explanations_are_judged_by_two_as_well(tmp_path, capsys):
    rows = [{"video_id": str(i), "output": f"<think></think><answer>{answer}</answer>", "ground_truth": "sad",
             "dataset": "dfew"} for i, answer in enumerate(("sad", "happy"))]
    path = write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(["--predictions", path, "--judge", "lexicon", "--judge", "paraphrases", "--out", f"{tmp_path}/out"])
    printed = capsys.readouterr().out
    assert "lexicon and paraphrases: the judges agree on - of 0 explanations, kappa - (2 left out)" in printed
    found = read_json(tmp_path / "out" / "metrics.json")["judges"]["lexicon"]["dfew"]
    assert (found["WAR"], found["EEA"], found["FCR"]) == (50, 0, 0)


def test_too_many_missing_predictions(tmp_path):
    golden_files(tmp_path, "DFEW")
    text = (tmp_path / "results.txt").read_text()
    write(tmp_path / "results.txt", text[text.index("10100.mp4|"):])
    command = ["--predictions", f"{tmp_path}/results.txt", "--data", f"dfew:{tmp_path}", "--out", f"{tmp_path}/out"]
    with pytest.raises(DataError, match="100 of 300 clips have no prediction .*, the first: 10000"):
        evaluate.main(command)
    evaluate.main([*command, "--allow-missing", "0.5"])
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert len(metrics["missing"]) == 100 and metrics["judges"]["no judge"]["dfew"]["EEA"] is None
    for wrong in (["--out", "x"], ["--model", "m"], ["--model", "m", "--predictions", command[1]]):
        with pytest.raises((SettingsError, SystemExit)):
            evaluate.main(wrong)


# ---------------------------------------------------------------------------------------------------- a model

@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A world of 16 clips, and a model of the toy's dimensions with random weights in `model/`."""
    folder = tmp_path_factory.mktemp("world")
    build_world(folder,
                WorldSettings(train=8, test=6, pretrain=2, sft_clips=4, resamples=1, erv_train=60, erv_valid=10),
                workers=1)
    config = humanomni("toy")
    lm = json.loads((folder / "tokenizers" / "lm" / "tokenizer.json").read_text())
    size = len(lm["model"]["vocab"]) + len(lm["added_tokens"])
    model = HumanOmni(replace(config, text=replace(config.text, vocab_size=size)))
    init_weights(model, 0)
    save_humanomni(model, folder / "model")
    for path in (folder / "tokenizers" / "lm").iterdir():
        shutil.copy(path, folder / "model")
    shutil.copytree(folder / "tokenizers" / "text_gate", folder / "model" / "text_gate", dirs_exist_ok=True)
    return folder


def run_model(world: Path, out: Path, *options: str) -> list[dict]:
    evaluate.main(["--model", str(world / "model"), "--data", f"toy:{world}", "--out", str(out), "--max-new-tokens",
                   "12",
                   "--device", "cpu", "--bootstrap", "0", *options])
    return [{k: v for k, v in row.items() if k != "chunk"} for row in read_jsonl(out / "predictions.jsonl")]


def test_evaluates_a_model_and_resumes(world, tmp_path, monkeypatch):
    rows = run_model(world, tmp_path / "whole")
    metrics = read_json(tmp_path / "whole" / "metrics.json")
    assert len(rows) == 6 and metrics["judges"]["lexicon"]["dfew"]["n"] == 6
    assert {row["ground_truth"] for row in rows} <= set(metrics["judges"]["lexicon"]["dfew"]["labels"])
    assert run_model(world, tmp_path / "batched", "--batch-size", "5", "--workers", "0") == rows
    with pytest.raises(SettingsError, match="already exists: give --resume"):
        run_model(world, tmp_path / "whole")
    with monkeypatch.context() as patch:  # told before the weights are read
        patch.setattr(predictions, "load_collator", lambda *_: pytest.fail("the model was read"))
        with pytest.raises(SettingsError, match="predictions.json: .* with other values of temperature; give another"):
            run_model(world, tmp_path / "whole", "--resume", "--temperature", "0")
    assert run_model(world, tmp_path / "whole", "--resume") == rows
    shutil.copytree(world / "model", tmp_path / "model")
    model = load_humanomni(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[-1, -1] += 1e-3
    save_humanomni(model, world / "model")  # trained further, into the same folder
    try:
        with pytest.raises(SettingsError, match="with other values of weights; give another --out"):
            run_model(world, tmp_path / "whole", "--resume")
    finally:
        save_humanomni(load_humanomni(tmp_path / "model"), world / "model")

    chunked = evaluate.predict_to_file
    monkeypatch.setattr(evaluate, "predict_to_file", lambda *args, **kwargs: chunked(*args, chunk=2, **kwargs))
    rows = run_model(world, tmp_path / "chunks")
    real, calls = predictions.predict, []

    def stops_in_the_third_chunk(*args, **kwargs):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(predictions, "predict", stops_in_the_third_chunk)
    with pytest.raises(KeyboardInterrupt):
        run_model(world, tmp_path / "stopped")
    path = tmp_path / "stopped" / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))  # the second chunk is cut, too
    assert run_model(world, tmp_path / "stopped", "--resume") == rows
    assert [len(part) for part in calls] == [2, 2, 2, 2, 2]  # the first chunk was not computed again


def test_the_same_clips_mute_or_black(world, tmp_path, monkeypatch):
    """One modality's features change, the other's stay."""
    example, features, seen = load_examples(f"toy:{world}", "test")[0], Collator.features, []
    policy = predictions.load_policy(predictions.AnswerSettings(model=str(world / "model"), device="cpu"))
    monkeypatch.setattr(Collator, "features", lambda self, x: seen.append(features(self, x)) or seen[-1])
    settings = predictions.AnswerSettings(max_new_tokens=1, workers=0)
    for without in ("", "audio", "video", ""):
        assert len(list(predictions.outputs(policy, [example], [0], replace(settings, without=without)))) == 1
    assert [[torch.equal(*pair) for pair in zip(other, seen[0])] for other in seen[1:]] == [
        [True, False], [False, True], [True, True]]
    with pytest.raises(SettingsError, match="--without audio: with --modality video there is none"):
        next(predictions.outputs(policy, [example], [0], replace(settings, without="audio", modality="video")))

    assert len(run_model(world, tmp_path / "mute", "--without", "audio")) == 6
    with pytest.raises(SettingsError, match="predictions.json: .* other values of without"):
        run_model(world, tmp_path / "mute", "--without", "video", "--resume")
    with pytest.raises(SettingsError, match="--without and --think need --model"):
        evaluate.main(["--predictions", str(tmp_path / "mute/predictions.jsonl"), "--without", "audio"])


def test_answers_after_a_changed_explanation(world, tmp_path, monkeypatch, capsys):
    """What the policy is given and what is counted, by hand: a policy that answers happy where it reads "smiles"."""
    numbers, given = [x.video_id for x in load_examples(f"toy:{world}", "test")], []
    said = [("He smiles.", "happy"), ("She smiles.", "happy"), ("He weeps.", "sad"), ("", "sad"), ("A.", "odd"),
            ("She weeps.", "happy")]  # the last one's answer does not follow its explanation; two have not both

    def answers(collate, examples, processes, settings, batch_size=8, progress=""):
        given.extend((x.video_id, x.begun) for x in examples)
        assert settings.temperature == 0 and settings.without == "audio"
        return [{"output": f"{x.begun}>{'happy' if 'smiles' in x.begun else 'sad'}</answer>"} for x in examples], []

    for way in ("cut", "exchange"):
        out, given[:] = tmp_path / way, []
        run_model(world, out, "--without", "audio")
        write(out / "predictions.jsonl", "".join(json.dumps({
            "video_id": number, "output": f"<think>{text}</think>\n<answer>{answer}</answer>", "ground_truth": "sad",
            "dataset": "dfew", "chunk": 0}) + "\n" for number, (text, answer) in zip(numbers, said)))
        with monkeypatch.context() as patch:
            patch.setattr(predictions, "predict", answers)
            run_model(world, out, "--without", "audio", "--think", way, "--resume")
        result, kept = read_json(out / "metrics.json")["think"]["dfew"], read_jsonl(out / "think.jsonl")
        four = [numbers[i] for i in (0, 1, 2, 5)]
        assert [row["video_id"] for row in kept] == four and [number for number, _ in given] == four * 2
        assert [row["answer"] for row in kept] == ["happy", "happy", "sad", "sad"]  # after the own explanation
        if way == "cut":  # none smiles any more
            assert {begun for _, begun in given[4:]} == {"<think></think>\n<answer"}
            assert result == {"n": 4, "moved": 0.5, "left_out": 2}
            assert "50.0% of 4 answers move after no explanation; 2 clips left out" in capsys.readouterr().out
        else:  # 0 and 1 get "He weeps.", 2 and the last, whose next ones are these, "She weeps." and "He weeps."
            assert [row["explanation_of"] for row in kept] == [numbers[i] for i in (2, 2, 5, 2)]
            assert given[6] == (numbers[2], "<think>She weeps.</think>\n<answer")
            assert result == {"n": 4, "moved": 0.5, "followed": 0.75, "left_out": 2}
            assert "4 answers move after another clip's explanation (75.0% to its" in capsys.readouterr().out


def test_an_answer_goes_on_after_its_beginning_whatever_the_batch(world):
    policy = predictions.load_policy(predictions.AnswerSettings(model=str(world / "model"), device="cpu"))
    settings = predictions.PredictionSettings(batch_size=1, workers=0)
    examples = load_examples(f"toy:{world}", "test")[:3]
    texts = ["He smiles.", "", "A woman is in the garden. The voice is thin and shaky."]
    alone = Processes(0, 1, torch.device("cpu"))
    said = predictions.answers_after(policy, examples, texts, alone, settings)
    assert said == predictions.answers_after(policy, examples, texts, alone, replace(settings, batch_size=3))
    assert all(x.startswith(f"<think>{text}</think>\n<answer") and len(x) > len(text) + 24 for x, text in zip(said, texts))
    ids = policy([Inputs(replace(examples[0], begun="<think>He"), None, (None, None))]).input_ids[0].tolist()
    assert ids == policy.text(examples[0])[0] + policy.tokenizer.encode("<think>He")


def test_sentences_of_a_world_are_counted(world, tmp_path, capsys):
    clips = {str(clip["number"]): clip for clip in read_jsonl(world / "params.jsonl") if clip["split"] == "test"}
    calm, cross = CUES["voice"]["neutral"][0], CUES["voice"]["angry"][0]  # "The voice is even." and so on: of nobody
    said = f"<think>{calm} {cross} The grammar lacks this.</think>"
    path = write(tmp_path / "p.jsonl", "".join(json.dumps({"video_id": number, "output": said}) + "\n"
                                               for number in clips))
    evaluate.main(["--predictions", path, "--data", f"toy:{world}", "--out", str(tmp_path), "--bootstrap", "0"])
    true = sum(clip["voice_shows"] in ("neutral", "angry") for clip in clips.values()) / 6
    assert read_json(tmp_path / "metrics.json")["sentences"] == {
        "sentences": 3, "formed": 2, "cues": 2, "true": true}
    assert f"2.00 about face or voice, {true:.2f} true of the clip" in capsys.readouterr().out


def test_undecodable_and_missing_clips_are_listed(world, tmp_path):
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    test = load_examples(f"toy:{copy}", "test")
    test[1].path.write_bytes(b"not a clip")
    test[2].path.unlink()
    with pytest.raises(DataError, match="1 of 6 clips are missing"):
        run_model(copy, tmp_path / "out")
    with pytest.raises(DataError, match="2 of 6 clips are missing or cannot be decoded .1: .*failed_clips.jsonl; --resume"):
        run_model(copy, tmp_path / "out", "--allow-missing", "0.2")
    assert not (tmp_path / "out" / "metrics.json").exists()
    rows = run_model(copy, tmp_path / "out", "--allow-missing", "0.4", "--resume")
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert len(rows) == 4 and metrics["missing"] == [test[2].video_id] and test[1].path.name in metrics["failed"][0]
    assert (tmp_path / "out" / "missing_clips.txt").read_text() == f"{test[2].path}\n"
    for example in test[:2] + test[3:]:
        example.path.write_bytes(b"not a clip")
    with pytest.raises(DataError, match="6 of 6 clips are missing or cannot be decoded"):  # nothing is left
        run_model(copy, tmp_path / "none", "--allow-missing", "1")


def test_a_wrong_judge_is_told_before_the_predictions_begin(world, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for judge, told in (("openai:gpt-4.1-mini", "OPENAI_API_KEY"), ("oracle", "expected openai:MODEL")):
        with pytest.raises(JudgeError, match=told):
            run_model(world, tmp_path / "out", "--judge", judge)
        assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_augment_describes_training_clips(world, tmp_path):
    command = ["describe", "--model", str(world / "model"), "--data", f"toy:{world}", "--out", str(tmp_path / "raw"),
               "--max-new-tokens", "8", "--device", "cpu", "--workers", "0"]
    with pytest.raises(DataError, match="none of 8 answers can be used"):  # random weights write no <think>
        augment.main(command)
    assert len(read_jsonl(tmp_path / "raw" / "predictions.jsonl")) == 8
    rejected = read_jsonl(tmp_path / "raw" / "descriptions.rejected.jsonl")
    assert rejected[0]["split"] == "train" and rejected[0]["raw"]
    overlap = tmp_path / "overlap"
    shutil.copytree(world, overlap)
    shutil.copy(overlap / "single_testset_5.csv", overlap / "single_trainset_5.csv")
    with pytest.raises(DataError, match="6 clips are in training and test data"):
        augment.main(["describe", "--model", "m", "--data", f"dfew:{overlap}", "--out", str(tmp_path / "o")])


# ---------------------------------------------------------------------------------------- held-out clips while training

def test_what_is_watched_by_hand(world, monkeypatch):
    """Of 3 and 1 clips of two data sets EEA holds in 2 and 1, EPC in 1 and 0: 75% and 25% of the four."""
    rows = [{"video_id": f"{i}", "output": f"<think>{said}</think><answer>{answer}</answer>", "ground_truth": "sad",
             "dataset": dataset} for i, (said, answer, dataset) in enumerate([
                 ("sad", "sad", "dfew"), ("sad", "happy", "dfew"), ("fear", "sad", "dfew"), ("sad", "fear", "mafw")])]
    asked, policy = [], SimpleNamespace(unsharded=contextlib.nullcontext)
    monkeypatch.setattr(hooks, "predict", lambda *given: asked.append(given) or ([dict(x) for x in rows], []))
    settings = GRPOSettings(seed=3, eval_temperature=0.7, max_new_tokens=9, batch_size=10, watch_every=2, world=str(world))
    for rank, expected in ((0, {"held_out_EEA": 75, "held_out_EPC": 25}), (1, {})):
        held_out = hooks.HeldOut(settings, Processes(rank, 2, torch.device("cpu")))
        held_out.judge = lambda texts, labels: [Judgement(text, "ok") for text in texts]
        assert held_out(policy, None, 4) == expected and held_out(policy, None, 5) == {}
    how, batch_size = asked[0][3:]
    assert len(asked) == 2 and batch_size == 5
    assert (how.seed, how.temperature, how.max_new_tokens) == (3 + 2**32, 0.7, 9)  # no noise of the training's


def test_which_clips_are_watched_and_who_judges(world, tmp_path):
    def start(**given):
        return hooks.HeldOut(GRPOSettings(world=str(world), **given), Processes(0, 1, torch.device("cpu")))

    (tmp_path / "clip").mkdir()
    (tmp_path / "single_testset_5.csv").write_text("video_name,label\n" + "".join(f"{i},1\n" for i in range(160)))
    for i in range(160):
        (tmp_path / "clip" / f"{i}.mp4").touch()
    assert len(start(watch_every=5).examples) == 6
    assert start(watch_every=5).judge(["She weeps."], ("sad",))[0].emotion == "sad"
    assert start(watch_every=0).examples == []
    shutil.copytree(world / "tokenizers" / "erv", tmp_path / "erv")
    save_erv(scratch("toy", 512, 11), tmp_path / "erv", ERV_LABELS)
    found = start(watch_every=5, data=f"dfew:{tmp_path}", watch_erv=str(tmp_path / "erv"), preset="paper-0.5b")
    assert [x.video_id for x in found.examples[:5]] == ["0", "2", "5", "7", "10"] and len(found.examples) == 64
    assert found.judge(["She weeps."], ("sad",))[0].emotion == "sad"  # the best of one label
    with pytest.raises(SettingsError, match="--watch-every 5: name a judge, --watch-erv"):
        start(watch_every=5, data=f"dfew:{tmp_path}")


# ---------------------------------------------------------------------------------------------------- one clip

def test_infer_one_clip_a_folder_and_a_list(world, tmp_path, capsys):
    clip = load_examples(f"toy:{world}", "test")[0].path
    options = ["--model", str(world / "model"), "--max-new-tokens", "6", "--device", "cpu", "--json"]
    infer.main([str(clip), *options])
    first = json.loads(capsys.readouterr().out)
    assert set(first) == {"clip", "emotion", "explanation", "output"} and first["clip"] == str(clip)
    listed = write(tmp_path / "list.txt", f"{clip}\n")
    for modality in ("video", "audio"):
        infer.main([listed, *options, "--modality", modality, "--question", "What does the person feel?"])
        assert json.loads(capsys.readouterr().out)["clip"] == str(clip)
    (tmp_path / "bad.mp4").write_bytes(b"x")
    with pytest.raises(SystemExit, match="1 of 2 clips could not be decoded"):
        infer.main([str(clip), str(tmp_path / "bad.mp4"), *options])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["output"] == first["output"] and "bad.mp4" in shown.err
    write(tmp_path / "._bad.mp4", "of macOS")
    (tmp_path / "00001").mkdir()
    write(tmp_path / "00001" / "1.jpg", "a frame")
    assert [p.name for p in infer.find_clips([str(tmp_path)])] == ["00001", "bad.mp4"]
    assert infer.find_clips([str(tmp_path / "00001")]) == [tmp_path / "00001"]
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DataError, match="list.txt: no clip is named there"):
        infer.main([listed, *options])
    with pytest.raises(DataError, match="verifier"):
        infer.main([str(clip), *options, "--explain-reward", "bored", "--erv", "x"])
    with pytest.raises(SettingsError, match="go together"):
        infer.main([str(clip), *options, "--explain-reward", "happy"])


def test_one_clip_in_five_lines_of_python(world, tmp_path, capsys):
    """The lines that the README shows, and infer.py's answer."""
    clip = load_examples(f"toy:{world}", "test")[0].path
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    lines = re.search(r"```python\n(from erv_min.train.answers.*?)```", readme, re.S)[1].splitlines()
    code = "\n".join(lines).replace("clip.mp4", str(clip)).replace(
        '"runs/toy/sft"', f'"{world}/model", max_new_tokens=6, device="cpu"')
    found = {}
    exec(code, found)
    said, printed = found["said"], capsys.readouterr().out.splitlines()[-1]
    infer.main([str(clip), "--model", str(world / "model"), "--max-new-tokens", "6", "--device", "cpu", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert said == predictions.Answer(shown["explanation"], shown["emotion"], shown["output"])
    assert len(lines) == 5 and printed == f"{said.emotion} {said.explanation}" and said.text
    (tmp_path / "bad.mp4").write_bytes(b"x")
    with pytest.raises(ClipError, match="bad.mp4"):
        predictions.answer(found["policy"], tmp_path / "bad.mp4", found["settings"])
    with pytest.raises(SettingsError, match="--max-new-tokens"):
        predictions.load_policy(predictions.AnswerSettings(model="x", max_new_tokens=0))


def test_infer_into_a_closed_pipe(world):
    clips = [example.path for example in load_examples(f"toy:{world}", "test")[:2]]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/infer.py"), *map(str, clips), "--model", str(world / "model"),
         "--max-new-tokens", "40", "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout.readline().startswith(b"== ")
    process.stdout.close()  # as `| head -1` does
    assert b"Traceback" not in process.stderr.read() and process.wait() == 1


def test_an_answer_with_letters_that_the_terminal_lacks(world, monkeypatch):
    clip = load_examples(f"toy:{world}", "test")[0].path
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    said = predictions.Answer("Größe", "sad", "<think>Größe</think>")
    monkeypatch.setattr(infer, "answers", lambda *args: iter([said]))
    infer.main([str(clip), "--model", str(world / "model"), "--device", "cpu"])
    terminal.flush()
    assert terminal.buffer.getvalue() == b"<think>Gr\\xf6\\xdfe</think>\n"


def test_explained_reward_by_hand():
    class Verifier:
        labels = ("happiness", "neutral", "fear")

        def probabilities(self, sentences):
            table = {"He smiles.": [.9, .1, .6], "A wall.": [.1, .8, .1], "She shakes.": [.1, .2, .3]}
            return torch.tensor([table[s] for s in sentences])

    result = infer.explain_reward("<think>He smiles. A wall. She shakes.</think><answer>happy</answer>", "happy",
                                  Verifier(),
                                  RewardSettings())
    # {happiness, fear}, {neutral}, {fear} (best, none over 0.5): c = 1, N = 3, N_neu = 1 -> 1 / 2
    assert result["R_E"] == 0.5
    assert [s["labels"] for s in result["sentences"]] == [{"happiness": .9, "fear": .6}, {"neutral": .8}, {"fear": .3}]


def test_stream_prints_each_character_once(capsys):
    class Bytes:  # a tokenizer whose tokens are bytes: a character may take two
        def decode(self, ids, skip_special):
            return bytes(ids).decode("utf-8", errors="replace")

    stream = infer.Stream(Bytes())
    for byte in "Größe, <think>".encode():
        stream(torch.tensor([byte]))
    assert capsys.readouterr().out == "Größe, <think>"
