"""What reaches the sampler when a policy answers: noise of its own for each clip, temperature, top-p, length."""

import contextlib
import inspect
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from erv_min.base import progress
from erv_min.base.processes import Processes
from erv_min.generate import rollout, sampling_noise
from erv_min.inputs import Example, Inputs
from erv_min.logps import Completions
from erv_min.train import answers
from erv_min.train.hooks import HeldOut
from erv_min.train.settings import GRPOSettings, PredictionSettings

ALONE = Processes(0, 1, torch.device("cpu"))
CLIPS = [Example(str(i), Path(f"{i}.mp4"), "sad", "dfew") for i in range(5)]
EOS, LENGTH = 9, 3


class Policy:
    """Stands in for a Collator: a batch is its list of inputs."""

    cache = None
    tokenizer = SimpleNamespace(eos_id=EOS, decode=lambda ids, skip_special: f"tokens {len(ids)}")

    def __init__(self):
        self.model = SimpleNamespace(eval=lambda: self.model, state_dict=dict, config=SimpleNamespace(num_frames=2))

    def __call__(self, inputs):
        return inputs


@pytest.fixture
def decoded(monkeypatch):
    """How clips were asked to be decoded, the last at the end."""
    found = []
    monkeypatch.setattr(answers, "clip_inputs", lambda examples, *_, **how: found.append(how) or map(Inputs, examples))
    return found


@pytest.fixture
def asked(decoded, monkeypatch):
    """[(clip's id, the arguments of the rollout that sampled it, its own row of the noise)]"""
    found = []

    def sample(*given, **named):
        arguments = inspect.signature(rollout).bind(*given, **named).arguments
        rows = len(arguments["prompts"])
        for i, x in enumerate(arguments["prompts"]):
            noise = arguments["noise"]
            found.append((x.example.video_id, arguments, noise[i]))
        return Completions(torch.full((rows, LENGTH), EOS), torch.ones(rows, LENGTH, dtype=torch.bool))

    monkeypatch.setattr(answers, "rollout", sample)
    monkeypatch.setattr(answers, "embed", lambda model, batch: batch)
    return found


def noises(asked) -> dict[str, tuple]:
    return {clip: tuple(noise.tolist()) for clip, _, noise in asked}


def test_settings_reach_the_sampler(asked):
    settings = PredictionSettings(temperature=0.7, top_p=0.9, max_new_tokens=LENGTH, seed=4)
    rows, failed = answers.predict(Policy(), CLIPS, ALONE, settings, 2)
    assert [row["output"] for row in rows] == ["tokens 3"] * 5 and not failed
    for _, given, _ in asked:
        assert (given["temperature"], given["top_p"], given["max_new_tokens"], given["eos_token_id"]) == (
            0.7, 0.9, LENGTH, EOS) and given["group_size"] == 1
    assert noises(asked) == {x.video_id: tuple(sampling_noise(4, 0, [i], 1, LENGTH)[0].tolist())
                             for i, x in enumerate(CLIPS)}


def test_settings_reach_the_decoder(asked, decoded):
    answers.predict(Policy(), CLIPS, ALONE, PredictionSettings(without="audio", geometry="stretch", silence="error",
                                                               modality="video_audio", workers=0), 2)
    assert decoded[-1] == {"num_frames": 2, "without": "audio", "geometry": "stretch", "silence": "error", "workers": 0,
                       "modality": "video_audio"}  # the checkpoint has 2 frames
    answers.predict(Policy(), CLIPS, ALONE, PredictionSettings(num_frames=5), 2)
    assert decoded[-1]["num_frames"] == 5


