"""survey.py: a blind and balanced page, tables 3 and 6 by hand, problems named."""

import json
import re

import pytest
from pages_material import key_of, lines, prediction, studies, survey, truths, world  # noqa: F401

from erv_min.base.errors import DataError, SettingsError


def test_top_one_and_top_two_break_ties_by_chance():
    votes = ["sad", "sad", "fear", "fear", "happy"]
    assert [survey.top_share(votes, e, 1) for e in ("sad", "fear", "happy", "angry")] == [0.5, 0.5, 0, 0]
    assert [survey.top_share(votes, e, 2) for e in ("sad", "happy")] == [1, 0]
    assert survey.top_share(["sad", "sad", "fear", "happy"], "happy", 2) == 0.5


def test_the_page_is_blind_and_balanced(studies, truths):
    page = (studies["inside"] / "survey.html").read_text()
    _, key = key_of(studies["inside"])
    content = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert [p.name for p in studies["inside"].iterdir()] == ["survey.html"]
    assert sorted(p.name for p in (studies["beside"] / "clips").iterdir()) == [f"q0{n}.mp4" for n in range(1, 5)]
    outside = re.sub(r"data:video/mp4;base64,[^\"]+", "", page)
    assert not any(word in outside for word in ("Ours", "Theirs", "ground_truth", "judged", *truths["test"]))
    entries = key["items"].values()
    assert {e["video_id"] for e in entries} == set(truths["test"])
    assert sum(e["left"] == "Ours" for e in entries) == 2 and sum(e["emotion_of"] == "Ours" for e in entries) == 2
    for item in content["items"]:
        entry = key["items"][item["id"]]
        assert item["left"].startswith(f"{entry['left'][0]}{entry['video_id'][-1]}:") and set(item) == {
            "id", "emotion_text", "left", "right", "choices", "clip"}
        assert item["emotion_text"] == item["left" if entry["emotion_of"] == entry["left"] else "right"]


def test_only_clips_that_both_got_right_are_asked_about(truths):
    a = [prediction(i, t, "x.", t, t) for i, t in truths["test"].items()]
    b = [{**a[0], "output": "<think>x.</think><answer>none</answer>"},
         {**a[1], "judged_emotion": None, "judge_status": "outside"}, {**a[2], "output": "<answer>sad</answer>"}, a[3]]
    assert [p[0]["video_id"] for p in survey.eligible(a, b, False)] == [a[3]["video_id"]]
    assert len(survey.eligible(a, b, True)) == 3
    with pytest.raises(DataError, match="disagree about its label"):
        survey.eligible(a, [{**a[0], "ground_truth": "other"}], True)


def test_clips_of_two_data_sets_with_one_id_are_two(world, truths, tmp_path):
    """MAFW's 10004 beside DFEW's: each is asked about with its own explanations, labels and file."""
    clips = tmp_path / "mafw"
    clips.mkdir()
    (clips / "10004.webm").write_bytes(b"the MAFW clip")
    entry = {"video": "10004.webm", "conversations": [{"from": "gpt", "value": "anger"}]}
    (tmp_path / "mafw.json").write_text(json.dumps([entry]))
    rows = [prediction("10004", truths["test"]["10004"], "of DFEW.", truths["test"]["10004"], None),
            {**prediction("10004", "anger", "of MAFW.", "anger", None), "dataset": "mafw"}]
    for row in rows:
        del row["judged_emotion"]
    lines(tmp_path / "rows.jsonl", rows)
    survey.main(["make", "--first", str(tmp_path / "rows.jsonl"), "--second", str(tmp_path / "rows.jsonl"), "--clips",
                 "2", "--data", f"toy:{world},json:mafw:{tmp_path / 'mafw.json'}@{clips}", "--out",
                 str(tmp_path / "study"), "--embed-mb", "0"])
    _, key = key_of(tmp_path / "study")
    page = (tmp_path / "study" / "survey.html").read_text()
    items = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])["items"]
    assert {key["items"][x["id"]]["dataset"] for x in items} == {"dfew", "mafw"}
    for item in items:
        mafw = key["items"][item["id"]]["dataset"] == "mafw"
        assert item["left"] == item["right"] == ("of MAFW." if mafw else "of DFEW.") and ("anger" in item["choices"]) == mafw
        assert ((tmp_path / "study" / item["clip"]).read_bytes() == b"the MAFW clip") == mafw


@pytest.mark.parametrize("path, value", [
    ("items", {"q01": []}), ("items/q01", "x"), ("items/q01/judged", []), ("items/q01/judged/Ours", 3), ("systems", ["Ours"]),
    ("choices/q02", 3), ("choices", None), ("items/q02/left", "Nobody"), ("", [1])])
def test_an_edited_key_is_refused(studies, tmp_path, path, value):
    file, key = key_of(studies["inside"])
    given = json.dumps(answers(key, "Anna", {"Ours": 5, "Theirs": 3}))
    *above, last = path.split("/")
    place = key
    for name in above:
        place = place[name]
    if last:
        place[last] = value
    (tmp_path / "key.json").write_text(json.dumps(key if last else value))
    (tmp_path / "a.json").write_text(given)
    with pytest.raises(DataError, match="key.json: not the key that survey.py make wrote"):
        survey.score(str(tmp_path / "key.json"), [str(tmp_path / "a.json")])


