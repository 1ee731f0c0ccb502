"""Numbers that are not finite: where they could come from, and what a run does about them. Gradients, not only losses."""

import json
import math

import pytest
import torch

from erv_min.base.errors import NumbersError
from erv_min.base.processes import Processes
from erv_min.grpo import group_advantages, grpo_loss, kl_k3, masked_mean
from erv_min.logps import Completions, completion_logps
from erv_min.rewards import RewardSettings, score_completions
from erv_min.sft import sft_loss
from erv_min.train.folder import Run
from erv_min.train.log import clipped
from erv_min.train.optimizer import make_optimizer, update
from erv_min.train.settings import SFTSettings
from erv_min.train.sharding import Replicated
from tiny import tiny_model, tiny_prompts

ALONE = Processes(0, 1, torch.device("cpu"))


def gradient(loss_of, logps):
    logps = torch.tensor(logps, requires_grad=True)
    loss = loss_of(logps)
    loss.backward()
    return loss.item(), logps.grad


def test_the_branch_that_the_clip_leaves_has_no_gradient_however_large_its_ratio():
    """ratio = exp(200) is inf in float32; min takes the clipped branch; the other one's gradient must not be 0 * inf."""
    loss, grad = gradient(lambda x: grpo_loss(x, torch.zeros(1, 2) - 200, x.detach(), torch.tensor([1.0]),
                                              torch.ones(1, 2)), [[0.0, 0.0]])
    assert loss == pytest.approx(-1.2) and grad.tolist() == [[0, 0]]
    loss, grad = gradient(lambda x: grpo_loss(x, torch.zeros(1, 1), x.detach(), torch.tensor([-1.0]), torch.ones(1, 1)),
                          [[-200.0]])  # ratio 0, clipped below
    assert loss == pytest.approx(0.8) and grad.tolist() == [[0]]


@pytest.mark.parametrize("rubbish", [math.inf, -math.inf, math.nan, 1e30])
def test_what_stands_at_padding_reaches_neither_loss_nor_gradient(rubbish):
    mask = torch.tensor([[True, False]])
    old, ref = torch.tensor([[-1.0, rubbish]]), torch.tensor([[-1.5, rubbish]])
    clean, expected = gradient(lambda x: grpo_loss(x, old[:, :1], ref[:, :1], torch.tensor([2.0]), mask[:, :1]), [[-1.2]])
    loss, grad = gradient(lambda x: grpo_loss(x, old, ref, torch.tensor([2.0]), mask), [[-1.2, rubbish]])
    assert loss == clean and grad.tolist() == [[expected.item(), 0]]
    loss, grad = gradient(lambda x: sft_loss(x, mask), [[-1.2, rubbish]])
    assert loss == pytest.approx(1.2) and grad.tolist() == [[-1, 0]]


def test_masks_of_zero_length_give_zero_and_no_gradient():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.full((2, 3), math.nan)
    for loss_of in (lambda y: grpo_loss(y, x, x, torch.ones(2), nothing), lambda y: sft_loss(y, nothing),
                    lambda y: masked_mean(y.masked_fill(~nothing, 0.0), nothing)):
        loss, grad = gradient(loss_of, [[0.0] * 3] * 2)
        assert loss == 0 and grad.abs().sum() == 0
    assert not any(held.any() for held in clipped(x, x, torch.ones(2), nothing))


def test_a_completion_without_a_token_costs_the_model_nothing():
    """One of two completions is empty: gradients are finite, and the empty row's ids do not matter."""
    found = []
    for filler in (0, 7):
        model = tiny_model()
        completions = Completions(torch.tensor([[5, 6, 2], [filler] * 3]), torch.tensor([[True] * 3, [False] * 3]))
        logps, entropy = completion_logps(model, tiny_prompts(model, (4,)), completions, with_entropy=True)
        assert logps[1].tolist() == [0, 0, 0] and entropy[1].tolist() == [0, 0, 0]
        grpo_loss(logps, logps.detach(), logps.detach() - 0.1, torch.tensor([1.0, -1.0]), completions.mask).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in grads)
        found.append(sum(g.double().abs().sum() for g in grads).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    model = tiny_model()
    none = Completions(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool))
    logps, _ = completion_logps(model, tiny_prompts(model, (4,)), none)
    assert logps.shape == (2, 3) and not logps.any()


def test_empty_and_unended_completions_have_rewards():
    settings, labels = RewardSettings(), ("happy", "neutral")
    texts = ["", "<think>", "<think></think><answer></answer>", "<think>She smiles", "</think></answer>", "\0" * 50]

    def verifier(sentences):
        return torch.full((len(sentences), 2), 0.4)

    rewards = score_completions(texts, ["happy"] * len(texts), "dfew", verifier, labels, settings)
    assert [r.total for r in rewards] == [0, 0, 1, 0, 0, 0]  # the third keeps the format, and says nothing


