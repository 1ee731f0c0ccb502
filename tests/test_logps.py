"""Log-probs of completions on a shared prompt: equal to the repeated form, in value and gradient (Eq. 2, Eq. 3)."""

import sys
from pathlib import Path

import pytest
import torch

import erv_min.base.chunked
from erv_min.inputs import Example
from erv_min.logps import Completions, completion_logps, token_logps
from erv_min.model.attention import PackedGroups
from erv_min.sft import group_targets
from tiny import tiny_model, tiny_prompts

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "tools"))
from live import Live  # noqa: E402


def repeated_logps(model, prompts, completions):
    """The plain form: every completion behind a prompt of its own, full logits, one row at a time."""
    group = len(completions.ids) // len(prompts.embeds)
    rows = []
    for r, ids in enumerate(completions.ids):
        prompt = prompts.embeds[r // group][prompts.mask[r // group]]
        x = torch.cat([prompt, model.model.embed_tokens(ids[:-1])])[None]
        hidden, _ = model.model(x)
        logps = (hidden[0, len(prompt) - 1 :] @ model.head_weight.T).log_softmax(-1)
        rows.append(logps.gather(1, ids[:, None])[:, 0] * completions.mask[r])
    return torch.stack(rows)


def completions_of(lengths, vocab=512, seed=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (len(lengths), max(lengths)), generator=generator)
    return Completions(ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("prompt_lengths", [(7, 7), (3, 7)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_shared_prompt_equals_repeated_prompt(prompt_lengths, recompute, tied, dtype, tolerance):
    """Prefix Grouper's claim, to the tolerances of each type: log-probs and gradients of G whole sequences."""
    model = tiny_model(dtype=dtype, tie_word_embeddings=tied)
    completions = completions_of((5, 1, 4, 2, 5, 3))
    gradients, values = [], []
    for form in (repeated_logps, lambda *a: completion_logps(*a)[0]):
        model.zero_grad()
        model.model.recompute = recompute
        prompts = tiny_prompts(model, prompt_lengths)
        prompts.embeds.requires_grad_()
        logps = form(model, prompts, completions)
        (logps * torch.arange(1, 6)).sum().backward()
        values.append(logps.detach())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        gradients[-1]["prompt"] = prompts.embeds.grad * prompts.mask[..., None]
    torch.testing.assert_close(values[1], values[0], atol=tolerance, rtol=tolerance)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 30
    for name, g in gradients[0].items():
        assert (g - gradients[1][name]).norm() <= tolerance * g.norm() + 1e-9, name


def test_rollouts_put_together_and_cut_apart_by_hand():
    # A completion of two tokens and one of one; 9 pads. Together as long as the longer, apart without its padding.
    one = Completions(torch.tensor([[4, 9]]), torch.tensor([[True, True]]), torch.tensor([[-1.0, -2.0]]))
    other = Completions(torch.tensor([[9]]), torch.tensor([[True]]), torch.tensor([[-3.0]]))
    both = Completions.cat([one, other], 9)
    assert both.ids.tolist() == [[4, 9], [9, 9]] and both.mask.tolist() == [[True, True], [True, False]]
    assert both.logps.tolist() == [[-1, -2], [-3, 0]]
    for part, rows in ((one, slice(0, 1)), (other, slice(1, 2))):
        assert all(torch.equal(x, getattr(part, name)) for name, x in vars(both[rows]).items())


def test_packing_by_hand():
    kv, mask = [(torch.ones(1, 1, 2, 1),) * 2], torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    packed = PackedGroups.of(kv, torch.tensor([[True, False]]), mask, fold=2)
    assert packed.places.tolist() == [0, 1, 3, 4, 5]
    x = torch.arange(1.0, 6)[None, :, None]  # width 1: the tokens 1 to 5
    assert packed.unpack(x)[:, :, 0].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert torch.equal(packed.pack(packed.unpack(x)), x)
    sees = [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]  # the prompt and its padding; itself
    assert packed.mask.exp().tolist() == [[sees * 2], [sees * 2]]  # for each of two query heads
    assert all(stride % 16 == 0 for stride in packed.mask.stride()[:-1])  # else CUDA's kernel copies it in every layer


def test_no_layer_computes_the_padding_of_completions():
    """Completions of 5, 1, 2 and 2 tokens: the second pass has the 4 + 0 + 1 + 1 tokens that predict another one."""
    model, completions, seen = tiny_model(), completions_of((5, 1, 2, 2)), []
    model.model.layers[0].mlp.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:2])))
    completion_logps(model, tiny_prompts(model, (3, 7)), completions)
    assert seen == [(2, 7), (1, 6)]


