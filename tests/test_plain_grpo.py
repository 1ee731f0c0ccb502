"""scripts/grpo.py against Eq. 3 to 5 and algorithm 1 written a second time (plain_step.py), option by option.

Gradients are clipped far below AdamW's epsilon of 1e-8, so that its step is proportional to them: an entry whose
gradient is rounding noise then moves by noise, too, and all entries can be compared. One run has the preset's own norm.
"""

from types import SimpleNamespace

import plain_step
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (Tiny, assert_other_weights, assert_same_rows, assert_same_run, assert_same_weights, input_of,
                       read_rows, table)

from erv_min.checkpoint import load_humanomni
from erv_min.data.examples import load_examples
from erv_min.tokenizer import Tokenizer

INPUTS = dict(num_frames=2, modality="video_audio", prompt_stage="inference", geometry="pad", subtitles=True)
OPTIONS = dict(steps=2, batch_size=4, micro_batch=4, group_size=4, max_new_tokens=27, lr=1.0, warmup=0.0,
               schedule="constant", max_grad_norm=1e-9, beta=0.2, epsilon=0.2, mu=1, kl="k3", advantages="grpo",
               loss_type="grpo", mask_truncated=False, temperature=1.0, top_k=0, tau=0.5, k=2, neutral_rule="only",
               answer_rule="paper", sentence_rule="released", w_format=1.0, w_answer=1.0, w_explanation=1.0, ablate="",
               seed=0, train_projectors=False, **INPUTS)


def around(tiny: Tiny) -> dict:
    """The options that say where all lies."""
    return dict(world=tiny.folder / "world", model=tiny.folder / "policy", erv=tiny.folder / "verifier", watch_every=0,
                eval_clips=-1, sample_every=1, cache_features=tiny.folder / "features")


def grpo_options(tiny: Tiny, **changes) -> dict:
    return around(tiny) | OPTIONS | changes


def grpo(tiny: Tiny, **changes):
    return tiny.run("grpo", grpo_options(tiny, **changes))


def groups_of(calls: list[dict], batch_size: int, group_size: int) -> list:
    """[step][place][i] -> (ids, the noise that drew them)."""
    rows = [(ids, noise[: len(ids)].tolist()) for call in calls for ids, noise in zip(call["sampled"], call["noise"])]
    groups = [rows[at : at + group_size] for at in range(0, len(rows), group_size)]
    return [groups[at : at + batch_size] for at in range(0, len(groups), batch_size)]


def plain(tiny: Tiny, calls: list[dict], o: SimpleNamespace):
    """Weights, rows and AdamW of the second implementation on what a run sampled."""
    policy, tokenizer = tiny.folder / "policy", Tokenizer(tiny.folder / "policy")
    model, reference = load_humanomni(policy), load_humanomni(policy)
    examples = load_examples(f"toy:{tiny.folder / 'world'}", "train")
    inputs = [input_of(example, model, policy, o) for example in examples]
    rows, optimizer = plain_step.grpo(
        model, reference, inputs, [example.label for example in examples], groups_of(calls, o.batch_size, o.group_size),
        lambda ids: tokenizer.decode(ids, skip_special=True), table, tokenizer.eos_id, o)
    return model, rows, optimizer


@pytest.fixture(scope="session")
def start(tiny):
    return load_file(tiny.folder / "policy/model.safetensors")


LONGER = dict(steps=3)
CLIPPED = dict(mu=2)
CHANGES = [  # (what is changed, what the outcome must differ from)
    (dict(beta=1.0), {}),
    (dict(beta=0.0), {}),
    (dict(mu=2), {}),
    (dict(mu=2, epsilon=0.02), CLIPPED),
    (dict(kl="k2"), {}),
    (dict(advantages="dr-grpo"), {}),
    (dict(loss_type="dapo"), {}),
    (dict(loss_type="dr-grpo"), {}),
    (dict(mask_truncated=True), {}),
    (dict(temperature=1.3), {}),
    (dict(top_k=2), {}),
    (dict(tau=0.7), {}),
    (dict(k=1), {}),
    (dict(k=3), {}),
    (dict(neutral_rule="any"), {}),
    (dict(ablate="neutral-filtering"), {}),
    (dict(ablate="sentence-level"), {}),
    (dict(w_format=2.0), {}),
    (dict(w_answer=3.0), {}),
    (dict(w_explanation=0.5), {}),
    (dict(answer_rule="released"), {}),
    (dict(sentence_rule="extended"), {}),
    (dict(max_grad_norm=3e-9), {}),
    (dict(steps=3, schedule="linear"), LONGER),
    (dict(steps=3, schedule="cosine"), LONGER),
    (dict(steps=3, warmup=0.5), LONGER),
    (dict(train_projectors=True), {}),
    (dict(group_size=3), {}),
    (dict(batch_size=2), {}),
    (dict(max_new_tokens=20), {}),
    (dict(lr=0.5), {}),
    (dict(seed=1), {}),
    (dict(mu=2, epsilon=0.05, loss_type="dapo", mask_truncated=True, kl="k2", temperature=0.8), CLIPPED),
]


