"""Two processes, whole and sharded, against one: passes that do not divide, sums over both; each its own dropout."""

from types import SimpleNamespace

from safetensors.torch import load_file
from test_plain_erv import OPTIONS, erv_options, plain
from test_plain_grpo import grpo, grpo_options
from test_plain_sft import sft, sft_options
from tiny_runs import assert_same_rows, assert_same_run, assert_same_weights


def test_two_processes_compute_what_one_does(tiny):
    """One torchrun for all runs. The losses divide by tokens of both processes; GRPO's and SFT's passes are uneven."""
    policy = load_file(tiny.folder / "policy/model.safetensors")
    verifier = load_file(tiny.folder / "verifier/model.safetensors")
    of_grpo = dict(batch_size=6, micro_batch=2, mu=2, epsilon=0.05, loss_type="dapo", mask_truncated=True)
    of_sft = dict(batch_size=6, micro_batch=2, train_projectors=True)
    of_erv = dict(dropout=0.3)
    found = tiny.run_on_two([
        ("grpo", grpo_options(tiny, **of_grpo, sharding="none")),
        ("grpo", grpo_options(tiny, **of_grpo, sharding="hand")),
        ("sft", sft_options(tiny, **of_sft, sharding="none")),
        ("sft", sft_options(tiny, **of_sft, sharding="hand")),
        ("erv", erv_options(tiny, **of_erv))])
    for two in found[:2]:
        assert two.calls
        assert_same_run(two, grpo(tiny, **of_grpo), policy)
    for two in found[2:4]:
        assert_same_run(two, sft(tiny, **of_sft), policy)
    rows, _, weights = plain(tiny, SimpleNamespace(**OPTIONS | of_erv), processes=2)
    assert_same_rows(found[4].rows, rows)
    assert_same_weights(found[4].weights, weights, verifier, len(rows))