def test_padding_of_prompts_gets_no_gradient():
    model = tiny_model()
    prompts = tiny_prompts(model, (3, 7))
    prompts.embeds.requires_grad_()
    completion_logps(model, prompts, completions_of((3, 2)))[0].sum().backward()
    assert torch.isfinite(prompts.embeds.grad).all()
    assert prompts.embeds.grad[0, 3:].abs().max() == 0 and prompts.embeds.grad[0, :3].abs().max() > 0


class OnCuda(torch.Tensor):
    is_cuda = True


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 8, generator=generator), torch.randn(40, 8, generator=generator)
    ids = torch.randint(0, 40, (50,), generator=generator)
    results, rows = [], []
    monkeypatch.setattr(erv_min.base.chunked, "linear", lambda x, weight: rows.append(len(x)) or x @ weight.T)
    for chunk, kind in ((2**24, torch.Tensor), (40 * 7, torch.Tensor), (40 * 7, OnCuda)):
        monkeypatch.setattr(erv_min.base.chunked, "CHUNK_LOGITS", chunk)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps, entropy = token_logps(h, w.as_subclass(kind), ids, with_entropy=True)
        logps.pow(2).sum().backward()
        results.append((logps.detach(), entropy, h.grad, w.grad))
    full = (hidden @ weight.T).log_softmax(-1)
    torch.testing.assert_close(results[0][0], full.gather(1, ids[:, None])[:, 0])
    for a, b, c in zip(*results):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c.as_subclass(torch.Tensor))
    assert rows == [50] * 2 + ([7] * 7 + [1]) * 2 + [28, 22] * 2  # each forward and backward, 4 times as long on CUDA


def test_gradients_at_a_temperature_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(10, 8, generator=generator)
    ids, scale = torch.randint(0, 10, (6,), generator=generator), torch.arange(6.0)
    found = []
    for own in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = (token_logps(h, w, ids, 0.7)[0] if own
                 else (h @ w.T / 0.7).log_softmax(-1).gather(1, ids[:, None])[:, 0])
        (logps * scale).sum().backward()
        found.append((logps, h.grad, w.grad))
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected)


