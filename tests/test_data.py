"""The data sets' own files, good and damaged, and clips decoded ahead: section 4.1, released-code section 7."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import pytest
import torch

from erv_min.base.errors import ClipError, DataError
from erv_min.base.files import read_jsonl
from erv_min.base.options import check as settings_check
from erv_min.base.processes import Processes
from erv_min.config import humanomni
from erv_min.data import loader
from erv_min.data.cache import FeatureCache
from erv_min.data.examples import check_clips, load_examples, summary, too_many
from erv_min.data.loader import clip_inputs, clip_loader
from erv_min.data.readers import read_annotated, read_training_json
from erv_min.inputs import Collator, Example, Inputs
from erv_min.media import load_clip, load_frames
from erv_min.model.parameters import random_humanomni
from erv_min.train import hooks, start
from erv_min.train.settings import SFTSettings
from test_media import write_clip


def write(path: Path, text: str | bytes = b"clip") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def dfew(root: Path, train: str = "order,label\n1,1\n2,4\n00003,7\n", test: str = "order,label\n9,3\n") -> Path:
    write(root / "single_trainset_5.csv", train)
    write(root / "single_testset_5.csv", test)
    for name in ("1", "2", "3", "9"):
        write(root / "clip" / f"{name}.mp4")
    return root


# ---------------------------------------------------------------------------------------------------- readers

def test_dfew_ids_and_clips(tmp_path):
    examples = read_annotated("dfew", dfew(tmp_path), "train")
    assert [(e.video_id, e.label, e.path.name, e.dataset, e.split) for e in examples] == [
        ("1", "happy", "1.mp4", "dfew", "train"), ("2", "angry", "2.mp4", "dfew", "train"),
        ("00003", "fear", "3.mp4", "dfew", "train")]  # released-code section 6: ids 1, 4, 7


def test_dfew_header_byte_order_mark_and_subfolder(tmp_path):
    write(tmp_path / "EmoLabel_DataSplit" / "train" / "single_trainset_5.csv", "\ufeff1,2\r\n2,6\r\n\r\n")
    assert [e.label for e in read_annotated("dfew", tmp_path, "train")] == [
        "sad", "disgust"]  # no header: its first row counts


@pytest.mark.parametrize("text, message", [
    ("order,label\n1,8\n", r"line 2: label '8' is not one of dfew's: happy, .*, or 1\.\.7"),
    ("order,label\n1,gloomy\n", "line 2: label 'gloomy'"), ("1,class\n1,1\n", "line 1: label 'class'"),
    ("order,label\n1,0\n", "line 2: label '0'"),
    ("order,label\n1\n", "line 2: expected a clip and its label"),
    ("order,label\n../../x,1\n", "line 2: .* lies outside the data root"),
    ("order,label\n1,1\n2,1\n01,2\n", "line 4: clip '01' was already on line 2"),
    ("order,label\n", "no example in it"),
    (b"order,label\n\xff\xfe,1\n", r"not UTF-8 text \(byte 12\)"),
])
def test_dfew_damaged(tmp_path, text, message):
    write(tmp_path / "single_trainset_5.csv", text)
    with pytest.raises(DataError, match=message) as error:
        load_examples(f"dfew:{tmp_path}", "train")
    assert str(tmp_path) in str(error.value)


def test_no_annotation_and_two_annotations(tmp_path):
    with pytest.raises(DataError, match="no single_trainset_5.csv or "):
        load_examples(f"dfew:{tmp_path}", "train")
    with pytest.raises(DataError, match="no such folder"):
        read_annotated("dfew", tmp_path / "nowhere", "train")
    for folder in "ab":
        write(tmp_path / folder / "single_trainset_5.csv", "1,1\n")
    with pytest.raises(DataError, match="more than one annotation file"):
        load_examples(f"dfew:{tmp_path}", "train")


def official_dfew(root: Path, clips: str = "Clip/original/{}.mp4") -> Path:
    """As its authors ship it: fold 3 has other labels than fold 5; ids are numbers without leading zeros."""
    for fold, label in ((1, 1), (3, 2), (5, 4)):
        write(root / f"EmoLabel_DataSplit/train(single-labeled)/set_{fold}.csv", f"video_name,label\n1,{label}\n12,3\n")
        write(root / f"EmoLabel_DataSplit/test(single-labeled)/set_{fold}.csv", f"video_name,label\n16372,{label}\n")
    for name in ("1", "12", "16372"):
        write(root / clips.format(name, name.zfill(5)))
    return root


@pytest.mark.parametrize("clips", ["Clip/original/{}.mp4", "Clip/original/{1}.mp4", "clip/{}.mp4",
                                   "Clip/clip_224x224/{1}/{1}_00001.jpg", "Clip/clip_224x224_16f/{1}/{1}_00001.jpg"])
def test_dfew_as_its_authors_ship_it(tmp_path, clips):
    """From the folder, from a file, in another fold; the folder of a file says which split it is."""
    root = official_dfew(tmp_path / "DFEW", clips)
    files = {split: root / f"EmoLabel_DataSplit/{split}(single-labeled)/set_5.csv" for split in ("train", "test")}
    for spec in (f"dfew:{root}", f"dfew:{files['train']}"):
        assert [(e.video_id, e.label) for e in load_examples(spec, "train")] == [("1", "angry"), ("12", "neutral")]
    for spec, label in ((f"dfew:{root}", "angry"), (f"dfew:{files['test']}", "angry"), (f"dfew:{root}@set_3", "sad")):
        (example,) = check_clips(load_examples(spec, "test"))
        assert (example.video_id, example.label, example.split) == ("16372", label, "test")
        assert example.path == (root / clips.format("16372", "16372") if clips.endswith("mp4") else
                                (root / clips.format("16372", "16372")).parent)
    with pytest.raises(DataError, match="is the train split, and test was asked for"):
        load_examples(f"dfew:{files['train']}", "test")


def test_another_set_than_the_papers(tmp_path):
    official_mafw(tmp_path / "MAFW"), official_dfew(tmp_path / "DFEW")
    assert [e.label for e in load_examples(f"mafw:{tmp_path}/MAFW@set_1,dfew:{tmp_path}/DFEW@set_1", "test")] == [
        "anger", "happy"]
    settings_check(SFTSettings(data=f"dfew:{tmp_path}/DFEW@set_3,json:{tmp_path}@{tmp_path}"))
    for spec, message in ((f"dfew:{tmp_path}/DFEW@set_2", "no single_trainset_2.csv or "),
                          (f"dfew:{tmp_path}/DFEW@set_6", "no such folder"),
                          (f"dfew:{tmp_path}/DFEW/EmoLabel_DataSplit/train(single-labeled)/set_5.csv@set_3",
                           "a file is one set already"), (f"emer:{tmp_path}@set_3", "no such folder")):
        with pytest.raises(DataError, match=message):
            load_examples(spec, "train")


def test_clips_of_frames_and_files_of_macos(tmp_path, caplog):
    """A file with sound goes before a folder of frames; `._clip.mp4` is no clip; NFD names find NFC files and the
    reverse; a folder without pictures is none."""
    write(tmp_path / "set_5" / "train.txt", "00001.mp4 anger\n00002.mp4 fear\n00003.mp4 fear\n")
    write(tmp_path / "data/frames/00001/1.jpg"), write(tmp_path / "data/frames/00002/1.PNG")
    write(tmp_path / "data/frames/00003/n_frames"), write(tmp_path / "clips/._00001.mp4")
    write(tmp_path / "clips/00001.mp4"), write(tmp_path / "set_5" / "._train.txt")
    examples = load_examples(f"mafw:{tmp_path}", "train")
    assert [e.path.relative_to(tmp_path).as_posix() for e in examples] == [
        "clips/00001.mp4", "data/frames/00002", "clips/00003.mp4"]
    assert check_clips(examples, 0.5) == examples[:2] and "2 clips found, 1 missing" in summary(examples)
    assert "1 files ._* skipped" in caplog.text
    for annotated, file in (("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")):
        root = tmp_path / file
        write(root / "EMER.csv", f"names,emotions,subtitles,reasons\n{annotated},sad,,She weeps.\n")
        write(root / "._EMER.csv"), write(root / "video" / f"{file}.mp4")
        write(root / "train.json", json.dumps([entry(f"video/{annotated}.mp4", "sad")]))
        for spec in (f"emer:{root}", f"json:emer:{root}/train.json"):
            assert [e.path.name for e in check_clips(load_examples(spec, "sft"))] == [f"{file}.mp4"]


def test_what_all_processes_read_is_said_once(tmp_path, caplog, monkeypatch):
    write(tmp_path / "EMER.csv", EMER)
    write(tmp_path / "sample_0001.avi"), write(tmp_path / "._sample_0001.avi")
    monkeypatch.setenv("RANK", "1")
    check_clips(load_examples(f"emer:{tmp_path}", "sft"), 0.5)
    assert not caplog.text
    monkeypatch.setenv("RANK", "0")
    check_clips(load_examples(f"emer:{tmp_path}", "sft"), 0.5)
    for said in ("1 of 2 clips are missing", "1 files ._*"):
        assert caplog.text.count(said) == 1


def test_mafw_words_and_ids(tmp_path):
    write(tmp_path / "set_5" / "train.txt", "00001.mp4 anger\n00002.mp4 11\n\n00003.mp4 Happiness\n")
    write(tmp_path / "set_5" / "test.txt", "00009.mp4 8\n")
    write(tmp_path / "clips" / "00001.mp4")
    train = load_examples(f"mafw:{tmp_path}", "train")
    assert [(e.video_id, e.label) for e in train] == [("00001", "anger"), ("00002", "disappointment"),
                                                      ("00003", "happiness")]
    assert train[0].path == tmp_path / "clips" / "00001.mp4" and train[0].path.is_file()
    assert [e.label for e in load_examples(f"mafw:{tmp_path}", "test")] == ["contempt"]


@pytest.mark.parametrize("line, message", [
    ("00001.mp4", "line 1: expected a clip and its label"), ("00001.mp4 12", "line 1: label '12'"),
    ("00001.mp4 joyous", "line 1: label 'joyous' is not one of mafw's: anger"),
    ("../../../etc/passwd anger", "lies outside the data root"),
    ("00001.mp4 anger\n00001.avi fear", "line 2: clip '00001' was already on line 1"),
])
def test_mafw_damaged(tmp_path, line, message):
    write(tmp_path / "set_5" / "train.txt", line + "\n")
    with pytest.raises(DataError, match=message):
        read_annotated("mafw", tmp_path, "train")


def test_a_file_given_as_root_must_fit_the_split(tmp_path):
    """Training clips called test give figures that are too good. A file whose name says no split is taken as given."""
    dfew(tmp_path)
    for name in ("train", "test"):
        write(tmp_path / "set_5" / f"{name}.txt", "00001.mp4 anger\n")
    for data, right, other in (("dfew", "single_testset_5.csv", "single_trainset_5.csv"),
                               ("mafw", "set_5/test.txt", "set_5/train.txt")):
        with pytest.raises(DataError, match=f"{other}: is the train split, and test was asked for.*the folder"):
            load_examples(f"{data}:{tmp_path / other}", "test")
        assert {e.split for e in load_examples(f"{data}:{tmp_path / right}", "test")} == {"test"}
        assert {e.split for e in load_examples(f"{data}:{tmp_path / other}", "sft")} == {"train"}
        with pytest.raises(DataError, match="is the test split, and train was asked for"):
            load_examples(f"{data}:{tmp_path / right}", "train")
    own = write(tmp_path / "latest_contest.csv", "1,1\n")  # no word of it is train or test
    assert len(load_examples(f"dfew:{own}", "train")) == len(load_examples(f"dfew:{own}", "test")) == 1


OFFICIAL = "Train & Test Set/single/no_caption"  # of MAFW: below it set_1 to set_5, beside it other tasks


def official_mafw(root: Path) -> Path:
    for task in (OFFICIAL, "Train & Test Set/single/with_caption", "Train & Test Set/compound/no_caption"):
        for fold in (1, 5):
            for split, name in (("train", "00001"), ("test", "00002")):
                label = ("fear" if fold == 5 else "anger") + "\ta caption" * ("with" in task)
                write(root / task / f"set_{fold}" / f"{split}.txt", f"{name}.mp4 {label}\n")
    for name in ("00001", "00002"):
        write(root / "data" / "clips" / f"{name}.mp4")
    return root


@pytest.mark.parametrize("where", ["", "Train & Test Set", "Train & Test Set/single", OFFICIAL,
                                   f"{OFFICIAL}/set_5/test.txt"])
def test_mafw_as_it_is_unpacked(tmp_path, where):
    """The single-label task without captions, fold 5 (section 4.1); the clips are found from any folder of the way."""
    root = official_mafw(tmp_path / "MAFW")
    (example,) = load_examples(f"mafw:{root / where}", "test")
    assert (example.video_id, example.label) == ("00002", "fear")
    if where == "" or where.endswith(".txt"):
        assert example.path == root / "data" / "clips" / "00002.mp4" and example.path.is_file()


def test_mafw_of_two_tasks_is_no_guess(tmp_path):
    for task in ("compound/no_caption", "compound/with_caption"):
        write(tmp_path / task / "set_5" / "train.txt", "00001.mp4 fear\n")
    with pytest.raises(DataError, match="more than one annotation file.*no_caption.*with_caption.*give the file"):
        read_annotated("mafw", tmp_path, "train")


EMER = ('names,emotions,subtitles,reasons\n'
        'sample_0001,worried,"Wait, what?","In the video, she frowns. Her voice shakes."\n'
        'sample_0002,happy,,"He smiles ""broadly"",\nthen laughs."\n')


def test_emer_quotes_newlines_and_subtitles(tmp_path):
    write(tmp_path / "EMER.csv", EMER)
    write(tmp_path / "video" / "sample_0001.avi")
    first, second = load_examples(f"emer:{tmp_path}", "sft")
    assert (first.label, first.subtitle, first.explanation) == (
        "worried", "Wait, what?", "In the video, she frowns. Her voice shakes.")
    assert first.path == tmp_path / "video" / "sample_0001.avi"
    assert second.explanation == 'He smiles "broadly",\nthen laughs.' and second.path.name == "sample_0002.avi"


@pytest.mark.parametrize("written", ["nan", "NaN", "None", "null", "N/A", "<NA>", ""])
def test_an_absent_cell_is_no_text(tmp_path, written):
    """pandas writes NaN for it, JSON null or NaN, Python None: the prompt must not quote them as a subtitle."""
    write(tmp_path / "EMER.csv", f"names,emotions,subtitles,reasons\ns1,sad,{written},She weeps.\n")
    (example,) = load_examples(f"emer:{tmp_path}")
    assert (example.subtitle, example.explanation) == ("", "She weeps.")
    write(tmp_path / "EMER.csv", f"names,emotions,subtitles,reasons\ns1,sad,x,{written}\n")
    with pytest.raises(DataError, match="or none in names or reasons"):
        load_examples(f"emer:{tmp_path}")
    for value in (json.dumps(written), "NaN", "null"):
        write(tmp_path / "MERR_fine_grained.json",
              f'{{"s1": {{"pseu_emotion": "angry", "smp_reason_caption": {value}, "text": {value}}}}}')
        (example,) = load_examples(f"merr:{tmp_path}")
        assert (example.subtitle, example.explanation) == ("", "")
    path = write(tmp_path / "a.json", json.dumps([entry("a.mp4", f"<think>{written}</think><answer>sad</answer>")]))
    assert load_examples(f"json:dfew:{path}")[0].explanation == ""


@pytest.mark.parametrize("rows", [
    'a,sad,x,y\nb,sad,,"She weeps.\nc,happy,,He smiles.\n', 'a,sad,x,y\nb,sad,,"She weeps.\nc,happy,,"He smiles."\n',
    'a,sad,x,y\nb,sad,"Wait,She weeps.\n'])
def test_a_quote_that_is_never_closed(tmp_path, rows):
    write(tmp_path / "EMER.csv", "names,emotions,subtitles,reasons\n" + rows)
    with pytest.raises(DataError, match=r"EMER.csv, line 3: not CSV \(.*a quote that is never closed"):
        load_examples(f"emer:{tmp_path}")


def test_ov_merd_is_no_emer(tmp_path):
    """MER2025's folder: open labels, several per clip, in files of their own."""
    for name, columns in (("track2_train_ovmerd", "name,openset"), ("track3_train_ovmerd", "name,reason"),
                          ("subtitle_chieng", "name,chinese,english")):
        write(tmp_path / f"{name}.csv", f"{columns}\na,b,c\n")
    with pytest.raises(DataError, match="track3_train_ovmerd.csv, line 1: no column names, emotions, subtitles, reasons"):
        load_examples(f"emer:{tmp_path}")