def test_noise_depends_on_the_clip_and_on_no_batch_or_process(asked, monkeypatch):
    settings = PredictionSettings(max_new_tokens=LENGTH)
    answers.predict(Policy(), CLIPS, ALONE, settings, 5)
    alone, parts = noises(asked), []
    assert len(set(alone.values())) == 5
    asked.clear()
    monkeypatch.setattr(answers, "gather_lists", lambda mine: parts.extend(mine) or parts)  # as if both had met there
    for rank in (1, 0):
        rows, _ = answers.predict(Policy(), CLIPS, Processes(rank, 2, torch.device("cpu")), settings, 2)
    assert noises(asked) == alone
    assert [row["video_id"] for row in rows] == [x.video_id for x in CLIPS]  # of all processes, in order


def test_each_chunk_of_a_prediction_file_has_noise_of_its_own(asked, tmp_path, monkeypatch):
    """Seed 2, chunk c: seed 2 * 100,003 + c, whatever the batch."""
    by_hand = {"0": (200_006, 0), "1": (200_006, 1), "2": (200_007, 0), "3": (200_007, 1), "4": (200_008, 0)}
    monkeypatch.setattr(answers, "load_collator", lambda *_: Policy())
    for batch_size in (1, 2):
        asked.clear()
        settings = PredictionSettings(max_new_tokens=LENGTH, seed=2, batch_size=batch_size,
                                      out=str(tmp_path / str(batch_size)))
        answers.predict_to_file(CLIPS, ALONE, settings, chunk=2)
        assert noises(asked) == {clip: tuple(sampling_noise(seed, 0, [place], 1, LENGTH)[0].tolist())
                                 for clip, (seed, place) in by_hand.items()}


def until(condition) -> None:
    while not condition():
        time.sleep(0.01)


def test_a_long_batch_and_a_long_answer_are_not_silent(asked, monkeypatch, capsys):
    """Lines come before a batch is there; of an answer on a terminal up to its first token, and none in its midst."""
    heard, sample = [], answers.rollout
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(progress, "print", lambda line, **_: heard.append(str(line)), raising=False)

    def slow(*given, on_token=None, **named):
        until(lambda: heard)
        if on_token:
            on_token(torch.tensor([3]))
            before = len(heard)
            time.sleep(0.2)
            assert len(heard) == before
        return sample(*given, **named)

    monkeypatch.setattr(answers, "rollout", slow)
    answers.predict(Policy(), CLIPS, ALONE, PredictionSettings(), 5)
    assert heard[0].startswith("answers: 0/5 clips, 0:00:00 so far")
    heard.clear()
    tokens = []
    said = answers.answers(Policy(), ["a.mp4"], PredictionSettings(), on_token=tokens.append)
    assert next(said).text == "tokens 3" and heard[0].startswith("a.mp4 is answered: ") and len(tokens) == 1


def test_answers_may_be_greedy(asked):
    answers.predict(Policy(), CLIPS, ALONE, PredictionSettings(temperature=0), 2)
    assert {given["temperature"] for _, given, _ in asked} == {0}


def test_held_out_answers_have_the_evaluations_temperature_and_no_training_noise(asked):
    settings = GRPOSettings(eval_temperature=0.2, temperature=1.0, max_new_tokens=LENGTH, seed=3)

    def judge(explanations, labels):
        emotion = next(label for label in labels if label.startswith("sad"))
        return [SimpleNamespace(emotion=emotion, status="ok") for _ in explanations]

    held_out = HeldOut(settings, ALONE)
    held_out.examples, held_out.judge, settings.watch_every = CLIPS, judge, 1
    sharded = SimpleNamespace(unsharded=contextlib.nullcontext)
    assert held_out(sharded, Policy(), 0) == {"held_out_EEA": 100, "held_out_EPC": 0}  # "tokens 3" holds no answer
    assert {given["temperature"] for _, given, _ in asked} == {0.2}
    assert noises(asked)["1"] == tuple(sampling_noise(3 + 2**32, 0, [1], 1, LENGTH)[0].tolist())
    others = [Example(str(i), Path(f"{i}.mp4"), "fear", "mafw") for i in range(3)]  # read as sad: EEA 0
    held_out.examples = CLIPS + others
    assert held_out(sharded, Policy(), 1)["held_out_EEA"] == 100 * 5 / 8