def test_groups_without_spread_have_advantage_zero():
    for value in (0.0, 3.0, 0.1, -1e6):
        assert group_advantages(torch.full((8,), value), 4).tolist() == [0] * 8
    assert group_advantages(torch.tensor([1.0, 2.0]), 1).tolist() == [0, 0]
    a = group_advantages(torch.tensor([1.0, 1.0, 1.0, 1.0 + 1e-7]), 4)
    assert a.isfinite().all() and a.abs().max() < 0.01


def test_kl_of_a_reference_far_away():
    """d = ref - logps: -100 is 99 (finite, gradient 1 a unit); +100 is e^100, which float32 does not hold: inf, reported."""
    loss, grad = gradient(lambda x: kl_k3(x, x.detach() - 100).sum(), [0.0])
    assert loss == pytest.approx(99) and grad.item() == pytest.approx(1)
    assert kl_k3(torch.tensor([0.0]), torch.tensor([80.0])).isfinite().all()
    assert kl_k3(torch.tensor([0.0]), torch.tensor([100.0])).isinf().all()
    assert kl_k3(torch.tensor([0.0], dtype=torch.float64), torch.tensor([100.0])).isfinite().all()


# ---- what a run does -------------------------------------------------------------------------------------------------


def of(p: torch.nn.Parameter) -> Replicated:
    """A model of one parameter, as the training loop holds it."""
    model = torch.nn.Module()
    model.p = p
    return Replicated(model, compute=torch.float32)


def a_run(out, steps, resume=False, total=20, save_every=100):
    """Steps of GRPO's loss on 2 completions of a clip; `steps`: what the reference's log-probability is in each."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(2, 3))
    policy, optimizer = of(p), make_optimizer([p])
    run = Run(out, SFTSettings(save_every=save_every, resume=resume), ALONE, total)
    first = run.begin(policy, optimizer)
    seen = []
    for step in range(first, len(steps)):
        logps = p * 1.0
        run.track_rows([f"clip7, completion {i}" for i in range(2)], logps)
        ref = torch.full((2, 3), -0.1)
        ref[1, 2] = steps[step]
        loss = grpo_loss(logps, logps.detach(), ref, torch.tensor([1.0, -1.0]), torch.ones(2, 3))
        loss.backward()
        norm = update(policy, optimizer, 0.1, 1.0, loss.item())
        run.log(step, {"loss": loss.item(), "grad_norm": norm})
        run.checkpoint(step + 1)
        seen.append(p.detach().clone())
    return run, seen


def test_a_step_that_is_not_finite_is_skipped_counted_and_explained(tmp_path, capsys):
    run, seen = a_run(tmp_path, [0.0, 0.0, 100.0, 0.0, math.nan])
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3]) and torch.equal(seen[3], seen[4])
    rows = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics.read_text().splitlines()]  # no NaN
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 2] and rows[2]["loss"] is None is rows[2]["grad_norm"]
    assert rows[2]["skipped_because"].endswith("of clip7, completion 1") and "skipped_because" not in rows[3]
    assert "step 3: skipped" in capsys.readouterr().out


def test_three_in_a_row_stop_the_run_also_across_a_resume(tmp_path):
    with pytest.raises(NumbersError, match="3 steps in a row up to step 4.*clip7, completion 1"):
        a_run(tmp_path / "a", [0.0, 100.0, 100.0, 100.0, 0.0])
    a_run(tmp_path / "b", [0.0, 100.0, 100.0], save_every=3)
    with pytest.raises(NumbersError, match="up to step 4"):
        a_run(tmp_path / "b", [0.0, 100.0, 100.0, 100.0], resume=True)
    assert json.loads((tmp_path / "b/metrics.jsonl").read_text().splitlines()[-1])["skipped"] == 3
    run, _ = a_run(tmp_path / "c", [100.0, 100.0, 0.0, 100.0, 100.0])  # a good one between them: not three in a row
    assert run.skips == [True, True, False, True, True]


def test_a_loss_that_is_not_finite_skips_a_step_whose_gradient_is():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([p])
    p.grad = torch.tensor([1.0, 2.0])
    assert math.isnan(update(of(p), optimizer, 0.1, 1.0, math.inf))
    assert p.tolist() == [1, 1] and p.grad is None


def test_a_gradient_lost_inside_the_model_names_the_batch(tmp_path):
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([p])
    run = Run(tmp_path, SFTSettings(), ALONE, 5)
    logps = (p * 0).sqrt() * 0 + p  # finite, and the square root's gradient at 0 is inf: 0 * inf
    run.track_rows(["clip9, target 0"], logps[None])
    logps.sum().backward()
    run.log(0, {"grad_norm": update(of(p), optimizer, 0.1, 1.0)})
    assert "inside the model" in (why := json.loads(run.metrics.read_text())["skipped_because"]) and "clip9" in why