def test_a_file_given_as_root_finds_its_clips(tmp_path):
    """Beside it, or in a folder of clips around it; a folder of clips further up is not in the way of the first."""
    path = write(tmp_path / "a" / "EMER" / "EMER.csv", EMER)
    write(tmp_path / "a" / "video" / "sample_0001.avi")
    assert read_annotated("emer", path, "train")[0].path == tmp_path / "a" / "video" / "sample_0001.avi"
    write(tmp_path / "a" / "EMER" / "sample_0001.avi")
    assert read_annotated("emer", path, "train")[0].path == tmp_path / "a" / "EMER" / "sample_0001.avi"


def test_emer_gb18030(tmp_path):
    write(tmp_path / "EMER.csv", "names,emotions,subtitles,reasons\ns1,sad,你好,她哭了。\n".encode("gb18030"))
    (example,) = read_annotated("emer", tmp_path, "train")
    assert (example.subtitle, example.explanation) == ("你好", "她哭了。")


@pytest.mark.parametrize("text, message", [
    ("names,emotions,reasons\na,sad,b\n", "line 1: no column subtitles; found names, emotions, reasons"),
    ("", "line 1: no column names, emotions, subtitles, reasons"),
    ("names,emotions,subtitles,reasons\na,sad,x\n", "line 2: more or less than 4 fields"),
    ("names,emotions,subtitles,reasons\na,sad,x,y,z\n", "line 2: more or less than 4 fields"),
    ("names,emotions,subtitles,reasons\na,bored,x,y\n", "line 2: label 'bored' is not one of emer's"),
    ("names,emotions,subtitles,reasons\na,sad,x,y\na.avi,sad,x,y\n", "line 3: clip 'a' was already on line 2"),
    ("names,emotions,subtitles,reasons\na,sad,x,\n", "line 2: .* or none in names or reasons"),
    ("names,emotions,subtitles,reasons\na,\"['sad', 'angry']\",x,y\nb,sad,x,y\nc,happy/sad,x,y\n",
     "line 2: label .*'sad', 'angry'.* is not one of emer's"),
    ("names,emotions,subtitles,reasons\na,\"sad, bored\",x,y\n", "line 2: label 'sad, bored' is not"),
    ("names,emotions,subtitles,reasons\n../../a,sad,x,y\n", "outside the data root"),
])
def test_emer_damaged(tmp_path, text, message):
    write(tmp_path / "EMER.csv", text)
    with pytest.raises(DataError, match=message):
        load_examples(f"emer:{tmp_path}")


