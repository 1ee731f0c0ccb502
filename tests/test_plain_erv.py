"""scripts/erv.py against binary cross entropy on [CLS] (section 3.2) written a second time (plain_step.py).

As in test_plain_grpo.py, gradients are clipped far below AdamW's epsilon, so that all entries can be compared.
"""

import json
from hashlib import blake2b
from types import SimpleNamespace

import plain_step
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import Tiny, assert_other_weights, assert_same_rows, assert_same_weights, read_rows

from erv_min.checkpoint import load_erv
from erv_min.tokenizer import EncoderTokenizer

OPTIONS = dict(steps=3, epochs=4, batch_size=6, lr=1.0, warmup=0.0, schedule="constant", max_grad_norm=1e-9, seed=0,
               head=11, dropout=0.0, sources="", holdout=0.1, tau=0.5, k=2)


def texts(tiny: Tiny, kind: str) -> list[dict]:
    """The world's pairs. A held-out row has a truth beside its labels."""
    rows = read_rows(tiny.folder / f"world/erv_{kind}.jsonl")
    return [row | {"truth": row.get("truth", row["labels"])} for row in rows]


def names(labels: list[str]) -> list[str]:
    return [plain_step.OF_DFEW.get(label, label) for label in labels]


def erv_options(tiny: Tiny, **changes) -> dict:
    options = OPTIONS | changes
    data = {name: tiny.folder / f"world/erv_{name}.jsonl" for name in ("train", "valid")}
    init = tiny.folder / ("verifier" if options["head"] == 11 else "verifier-28")
    around = dict(data=data["train"], valid=data["valid"], init=init)
    if "holdout" in changes:
        del around["valid"]
    return around | options


def erv(tiny: Tiny, **changes):
    return tiny.run("erv", erv_options(tiny, **changes), judged_by_table=False)


def plain(tiny: Tiny, o: SimpleNamespace, held_out: bool = False, processes: int = 1):
    """Rows of metrics.jsonl and epochs.jsonl, and the weights of the second implementation."""
    folder = tiny.folder / ("verifier" if o.head == 11 else "verifier-28")
    rows, valid = texts(tiny, "train"), texts(tiny, "valid")
    if held_out:  # by clip
        def aside(row):
            digest = blake2b(f"{o.seed}:{row['clip']}".encode(), digest_size=8).digest()
            return int.from_bytes(digest, "big") < o.holdout * 2**64
        rows, valid = [row for row in rows if not aside(row)], [row for row in rows if aside(row)]
        assert len(valid) > 5
    rows, valid = ([row | {x: names(row[x]) for x in ("labels", "truth")} for row in part] for part in (rows, valid))
    return plain_step.verifier(load_erv(folder), rows, valid, EncoderTokenizer(folder).encode_batch, o, processes)


LONGER = dict(steps=0, epochs=2)
CHANGES = [  # (what is changed, what the outcome must differ from)
    (dict(sources="human,complement"), {}),
    (dict(dropout=0.3), {}),
    (dict(schedule="linear"), {}),
    (dict(schedule="cosine"), {}),
    (dict(warmup=0.5), {}),
    (dict(max_grad_norm=3e-9), {}),
    (dict(batch_size=4), {}),
    (dict(lr=0.5), {}),
    (dict(seed=1), {}),
    (dict(steps=0, epochs=1), LONGER),
    (dict(holdout=0.4), {}),
]


@pytest.mark.parametrize("changes, other", [({}, None), *CHANGES], ids=str)
def test_a_run_is_what_the_plain_step_makes(tiny, changes, other):
    start = load_file(tiny.folder / "verifier/model.safetensors")
    run, o = erv(tiny, **changes), SimpleNamespace(**OPTIONS | changes)
    rows, epochs, weights = plain(tiny, o, "holdout" in changes)
    assert_same_rows(run.rows, rows)
    assert_same_rows(read_rows(run.out / "epochs.jsonl"), epochs)
    assert_same_weights(run.weights, weights, start, len(rows))
    if other is not None:
        assert_other_weights(run.weights, erv(tiny, **other).weights, start)


@pytest.mark.parametrize("changes", [dict(tau=0.9), dict(k=1)], ids=str)
def test_threshold_and_number_of_labels_are_the_reports_alone(tiny, changes):
    start = load_file(tiny.folder / "verifier/model.safetensors")
    run, default = erv(tiny, **changes), erv(tiny)
    _, epochs, _ = plain(tiny, SimpleNamespace(**OPTIONS | changes))
    assert_same_rows(read_rows(run.out / "epochs.jsonl"), epochs)
    assert_same_weights(run.weights, default.weights, start, 3)
    report, other = (json.loads((x.out / "report.json").read_text()) for x in (run, default))
    assert report["at_tau"] != other["at_tau"] and report["at_tau"]["macro_f1"] == epochs[-1]["macro_f1"]


def test_goemotions_head_learns_in_the_eleven_columns_that_the_reward_reads(tiny):
    start = load_file(tiny.folder / "verifier-28/model.safetensors")
    run = erv(tiny, head=28)
    rows, epochs, weights = plain(tiny, SimpleNamespace(**OPTIONS | dict(head=28)))
    assert_same_rows(run.rows, rows)
    assert_same_rows(read_rows(run.out / "epochs.jsonl"), epochs)
    assert_same_weights(run.weights, weights, start, 3)


def test_another_heads_size_gives_a_fresh_output_layer_on_the_same_network(tiny):
    start = load_file(tiny.folder / "verifier/model.safetensors")
    options = erv_options(tiny, head=28, lr=0.0) | dict(init=tiny.folder / "verifier")
    run = tiny.run("erv", options, judged_by_table=False)
    fresh = {name for name, x in run.weights.items() if x.shape != start[name].shape}
    assert fresh == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    assert run.weights["classifier.out_proj.weight"].shape == (28, 16)
    assert all(torch.equal(x, start[name]) for name, x in run.weights.items() if name not in fresh)
