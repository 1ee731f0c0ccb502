"""scripts/tools/bench.py at toy size: every bench runs, both ways do the same work, rows can be read. Times are not
judged."""

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "tools"))
import bench  # noqa: E402
from erv_min.base.errors import SettingsError  # noqa: E402
from erv_min.config import humanomni  # noqa: E402

TOY = Namespace(size="toy", device="cpu", dtype=torch.float32, group=3, tokens=4, repeats=1)
OTHER = {"rollout": "transformers", "step": "transformers", "logps": "transformers", "fsdp": "fully_shard"}


def test_rows(capsys):
    pytest.importorskip("transformers")
    bench.main([*OTHER, "--group", "3", "--tokens", "4", "--device", "cpu", "--repeats", "1", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["bench"], row["way"]) for row in rows] == [
        (name, way) for name, other in OTHER.items() for way in ("ours", other)]
    for ours, other in zip(rows[::2], rows[1::2]):
        assert (ours["size"], ours["group"], ours["tokens"], ours["dtype"]) == ("toy", 3, 4, "float32")
        assert ours["ratio_time"] == ours["ratio_memory"] == 1 and ours["peak_bytes"] > 0
        assert other["ratio_time"] == pytest.approx(other["seconds"] / ours["seconds"]) and other["seconds"] > 0
        assert other["ratio_memory"] == pytest.approx(other["peak_bytes"] / ours["peak_bytes"])


def test_ways_take_turns_and_the_median_counts(monkeypatch):
    order, clock = [], iter([0, 1, 0, 9, 0, 9, 0, 8, 0, 2, 0, 9])  # of a: 1, 8, 2; of b: 9
    monkeypatch.setattr(bench, "peak_of", lambda work, device: len(work.__name__))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))

    def a():
        order.append("a")

    def b():
        order.append("b")

    assert bench.measure({"a": a, "b": b}, Namespace(device="cpu", repeats=3)) == {"a": (2, 1), "b": (9, 1)}
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_both_ways_of_the_log_probs_give_the_same():
    """Loss and gradients of hidden states and weight."""
    pytest.importorskip("transformers")
    ours, theirs = (work() for work in bench.logps_ways(TOY).values())
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert ours[1].abs().max() > 1e-3


def test_both_ways_sample_as_many_tokens_after_a_prompt_of_one_length():
    pytest.importorskip("transformers")
    ours, theirs = (work() for work in bench.rollout_ways(TOY).values())
    assert ours.shape == theirs.shape == (3, 4)
    for size, tokens in (("toy", None), ("0.5b", 950)):
        c = humanomni(size)
        assert tokens in (None, c.video_tokens + c.audio_tokens + bench.TEXT_TOKENS)
    model, video, audio = bench.build(TOY)
    prompts = bench.prompt_of(model, (model.vision_features(video), model.audio_features(audio)))
    assert prompts.embeds.shape[1] == bench.their_model(TOY)[1].shape[1]


def test_their_log_probs_by_hand():
    pytest.importorskip("transformers")
    model, prompt = bench.their_model(TOY)
    completions = torch.randint(0, 100, (3, 4))
    with torch.no_grad():
        logps = bench.their_logps(model, prompt, completions)
        whole = model(torch.cat([prompt, completions[1:2]], 1)).logits[0].log_softmax(-1)
    by_hand = [whole[prompt.shape[1] - 1 + t, token] for t, token in enumerate(completions[1])]
    torch.testing.assert_close(logps[1], torch.stack(by_hand), atol=1e-5, rtol=1e-5)


def test_peak_counts_the_second_run_beside_what_was_there():
    kept = []

    def work():
        kept.append(torch.ones(2**20))  # 4 MiB that stay
        torch.ones(2**22)  # 16 MiB that go

    assert bench.peak_of(work, "cpu") == 20 * 2**20


def test_what_cannot_be_measured_is_said(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install transformers"):
        bench.main(["fsdp", "step", "--device", "cpu"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SettingsError, match="two GPUs; --device cpu"):
        bench.fsdp(Namespace(device="cuda"))