def test_make_says_what_is_wrong(studies, world, tmp_path):
    ours = str(studies["inside"].parent / "Ours.jsonl")
    common = ["make", "--first", ours, "--second", ours, "--data", f"toy:{world}", "--out"]
    with pytest.raises(SettingsError, match="answers belong to its key"):
        survey.main([*common, str(studies["inside"])])
    with pytest.raises(SettingsError, match="--clips 9: 4 clips have"):
        survey.main([*common, str(tmp_path / "a"), "--clips", "9"])
    with pytest.raises(SettingsError, match="two different names"):
        survey.main([*common, str(tmp_path / "a"), "--names", "A,A"])
    assert not list(tmp_path.iterdir())
    row = prediction("10004", "sad", "x.", "sad", "sad")
    for number, broken in enumerate((3, {**row, "judged_emotion": 3}, {**row, "output": None})):
        lines(tmp_path / f"{number}.jsonl", [row, broken] if isinstance(broken, int) else [broken])
        with pytest.raises(DataError, match=rf"{number}.jsonl, (row|line) {1 + (number == 0)}: "):
            survey.main(["make", "--first", str(tmp_path / f"{number}.jsonl"), "--second", ours, "--data",
                         f"toy:{world}", "--out", str(tmp_path / "a")])


def answers(key: dict, rater: str, scores: dict[str, int], **changes) -> dict:
    """A rater who gives a system always the same score and always agrees with the judge."""
    given = {item: {"emotion": e["judged"][e["emotion_of"]], "left": scores[e["left"]], "right": scores[e["right"]]}
             for item, e in key["items"].items()}
    return {"survey": key["survey"], "rater": rater, "answers": given, **changes}


def test_score_by_hand_and_every_problem_named(studies, tmp_path, capsys):
    path, key = key_of(studies["inside"])
    anna, ben = answers(key, "Anna", {"Ours": 5, "Theirs": 3}), answers(key, "Ben", {"Ours": 4, "Theirs": 4})
    q1 = key["items"]["q01"]
    ben["answers"]["q01"]["left" if q1["left"] == "Ours" else "right"] = 1  # q01: Ours (5 + 1) / 2 = 3, Theirs 3.5
    files = []
    for name, content in (("a.json", anna), ("b.json", ben)):
        (tmp_path / name).write_text(json.dumps(content))
        files.append(str(tmp_path / name))
    result = survey.score(str(path), files)
    assert result["Ours"]["win rate"] == 75 and result["Theirs"]["win rate"] == 25 and result["problems"] == []
    assert result["Ours"]["mean"] == pytest.approx((3 + 3 * 4.5) / 4) and result["Theirs"]["mean"] == 3.5
    assert result["Ours"]["sd"] == pytest.approx(0.75) and result["Theirs"]["sd"] == 0
    assert result["agreement"]["both"] == {"clips": 4, "top 1": 100, "top 2": 100}
    assert result["ties"] == 0
    ben["answers"]["q01"]["left" if q1["left"] == "Theirs" else "right"] = 3  # q01: 3 and 3
    (tmp_path / "b.json").write_text(json.dumps(ben))
    assert survey.score(str(path), files)["Ours"]["win rate"] == 87.5  # three clips and half of one

    cara = answers(key, "Cara", {"Ours": 5, "Theirs": 5})
    cara["answers"]["q02"] = {"emotion": "bored", "left": 6}
    cara["answers"]["q99"] = {}
    del cara["answers"]["q03"]
    for name, content in (("c.json", cara), ("again.json", anna), ("other.json", {**ben, "survey": "zzz"})):
        (tmp_path / name).write_text(json.dumps(content))
        files.append(str(tmp_path / name))
    (tmp_path / "cut.json").write_text('{"survey": ')
    files.append(str(tmp_path / "cut.json"))
    survey.main(["score", "--key", str(path), *files, "--out", str(tmp_path / "result.json")])
    printed = capsys.readouterr().out
    for problem in ("Cara, q02 emotion: 'bored' is not among the choices", "Cara, q02 left: 6 is not among the choices",
                    "Cara, q02 right: not answered", "Cara, q03 emotion: not answered", "cut.json: not a JSON file",
                    "again.json: rater 'Anna' has answered in another file", "other.json: answers survey 'zzz'",
                    "Cara, question 'q99': not in this survey"):
        assert problem in printed, problem
    assert "53.6%" in printed and "3.52 ± 0.41" in printed and "30 of 36 answers" in printed
    assert json.loads((tmp_path / "result.json").read_text())["raters"] == ["Anna", "Ben", "Cara"]
    with pytest.raises(DataError, match="no clip has a score for both systems"):
        survey.score(str(path), [str(tmp_path / "cut.json")])


def test_ties_by_hand(studies, tmp_path):
    """q01: both systems 3: half a win each. The others: Ours 2, Theirs 4. Question 1 of q02 is answered by two raters,
    with the judge's emotion and another: in half of the ways to break the tie it is the first, in all among two."""
    path, key = key_of(studies["inside"])
    scores = {"Ours": 2, "Theirs": 4}
    anna, ben = answers(key, "Anna", scores), answers(key, "Ben", scores)
    for rater in (anna, ben):
        rater["answers"]["q01"] |= {"left": 3, "right": 3}
    q2 = key["items"]["q02"]
    ben["answers"]["q02"]["emotion"] = next(x for x in key["choices"]["q02"] if x != q2["judged"][q2["emotion_of"]])
    files = []
    for name, content in (("a.json", anna), ("b.json", ben)):
        (tmp_path / name).write_text(json.dumps(content))
        files.append(str(tmp_path / name))
    result = survey.score(str(path), files)
    assert (result["Ours"]["win rate"], result["Theirs"]["win rate"], result["ties"]) == (12.5, 87.5, 1)
    assert result["agreement"]["both"] == {"clips": 4, "top 1": 87.5, "top 2": 100}