def test_chunks_do_not_cost_bfloat16_its_digits(monkeypatch):
    """The head's gradient over 64 chunks is as near to float32's as that of one: chunks are summed in float32."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(512, 32, generator=generator), torch.randn(100, 32, generator=generator)
    ids = torch.randint(0, 100, (512,), generator=generator)

    def gradient(dtype: torch.dtype, chunk: int) -> torch.Tensor:
        monkeypatch.setattr(erv_min.base.chunked, "CHUNK_LOGITS", chunk)
        w = weight.detach().clone().to(dtype).requires_grad_()
        token_logps(hidden.to(dtype), w, ids)[0].mean().backward()
        return w.grad.float()

    exact = gradient(torch.float32, 2**24)
    one, many = ((gradient(torch.bfloat16, chunk) - exact).norm() / exact.norm() for chunk in (2**24, 100 * 8))
    assert many < 1.5 * one, (one, many)  # 3.4 times as far where they are summed in bfloat16


def test_memory_does_not_grow_with_vocabulary_times_length(monkeypatch):
    """The most bytes alive at a time in forward and backward, hidden states and the head's gradient apart."""
    assert 4 * erv_min.base.chunked.CHUNK_LOGITS <= 2**26 and erv_min.base.chunked.ON_CUDA <= 4  # bytes that are set aside for logits
    monkeypatch.setattr(erv_min.base.chunked, "CHUNK_LOGITS", 2**12)

    def peak(vocab: int, length: int) -> int:
        hidden, weight = torch.randn(length, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
        ids = torch.zeros(length, dtype=torch.long)
        with Live() as live:
            token_logps(hidden, weight, ids, with_entropy=True)[0].sum().backward()
        return live.peak - hidden.nbytes - weight.nbytes

    few = peak(256, 64)
    assert peak(256, 640) < 2 * few and peak(2048, 64) < 2 * few and peak(2048, 640) < 2 * few
    assert peak(2048, 640) < 2048 * 640 * 4 / 10  # of the logits alone


def test_a_prompt_is_not_repeated_in_memory():
    """Twice the completions on one prompt need less than twice the bytes: no copy of the prompt's activations."""
    model = tiny_model()
    prompts = tiny_prompts(model, (400,))

    def peak(group: int) -> int:
        with Live() as live:
            completion_logps(model, prompts, completions_of([4] * group))[0].sum().backward()
        model.zero_grad()
        return live.peak

    assert peak(16) < 1.5 * peak(8)


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_log_probs_and_gradients_are_near(tied):
    """Under autocast (weights float32, products bfloat16) both directions keep to the float32 numbers."""
    model = tiny_model(tie_word_embeddings=tied)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logps, _ = completion_logps(model, tiny_prompts(model), completions_of((4, 3)))
        assert logps.dtype == torch.float32
        logps.sum().backward()
        results.append((logps.detach(), model.head_weight.grad.clone()))
    torch.testing.assert_close(results[1][0], results[0][0], atol=0.2, rtol=0.05)
    assert (results[1][1] - results[0][1]).norm() < 0.25 * results[0][1].norm()  # torch 2.6: 0.20, 2.13: 0.11


def test_the_entropy_keeps_float32_under_autocast():
    """Autocast takes dot products in bfloat16; the entropy is that of the same logits without it."""
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(64, 32).bfloat16(), torch.randn(4000, 32).bfloat16(), torch.arange(64)
    plain = token_logps(hidden, weight, ids, with_entropy=True)[1]
    with torch.autocast("cpu", torch.bfloat16):
        cast = token_logps(hidden, weight, ids, with_entropy=True)[1]
    torch.testing.assert_close(cast, plain, atol=1e-5, rtol=0)


def test_empty_completions_have_a_defined_result():
    model = tiny_model()
    completions = Completions(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool))
    logps, entropy = completion_logps(model, tiny_prompts(model), completions, with_entropy=True)
    assert logps.abs().sum() == 0 and entropy.abs().sum() == 0


def test_group_targets_gives_every_target_a_unit(tmp_path):
    def example(clip, text):
        return Example(video_id=clip, path=tmp_path / clip, label="happy", dataset="dfew", explanation=text)

    examples = [example("a", "1"), example("b", "2"), example("a", "3"), example("a", "4")]
    for size, expected in ((1, [["1"], ["3"], ["4"], ["2"]]), (2, [["1", "3"], ["4", "1"], ["2", "2"]])):
        assert [[e.explanation for e in unit] for unit in group_targets(examples, size)] == expected


def test_targets_of_other_clips_or_with_other_words_share_no_prompt(tmp_path):
    """One file name in two folders is two clips, and a subtitle is part of the prompt."""
    examples = [Example("a", tmp_path / folder / "a", "happy", "dfew", subtitle=said)
                for folder, said in (("x", ""), ("y", ""), ("x", "No!"), ("x", ""))]
    units = group_targets(examples, 2)
    assert [[(e.path.parent.name, e.subtitle) for e in unit] for unit in units] == [
        [("x", "")] * 2, [("y", "")] * 2, [("x", "No!")] * 2]