def test_merr_and_its_doubt(tmp_path):
    entries = {"s1": {"pseu_emotion": "angry", "smp_reason_caption": "He shouts.", "text": "No!"},
               "s2": {"pseu_emotion": "doubt"}, "s3": {"pseu_emotion": "worried"}}
    write(tmp_path / "MERR_fine_grained.json", json.dumps(entries))
    write(tmp_path / "other.json", "{}")  # the coarse file lies beside it
    write(tmp_path / "s1.mp4")
    examples = read_annotated("merr", tmp_path, "train")
    assert [(e.video_id, e.label, e.explanation, e.subtitle) for e in examples] == [
        ("s1", "angry", "He shouts.", "No!"), ("s2", "doubt", "", ""), ("s3", "worried", "", "")]
    assert examples[0].path.name == "s1.mp4"


@pytest.mark.parametrize("text, message", [
    ('{"s1": {"pseu_emotion": "angry"}, "s1": {"pseu_emotion": "sad"}}', "'s1' is there twice"),
    ('{"s1": {"emotion": "angry"}}', "entry 's1': no text in field pseu_emotion"),
    ('{"s1": {"pseu_emotion": "hungry"}}', "entry 's1': label 'hungry'"),
    ('[1]', "found a list"), ('{"s1": \n{]}', r"not a JSON file \(.*line 2"), ('{}', "no example"),
])
def test_merr_damaged(tmp_path, text, message):
    write(tmp_path / "MERR_fine_grained.json", text)
    with pytest.raises(DataError, match=message):
        load_examples(f"merr:{tmp_path}")