@pytest.mark.parametrize("changes, other", [({}, None), *CHANGES], ids=str)
def test_a_run_is_what_the_plain_step_makes(tiny, start, changes, other):
    run, o = grpo(tiny, **changes), SimpleNamespace(**OPTIONS | changes)
    model, rows, _ = plain(tiny, run.calls, o)
    assert_same_rows(run.rows, rows)
    assert_same_weights(run.weights, model.state_dict(), start, o.steps)
    if other is not None:
        assert_other_weights(run.weights, grpo(tiny, **other).weights, start)


def test_the_rewards_teach(tiny):
    """What the runs are made of: groups with a spread, each reward given and not given, outputs cut and ended."""
    rows = grpo(tiny).rows
    for row in rows:
        assert row["frac_zero_std"] < 0.5 and row["reward_std"] > 0.1
    for name in ("reward_format", "reward_answer", "reward_explanation", "truncated"):
        assert 0 < sum(row[name] for row in rows) < len(rows), name


@pytest.mark.parametrize("changes", [
    dict(micro_batch=3, rollout_batch=3, recompute=True),
    dict(micro_batch=1, workers=1, cache_features=""),
    dict(ablate="augmentation"),  # table 2's row is another --erv, with the same reward
], ids=str)
def test_how_it_is_computed_changes_no_number(tiny, start, changes):
    assert_same_run(grpo(tiny, **changes), grpo(tiny), start)


def test_the_toys_own_defaults(tiny, start):
    """What the help lists for the toy, and AdamW with gradients far over its epsilon. There an entry whose gradient is
    rounding noise moves by the rate in either direction: only those are compared whose root mean square gradient is
    over 1e-4 of the largest. The embedding has few, since most tokens have no probability."""
    sizes = dict(batch_size=4, group_size=4, steps=5, max_new_tokens=27, num_frames=2)
    defaults = OPTIONS | sizes | dict(beta=0.07, lr=5e-4, warmup=0.15, schedule="linear", max_grad_norm=1.0)
    run = tiny.run("grpo", around(tiny) | sizes)
    model, rows, optimizer = plain(tiny, run.calls, SimpleNamespace(**defaults))
    assert_same_rows(run.rows, rows)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: optimizer.state[p]["exp_avg_sq"].sqrt() for name, p in trained.items()}
    largest, weights = max(gradient.max() for gradient in gradients.values()), dict(model.state_dict())
    for name, gradient in gradients.items():
        clear = gradient > 1e-4 * largest
        assert clear.float().mean() > (0.1 if name == "model.embed_tokens.weight" else 0.7), name
        weights[name] = torch.where(clear, weights[name], run.weights[name])
    assert_same_weights(run.weights, weights, start, 5)


def test_without_the_explanations_reward_no_verifier_is_asked(tiny, start):
    baseline = {name: value for name, value in around(tiny).items() if name != "erv"}
    run = tiny.run("grpo", baseline | OPTIONS | dict(w_explanation=0.0))
    model, rows, _ = plain(tiny, run.calls, SimpleNamespace(**OPTIONS | dict(w_explanation=0.0)))
    assert all(row.pop("reward_explanation") > 0 for row in rows) and not any(x["sentences"] for x in completions(run))
    assert_same_rows(run.rows, rows)
    assert_same_weights(run.weights, model.state_dict(), start, 2)


def completions(run) -> list[dict]:
    return read_rows(run.out / "completions.jsonl")


def test_held_out_clips_are_answered_at_their_own_temperature(tiny):
    run = grpo(tiny, steps=1, watch_every=1, eval_temperature=0.6)
    training, held_out = ([c for c in run.calls if c["group_size"] == G] for G in (4, 1))
    assert {c["temperature"] for c in training} == {1.0} and {c["temperature"] for c in held_out} == {0.6}
    assert "held_out_EEA" in run.rows[0]


def test_what_is_kept_of_a_group(tiny):
    """completions.jsonl: the first prompt's group of each step, in the order that the plain step reads clips in."""
    run, o = grpo(tiny), SimpleNamespace(**OPTIONS)
    examples, tokenizer = load_examples(f"toy:{tiny.folder / 'world'}"), Tokenizer(tiny.folder / "policy")
    kept = [(row["step"], row["video_id"], row["ground_truth"], row["completion"], row["reward_explanation"])
            for row in completions(run)]
    expected = []
    for step, groups in enumerate(groups_of(run.calls, 4, 4)):
        clip = examples[next(plain_step.places(len(examples), o, step, 4))]
        for ids, _ in groups[0]:
            text = tokenizer.decode(ids, skip_special=True)
            R_E = plain_step.explanation_reward(text, clip.label, table, o)
            expected.append((step, clip.video_id, clip.label, text, pytest.approx(R_E)))
    assert kept == expected
