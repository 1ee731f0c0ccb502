"""The verifier's training data (section 3.2, appendix B) against a local server: figures 6 and 7, table 5."""

import json
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import augment  # noqa: E402
from test_judge import bad, good, reason, serve  # noqa: E402, F401  (serve is a fixture)

from erv_min.base.chat import ChatClient
from erv_min.base.errors import DataError
from erv_min.base.files import append_jsonl, read_jsonl, write_jsonl
from erv_min.inputs import Example

MAFW = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise", "contempt", "anxiety",
        "helplessness",
        "disappointment")


def client(cache) -> ChatClient:
    return ChatClient("openai:gpt-4.1", cache)


def rows_of(*texts: str, **fields) -> list[dict]:
    return [{"text": text, "source": "dfew", "clip": f"dfew/{i}", "split": "train", **fields} for i,
            text in enumerate(texts)]


@pytest.mark.parametrize("raw, labels", [
    ("anger", ["anger"]), ("Anger, Sadness.", ["anger", "sadness"]), ("anger and fear", ["anger", "fear"]),
    ("happy", ["happiness"]), ("anger, anger", ["anger"]), ("anger, sadness, fear", []), ("anger, content", []),
    ("", []),
    ("I cannot say.", []),
])
def test_answers_of_figure_6(raw, labels):
    assert augment.read_labels(raw) == labels


def test_label_keeps_raw_answers_rejects_and_removes_repeats(serve, tmp_path):  # noqa: F811
    answers = {"He shouts.": "anger", "She weeps,  alone.": "sadness, helplessness", "A wall.": "none of these",
               "Oops.": None}
    api = serve(lambda prompt, times: good(answers[reason(prompt)]) if answers[reason(prompt)] else bad(400))
    rows = rows_of("He shouts.", "She weeps,  alone.", "she WEEPS, alone.", "A wall.", "Oops.", raw="<think>..",
                   model="r1")
    kept, rejected = augment.labelled(rows, client(tmp_path / "cache.jsonl"), seed=3)
    assert [(row["text"], row["labels"]) for row in kept] == [
        ("He shouts.", ["anger"]), ("She weeps,  alone.", ["sadness", "helplessness"])]
    assert kept[1] | {"raw": "sadness, helplessness", "description_raw": "<think>..", "described_by": "r1",
                      "model": "openai:gpt-4.1", "prompt": "figure 6", "seed": 3, "clip": "dfew/1"} == kept[1]
    assert [row["text"] for row in rejected] == ["A wall.", "Oops."] and rejected[0]["raw"] == "none of these"
    prompt = next(iter(api.asked))
    assert "If necessary, output up to 2 dominant emotions, separated by commas." in prompt
    listed = [tuple(re.search(r"emotion in (.*?)\. Primarily", p).group(1).split(", ")) for p in api.asked]
    assert all(sorted(order) == sorted(MAFW) for order in listed) and len(set(listed)) > 1  # permuted, item by item


def test_label_command_stops_resumes_and_never_asks_twice(serve, tmp_path, monkeypatch, capsys):  # noqa: F811
    def behave(prompt, times):
        time.sleep(0.005)
        return good("fear")

    api = serve(behave)
    write_jsonl(tmp_path / "raw.jsonl", rows_of(*(f"Text {i}." for i in range(150))))
    command = ["label", "--input", str(tmp_path / "raw.jsonl"), "--ask", "openai:gpt-4.1", "--out",
               str(tmp_path / "out.jsonl"),
               "--concurrency", "4"]

    def keep_and_stop(path, row):
        append_jsonl(path, row)
        if len(read_jsonl(path)) >= 60:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("erv_min.base.chat.append_jsonl", keep_and_stop)
        with pytest.raises(KeyboardInterrupt):
            augment.main(command)
    assert not (tmp_path / "out.jsonl").exists() and 60 <= sum(api.asked.values()) < 150
    augment.main(command)
    assert set(api.asked.values()) == {1} and len(api.asked) == 150
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert len(rows) == 150 and {tuple(row["labels"]) for row in rows} == {("fear",)}
    assert "150 rows, 0 rejected" in capsys.readouterr().out


def test_a_row_without_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    for text in ("NaN", "null", '"nan"', '" "'):
        (tmp_path / "raw.jsonl").write_text(f'{{"text": {text}}}\n')
        with pytest.raises(DataError, match="row 1: no text in field text"):
            augment.main(["label", "--input", str(tmp_path / "raw.jsonl"), "--ask", "openai:m", "--out",
                          str(tmp_path / "o")])


def test_test_clips_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    write_jsonl(tmp_path / "raw.jsonl", rows_of("a", "b", split="test"))
    for step in ("label", "complement"):
        with pytest.raises(DataError, match="raw.jsonl, row 1: clip dfew/0 is of a test split"):
            augment.main([step, "--input", str(tmp_path / "raw.jsonl"), "--ask", "openai:m", "--out",
                          str(tmp_path / "o")])