def entry(video: str, answer: str) -> dict:
    return {"video": video, "conversations": [{"from": "human", "value": "<video>\n<audio>\nWhich?"},
                                              {"from": "gpt", "value": answer}]}


def test_training_json_tags_bare_labels_and_repeats(tmp_path):
    path = write(tmp_path / "train.json", json.dumps([
        entry("clip/1.mp4", "<think>A smile.\nA laugh.</think>\n<answer>happy</answer>"),
        entry("clip/1.mp4", "<think>Other words.</think>\n<answer>happy</answer>"), entry("clip/2.mp4", "fear\n")]))
    examples = read_training_json(path, None, "dfew")
    assert [(e.video_id, e.label, e.explanation, e.dataset) for e in examples] == [
        ("1", "happy", "A smile.\nA laugh.", "dfew"), ("1", "happy", "Other words.", "dfew"), ("2", "fear", "", "dfew")]
    assert read_training_json(path, tmp_path / "elsewhere", "dfew")[0].path == tmp_path / "elsewhere" / "clip" / "1.mp4"
    assert load_examples(f"json:dfew:{path}@{tmp_path}/a", "sft")[0].path == tmp_path / "a" / "clip" / "1.mp4"


def test_training_json_data_set(tmp_path):
    path = write(tmp_path / "rl.json",
                 json.dumps([entry("DFEW/clip/1.mp4", "angry"), entry("MAFW/clips/1.mp4", "anger")]))
    examples = read_training_json(path)  # by the folder's name; equal stems get the whole path as id
    assert [(e.dataset, e.label, e.video_id) for e in examples] == [
        ("dfew", "angry", "DFEW/clip/1"), ("mafw", "anger", "MAFW/clips/1")]
    write(path, json.dumps([entry("x/1.mp4", "angry"), entry("x/2.mp4", "helplessness")]))
    with pytest.raises(DataError, match=f"no folder of 'x/1.mp4' is a data set's name; name one: json:mafw:{path}"):
        load_examples(f"json:{path}")
    assert [e.label for e in load_examples(f"json:mafw:{path}", "train")] == ["anger", "helplessness"]  # aliases


