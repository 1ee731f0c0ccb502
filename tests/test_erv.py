"""erv.py and data/pairs.py, scripts/erv.py end to end, and scripts/tools/audit.py: ways to cheat."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from erv_min import checkpoint, erv
from erv_min.base.errors import CheckpointError, DataError, SettingsError
from erv_min.base.files import read_json, read_jsonl
from erv_min.base.processes import Processes
from erv_min.data import pairs
from erv_min.emotions import ERV_LABELS, GOEMOTIONS, GOEMOTIONS_INDEX
from erv_min.rewards import Reward, explanation_reward, select_labels
from erv_min.tokenizer import EncoderTokenizer
from erv_min.toy import chain
from erv_min.toy.lexicon import LexiconJudge
from erv_min.toy.render import Look
from erv_min.toy.text import CUES, EMOTIONS, appearances, erv_row, fill
from erv_min.toy.vocab import roberta_tokenizer
from erv_min.train import log

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "tools"))
import audit  # noqa: E402

DFEW = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")
# Sentences of the embedded world about a man: his look, and what conveys an emotion.
LOOK = appearances(Look(False, "red", "dark", True, True, "office", 0))[0][0]
SAYS = {emotion: [fill(CUES[subject][emotion][-1], False) for subject in ("face", "voice")] for emotion in EMOTIONS}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def template_rows(seed: int, count: int, noise: float) -> list[dict]:
    """Pseudo-labelled pairs of the embedded world's grammar."""
    rng = np.random.default_rng(seed)
    looks = [Look(bool(i % 2), s, h, bool(i % 3), bool(i % 5), r, 0) for i, (s, h, r) in enumerate(
        (s, h, r) for s in ("red", "blue", "white") for h in ("dark", "fair") for r in ("office", "garden"))]
    return [erv_row(rng, looks[rng.integers(len(looks))], EMOTIONS[rng.integers(7)], "pseudo", f"{seed}-{i}", noise,
                    0.25) for i in range(count)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Training rows with 15% wrong first labels, held-out rows with the generator's truth, a tokenizer."""
    out = tmp_path_factory.mktemp("erv")
    train = [{k: v for k, v in row.items() if k != "truth"} for row in template_rows(0, 2500, 0.15)]
    write(out / "train.jsonl", train)
    write(out / "valid.jsonl", template_rows(1, 400, 0.15))
    (out / "tokenizer").mkdir()
    roberta_tokenizer([row["text"] for row in train]).save(str(out / "tokenizer" / "tokenizer.json"))
    return out


def load_script(name: str):
    path = Path(__file__).parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{name}_script"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script():
    return load_script("erv")


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(folder / "train.jsonl"), "--valid", str(folder / "valid.jsonl"), "--tokenizer",
            str(folder / "tokenizer"), "--out", str(out), "--device", "cpu", *more]


@pytest.fixture(scope="session")
def trained(folder, script) -> Path:
    script.main(arguments(folder, folder / "run"))
    return folder / "run"


class FakeModel(torch.nn.Module):
    """Counts the sentences it is given; the logit of class j is the sum of the ids plus j."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, ids, mask):
        self.batches.append(tuple(ids.shape))
        return ((ids * mask).sum(1, keepdim=True) + torch.arange(11.0)) / 100


class FakeTokenizer:
    """One id a word: its length."""

    def encode_batch(self, texts):
        if not texts:
            return torch.zeros(0, 0), torch.zeros(0, 0)
        rows = [[len(word) for word in text.split()] for text in texts]
        width = max(map(len, rows))
        return (torch.tensor([r + [1] * (width - len(r)) for r in rows]),
                torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]))


class FakeVerifier(erv.Verifier):
    """Knows each sentence's probabilities: 0.9 for the emotions that it names, neutral where it names none."""

    def __init__(self):
        self.labels = tuple(ERV_LABELS)

    def probabilities(self, sentences):
        rows = [[0.9 if label in s.lower() else 0.1 for label in ERV_LABELS] for s in sentences]
        for row in rows:
            row[ERV_LABELS.index("neutral")] = 0.1
            row[ERV_LABELS.index("neutral")] = 0.8 if max(row) < 0.5 else 0.1
        return torch.tensor(rows).reshape(-1, 11)


# ---- loss ------------------------------------------------------------------------------------------------------------


