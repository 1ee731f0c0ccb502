"""Small material of the tests of report.py and survey.py: real clips, and runs and studies with made-up answers."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "tools"))

import survey  # noqa: E402

from erv_min.data.examples import load_examples  # noqa: F401
from erv_min.metrics import score  # noqa: F401
from erv_min.train.settings import GRPOSettings
from erv_min.toy.world import WorldSettings, build_world  # noqa: F401
from erv_min.train.folder import provenance  # noqa: F401

EVIL = ("<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\"> She smiles."
        + "m" * 300)


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prediction(video_id: str, truth: str, explanation: str, answer: str, judged: str) -> dict:
    return {"video_id": video_id, "output": f"<think>{explanation}</think><answer>{answer}</answer>",
            "ground_truth": truth, "dataset": "dfew", "judged_emotion": judged, "judge_status": "ok"}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Seven real MP4 clips: 10001 to 10003 for training, 10004 to 10007 held out."""
    folder = tmp_path_factory.mktemp("pages") / "world"
    build_world(folder, WorldSettings(train=3, test=4, pretrain=2, sft_clips=2, resamples=1, erv_train=20, erv_valid=4),
                workers=1)
    return folder


@pytest.fixture(scope="session")
def truths(world):
    return {split: {e.video_id: e.label for e in load_examples(f"toy:{world}", split)} for split in ("train", "test")}


def make_run(folder: Path, world: Path, truths: dict, steps: int = 40, **settings) -> Path:
    """A run's folder as scripts/grpo.py leaves it, with numbers made up."""
    folder.mkdir(parents=True)
    about = provenance(GRPOSettings(out=str(folder), world=str(world), steps=steps, **settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "erv_min": about}))
    same = dict(loss=0.1, reward_format=1.0, reward_explanation=0.5, entropy=1.0, completion_length=40.0, lr=1e-4,
                neutral_share=None, frac_zero_std=0.0, grad_norm=float("nan"), tokens_per_s=100.0)
    lines(folder / "metrics.jsonl", [{"step": i, "reward": 2.0, "reward_answer": i / steps, "kl": i / 100, **same}
                                     for i in range(steps)])
    clip, truth = next(iter(truths["train"].items()))
    row = {"video_id": clip, "dataset": "dfew", "ground_truth": truth,
           "completion": f"<think>{EVIL} He cries. It is a room.</think>\n<answer>{truth}</answer>",
           "sentences": [EVIL, "He cries.", "It is a room."],
           "labels": [["happiness"], ["sadness", "anxiety"], ["neutral"]],
           "reward_format": 1.0, "reward_answer": 1.0, "reward_explanation": 0.5}
    lines(folder / "completions.jsonl", [{"step": i, **row} for i in range(0, steps, 20) for _ in range(3)])
    scores = {}
    for name, share in (("SFT", 1), ("GRPO with R_E", 0)):
        rows = [prediction(i, t, f"She smiles & waves {name}.", t if n % 2 == share else "sad", t)
                for n, (i, t) in enumerate(truths["test"].items())]
        lines(folder / f"predictions-{name.replace(' ', '-')}.jsonl", rows)
        scores[name] = score(rows, "dfew")
    (folder / "evaluation.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, world, truths):
    return make_run(tmp_path_factory.mktemp("runs") / "ours", world, truths)


@pytest.fixture(scope="session")
def studies(tmp_path_factory, world, truths):
    """Two studies of four clips: clips inside the page, and beside it."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("Ours", "Theirs"):
        lines(folder / f"{name}.jsonl", [prediction(i, t, f"{name[0]}{i[-1]}: face </script> & <b>voice</b>.", t, t)
                                         for i, t in truths["test"].items()])
    made = {}
    for kind, megabytes in (("inside", "32"), ("beside", "0")):
        made[kind] = folder / kind
        survey.main(["make", "--first", str(folder / "Ours.jsonl"), "--second", str(folder / "Theirs.jsonl"),
                     "--names", "Ours,Theirs", "--data", f"toy:{world}", "--out", str(made[kind]), "--clips", "4",
                     "--embed-mb", megabytes])
    return made


def key_of(folder: Path) -> tuple[Path, dict]:
    path = Path(f"{folder}-key.json")
    return path, json.loads(path.read_text())