@pytest.mark.parametrize("value, message", [
    ([entry("../x.mp4", "happy")], "entry 0, field video: '../x.mp4' lies outside the data root"),
    ([entry("/etc/passwd", "happy")], "lies outside the data root"),
    ([entry("", "happy")], "entry 0: expected .*\"video\": PATH"),
    ([{"video": "a.mp4"}], "entry 0: expected .*conversations"),
    ([{"video": "a.mp4", "conversations": [{"from": "human", "value": "x"}]}], "with one gpt turn"),
    ([entry("a.mp4", "<think>x</think> happy")], "which is <think>"),
    ([entry("dfew/a.mp4", "furious delight")], "entry 0: label 'furious delight' is not one of dfew's"),
    ({"video": "x"}, "expected .*found a dict"), ([], "no example in it"),
])
def test_training_json_damaged(tmp_path, value, message):
    path = write(tmp_path / "train.json", json.dumps(value))
    with pytest.raises(DataError, match=message):
        load_examples(f"json:{path}")


# ---------------------------------------------------------------------------------------------------- mixtures

def test_mixture_toy_and_unknown_names(tmp_path):
    world = dfew(tmp_path / "a,b")
    write(world / "train.json", json.dumps([entry("clip/1.mp4", "<think>x</think><answer>sad</answer>")]))
    with pytest.raises(DataError, match="no finished toy world"):
        load_examples(f"toy:{world}")
    write(world / "world.json", "{}")
    write(tmp_path / "m" / "set_5" / "test.txt", "1.mp4 fear\n")
    mixed = load_examples(f"toy:{world},mafw:{tmp_path / 'm'}", "test")
    assert [(e.dataset, e.label) for e in mixed] == [("dfew", "neutral"), ("mafw", "fear")]
    (target,) = load_examples(f"toy:{world}", "sft")
    assert (target.label, target.explanation, target.path.is_file()) == ("sad", "x", True)
    for spec, split, message in ((f"fer:{world}", "test", "expected name:/path with name one of toy, dfew"),
                                 ("dfew", "test", "expected name:/path"),
                                 (f"dfew:{world}", "valid", "no valid split; there are train, test, sft"),
                                 (f"mafw:{world}", "tune", "no tune split"),
                                 (f"emer:{world}", "test", "no test split")):
        with pytest.raises(DataError, match=message):
            load_examples(spec, split)


def test_missing_clips_are_listed_and_too_many_are_an_error(tmp_path):
    examples = [Example(str(i), tmp_path / f"{i}.mp4", "sad", "dfew") for i in range(200)]
    for example in examples[2:]:
        write(example.path)
    found = check_clips(examples, report=tmp_path / "missing.txt")  # 2 of 200 is 1%: allowed
    assert found == examples[2:]
    assert (tmp_path / "missing.txt").read_text() == f"{tmp_path}/0.mp4\n{tmp_path}/1.mp4\n"
    examples[2].path.unlink()
    with pytest.raises(DataError, match=r"3 of 200 clips are missing \(1.5%\), the first: .*0.mp4; all of them"):
        check_clips(examples, report=tmp_path / "missing.txt")
    assert len(check_clips(examples, allow_missing=0.02)) == 197
    with pytest.raises(DataError, match="1 of 1"):
        check_clips(examples[:1], allow_missing=1.0)


def test_clips_that_do_not_decode_count_against_allow_missing():
    too_many(1, 100, 0.01), too_many(0, 0, 0.0), too_many(3, 4, 0.75)
    with pytest.raises(DataError, match=r"2 of 100 clips cannot be decoded \(2.0%\), the first: a.mp4: cut off.*"
                                        r"allow more than 1.0% \(--allow-missing\)"):
        too_many(2, 100, 0.01, ClipError("a.mp4: cut off"))
    with pytest.raises(DataError, match="4 of 4 clips cannot be decoded"):  # nothing is left to train on or to score
        too_many(4, 4, 1.0)