def test_erv_loss_by_hand():
    # logits 0 and ln 3: probabilities 1/2 and 3/4. Targets 1 and 0: -ln(1/2) = 0.6931, -ln(1/4) = 1.3863; mean 1.0397.
    logits, wanted = torch.tensor([[0.0, np.log(3)]]), torch.tensor([[1.0, 0.0]])
    assert erv.erv_loss(logits, wanted).item() == pytest.approx(1.0397, abs=1e-4)


# ---- training data ---------------------------------------------------------------------------------------------------


def test_rows_accept_any_data_sets_names(tmp_path):
    path = write(tmp_path / "emer.jsonl", [{"text": " He shouts. ", "labels": ["angry", "Anger"]},
                                           {"text": "She waits.", "labels": ["worried"], "truth": ["sad"], "clip": "7",
                                            "source": "pseudo"}])
    first, second = pairs.read_rows([path])
    assert first == pairs.Row("He shouts.", ("anger",), "emer", "He shouts.", ("anger",))
    assert second == pairs.Row("She waits.", ("anxiety",), "pseudo", "7", ("sadness",))


@pytest.mark.parametrize("row, field", [
    ({"labels": ["sad"]}, "text"), ({"text": " ", "labels": ["sad"]}, "text"), ({"text": "x"}, "labels"),
    ({"text": "x", "labels": "sad"}, "labels"), ({"text": "x", "labels": []}, "labels"),
    ({"text": "x", "labels": ["sad"], "truth": []}, "truth"),
    ({"text": "x", "labels": ["gloomyish"]}, "gloomyish"), ({"text": "x", "labels": ["sad"], "truth": ["?"]}, "label '?'")])
def test_bad_rows_are_named(tmp_path, row, field):
    path = write(tmp_path / "rows.jsonl", [{"text": "fine", "labels": ["sad"]}, row])
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2") as error:
        pairs.read_rows([path])
    assert field in str(error.value)


