"""scripts/tools/bench.py at toy size: every bench runs and gives rows that can be read. Times are not judged here."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "tools"))
import bench  # noqa: E402
from benches.common import Options, Peak, language_flops, linear_weights, prompt_tokens  # noqa: E402
from benches.erv import prepare, step_sentences, throughput  # noqa: E402
from benches.step import naive_logps, prompts_of  # noqa: E402
from erv_min.config import humanomni  # noqa: F401
from erv_min.base.errors import SettingsError  # noqa: F401
from erv_min.logps import Completions, completion_logps  # noqa: F401
from tiny import tiny_model  # noqa: E402

FIELDS = {"bench", "variant", "seconds", "tokens_per_s", "peak_bytes", "ratio_time", "ratio_memory", "ceiling_fraction",
          "flops", "bytes", "size", "group", "new_tokens", "dtype", "device", "versus", "matmul_limit", "copy_limit"}


@pytest.mark.parametrize("name, versus", [("towers", "naive"), ("rollout", "naive"), ("step", "naive"),
                                          ("logps", "naive"), ("erv", ""), ("data", "")])
def test_rows(capsys, name, versus):
    options = ["--group", "3", "--new-tokens", "4", "--tokens", "8", "--clips", "2", "--device", "cpu", "--json"]
    assert bench.main([name, "--versus", versus, *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["variant"] for row in rows][-1] == "ours" and len(rows) == (2 if versus or name == "erv" else 1)
    for row in rows:
        assert FIELDS <= row.keys() and row["bench"] == name and row["size"] == "toy" and row["group"] == 3
        assert row["seconds"] > 0 and row["flops"] > 0 and row["ceiling_fraction"] > 0
    if versus:
        assert rows[-1]["ratio_time"] == pytest.approx(rows[0]["seconds"] / rows[-1]["seconds"])
    if name == "data":
        assert 0 <= rows[0]["stall"] <= 1


def test_sentences_of_the_verifiers_bench_repeat_as_asked():
    completions = step_sentences(2, repeats=0.5)
    flat = [s for own in completions for s in own]
    assert len(completions) == 32 and len(flat) == 160 and 60 < len(set(flat)) < 110  # 85 expected, deviation 6
    assert len(set(s for own in step_sentences(1, repeats=0) for s in own)) == 80


def test_ways_that_differ_are_not_compared(monkeypatch, tmp_path):
    completions = step_sentences(1, 4)
    verifier = prepare("toy", [s for own in completions for s in own], tmp_path)
    assert set(throughput(verifier, completions, rounds=1)) == {"batched", "loop"}
    right = verifier.probabilities
    monkeypatch.setattr(verifier, "probabilities", lambda sentences: right(sentences) + 0.01)
    with pytest.raises(SettingsError, match="different probabilities"):
        throughput(verifier, completions, rounds=1)


def test_memory_limit(capsys):
    assert bench.main(["logps", "--memory-limit", "1M", "--device", "cpu"]) == 1
    assert "--memory-limit" in capsys.readouterr().err


@pytest.mark.parametrize("device, index", [("cuda", 0), ("cuda:1", 1)])
def test_memory_limit_names_the_device(monkeypatch, capsys, device, index):
    """CUDA takes no device without an index here; all functions that the benches ask look at the current one."""
    asked, whole = [], type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: whole if isinstance(device, int) else None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append((share, device)))
    monkeypatch.setattr(bench, "ceilings", lambda options: exec("raise SettingsError('far enough')", globals()))
    assert bench.main(["logps", "--memory-limit", "20G", "--device", device]) == 1
    assert asked == [index, (0.25, index)] and "far enough" in capsys.readouterr().err


def test_unknown_sizes_are_named(capsys):
    assert bench.main(["logps", "--size", "96,256", "--device", "cpu"]) == 1
    assert "six integers" in capsys.readouterr().err
    assert Options(size="64,128,2,4,2,300").config.text.vocab_size == 300


def test_peak_sees_an_allocation_that_is_gone():
    with Peak() as peak:
        torch.ones(2**24)  # 64 MiB
    assert 60 * 2**20 < peak.bytes < 100 * 2**20


def test_counts_by_hand():
    # 0.5B: 24 layers of 896 x (896 q + 128 k + 128 v + 896 o) + 3 x 896 x 4864 = 14,909,440 elements: 357.8 M.
    config = humanomni("0.5b")
    assert prompt_tokens(config) == 950 and linear_weights(config.text) == 24 * (896 * 2048 + 3 * 896 * 4864)
    # One token behind 949: two operations an element, and scores and sums over 950 keys of 896 in each layer.
    assert language_flops(config.text, 1, 1, 949) == 2 * linear_weights(config.text) + 24 * 4 * 896 * 950


def test_the_naive_schedule_computes_the_same():
    """What ours is compared with gives the same log-probs: the ratio is of two ways to one result."""
    model, G = tiny_model(), 3
    options = Options()
    features = [torch.randn(1, options.config.num_frames, 16, 48).expand(G, -1, -1, -1), torch.randn(1, 16, 48).expand(G, -1, -1)]
    ids = torch.randint(0, 600, (G, 5))
    own, _ = completion_logps(model, prompts_of(model, [x[:1] for x in features]), Completions(ids, ids >= 0))
    torch.testing.assert_close(naive_logps(model, prompts_of(model, features), ids), own, atol=1e-4, rtol=1e-4)
