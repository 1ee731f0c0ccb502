"""The small world: real clips, annotations, noise as set, tokenizers, judges apart from the labeller."""

import ast
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from erv_min.base.errors import SettingsError
from erv_min.base.files import read_json, read_jsonl, write_jsonl
from erv_min.base.options import parse
from erv_min.base.processes import Processes
from erv_min.emotions import to_erv
from erv_min.prompts import QUESTION, REASONING_SUFFIX, render
from erv_min.toy import chain, launch, lexicon, text, world
from erv_min.toy.render import FACE, FRAMES, RATE, SIZE, VOICE, Look, draw, encode, voice
from erv_min.toy.text import EMOTIONS
from erv_min.toy.world import PROTOTYPES, WorldSettings, build_world, sample_clips
from erv_min.train.settings import ERVSettings, GRPOSettings, SFTSettings

SMALL = WorldSettings(seed=3, train=24, test=8, tune=4, pretrain=30, sft_clips=12, reading=200, erv_train=300,
                      erv_valid=60)
LOOKS = [Look(woman, "red", "dark", woman, True, "office", 1) for woman in (True, False)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return build_world(tmp_path_factory.mktemp("toy") / "world", SMALL, workers=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------- clips and files

def test_clips_are_real_mp4_with_sound(small):
    with av.open(str(small / "clip" / "10001.mp4")) as clip:
        assert clip.streams.video[0].codec_context.name == "h264" and clip.streams.audio[0].codec_context.name == "aac"
        assert [f.to_ndarray(format="rgb24").shape for f in clip.decode(video=0)] == [(SIZE, SIZE, 3)] * FRAMES
    with av.open(str(small / "clip" / "10001.mp4")) as clip:
        sound = [f for f in clip.decode(audio=0)]
    assert {(f.sample_rate, f.layout.name) for f in sound} == {(RATE, "mono")}
    assert abs(sum(f.samples for f in sound) - RATE) <= 1024  # one second, to one AAC frame


def test_coding_keeps_what_was_drawn_and_voiced():
    rng = np.random.default_rng(0)
    frames = draw(np.array(PROTOTYPES["surprise"][0]), LOOKS[0], rng)
    sound = voice(np.array(PROTOTYPES["surprise"][1]), LOOKS[0], rng)
    assert frames.dtype == np.uint8 and sound.dtype == np.float32 and np.abs(sound).max() < 1
    content = encode(frames, sound)
    decoded = np.stack([f.to_ndarray(format="rgb24") for f in av.open(io.BytesIO(content)).decode(video=0)])
    heard = np.concatenate([f.to_ndarray().ravel() for f in av.open(io.BytesIO(content)).decode(audio=0)])[:RATE]
    assert np.abs(decoded.astype(int) - frames).mean() < 8  # of 255 levels
    assert np.corrcoef(heard, sound)[0, 1] > 0.95


def test_each_emotion_looks_and_sounds_different():
    """Between any two prototypes the pixels of the last frame and the spectra differ more than the coding does."""
    seen, heard = [], []
    for emotion in EMOTIONS:
        seen.append(draw(np.array(PROTOTYPES[emotion][0]), LOOKS[0], np.random.default_rng(0))[-1].astype(float))
        spectrum = np.abs(np.fft.rfft(voice(np.array(PROTOTYPES[emotion][1]), LOOKS[0], np.random.default_rng(0))))
        heard.append(np.log(spectrum[:4000].reshape(80, 50).mean(1) + 1e-3))
    for i in range(7):
        for j in range(i):
            assert (np.abs(seen[i] - seen[j]).max(-1) > 40).sum() > 40, (EMOTIONS[i], EMOTIONS[j])  # pixels
            assert np.abs(heard[i] - heard[j]).mean() > 0.2, (EMOTIONS[i], EMOTIONS[j])


def test_whom_a_sentence_is_about_can_be_seen_and_heard():
    """A woman's hair is long and her voice higher, a man's the opposite: "he" or "she" is no guess."""
    assert all(c.look.long_hair == c.look.woman for c in sample_clips(replace(SMALL, train=100)))
    woman, man = (draw(np.zeros(7), look, np.random.default_rng(0))[-1].astype(int) for look in LOOKS)
    assert (np.abs(woman - man).max(-1) > 40).sum() > 200


def test_same_seed_gives_the_same_bytes_in_another_process(small, tmp_path):
    """Other hash seed, one worker instead of two: every file is the same."""
    code = (f"from erv_min.toy.world import *; build_world({str(tmp_path / 'again')!r}, "
            f"WorldSettings(**{vars(SMALL)!r}), workers=1)")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin"},
                   cwd=Path(__file__).parent.parent)
    first, second = contents(small), contents(tmp_path / "again")
    assert first.keys() == second.keys() and [k for k in first if first[k] != second[k]] == []
    other = sample_clips(replace(SMALL, seed=4))
    assert [c.label for c in other] != [c.label for c in sample_clips(SMALL)]


def test_a_seed_gives_what_it_gave_when_its_version_was_made(tmp_path):
    """Labels, texts and token ids, recorded when version 10 was made: a change of them needs another VERSION. (Pixels and
    sound depend on the encoder's version.)"""
    world.write_annotations(tmp_path, sample_clips(SMALL), SMALL)
    names = ("params.jsonl", "train.json", "pretrain.json", "reading.jsonl", "erv_train.jsonl", "erv_valid.jsonl")
    found = b"".join((tmp_path / name).read_bytes() for name in names)
    for name in ("lm", "text_gate", "erv"):
        vocab = Tokenizer.from_file(str(tmp_path / "tokenizers" / name / "tokenizer.json")).get_vocab()
        found += str(sorted(vocab.items())).encode()
    assert (world.VERSION, hashlib.sha256(found).hexdigest()[:16]) == (10, "4039ae76bc3d7917")


def test_a_stopped_world_begins_again_and_a_complete_one_is_reused(small, tmp_path, monkeypatch):
    folder = tmp_path / "world"
    with monkeypatch.context() as m:
        m.setattr(world, "write_annotations", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_world(folder, SMALL, workers=1)
    assert not (folder / "world.json").exists()
    (folder / "clip" / "10003.mp4").write_bytes(b"half")
    (folder / "clip" / "99999.mp4").write_bytes(b"of other settings")
    build_world(folder, SMALL, workers=1)
    assert contents(folder) == contents(small)
    written = (folder / "clip" / "10001.mp4").stat().st_mtime_ns
    assert build_world(folder, SMALL) == folder and (folder / "clip" / "10001.mp4").stat().st_mtime_ns == written


def test_a_folder_of_something_else_is_refused(small, tmp_path):
    with pytest.raises(SettingsError, match="other settings"):
        build_world(small, replace(SMALL, noise=0.3))
    (tmp_path / "dfew" / "clip").mkdir(parents=True)
    with pytest.raises(SettingsError, match="not a world's"):
        build_world(tmp_path / "dfew", SMALL)
    assert list((tmp_path / "dfew").iterdir()) == [tmp_path / "dfew" / "clip"]
    with pytest.raises(SettingsError):
        sample_clips(replace(SMALL, train=0, test=0, tune=0, pretrain=0))


def test_annotations(small):
    numbers = {}
    truth = {row["number"]: row for row in read_jsonl(small / "params.jsonl")}
    for split, size in (("train", 24), ("test", 8), ("tune", 4)):
        lines = (small / f"single_{split}set_5.csv").read_text().splitlines()
        assert lines[0] == "video_name,label" and len(lines) == size + 1
        numbers[split] = [int(line.split(",")[0]) for line in lines[1:]]
        for number, label in (map(int, line.split(",")) for line in lines[1:]):
            assert EMOTIONS[label - 1] == truth[number]["label"]
    assert len({n for part in numbers.values() for n in part}) == 36 and len(truth) == 66
    assert all((small / "clip" / f"{n}.mp4").is_file() for n in truth)
    entries = read_json(small / "train.json")
    assert len(entries) == 12 * WorldSettings.resamples and len({e["video"] for e in entries}) == 12
    human, gpt = entries[0]["conversations"]
    assert human == {"from": "human", "value": f"<video>\n<audio>\n{QUESTION} {REASONING_SUFFIX}"}
    assert gpt["from"] == "gpt" and gpt["value"].startswith("<think>") and gpt["value"].endswith("</answer>")
    captions = read_json(small / "pretrain.json")
    assert {truth[int(e["video"][5:10])]["split"] for e in captions} == {"pretrain"} and len(captions) == 90
    assert len(read_jsonl(small / "erv_train.jsonl")) == 300 and len(read_jsonl(small / "erv_valid.jsonl")) == 60
    assert sum(row["source"] == "human" for row in read_jsonl(small / "erv_train.jsonl")) == 60
    assert all("truth" in row for row in read_jsonl(small / "erv_valid.jsonl"))
    assert not any("truth" in row for row in read_jsonl(small / "erv_train.jsonl"))


# --------------------------------------------------------------------------------------------- noise, as it was set

def test_clips_are_weak_and_contradict_as_set():
    clips = sample_clips(WorldSettings(train=3000, test=0, pretrain=0))
    assert abs(np.mean([c.face_shows != c.label or c.voice_shows != c.label for c in clips]) - 0.05) < 0.02
    assert max(abs(n / 3000 - 1 / 7) for n in Counter(c.label for c in clips).values()) < 0.03
    happy = np.array([c.face for c in clips if c.face_shows == "happy"])  # mouth_curve: 0.9 x strength + noise
    assert abs((happy[:, FACE.index("mouth_curve")] < 0.38).mean() - 0.2) < 0.1
    still = np.array([c.voice for c in clips if c.voice_shows == "neutral"])
    assert abs(still[:, VOICE.index("pitch")].std() - 0.16) < 0.03


def test_answers_follow_explanations_and_clips_as_set():
    """Shares by hand. Percept = label: 1 - 6/7 noise; explanation = percept: 1 - 6/7 noise; the answer is one of both."""
    settings = WorldSettings(train=1000, test=0, pretrain=0, percept_noise=0.4, about_noise=0.3, reads=0.6)
    clips = sample_clips(settings)
    thoughts, answers = zip(*(told for clip in clips for told in world.sft_targets(clip, settings)))
    labels = [c.label for c in clips for _ in range(settings.resamples)]
    judged = lexicon.LexiconJudge().judge(list(thoughts), EMOTIONS)

    def equal(x, y):
        return np.mean([a == b for a, b in zip(x, y)])

    percept, about = 1 - 0.4 * 6 / 7, 1 - 0.3 * 6 / 7
    told = about * percept + (1 - about) * (1 - percept) / 6
    assert abs(equal(judged, labels) - told) < 0.04
    assert abs(equal(answers, labels) - (0.6 * told + 0.4 * percept)) < 0.04
    assert abs(equal(answers, judged) - (0.6 + 0.4 * about)) < 0.04
    one_percept = [len(set(answers[i:i + settings.resamples])) == 1 for i in range(0, len(answers), settings.resamples)]
    assert 0.55 < np.mean(one_percept) < 0.75  # about 0.883 ** 3: a percept is fixed for its clip
    assert 4 < np.mean([thought.count(".") for thought in thoughts]) < 5


def test_texts_without_a_clip_say_what_they_answer(small):
    """So do the explanations of pretrain.json; its captions answer at random."""
    rows, judge = read_jsonl(small / "reading.jsonl"), lexicon.LexiconJudge()
    assert len(rows) == SMALL.reading and np.mean([x == row["emotion"] for x, row in zip(
        judge.judge([row["explanation"] for row in rows], EMOTIONS), rows)]) > 0.9
    texts = [e["conversations"][1]["value"].split("</think>\n<answer>") for e in read_json(small / "pretrain.json")]
    right = [judge.judge([said], EMOTIONS)[0] == answer.removesuffix("</answer>") for said, answer in texts]
    assert np.mean(right[2::3]) > 0.9 and np.mean(right) < 0.6  # of each clip two captions, then an explanation


def test_label_noise_of_the_verifiers_pairs():
    settings = WorldSettings(test=0, pretrain=0)
    train, valid = world.erv_pairs(sample_clips(settings), settings)
    wrong = np.mean([row["labels"][0] != row["truth"][0] for row in train])
    assert abs(wrong - 0.12) < 0.02 and len(train) == 4000 and len(valid) == 500
    assert not {r["clip"] for r in train} & {r["clip"] for r in valid}
    small = [row for row in train if row["source"] == "human"]
    assert len(small) == 800
    counts = Counter(row["truth"][0] for row in small)
    assert counts["disgust"] < counts["anger"] / 4  # what the complement set is for
    assert any(len(row["labels"]) == 2 for row in train) and max(len(row["labels"]) for row in train) == 2


def test_true_labels_by_hand():
    s = text.Sentence
    assert text.true_labels([s("a")]) == ["neutral"]
    two_and_one = [s("a"), s("b", "sad"), s("c", "sad"), s("d", "fear")]
    assert text.true_labels(two_and_one) == ["sadness", "fear"]
    assert text.true_labels([s("b", "sad"), s("c", "angry")]) == ["anger", "sadness"]  # a tie: the later first
    assert text.true_labels([s("b", "sad"), s("c", "angry"), s("d", "sad"), s("e", "angry")]) == ["anger", "sadness"]
    assert text.true_labels([s("b", "sad"), s("c", "angry"), s("d", "fear"), s("e", "sad")]) == ["sadness", "fear"]
    assert text.true_labels([s("b", "sad")] * 3 + [s("c", "angry")]) == ["sadness"]  # 1 is under half of 3


def test_captions_name_no_emotion_and_follow_the_parameters():
    rng = np.random.default_rng(0)
    for clip in sample_clips(replace(SMALL, train=0, test=0, tune=0, pretrain=300)):
        caption = text.caption(rng, clip.look, clip.face, clip.voice)
        assert lexicon.LexiconJudge().emotion(caption) == "neutral", caption
        if "mouth is up" in caption:
            assert clip.face[FACE.index("mouth_curve")] > 0.3


# ------------------------------------------------------------------------------------------------- tokenizers

def test_tokenizers(small):
    folder = small / "tokenizers"
    lm = Tokenizer.from_file(str(folder / "lm" / "tokenizer.json"))
    golden = Tokenizer.from_file(str(Path(__file__).parent / "golden" / "chat" / "tokenizer.json"))
    assert lm.get_vocab_size() == 800
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    assert [lm.token_to_id(t) for t in specials] == list(range(794, 800))
    words = "<vi_start> isn't it 42 times?\n\n  <|im_end|>\nA naïve test – ok"
    assert lm.decode(lm.encode(words).ids, skip_special_tokens=False) == words
    assert lm.pre_tokenizer.pre_tokenize_str(words) == golden.pre_tokenizer.pre_tokenize_str(words)
    settings = read_json(folder / "lm" / "tokenizer_config.json")
    assert settings == read_json(Path(__file__).parent / "golden" / "chat" / "tokenizer_config.json")
    assert 794 not in lm.encode(render()).ids and 795 in lm.encode(render()).ids
    spoken = [e["conversations"][1]["value"] for e in read_json(small / "train.json")]
    said = {f" {word}" for text_ in spoken for word in re.findall(r"(?<= )[A-Za-z]+", text_)}
    assert len(said) > 60 and [word for word in said if len(lm.encode(word).ids) > 1] == []
    assert len(lm.encode(render()).ids) < 90

    gate = Tokenizer.from_file(str(folder / "text_gate" / "tokenizer.json"))
    ids = gate.encode(QUESTION)
    assert gate.get_vocab_size() <= 256 and gate.token_to_id("[PAD]") == 0
    assert ids.tokens[0] == "[CLS]" and ids.tokens[-1] == "[SEP]" and "[UNK]" not in ids.tokens

    erv = Tokenizer.from_file(str(folder / "erv" / "tokenizer.json"))
    assert erv.get_vocab_size() == 512
    assert [erv.token_to_id(t) for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    ids = erv.encode("Her mouth droops. Ünseen wörds!").ids
    assert ids[0] == 0 and ids[-1] == 2 and 3 not in ids


# ------------------------------------------------------------------------------------------------- judges

def test_the_lexicon_knows_the_grammar():
    """Each emotional sentence that the grammar can emit, for a woman and a man; appearance is neutral."""
    judge = lexicon.LexiconJudge()
    cases = [(text.fill(words, woman), emotion) for table in text.CUES.values() for emotion in EMOTIONS
             for words in table[emotion] for woman in (True, False)]
    right = [verdict == emotion for verdict, (_, emotion) in zip(judge.judge([c for c, _ in cases], EMOTIONS), cases)]
    assert len(cases) == 112 and np.mean(right) >= 0.95
    rng = np.random.default_rng(0)
    clips = sample_clips(replace(SMALL, train=300))
    neutral = judge.judge([text.join(text.appearance(rng, c.look, 0.5)) for c in clips], EMOTIONS)
    assert set(neutral) == {"neutral"}
    whole = judge.judge([text.join(text.explain(rng, c.look, c.label, 0.1)) for c in clips], EMOTIONS)
    assert np.mean([a == c.label for a, c in zip(whole, clips)]) > 0.9


def test_paraphrases_by_hand(monkeypatch):
    """"<abc>" and "<abd>": of six runs of letters each "<ab" is in both and left out; of the ten kept p = 1.1 / 6 for the
    own five, 0.1 / 6 for the others: five of them make 11 ** 5 to 1."""
    monkeypatch.setattr(lexicon, "PARAPHRASES", {"happy": ["Abc."], "sad": ["Abd."]})
    judge = lexicon.ParaphraseJudge()
    assert judge.logs["abc"] == pytest.approx({"happy": math.log(1.1 / 6), "sad": math.log(0.1 / 6)})
    assert judge.probabilities("ABC!") == pytest.approx({"happy": 11**5 / (11**5 + 1), "sad": 1 / (11**5 + 1)})
    assert judge.probabilities("ab, abe") == {"happy": 0.5, "sad": 0.5}  # nothing that it knows


def test_the_second_judge_learnt_from_no_sentence_of_a_world():
    """It is right on most clean explanations, not on all; the words of the paraphrases are other sentences."""
    judge, rng = lexicon.ParaphraseJudge(), np.random.default_rng(0)
    texts = [sentence for sentences in lexicon.PARAPHRASES.values() for sentence in sentences]
    assert len(texts) == 128 and not {*texts} & {*text.grammar(True), *text.grammar(False)}
    clips = sample_clips(replace(SMALL, train=300))
    said = judge.judge([text.join(text.explain(rng, c.look, c.label)) for c in clips], EMOTIONS)
    assert 0.8 < np.mean([a == c.label for a, c in zip(said, clips)]) < 1
    assert judge.judge(["A blue jacket.", ""], EMOTIONS) == ["neutral", None]


def test_judge_reads_words_outside_the_grammar_and_answers_in_the_callers_labels():
    judge = lexicon.LexiconJudge()
    assert judge.judge(["Tears stream down and she cries, sobbing.", "He seems furious; he yells."],
                       tuple(map(to_erv, EMOTIONS))) == ["sadness", "anger"]
    assert judge.judge(["He does not smile. He is not happy. His voice is harsh."], EMOTIONS) == ["angry"]
    assert judge.judge(["She smiles.", "", "A man in a shirt."], ("sad", "neutral")) == [None, None, "neutral"]
    assert judge.judge(["A man in a shirt."], ("happy", "sad")) == [None]


def test_judges_share_nothing_with_the_labeller():
    """The module of the judges imports the standard library alone: not the grammar, not the verifier's labels."""
    tree = ast.parse(Path(lexicon.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {"collections", "json", "math", "pathlib", "re"}


def test_slips_are_of_another_emotion_but_never_calm():
    rng = np.random.default_rng(0)
    told = [s.emotion for _ in range(600) for s in text.explain(rng, LOOKS[0], "sad", 0.3)]
    assert set(told) == set(EMOTIONS) - {"neutral"} | {None}
    cues = [s.emotion for _ in range(600) for s in text.explain(rng, LOOKS[0], "neutral", 0.3) if s.emotion]
    assert 0.25 < np.mean([e != "neutral" for e in cues]) < 0.35


# ------------------------------------------------------------------------------- the stages before GRPO, and its table

def test_a_world_that_is_taken_is_of_the_runs_seed(tmp_path):
    """GRPO's own lies inside, that of the stages before it beside them; one of another seed is not taken unasked."""
    def world(folder: str, seed: int) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "world.json").write_text(json.dumps({"settings": {"seed": seed}}))

    def where(cls, seed: int, **given) -> str:
        settings = cls(out=str(tmp_path / "run"), seed=seed, **given)
        chain.world_stages(settings)
        return str(Path(settings.world).relative_to(tmp_path))

    assert where(GRPOSettings, 0) == "run/world" and where(SFTSettings, 0) == where(ERVSettings, 0) == "world"
    world("world", 17)
    assert where(SFTSettings, 17) == "world" and where(GRPOSettings, 0) == "run/world"
    assert where(GRPOSettings, 0, world=str(tmp_path / "world")) == "world"  # it is asked for
    world("run/world", 1)
    assert where(GRPOSettings, 1) == "run/world"
    for cls, folder, seed in ((GRPOSettings, "run/world", 1), (SFTSettings, "world", 17)):
        with pytest.raises(SettingsError, match=f"{folder}: holds a world of seed {seed}, not 0: give another --out"):
            where(cls, 0)


def test_the_baseline_gets_whatever_was_given_for_ours(tmp_path, monkeypatch):
    """It trains with Ours' settings, not with the preset's: the two stand in one table. No table, no Baseline."""
    commands = []
    monkeypatch.setattr(chain, "run", lambda some, processes: commands.extend(some))
    given = ["--out", str(tmp_path), "--lr", "3e-4", "--group-size", "4", "--beta", "0.1", "--mu", "2",
             "--modality", "video", "--no-subtitles", "--seed", "5", "--ablate", "augmentation", "--eval-clips", "7"]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *given])
    settings = parse(GRPOSettings, "", given)
    chain.prepare(settings, tmp_path / "scripts", Processes(0, 1, torch.device("cuda", 0)))
    assert all(c[c.index("--device") + 1] == "cuda" for c in commands[1:3])  # where GRPO itself runs
    assert [Path(c[0]).name for c in commands] == ["-m", "sft.py", "erv.py", "grpo.py"]
    assert "--clips-only" not in commands[0]  # SFT starts from the base model
    scripts = [word for c in commands for word in c if word.endswith(".py")]
    assert scripts == [str(tmp_path / "scripts" / f"{name}.py") for name in ("sft", "erv", "grpo")]  # not the package's
    for folder in (tmp_path / "sft", tmp_path / "world"):  # which the command's own check looks for
        folder.mkdir()
    made = parse(GRPOSettings, "", commands[-1][1:])
    assert (made.lr, made.group_size, made.beta, made.mu, made.modality) == (3e-4, 4, 0.1, 2, "video")
    assert made == replace(settings, out=str(tmp_path / "baseline"), erv="", ablate="", eval_clips=-1, resume=True,
                           w_explanation=0.0, cache_features="WORLD/features")
    sft = parse(SFTSettings, "", commands[1][1:])
    chain.prepare_sft(sft, Processes(0, 1, torch.device("cpu")))
    assert sft.cache_features == settings.cache_features == f"{tmp_path}/world/features"  # the same for all stages
    commands.clear()
    for name in ("sft", "erv-unaugmented", "baseline"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "model.safetensors").touch()
    chain.prepare(settings, tmp_path / "scripts", Processes(0, 1, torch.device("cpu")))
    assert [c[:2] + c[-1:] for c in commands] == [["-m", "erv_min.toy", "--clips-only"]]  # SFT is there, the world not
    monkeypatch.setattr(chain, "load_examples", lambda data: [])
    for unasked in (["--no-baseline"], ["--eval-clips", "-1"], ["--w-explanation", "0"], ["--data", "toy:/w"]):
        settings = parse(GRPOSettings, "", [*given, *unasked])
        chain.prepare(settings, tmp_path / "scripts", Processes(0, 1, torch.device("cpu")))
        assert not settings.baseline


def test_a_process_alone_under_torchrun_gives_its_command_to_two(tmp_path, monkeypatch):
    """On the CPU, if the prompts halve, and never else: to one for each kind of GRPO and then to two for the table."""
    monkeypatch.setattr(chain, "become", lambda before, locks, after: started.extend([before, *after]))
    monkeypatch.setattr(chain, "run", lambda *_: started.append("baseline by itself"))
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--lr", "3e-4"])
    (tmp_path / "world").mkdir()
    (tmp_path / "world/world.json").write_text('{"settings": {"seed": 0}}')
    ours, none = ["scripts/grpo.py", "--lr", "3e-4"], ["--eval-clips", "-1"]
    for size, device, batch in ((None, "cpu", 32), ("2", "cpu", 32), ("1", "cuda", 32), ("1", "cpu", 31),
                                ("1", "cpu", 32)):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        for baseline in (True, False):
            settings, started = GRPOSettings(out=str(tmp_path), model="m", erv="e", batch_size=batch,
                                             baseline=baseline), []
            chain.prepare(settings, Path("scripts"), Processes(0, 1, torch.device(device)))
            if (size, device, batch) != ("1", "cpu", 32):
                assert started == ["baseline by itself"] * baseline
            elif baseline:
                before, training, table = started
                assert before == [] and training[1] == 1
                assert training[0][0][:3] == ours and training[0][1] == [*ours, *none]
                assert table == ([[*ours, "--resume"]], 2)
            else:
                assert started == [[], ([ours], 2)]


def test_who_waits_for_the_two_holds_neither_the_folder_nor_pytorch(tmp_path):
    """It is the same process as before, small, and its status is theirs. Stages before find the folder locked, the two
    can take it."""
    opens = (f"import torch; from erv_min.train.folder import LOCKS, open_folder; from erv_min.base.processes import "
             f"Processes; open_folder({str(tmp_path)!r}, True, Processes(0, 1, torch.device('cpu')))")
    refused = python(f"\ntry:\n    {opens}\nexcept Exception as error:\n    print(error, flush=True)")
    for code in (0, 3, 75):
        inner = (f"{opens}; maps = open(f'/proc/{{os.getppid()}}/maps').read() if os.path.exists('/proc') else ''; "
                 f"print('parent', os.getppid(), 'libtorch' in maps, flush=True); sys.exit({code})")
        outer = (f"import os; {opens}; from erv_min.toy import launch; print('outer', os.getpid()); "
                 "locks = [x.fileno() for x in LOCKS]; "
                 f"launch.become([([{refused!r}], 1)], locks, [([{python(inner)!r}], 1)])")
        done = subprocess.run([sys.executable, "-c", outer], capture_output=True, text=True)
        assert done.returncode == (1 if code == 3 else code), done.stderr
        assert done.stdout.count("another run is writing into this folder") == 1
        (first,), (second, big) = (re.findall(rf"^{word} (.*)$", done.stdout, re.M)[0].split()
                                   for word in ("outer", "parent"))
        assert first == second and big == "False"


def test_the_table_says_what_it_shows():
    """At the bounds of the paper's movement; and each of them crossed by a tenth of a point."""
    sft, baseline, ours = ({"EEA": 40.0, "FCR": 35.0, "EPC": 75.0, "WAR": 50.0},
                           {"EEA": 45.0, "FCR": 42.0, "EPC": 60.0, "WAR": 60.0},
                           {"EEA": 55.0, "FCR": 52.0, "EPC": 70.0, "WAR": 57.0})
    said, shown = chain.movement(sft, baseline, ours)
    assert "alone take explanations and answers apart (EPC -15.0, WAR +10.0 over SFT)" in said and shown
    assert "R_E brings them together (EPC +10.0, EEA +10.0 over GRPO without it)" in said
    for row, name, step in ((baseline, "EPC", 5.1), (baseline, "WAR", -0.1), (ours, "EPC", -0.1), (ours, "EEA", -0.1),
                            (ours, "FCR", -0.1), (ours, "WAR", -0.1)):
        row[name] += step
        assert not chain.movement(sft, baseline, ours)[1], name
        row[name] -= step
    assert not chain.movement(sft | {"EPC": 59}, baseline | {"EPC": 40}, ours)[1]  # an SFT that does not cohere
    assert "do not take" in chain.movement(sft | {"EPC": 69.9}, baseline, ours)[0]
    assert "does not bring them together (EPC +9.9" in chain.movement(sft, baseline, ours | {"EPC": 69.9})[0]


def python(code: str) -> list[str]:
    return ["-c", f"import os, signal, sys, time; {code}"]


def test_a_stage_runs_by_itself(tmp_path, monkeypatch):
    """On one thread, and apart from this process's group; two side by side wait for each other's file here."""
    for name, here in (("RANK", "1"), ("WORLD_SIZE", "2"), ("OMP_NUM_THREADS", "2")):
        monkeypatch.setenv(name, here)
    said = ("open(f'{name}', 'w').write("
            "str('RANK' in os.environ or 'WORLD_SIZE' in os.environ) + os.environ['OMP_NUM_THREADS'])")
    a, b = (python(f"os.chdir({str(tmp_path)!r}); name = {mine!r}; {said}\n"
                   f"while not os.path.exists({other!r}): time.sleep(0.01)") for mine, other in ("ab", "ba"))
    launch.run([a, b], 1)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["False1"] * 2


def test_a_process_that_fails_or_stops_ends_the_other(tmp_path):
    """Whichever of the two it is; the first one's status is told, and Ctrl-C and SIGTERM work afterwards as before."""
    mark, ready = tmp_path / "stopped", tmp_path / "on"
    waits = (f"signal.signal(15, lambda *_: (open({str(mark)!r}, 'w'), sys.exit(75)))\n"
             f"open({str(ready)!r}, 'w'); time.sleep(60)")
    before = signal.getsignal(signal.SIGTERM)

    def two(rank: int, ends: str) -> None:
        """Runs two processes; `rank` does `ends` once the other one waits."""
        until = f"while not os.path.exists({str(ready)!r}): time.sleep(0.01)"
        indented = "\n".join(f"    {line}" for line in (until + "\n" + ends).splitlines())
        rest = "\n".join(f"    {line}" for line in waits.splitlines())
        launch.run([python(f"\nif os.environ['RANK'] == '{rank}':\n{indented}\nelse:\n{rest}")], 2)

    for rank in (0, 1):
        with pytest.raises(SystemExit, match="ended with status 3"):
            two(rank, "sys.exit(3)")
        assert mark.exists() and signal.getsignal(signal.SIGTERM) is before
        mark.unlink(), ready.unlink()
    for ends in ("sys.exit(75)", f"os.kill({os.getpid()}, 15); time.sleep(60)"):  # it stops; this process is told to
        with pytest.raises(SystemExit) as stopped:
            two(0, ends)
        assert stopped.value.code == 75 and mark.exists()
        mark.unlink(), ready.unlink()


def test_two_processes_of_a_command_find_each_other(tmp_path, monkeypatch):
    """Apart from the store of this process's torchrun; one that fails ends the other, which waits for it."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    join = "from erv_min.base.processes import *; p = join_processes('cpu'); "
    write = f"open({str(tmp_path)!r} + f'/{{p.rank}}', 'w').write(str(all_gather_object(p.rank))); leave()"
    launch.run([python(join + write)], 2)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[0, 1]"] * 2
    with pytest.raises(SystemExit, match="ended with status 3"):
        launch.run([python(f"os.environ['RANK'] == '1' and sys.exit(3); {join}")], 2)


# --------------------------------------------------------------------------------- of the grammar, and true of the clip

def test_what_the_world_writes_is_of_its_grammar():
    """Every sentence of every explanation is found in the right person, with the emotion that its record names."""
    rng = np.random.default_rng(0)
    for clip in sample_clips(replace(SMALL, train=200)):
        for s in text.explain(rng, clip.look, clip.label, 0.2):
            assert text.grammar(clip.look.woman)[s.text][1] == s.emotion
    assert len(text.grammar(True)) == len(text.grammar(False)) == 5 + 4 + 2 + 3 + 1 + 21 + 14 + 21


def test_sentences_counted_by_hand(tmp_path):
    clip = {"number": 7, "look": {"woman": True}, "face_shows": "sad", "voice_shows": "fear"}
    write_jsonl(tmp_path / "params.jsonl", [clip])
    said = ("Behind her is the garden. She weeps. She beams. The voice is shaky. "
            "She feels sad. "  # of the grammar; a conclusion is no cue
            "He sobs. She freeurprised. He glares wears a tone. she weeps.")
    rows = [{"video_id": "7", "output": f"<think>{said}</think>\n<answer>sad</answer>"},
            {"video_id": "7", "output": "<think></think>"}]
    assert text.count_sentences(rows, tmp_path) == {
        "sentences": 9, "formed": 5, "cues": 3, "true": 2}  # "He sobs.": not her person