def test_a_clip_that_two_processes_met_counts_once(tmp_path, monkeypatch):
    """As in two epochs on two processes: 1 broken clip of 10, with 10% allowed, ends no run."""
    settings = SFTSettings(out=str(tmp_path), allow_missing=0.1)
    clips = hooks.TrainingClips(settings, Processes(0, 1, torch.device("cpu")), [[]] * 10, 4)
    monkeypatch.setattr(hooks, "gather_lists", lambda mine: [*mine, "cut.mp4: broken"])  # what the other one met
    clips._failed(2, ClipError("cut.mp4: broken")), clips.check_failed(), clips.check_failed()
    clips._failed(9, ClipError("other.mp4: broken"))
    with pytest.raises(DataError, match=r"2 of 10 clips cannot be decoded \(20.0%\), the first: cut.mp4: broken"):
        clips.check_failed()
    assert [row["step"] for row in read_jsonl(tmp_path / "failed_clips.jsonl")] == [0, 2]


def test_summary_counts_clips_not_entries(tmp_path):
    examples = read_annotated("dfew", dfew(tmp_path), "train")
    (tmp_path / "clip" / "2.mp4").unlink()
    assert summary([*examples, examples[0]]) == (
        "dfew train: 2 clips found, 1 missing, 4 examples "
        "(happy 2, sad 0, neutral 0, angry 1, surprise 0, disgust 0, fear 1)")


# ---------------------------------------------------------------------------------------------------- decoding

def paths(*names: str) -> list[Path]:
    return [Path(name) for name in names]


def decode(path: Path):
    """Stands in for media.load_clip: what happens is in the clip's name."""
    kind = str(path)
    if kind == "slow":
        time.sleep(0.2)
    if kind == "bad":
        raise ClipError(f"{path}: no video stream")
    if kind == "odd":
        raise ValueError("what a codec may throw")
    if kind == "crash":
        os._exit(139)
    if kind == "types":
        scalar, empty = torch.tensor(2.5), torch.empty(0, 3)
        return torch.arange(6).view(2, 3).T, torch.ones(2, dtype=torch.bfloat16), empty, scalar, None
    return torch.full((2, 3), float(len(str(path)))), os.getpid(), torch.get_num_threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_order_and_names_errors(workers):
    clips = [*paths("slow", "a", "bad", "dd"), "kept features", *paths("odd", "ccc")]
    results = list(clip_loader(clips, decode, workers=workers))
    kinds = [type(result).__name__ for result in results]
    assert kinds == ["tuple", "tuple", "ClipError", "tuple", "str", "ClipError", "tuple"]
    assert str(results[2]) == "bad: no video stream"
    assert str(results[5]) == "odd: ValueError: what a codec may throw"
    for i in (0, 1, 6):  # in order: decode gives the length of the name
        assert torch.equal(results[i][0], torch.full((2, 3), float(len(str(clips[i])))))
    if workers:
        assert os.getpid() not in {result[1] for result in results if isinstance(result, tuple)}
        assert {result[2] for result in results if isinstance(result, tuple)} == {1}


def test_loader_keeps_tensors_as_they_are():
    (alone,) = clip_loader(paths("types"), decode, workers=1)
    for got, expected in zip(alone, decode(Path("types")), strict=True):
        if expected is None:
            assert got is None
        else:
            assert got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(got, expected)
            got += 1  # writable


def test_loader_survives_a_dying_decoder():
    clips = paths("a", "bb", "crash", "slow", "ccc", "bad", "crash", "dddd")
    results = list(clip_loader(clips, decode, workers=2))
    broken = [i for i, result in enumerate(results) if isinstance(result, ClipError)]
    assert len(results) == 8 and broken == [2, 5, 6]
    assert "crash: the decoder process died" in str(results[2])
    assert [result[0][0, 0] for result in (results[0], results[4], results[7])] == [1, 3, 4]


def test_loader_survives_a_decoder_that_dies_while_the_consumer_is_busy():
    """As in training: the pool is already broken when the next clip is handed in."""
    results = []
    for result in clip_loader(paths("a", "crash", "bb", "ccc", "dddd"), decode, workers=1):
        results.append("broken" if isinstance(result, ClipError) else int(result[0][0, 0]))
        time.sleep(1)
    assert results == [1, "broken", 2, 3, 4]


def test_loader_is_bounded():
    taken = []

    def stream():
        for path in paths(*"abcdefghijklmnop"):
            taken.append(path)
            yield path

    clips = clip_loader(stream(), decode, workers=2)
    next(clips)
    assert len(taken) <= 2 * loader.AHEAD
    clips.close()


def test_workers_die_with_the_parent(tmp_path):
    code = (f"import sys, os, signal; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from test_data import *\n"
            "loader = clip_loader(paths(*'abcdefgh'), decode, workers=1)\n"
            "print(next(loader)[1], flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n")
    with open(tmp_path / "pid", "w") as pid:  # not a pipe: the worker would hold it open
        assert subprocess.run([sys.executable, "-c", code], stdout=pid).returncode == -signal.SIGKILL
    worker = int((tmp_path / "pid").read_text())
    for _ in range(300):
        if not Path(f"/proc/{worker}").exists() or "\nState:\tZ" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


# ---------------------------------------------------------------------------------------------------- features

def test_feature_cache_keys_disk_and_damage(tmp_path, caplog):
    clip = Example("1", write(tmp_path / "1.mp4"), "sad", "dfew")
    vision, audio = torch.randn(2, 4, 3, dtype=torch.bfloat16), torch.randn(5, 3)
    cache = FeatureCache(tmp_path / "cache", "towers-a")
    assert cache.get(clip) is None
    cache.put(clip, vision, audio)
    got = FeatureCache(tmp_path / "cache", "towers-a").get(clip).features
    assert got[0].dtype == torch.bfloat16 and torch.equal(got[0], vision) and torch.equal(got[1], audio)
    assert FeatureCache(tmp_path / "cache", "towers-b").get(clip) is None
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    assert FeatureCache(tmp_path / "cache", "towers-a").get(clip) is None and "damaged, made again" in caplog.text
    write(clip.path, b"another clip")  # the file changed: its old features are not its features
    assert cache.get(clip) is None