def test_absent_fields_of_rows(tmp_path):
    """NaN for a clip is no clip: such rows do not all fall on one side of the split."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "She smiles.", "labels": ["joy"], "source": NaN, "clip": NaN}\n')
    (row,) = pairs.read_rows([path])
    assert (row.source, row.key) == ("rows", "She smiles.")
    path.write_text('{"text": "nan", "labels": ["joy"]}\n')
    with pytest.raises(DataError, match="row 1: expected text in field 'text'"):
        pairs.read_rows([path])


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no training pair"):
        pairs.read_rows([write(tmp_path / "empty.jsonl", [])])


def test_split_keeps_a_clip_on_one_side():
    rows = [pairs.Row(f"text {i}", ("anger",), "s", f"clip {i // 4}", ("anger",)) for i in range(4000)]
    train, valid = pairs.split_rows(rows, 0.1)
    assert {r.key for r in train}.isdisjoint(r.key for r in valid) and len(train) + len(valid) == 4000
    assert 300 < len(valid) < 500  # 10% of 1000 clips, 3 standard deviations are 28 clips
    assert pairs.split_rows(rows, 0.1) == (train, valid) and pairs.split_rows(rows, 0.1, seed=1) != (train, valid)


def test_counts_are_table_5s():
    rows = [pairs.Row("a", ("anger", "fear"), "emer", "a", ()), pairs.Row("b", ("anger",), "emer", "b", ()),
            pairs.Row("c", ("neutral",), "pseudo", "c", ())]
    lines = [line.split() for line in pairs.counts_table(rows).splitlines()]
    assert lines[1][:5] == ["emer", "2", "2", "-", "1"] and lines[-1][:6] == ["all", "3", "2", "-", "1", "-"]


def test_targets_of_both_heads():
    small = pairs.targets([("anger", "neutral"), ("fear",)])
    assert small.shape == (2, 11) and small.nonzero().tolist() == [[0, 0], [0, 4], [1, 2]]
    large = pairs.targets([("anger", "neutral"), ("fear",)], 28)
    assert large.shape == (2, 28) and large.nonzero().tolist() == [[0, 2], [0, 27], [1, 14]]


# ---- the verifier ----------------------------------------------------------------------------------------------------


def test_each_distinct_sentence_is_scored_once_and_in_order():
    model = FakeModel()
    verifier = erv.Verifier(model, FakeTokenizer(), ERV_LABELS)
    verifier.token_budget = 8
    sentences = ["aa b", "c", "aa b", "dd e f gggg", "c", "h"]
    probs = verifier.probabilities(sentences)
    by_hand = [[sum(map(len, s.split())) + j for j in range(11)] for s in sentences]
    torch.testing.assert_close(probs, torch.sigmoid(torch.tensor(by_hand) / 100))
    # 4 distinct of 1, 1, 2 and 4 words: three fit 8 tokens (3 x 2), the one of 4 words comes alone.
    assert model.batches == [(3, 2), (1, 4)]


def test_no_sentence_gives_no_row():
    assert erv.Verifier(FakeModel(), FakeTokenizer(), ERV_LABELS).probabilities([]).shape == (0, 11)


def test_length_batches_keep_the_budget():
    lengths = torch.randint(1, 50, (300,), generator=torch.Generator().manual_seed(0))
    batches = list(erv.length_batches(lengths, 100))
    assert sorted(i for rows, _ in batches for i in rows.tolist()) == list(range(300))
    assert all(len(rows) * length <= 100 and length == lengths[rows].max() for rows, length in batches)
    assert [length for _, length in batches] == sorted(length for _, length in batches)
    assert [len(rows) for rows, _ in erv.length_batches(torch.tensor([700]), 100)] == [1]  # one too long still comes


def test_head_labels():
    def raw(names):
        return {"id2label": {str(i): name for i, name in enumerate(names)}, "problem_type": "multi_label_classification"}

    assert erv.head_labels(raw(f"LABEL_{i}" for i in range(28)), "x") == GOEMOTIONS
    assert erv.head_labels(raw(ERV_LABELS), "x") == ERV_LABELS
    assert erv.head_labels(raw(ERV_LABELS[::-1]), "x") == ERV_LABELS[::-1]
    for names in (DFEW, [], [*GOEMOTIONS[1:], "admiration"]):
        with pytest.raises(CheckpointError, match="id2label"):
            erv.head_labels(raw(names), "x")
    for kind in ("single_label_classification", "regression", None):  # softmax, none, or whichever it was trained with
        with pytest.raises(CheckpointError, match=f"x/config.json: problem_type is {kind!r}.*multi_label_classification"):
            erv.head_labels(raw(ERV_LABELS) | {"problem_type": kind}, "x")
    assert list(erv.erv_columns(ERV_LABELS[::-1]).items()) == [(x, 10 - i) for i, x in enumerate(ERV_LABELS)]
    assert list(erv.erv_columns(GOEMOTIONS)) == list(ERV_LABELS) and erv.erv_columns(GOEMOTIONS) == GOEMOTIONS_INDEX


def test_fresh_head_keeps_the_rest():
    torch.manual_seed(0)
    old = erv.scratch("toy", 64, 28)
    new = erv.fresh_head(old, 11).state_dict()
    assert new.pop("classifier.out_proj.weight").shape == (11, 64)
    assert new.pop("classifier.out_proj.bias").shape == (11,)
    for name, value in new.items():
        assert torch.equal(value, old.state_dict()[name]), name


def test_a_tokenizer_larger_than_its_model_is_refused(trained, tmp_path):
    vocabulary = EncoderTokenizer(trained).vocab_size
    shutil.copy(trained / "tokenizer.json", tmp_path)
    checkpoint.save_erv(erv.scratch("toy", vocabulary, 11), tmp_path, ERV_LABELS)
    assert len(erv.Verifier.load(tmp_path).probabilities(["He smiles.", "half \ud83d"])) == 2
    checkpoint.save_erv(erv.scratch("toy", vocabulary - 1, 11), tmp_path, ERV_LABELS)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/tokenizer.json: it has {vocabulary} ids, the model {vocabulary - 1}:"):
        erv.Verifier.load(tmp_path)


def test_max_tokens():
    assert erv.max_tokens(erv.scratch("toy", 64, 11)) == 128  # RoBERTa's 130 positions begin at 2


# ---- measures --------------------------------------------------------------------------------------------------------


def test_f1_by_hand():
    truth = [("anger",), ("anger", "disgust"), ("disgust",)]
    guess = [("anger",), ("disgust",), ("anger", "disgust")]
    # anger: hit 1 of 2 guessed, 2 there: P 1/2, R 1/2, F1 1/2. disgust: 2 of 2, 2: 1, 1, 1. fear: none there or guessed.
    # micro: 2 * 3 / (4 + 4) = 3/4; macro over the classes there: (1/2 + 1) / 2 = 3/4.
    report = pairs.verifier_report(0.1 + 0.8 * pairs.targets(guess), truth)
    of_class = report["at_tau"]["per_class"]
    assert of_class["anger"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert of_class["disgust"]["f1"] == 1 and of_class["fear"]["support"] == 0
    assert [report["at_tau"][name] for name in ("micro_f1", "macro_f1")] == pytest.approx([0.75, 0.75])
    # Another guess of disgust: micro 2 * 3 / 9, disgust: P 2/3, F1 4/5, macro (1/2 + 4/5) / 2 = 0.65.
    report = pairs.verifier_report(0.1 + 0.8 * pairs.targets([("anger", "disgust"), *guess[1:]]), truth)
    assert [report["at_tau"][name] for name in ("micro_f1", "macro_f1")] == pytest.approx([6 / 9, 0.65])


def test_the_report_is_of_what_the_reward_selects():
    """At most k labels over tau, the best one if none is: sadness counts at k 2, fear at tau 0.5 although it is 0.4."""
    probs = torch.full((2, 11), 0.1)
    probs[0, ERV_LABELS.index("anger")], probs[0, ERV_LABELS.index("sadness")] = 0.9, 0.8
    probs[1, ERV_LABELS.index("fear")] = 0.4
    truth = [("anger", "sadness"), ("fear",)]
    for tau, k, expected in ((0.5, 2, 1.0), (0.5, 1, 2 * 2 / (2 + 3)), (0.85, 2, 2 * 2 / (2 + 3))):
        report = pairs.verifier_report(probs, truth, tau, k)
        assert report["at_tau"]["micro_f1"] == pytest.approx(expected)


# ---- watched, and cheated --------------------------------------------------------------------------------------------


def test_explanation_statistics_by_hand():
    sentences, label_sets = ["He is here.", "He is angry.", "He is angry."], [["neutral"], ["anger"], ["anger"]]
    rewards = [Reward(1, 1, 0.5, 2.5, sentences, label_sets), Reward(1, 0, 0.0, 1.0, [], [])]
    # 3 sentences over 2 completions; 1 neutral of 3; 2 of 3 name an emotion; 2 distinct of 3; 3 + 3 + 3 words over 2.
    assert log.explanation_statistics(rewards) == pytest.approx(
        {"sentences": 1.5, "neutral_share": 1 / 3, "label_word_rate": 2 / 3, "distinct_sentence_rate": 2 / 3,
         "explanation_words": 4.5})
    assert log.explanation_statistics([Reward(1, 1, 0, 2, ["A b."], [])])["neutral_share"] is None
    # Neutral beside another label stays in R_E and is not counted: 1 of 3. Distinct sentences: 2 of 2 and 1 of 2.
    mixed = [Reward(1, 1, 0, 2, ["A.", "B."], [["neutral", "fear"], ["neutral"]]), Reward(1, 1, 0, 2, ["A.", "A."],
             [["fear", "neutral"]])]
    assert log.explanation_statistics(mixed)["neutral_share"] == pytest.approx(1 / 3)
    assert log.explanation_statistics(mixed)["distinct_sentence_rate"] == 0.75
    assert log.explanation_statistics([])["sentences"] == 0
    words = Reward(1, 1, 0, 2, ["Unhappy.", "Not sad; calm.", "HAPPINESS!", "Sadly."], [])
    assert log.explanation_statistics([words])["label_word_rate"] == 0.5  # whole words, aliases too


HONEST = ["A man is in the office.", "His voice shows anger.", "His face shows fear."]


@pytest.mark.parametrize("way, expected", [
    ("repeat one sentence", ["His voice shows anger."] * 3), ("stuff label words", ["Anger, anger, anger."] * 3),
    ("drop neutral sentences", HONEST[1:]), ("one sentence only", ["His voice shows anger."]),
    ("name the emotion in each", [s[:-1] + ", which shows anger." for s in HONEST]),
    ("two emotions in each", [s[:-1] + ", which shows anger or happiness." for s in HONEST]),
    ("claim calm around one", ["The face is calm and neutral.", "His voice shows anger.", "The person is neutral."]),
    ("wrong answer", HONEST)])
def test_ways_to_cheat(way, expected):
    assert audit.ways_to_cheat(HONEST, "angry", [0.0, 0.9, 0.1], [True, False, False])[way] == expected


def test_every_way_is_written():
    ways = audit.ways_to_cheat(HONEST, "sad", [0.0, 0.9, 0.1], [True, True, True])
    assert len(ways) == 11 and all(sum(ways.values(), []))
    ways = audit.ways_to_cheat(HONEST, "neutral", [0.9, 0, 0], [True, False, False])
    assert ways["drop neutral sentences"] == HONEST


def test_audit_by_hand():
    """Honest R_E: neutral, anger, fear against angry: 1 / (3 - 1) = 1/2."""
    rows = {row.way: row for row in audit.audit(FakeVerifier(), [" ".join(HONEST), ""], ["angry", "sad"], "dfew", DFEW,
                                                lambda texts: ["angry"] * len(texts))}
    assert list(rows) == list(audit.ways_to_cheat(HONEST, "angry", [0, 1, 0], [True, False, False]))
    honest = rows["honest"].rewards
    assert honest == pytest.approx({"paper": 0.5, "no neutral filter": 1 / 3})
    assert rows["repeat one sentence"].rewards["paper"] == 1.0
    assert rows["one sentence only"].rewards == {"paper": 1.0, "no neutral filter": 1.0}
    calm = rows["claim calm around one"].rewards  # two calm sentences, left out by the filter: 1 / (3 - 2)
    assert calm["paper"] == 1.0 and calm["no neutral filter"] == pytest.approx(1 / 3)
    assert rows["wrong answer"].rewards["paper"] == 0.5
    assert rows["stuff label words"].statistics["distinct_sentence_rate"] == pytest.approx(1 / 3)
    assert rows["honest"].judged == 1.0 and "| one sentence only | 100.0 |" in audit.audit_table(list(rows.values()))
    with pytest.raises(SettingsError, match="at least one sentence"):
        audit.audit(FakeVerifier(), [" "], ["sad"], "dfew", DFEW)


# ---- scripts/erv.py --------------------------------------------------------------------------------------------------


def test_training_reaches_macro_f1_of_09(folder, trained):
    """Issue 4: macro F1 of at least 0.9 against the generator's truth, from labels with 15% noise."""
    report = read_json(trained / "report.json")
    assert report["at_tau"]["macro_f1"] >= 0.9 and report["sentences"] == 400
    assert {"micro_f1", "macro_f1", "per_class"} <= set(report["at_tau"])
    lines = read_jsonl(trained / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(len(lines))) and lines[-1]["loss"] < lines[0]["loss"] / 3
    assert {"lr", "examples_per_s", "grad_norm", "padding"} <= set(lines[0])


