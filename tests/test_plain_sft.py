"""scripts/sft.py against Eq. 2 written a second time (plain_step.py), option by option, and what a model is given.

As in test_plain_grpo.py, gradients are clipped far below AdamW's epsilon, so that all entries can be compared.
"""

from types import SimpleNamespace

import plain_step
import pytest
from safetensors.torch import load_file
from tiny_runs import Tiny, assert_other_weights, assert_same_rows, assert_same_run, assert_same_weights, input_of

from erv_min.checkpoint import load_humanomni
from erv_min.data.examples import load_examples
from erv_min.tokenizer import Tokenizer

INPUTS = dict(num_frames=2, modality="video_audio", prompt_stage="inference", geometry="pad", subtitles=True)
OPTIONS = dict(steps=2, batch_size=4, micro_batch=4, lr=1.0, warmup=0.0, schedule="constant", max_grad_norm=1e-9,
               loss_reduction="mean", targets_per_clip=1, answers_only=False, train_projectors=False,
               train_vision_tower=False, seed=0, **INPUTS)


def sft_options(tiny: Tiny, data: str = "", **changes) -> dict:
    around = dict(model=tiny.folder / "policy", world=tiny.folder / "world", cache_features=tiny.folder / "features")
    return around | ({"data": data} if data else {}) | OPTIONS | changes


def sft(tiny: Tiny, data: str = "", **changes):
    return tiny.run("sft", sft_options(tiny, data, **changes))


def plain(tiny: Tiny, o: SimpleNamespace, data: str = "", **towers):
    """Model and rows of the second implementation."""
    policy = tiny.folder / "policy"
    model, tokenizer = load_humanomni(policy, **towers), Tokenizer(policy)
    examples = load_examples(data or f"toy:{tiny.folder / 'world'}", "sft")
    kept = {example.path: input_of(example, model, policy, o) for example in examples}
    rows = plain_step.sft(model, examples, lambda example: kept[example.path], tokenizer.encode, o.steps, o)
    return model, rows


@pytest.fixture(scope="session")
def start(tiny):
    return load_file(tiny.folder / "policy/model.safetensors")


LONGER = dict(steps=3)
CHANGES = [  # (what is changed, what the outcome must differ from)
    (dict(targets_per_clip=2), {}),
    (dict(answers_only=True), {}),
    (dict(train_projectors=True), {}),
    (dict(train_vision_tower=True, cache_features="", sharding="hand"), {}),
    (dict(steps=3, schedule="linear"), LONGER),
    (dict(steps=3, schedule="cosine"), LONGER),
    (dict(steps=3, warmup=0.5), LONGER),
    (dict(max_grad_norm=3e-9), {}),
    (dict(batch_size=2), {}),
    (dict(lr=0.5), {}),
    (dict(seed=1), {}),
]


@pytest.mark.parametrize("changes, other", [({}, None), *CHANGES], ids=str)
def test_a_run_is_what_the_plain_step_makes(tiny, start, changes, other):
    run, o = sft(tiny, **changes), SimpleNamespace(**OPTIONS | changes)
    model, rows = plain(tiny, o)
    assert_same_rows(run.rows, rows)
    assert_same_weights(run.weights, model.state_dict(), start, o.steps)
    if other is not None:
        assert_other_weights(run.weights, sft(tiny, **other).weights, start)


def test_the_sum_over_tokens_is_the_mean_but_for_the_scale(tiny, start):
    """Eq. 2 as it stands: a mean over (x, y), a sum over tokens. AdamW takes no notice, nor does a clipped norm."""
    run, mean, o = sft(tiny, loss_reduction="sum"), sft(tiny), SimpleNamespace(**OPTIONS | dict(loss_reduction="sum"))
    model, rows = plain(tiny, o)
    assert_same_rows(run.rows, rows)
    assert_same_weights(run.weights, model.state_dict(), start, o.steps)
    for row, other in zip(run.rows, mean.rows):
        assert row["loss"] > 5 * other["loss"] and row["grad_norm"] > 5 * other["grad_norm"]


@pytest.mark.parametrize("changes", [
    dict(micro_batch=3, recompute=True),
    dict(micro_batch=1, workers=1, cache_features=""),
], ids=str)
def test_how_it_is_computed_changes_no_number(tiny, start, changes):
    assert_same_run(sft(tiny, **changes), sft(tiny), start)


# ---- what the model is given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    dict(geometry="stretch"),
    dict(prompt_stage="sft"),
    dict(prompt_stage="grpo"),
    dict(modality="video"),
    dict(modality="audio"),
    dict(num_frames=3),
    dict(vision_tower="vision"),
    dict(audio_tower="audio"),
    dict(text_tower="text"),
], ids=str)
def test_the_model_is_given_what_the_options_say(tiny, start, changes):
    data = f"merr:{tiny.folder / 'merr'}"
    changes = {name: tiny.folder / "towers" / x if name.endswith("tower") else x for name, x in changes.items()}
    towers = {name: x for name, x in changes.items() if name.endswith("tower")}
    run, o = sft(tiny, data, **changes), SimpleNamespace(**OPTIONS | changes)
    model, rows = plain(tiny, SimpleNamespace(**vars(o) | {name: "" for name in towers}), data, **towers)
    assert_same_rows(run.rows, rows)
    trained = {name: x for name, x in start.items() if "tower" not in name and "bert_model" not in name}
    assert_same_weights(run.weights, model.state_dict(), trained, o.steps)
    assert_other_weights(run.weights, sft(tiny, data).weights, trained)


def test_subtitles_stand_in_the_prompt_unless_they_are_switched_off(tiny, start):
    """Each clip's own. The second implementation reads its x by path: a clip has one subtitle."""
    data, outcomes = f"merr:{tiny.folder / 'merr'}", []
    for subtitles in (True, False):
        run, o = sft(tiny, data, subtitles=subtitles), SimpleNamespace(**OPTIONS | dict(subtitles=subtitles))
        model, rows = plain(tiny, o, data)
        assert_same_rows(run.rows, rows)
        assert_same_weights(run.weights, model.state_dict(), start, o.steps)
        outcomes.append(run.weights)
    assert_other_weights(*outcomes, start)