def test_a_changed_clip_has_no_cached_features(tmp_path):
    """Of the same size at another time, of another size at the same time."""
    clip = Example("1", write(tmp_path / "1.mp4", b"clip"), "sad", "dfew")
    cache = FeatureCache(tmp_path / "cache", "k")
    os.utime(clip.path, ns=(10**18, 10**18))
    cache.put(clip, torch.zeros(1))
    assert cache.get(clip)
    write(clip.path, b"plic")
    os.utime(clip.path, ns=(10**18, 10**18 + 1))
    assert not cache.get(clip)
    write(clip.path, b"a clip")
    os.utime(clip.path, ns=(10**18, 10**18))
    assert not cache.get(clip)
    folder = replace(clip, path=tmp_path / "2")  # of frames: the folder's own time says nothing of a changed frame
    frame = write(folder.path / "1.jpg", b"frame")
    cache.put(folder, torch.zeros(1))
    assert cache.get(folder)
    write(frame, b"a frame")
    assert not cache.get(folder)


def test_what_shapes_a_feature_is_in_the_caches_key(tmp_path, monkeypatch):
    """Features are kept across runs: no setting that decodes or encodes a clip otherwise may meet those of another."""
    model = random_humanomni(humanomni("toy"), 0)
    monkeypatch.setattr(start, "load_collator", lambda *_, **__: Collator(model, None, None))
    alone = Processes(0, 1, torch.device("cpu"))

    def key(**changes) -> str:
        settings = SFTSettings(model="m", cache_features=str(tmp_path), **changes)
        return start.load_start(settings, alone).cache.key

    same = key()
    for change in (dict(dtype="bfloat16"), dict(num_frames=9), dict(modality="video"), dict(geometry="stretch"),
                   dict(silence="error")):
        assert key(**change) != same, change
    assert key(lr=1.0, seed=3, prompt_stage="sft") == same  # these shape no feature
    whole = model.config
    for changes in (dict(mm_vision_select_layer=-3), dict(vision=replace(whole.vision, num_attention_heads=2)),
                    dict(vision=replace(whole.vision, image_size=50)),
                    dict(vision=replace(whole.vision, layer_norm_eps=1)),
                    dict(audio=replace(whole.audio, encoder_attention_heads=2))):
        model.config = replace(whole, **changes)  # none of them changes the weights' bytes
        assert key() != same, changes
    model.config = whole
    monkeypatch.setattr(start, "FEATURES", "another")
    assert key() != same
    for tower in (model.model.vision_tower, model.model.audio_tower):
        before = key()
        with torch.no_grad():
            next(tower.parameters()).add_(1)
        assert key() != before


def test_feature_cache_of_one_modality(tmp_path):
    clip, cache = Example("a", write(tmp_path / "a.mp4"), "sad", "dfew"), FeatureCache(tmp_path / "cache", "k")
    cache.put(clip, vision=torch.zeros(2, 3))
    x = cache.get(clip)
    assert x.features[0].shape == (2, 3) and x.features[1] is None and not x.silent


def test_a_clip_heard_as_silence_stays_known_as_such(tmp_path):
    """From decoding through the workers' pipe and the cache to what the caller counts (divergence 19)."""
    write_clip(tmp_path / "mute.mp4", sound=None), write_clip(tmp_path / "loud.mp4")
    model = random_humanomni(humanomni("toy"), 0)
    clips = [Example(name, tmp_path / f"{name}.mp4", "sad", "dfew") for name in ("mute", "loud")]
    heard = list(clip_inputs(clips, model.config, None, num_frames=2, workers=1))
    assert [x.silent for x in heard] == [True, False]
    error, loud = clip_inputs(clips, model.config, None, num_frames=2, workers=1, silence="error")
    assert isinstance(error, ClipError) and "--silence" in str(error) and not loud.silent
    cache = FeatureCache(tmp_path / "cache", "k")
    for x in heard:
        cache.put(x.example, torch.zeros(1), torch.zeros(1), x.silent)
    assert all(map(cache.get, clips))
    assert [x.silent for x in clip_inputs(clips, model.config, cache)] == [True, False]  # nothing is decoded


def test_clips_heard_as_silence_are_counted_in_words(tmp_path, caplog):
    """At the first, and at the end, once per clip: also where the consumer takes no more of the stream."""
    a, b = (write_clip(tmp_path / name, sound=None) for name in ("a.mp4", "b.mp4"))
    clips = [Example(path.stem, path, "sad", "dfew") for path in (a, b, b)]
    stream = clip_inputs(clips * 2, humanomni("toy"), None, num_frames=2, workers=0)
    next(stream)
    assert "a.mp4: no sound, heard as 10 s of silence (--silence)" in caplog.text
    next(stream), next(stream), stream.close()
    assert caplog.text.count("no sound") == 1 and "2 clips without sound were heard" in caplog.text