def test_the_run_is_a_verifier_folder(trained):
    config = read_json(trained / "config.json")
    assert config["model_type"] == "roberta" and config["erv_min"]["settings"]["epochs"] == 4
    verifier = erv.Verifier.load(trained)
    assert verifier.labels == ERV_LABELS
    sentences = [SAYS["sad"][1], LOOK, SAYS["disgust"][0]]
    probs = verifier.probabilities(sentences)
    assert select_labels(probs, verifier.labels) == [["sadness"], ["neutral"], ["disgust"]]
    for sentence, row in zip(sentences, probs):  # alone and in a batch, padded and not
        torch.testing.assert_close(verifier.probabilities([sentence])[0], row, atol=1e-6, rtol=0)


def test_resume_gives_the_same_weights(folder, script, tmp_path, monkeypatch):
    """A run that is stopped after 4 of 8 steps and resumed ends as the one that was not, dropout included."""
    few = write(tmp_path / "train.jsonl", read_jsonl(folder / "train.jsonl")[:128])
    more = ["--data", str(few), "--epochs", "4", "--save-every", "2", "--dropout", "0.1"]
    script.main(arguments(folder, tmp_path / "whole", *more))
    learning_rate = script.learning_rate

    def stop(step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return learning_rate(step, *rest)

    monkeypatch.setattr(script, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments(folder, tmp_path / "cut", *more))
    monkeypatch.undo()
    with pytest.raises(SettingsError, match="--resume"):
        script.main(arguments(folder, tmp_path / "cut", *more))
    script.main(arguments(folder, tmp_path / "cut", *more, "--resume"))
    for name in ("model.safetensors", "epochs.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert [x["step"] for x in read_jsonl(tmp_path / "cut" / "metrics.jsonl")] == list(range(8))


def test_weights_do_not_depend_on_the_number_of_processes(folder, tmp_path):
    """8 steps with the paper's rate, without dropout, and their logged losses; 8 of 16 rows on each."""
    script = str(Path(__file__).parent.parent / "scripts" / "erv.py")
    for size in (1, 2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
        options = "--steps 8 --batch-size 16 --dropout 0 --lr 3e-5".split()
        subprocess.run([*torchrun, script, *arguments(folder, tmp_path / str(size), *options)], check=True,
                       capture_output=True)
    one, two = (load_file(tmp_path / size / "model.safetensors") for size in "12")
    losses = [[x["loss"] for x in read_jsonl(tmp_path / size / "metrics.jsonl")] for size in "12"]
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 8


def row(text, *labels):
    return pairs.Row(text, labels, "pseudo", text, labels)


def test_only_one_process_makes_the_world(script, tmp_path, monkeypatch):
    """The others wait until it is there: they have its paths only after the barrier."""
    made, order = [], []
    monkeypatch.setattr(chain, "run", lambda *_, **__: made.append(1))
    monkeypatch.setattr(chain, "barrier", lambda: order.append(len(made)))
    for rank in (0, 1):
        settings = script.ERVSettings(out=str(tmp_path / "erv"), init="scratch:toy")
        chain.prepare_erv(settings, Processes(rank, 2, torch.device("cpu")))
        assert settings.data.endswith("erv_train.jsonl") and settings.tokenizer
    assert made == [1] and order == [1, 1]


def test_more_processes_than_rows_of_a_step(folder, script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "join_processes", lambda *_: Processes(0, 4, torch.device("cpu")))
    with pytest.raises(SettingsError, match="3 prompts per step do not divide by the 4 processes"):
        script.main(arguments(folder, tmp_path, "--batch-size", "3"))


def test_options_of_training(folder, script, tmp_path):
    """A 28-way head, and a start from another verifier's weights."""
    few = write(tmp_path / "few.jsonl", read_jsonl(folder / "train.jsonl")[:200])
    base = arguments(folder, tmp_path / "a", "--data", str(few), "--epochs", "1", "--head", "28")
    script.main([*base, "--holdout", "0.2", "--valid", ""])
    assert erv.Verifier.load(tmp_path / "a").labels == GOEMOTIONS
    script.main(arguments(folder, tmp_path / "b", "--init", str(tmp_path / "a"), "--data", str(few), "--epochs", "1"))
    assert erv.Verifier.load(tmp_path / "b").labels == ERV_LABELS


def test_a_28_way_head_is_read_through_the_index_map(trained, tmp_path):
    """Divergence 4: the trained 11 outputs, put where GoEmotions has them, give the same probabilities and R_E."""
    small = erv.Verifier.load(trained)
    wide = erv.fresh_head(small.model, 28)
    with torch.no_grad():
        wide.classifier["out_proj"].weight.zero_()
        wide.classifier["out_proj"].bias.fill_(-9.0)
        for part in ("weight", "bias"):
            old, new = (getattr(m.classifier["out_proj"], part) for m in (small.model, wide))
            new[[GOEMOTIONS_INDEX[x] for x in ERV_LABELS]] = old
    checkpoint.save_erv(wide, tmp_path, GOEMOTIONS)
    shutil.copy(trained / "tokenizer.json", tmp_path)
    large, sentences = erv.Verifier.load(tmp_path), [SAYS["happy"][1], SAYS["sad"][1], LOOK]
    probs = large.probabilities(sentences)
    assert large.labels == GOEMOTIONS and probs[0].argmax() == 17 and probs[1].argmax() == 25  # joy, sadness
    torch.testing.assert_close(probs[:, list(erv.erv_columns(large.labels).values())], small.probabilities(sentences))
    sets = [select_labels(v.probabilities(sentences), v.labels) for v in (large, small)]
    for e_gt, R_E in (("happy", 1 / 2), ("sad", 1 / 2), ("neutral", 1 / 3), ("fear", 0)):
        assert explanation_reward(sets[0], e_gt) == explanation_reward(sets[1], e_gt) == R_E


def test_ablate_augmentation_trains_the_toy_verifier_on_human_rows(tmp_path, monkeypatch):
    """Table 2's row in one command on the toy; with real data the error says which verifier to train."""
    grpo, commands = load_script("grpo"), []
    monkeypatch.setattr(grpo.chain, "run", lambda some, processes: commands.extend(some))
    for ablate, name, sources in (("augmentation", "erv-unaugmented", ["--sources", "human"]), ("", "erv", [])):
        commands.clear()
        grpo.chain.prepare(grpo.GRPOSettings(out=str(tmp_path), ablate=ablate), Path("scripts"),
                           Processes(0, 1, torch.device("cpu")))
        (made,) = (c for c in commands if c[0].endswith("erv.py"))
        assert made[made.index("--out") + 1] == str(tmp_path / name) and made[made.index("--out") + 2:] == sources
    with pytest.raises(SettingsError, match="scripts/erv.py --sources"):
        grpo.main(["--preset", "paper-0.5b", "--ablate", "augmentation", "--out", str(tmp_path / "run")])


def test_sources_and_missing_data_are_named(folder, script, tmp_path):
    with pytest.raises(SettingsError, match="the data has the sources pseudo"):
        script.main(arguments(folder, tmp_path / "a", "--sources", "emer"))
    with pytest.raises(SettingsError, match="--data"):
        script.main(["--preset", "paper", "--out", str(tmp_path / "b")])
    with pytest.raises(SettingsError, match="--tokenizer"):
        script.main(["--preset", "paper", "--init", "scratch:toy", "--out", str(tmp_path / "c"), "--data",
                      str(folder / "train.jsonl")])


def test_audit_command(trained, tmp_path, capsys):
    told = {"sad": SAYS["sad"], "angry": SAYS["angry"], "happy": SAYS["sad"]}
    rows = [{"video_id": e, "ground_truth": e, "dataset": "dfew",
             "output": f"<think>{' '.join([LOOK, *cues])}</think>\n<answer>{e}</answer>"} for e, cues in told.items()]
    predictions = str(write(tmp_path / "rows.jsonl", rows))
    audit.main(["--erv", str(trained), "--predictions", predictions, "--judge", "lexicon", "--out",
                str(tmp_path / "audit.json")])
    result = read_json(tmp_path / "audit.json")
    assert result["explanations"] == 2 and result["rows"][0]["rewards"]["paper"] == 1.0  # the happy one is not honest
    assert result["agreement"]["accuracy"] >= 0.8 and "| honest |" in capsys.readouterr().out
    blind = erv.Verifier.load(trained)  # a second verifier that takes every sentence for disgust
    with torch.no_grad():
        blind.model.classifier["out_proj"].weight.zero_()
        blind.model.classifier["out_proj"].bias.fill_(-9.0)[ERV_LABELS.index("disgust")] = 9.0
    checkpoint.save_erv(blind.model, tmp_path / "blind", ERV_LABELS)
    shutil.copy(trained / "tokenizer.json", tmp_path / "blind")
    assert audit.on_paraphrases(blind, 0.5, 2) == {  # disgust's 16 of 112: F1 2 * 16 / (112 + 16), of six others 0
        "sentences": 112, "macro_f1": pytest.approx(0.25 / 7)}
    for broken, message in (([rows[0], 3], "line 2: not a JSON object"),
                            ([{**rows[0], "output": 3}], "row 1: expected fields video_id and output"),
                            ([{"video_id": "1", "output": "x"}], "row 1: clip 1 has no ground_truth"),
                            ([{**rows[0], "ground_truth": "odd"}], "row 1"), ([], "no prediction"),
                            ([rows[0], {**rows[0], "dataset": "mafw", "ground_truth": "anger"}], "dfew and mafw")):
        with pytest.raises(DataError, match=message):
            audit.main(["--erv", str(trained), "--predictions", str(write(tmp_path / "broken.jsonl", broken))])
    with pytest.raises(SettingsError, match="--erv: name a verifier"):
        audit.main(["--predictions", predictions])
    with pytest.raises(DataError, match="--data ''"):
        audit.main(["--erv", str(trained)])


def test_long_sentences_are_cut(folder):
    verifier = erv.Verifier(erv.scratch("toy", 512, 11), EncoderTokenizer(folder / "tokenizer", 128), ERV_LABELS)
    assert verifier.probabilities(["word " * 1000]).shape == (1, 11)


def test_the_judge_knows_nothing_of_the_verifier():
    """A condition of the audit's figures: the lexicon judge reads words, not the verifier's labels or data."""
    assert LexiconJudge().judge(["He sobs."], DFEW)
    assert "erv_min" not in Path(sys.modules[LexiconJudge.__module__].__file__).read_text().split('"""', 2)[2]