@pytest.mark.parametrize("rows, message", [
    ([], "no description in it"), ([3], "line 1: not a JSON object"), ([{"text": 3}], "row 1: no text"),
    ([{"text": "a"}, {"text": " "}], "row 2: no text")])
def test_label_names_the_row_without_text(tmp_path, monkeypatch, rows, message):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    write_jsonl(tmp_path / "raw.jsonl", rows)
    with pytest.raises(DataError, match=f"raw.jsonl.*{message}"):
        augment.main(["label", "--input", str(tmp_path / "raw.jsonl"), "--ask", "openai:m", "--out", str(tmp_path / "o")])


def test_no_result_is_an_error(serve, tmp_path, monkeypatch):  # noqa: F811
    """No answer that can be used, no description in any output, no clip that can be decoded: what there is is kept."""
    serve(lambda prompt, times: good("bored"))
    write_jsonl(tmp_path / "raw.jsonl", rows_of("a", "b"))
    with pytest.raises(DataError, match="none of 2 answers can be used.*o.rejected.jsonl"):
        augment.main(["label", "--input", str(tmp_path / "raw.jsonl"), "--ask", "openai:m", "--out", str(tmp_path / "o")])
    assert len(read_jsonl(tmp_path / "o.rejected.jsonl")) == 2
    clips = [Example(str(n), tmp_path / f"{n}.mp4", "sad", "emer", split="train") for n in range(2)]
    for clip in clips:
        clip.path.touch()
    monkeypatch.setattr(augment, "load_examples", lambda *_: clips)
    monkeypatch.setattr(augment, "check_names", lambda _: None)
    row = {"video_id": "0", "dataset": "emer", "ground_truth": "sad", "output": "<answer>sad</answer>"}
    for found, message in ((([row, row], [], None), "none of 2 answers can be used.*descriptions.rejected.jsonl"),
                           (([], ["0.mp4: broken", "1.mp4: broken"], None), "2 of 2 clips cannot be decoded.*0.mp4: broken")):
        monkeypatch.setattr(augment, "predict_to_file", lambda *_: found)
        with pytest.raises(DataError, match=message):
            augment.main(["describe", "--model", str(tmp_path), "--data", f"emer:{tmp_path}", "--out", str(tmp_path / "d"),
                          "--allow-missing", "1"])


def pool() -> list[dict]:
    rows = rows_of(*(f"Disgust {i}." for i in range(3)), labels=["disgust"], prompt="figure 6")
    rows += rows_of("Fear 0.", "Fear 1.", labels=["fear", "anxiety"], prompt="figure 6")
    return rows + rows_of("Human fear.", labels=["fear"])


def test_complement_fills_up_to_the_target_with_two_random_examples():
    plan = augment.complement_plan(pool(), 5, ("disgust", "fear"), seed=0)
    assert Counter(emotion for emotion, *_ in plan) == {"disgust": 2, "fear": 2}  # 3 + 2 = 5 and 3 + 2 = 5
    for emotion, examples, _ in plan:
        assert len(set(examples)) == 2 and all(text.lower().startswith(emotion) for text in examples), "no human one"
    assert len({seed for *_, seed in plan}) == 4
    assert plan == augment.complement_plan(pool()[::-1], 5, ("disgust", "fear"), seed=0)
    pairs = {tuple(examples) for _, examples, _ in augment.complement_plan(pool(), 60, ("disgust",), seed=0)}
    assert len(pairs) == 6  # of 3 texts, in both orders
    spelled = [row | {"labels": ["afraid", "fear"]} if "fear" in row["labels"] else row for row in pool()]
    assert augment.complement_plan(spelled, 5, ("disgust", "fear"), seed=0) == plan  # other words of the same emotion
    with pytest.raises(DataError, match="holds 0 descriptions of contempt"):
        augment.complement_plan(pool(), 5, ("contempt",), seed=0)