def test_what_stands_in_a_broken_clips_place_brings_its_own_label(monkeypatch):
    """The order is a happy, b sad, c angry, and so on again; b breaks. Its place 1 gets c, and is told to be place 2,
    whose label is c's; place 4 gets c, too, and is place 5. A clip that comes twice breaks twice."""
    clips = [Example(name, Path(name), label, "dfew") for name, label in (("a", "happy"), ("b", "sad"), ("c", "angry"))]

    def decoded(examples, **_):
        return (ClipError("b: broken") if x.video_id == "b" else Inputs(x) for x in examples)

    stream = hooks.TrainingClips(SFTSettings(), Processes(0, 1, torch.device("cpu")), [[x] for x in clips], 1)
    told = []
    monkeypatch.setattr(stream, "unit_at", lambda place: [clips[place % 3]])
    monkeypatch.setattr(stream, "_failed", lambda place, _: told.append(place))
    monkeypatch.setattr(hooks, "clip_inputs", decoded)
    taken = list(stream.inputs([0, 1, 2, 4]))
    assert [(place, x.example.label) for place, x in taken] == [(0, "happy"), (2, "angry"), (2, "angry"), (5, "angry")]
    assert all(clips[place % 3] is x.example for place, x in taken) and told == [1, 4]
    monkeypatch.setattr(hooks, "clip_inputs", lambda examples, **_: (ClipError(x.video_id) for x in examples))
    with pytest.raises(ClipError, match="none of the 3 clips could be decoded"):
        list(stream.inputs([0]))


WALK = {  # what a user's folder holds: (encoder, options of write_clip)
    "h264-aac.mp4": {}, "mpeg4-mp3.avi": {"codec": "mpeg4", "sound": "mp3"},
    "vp9-opus.webm": {"codec": "libvpx-vp9", "sound": "libopus", "rate": 48000},
    "hevc-10-bit.mkv": {"codec": "libx265", "pixels": "yuv420p10le", "sound": "flac"},
    "rotated.mov": {"sound": "pcm_s16le", "rotate": 90}, "mute.mp4": {"sound": None}}


def can_encode(name: str) -> bool:
    try:
        return bool(av.Codec(name, "w"))
    except ValueError:  # av.codec.codec.UnknownCodecError
        return False


def walk(folder: Path) -> tuple[list[str], Path]:
    """WALK's clips, one cut off, one missing in `folder`/clips: the names of the whole ones, and the training JSON."""
    written = []
    (folder / "clips").mkdir()
    for name, options in WALK.items():
        if can_encode(options.get("codec", "libx264")) and can_encode(options.get("sound") or "aac"):
            write_clip(folder / "clips" / name, size=(64, 48), n=24, seconds=2, **options)
            written.append(name)
    cut = (folder / "clips/h264-aac.mp4").read_bytes()
    write(folder / "clips/cut.mp4", cut[: len(cut) // 2])
    entries = [entry(f"clips/{name}", "<think>She smiles.</think>\n<answer>happy</answer>")
               for name in [*written, "cut.mp4", "missing.mp4"]]
    return written, write(folder / "train.json", json.dumps(entries))


def test_a_folder_of_clips_in_the_released_layout(tmp_path):
    """Five containers, four video and five sound codecs, one clip mute, one HEVC of 10 bit, one rotated, one cut, one
    missing: a result for each, or a reason that names it. Where this build of FFmpeg lacks an encoder, not its clip."""
    written, path = walk(tmp_path)
    names = [*written, "cut.mp4", "missing.mp4"]
    examples = check_clips(read_training_json(path, None, "dfew"), 0.2, tmp_path / "missing.txt")
    assert [e.path.name for e in examples] == names[:-1] and "missing.mp4" in (tmp_path / "missing.txt").read_text()
    load = partial(load_clip, modality="video_audio", num_frames=4, image_size=48, n_mels=32, n_frames=300)
    results = dict(zip(names, clip_loader([e.path for e in examples], load, workers=1)))
    failed = {name: str(x) for name, x in results.items() if isinstance(x, ClipError)}
    assert list(failed) == ["cut.mp4"] and "cut.mp4: " in failed["cut.mp4"]
    assert {name for name in written if results[name].silent} == {"mute.mp4"}
    for name in written:
        clip = results[name]
        assert clip.video.shape == (4, 3, 48, 48) and clip.video.std() > 0.08 and clip.audio.shape == (32, 300)
        assert (clip.audio.std() == 0) == (name == "mute.mp4")
    grey = load_frames(tmp_path / "clips/h264-aac.mp4", 4).float()
    for name in written:  # the same picture from each: 8 or 10 bit, upright or turned by the mark
        frames = load_frames(tmp_path / "clips" / name, 4).float()
        assert frames.shape == ((4, 64, 48, 3) if name == "rotated.mov" else (4, 48, 64, 3))
        assert (frames[:, 20:30, 20:30].mean((1, 2, 3)) - grey[:, 20:30, 20:30].mean((1, 2, 3))).abs().max() < 5, name


def test_a_clip_comes_through_the_workers_as_it_is_read(tmp_path):
    """To the last bit; and one whose kept features are damaged is decoded after all."""
    path = write_clip(tmp_path / "a.mp4")
    example, config = Example("a", path, "happy", "dfew"), humanomni("toy")
    (x,) = clip_inputs([example], config, None, num_frames=4, workers=1)
    clip = load_clip(path, num_frames=4, image_size=config.vision.image_size, n_mels=config.audio.num_mel_bins,
                     n_frames=2 * config.audio.max_source_positions)
    assert torch.equal(x.clip.video, clip.video) and torch.equal(x.clip.audio, clip.audio)
    FeatureCache(tmp_path / "cache", "k").put(example, torch.zeros(1))
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(b"damaged")
    (x,) = clip_inputs([example], config, FeatureCache(tmp_path / "cache", "k"), num_frames=4, workers=1)
    assert x.features is None and torch.equal(x.clip.video, clip.video)