def test_complement_command(serve, tmp_path, capsys):  # noqa: F811
    def behave(prompt, times):
        emotion = prompt.rsplit("Target Emotion: ", 1)[1]
        draw = api.bodies[-1]["seed"]
        return good("Fear 1." if emotion == "fear" else f"Target Emotion: Disgust\nA new text, number {draw}.")

    api = serve(behave)
    write_jsonl(tmp_path / "pool.jsonl", pool())
    out = tmp_path / "more.jsonl"
    augment.main(["complement", "--input", str(tmp_path / "pool.jsonl"), "--ask", "openai:gpt-4.1-mini", "--out",
                  str(out),
                  "--per-class", "5", "--classes", "disgust,fear", "--concurrency", "1"])
    rows, rejected = read_jsonl(out), read_jsonl(f"{out}.rejected.jsonl")
    assert [row["labels"] for row in rows] == [["disgust"]] * 2
    assert all(row["text"].startswith("A new text") for row in rows)
    assert rows[0]["source"] == "complement" and rows[0]["prompt"] == "figure 7" and len(rows[0]["examples"]) == 2
    assert rows[0]["raw"].startswith("Target Emotion: Disgust") and rows[0]["seed"] == api.bodies[0]["seed"]
    assert [row["text"] for row in rejected] == ["Fear 1."] * 2  # already in the data
    assert api.bodies[0]["temperature"] == 1.0
    prompt = api.bodies[0]["messages"][0]["content"]
    assert prompt.count("(Target Emotion: disgust)") == 2 and prompt.endswith("Target Emotion: disgust")
    assert "2 rows, 2 rejected" in capsys.readouterr().out
    asked = sum(api.asked.values())
    augment.main(["complement", "--input", str(tmp_path / "pool.jsonl"), "--ask", "openai:gpt-4.1-mini", "--out",
                  str(out),
                  "--per-class", "5", "--classes", "disgust,fear"])
    assert sum(api.asked.values()) == asked and read_jsonl(out) == rows
    assert "0 requests (4 answered or repeated)" in capsys.readouterr().out


def test_a_description_that_was_cut_at_its_limit_is_no_row(serve, tmp_path):  # noqa: F811
    serve(lambda prompt, times: good("She is disgusted by the", "length" if prompt.endswith("disgust") else "stop"))
    write_jsonl(tmp_path / "pool.jsonl", pool())
    augment.main(["complement", "--input", str(tmp_path / "pool.jsonl"), "--ask", "openai:m", "--out",
                  str(tmp_path / "o"), "--per-class", "4", "--classes", "disgust,fear"])
    assert [row["labels"] for row in read_jsonl(tmp_path / "o")] == [["fear"]]
    (cut,) = read_jsonl(tmp_path / "o.rejected.jsonl")
    assert cut["labels"] == ["disgust"] and "cut" in cut["raw"]


def test_annotated_leaves_doubt_out_and_stats_count_labels(tmp_path, capsys):
    examples = [Example("a", Path("a"), "worried", "emer", "Her voice shakes."),
                Example("b", Path("b"), "doubt", "merr", "Hm."),
                Example("c", Path("c"), "angry", "merr", "He shouts."), Example("d", Path("d"), "angry", "merr")]
    rows, left = augment.annotated(examples)
    assert [(row["text"], row["labels"], row["source"], row["clip"]) for row in rows] == [
        ("Her voice shakes.", ["anxiety"], "emer", "emer/a"), ("He shouts.", ["anger"], "merr", "merr/c")]
    assert left == {"doubt": 1, "without a description": 1}
    write_jsonl(tmp_path / "rows.jsonl", rows + rows_of("x", labels=["anger", "fear"]))
    augment.main(["stats", "--input", str(tmp_path / "rows.jsonl")])
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    column = lines["source"].index("anger")
    assert (lines["merr"][column], lines["dfew"][column], lines["all"][column], lines["all"][1]) == ("1", "1", "2", "3")


def test_described_takes_the_explanation_once(tmp_path):
    rows = [{"video_id": "1", "dataset": "dfew", "ground_truth": "sad",
             "output": "<think>He weeps.</think><answer>sad</answer>"},
            {"video_id": "2", "dataset": "dfew", "ground_truth": "sad",
             "output": "<think>He weeps.</think><answer>fear</answer>"},
            {"video_id": "3", "dataset": "dfew", "ground_truth": "sad", "output": "sad"}]
    kept, empty = augment.described(rows, "r1", 7)
    assert [(row["text"], row["clip"], row["split"], row["model"], row["seed"]) for row in kept] == [
        ("He weeps.", "dfew/1", "train", "r1", 7)]
    assert [row["clip"] for row in empty] == ["dfew/3"] and json.dumps(kept)


def test_train_and_test_do_not_share_clips(tmp_path):
    *train, test = (Example(name, tmp_path / f"{name}.mp4", "sad", "dfew") for name in "129")
    augment.check_disjoint(train, [test])
    with pytest.raises(DataError, match="1 clips are in training and test data.*9.mp4"):
        augment.check_disjoint([*train, replace(test, video_id="other")], [test])  # the same file under another id
    elsewhere = [replace(train[0], path=tmp_path / "copy" / train[0].path.name)]  # the same clip in another folder
    with pytest.raises(DataError, match="1 clips are in training and test data"):
        augment.check_disjoint(train, elsewhere)
    augment.check_disjoint(train, [replace(elsewhere[0], dataset="mafw")])  # of another data set: another clip
