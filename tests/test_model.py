"""HumanOmni (Eq. 1) against the released code's golden vectors, and what the vectors do not show: mixed batches."""

import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import GOLDEN
from erv_min.base.errors import DataError
from erv_min.base.onednn import Linear, use_onednn
from erv_min.checkpoint import load_humanomni
from erv_min.config import humanomni
from erv_min.inputs import Batch, Collator, Example, Inputs
from erv_min.media import Clip
from erv_min.model.attention import PackedGroups, attend_causal
from erv_min.model.humanomni import AUDIO, IGNORE, VIDEO, HumanOmni
from erv_min.model.parameters import (PARTS, freeze_except, frozen_reference, init_weights, random_humanomni,
                                      unused_parameters)
from erv_min.model.towers import sinusoids
from tiny import close


@pytest.fixture(scope="module")
def toy():
    return random_humanomni(humanomni("toy"), seed=1)


def clips(n, seed=0):
    """n random clips for the toy model: video [n, 4, 3, 48, 48], audio [n, 32, 100]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 3, 48, 48, generator=g), torch.randn(n, 32, 100, generator=g)


def spliced_row_by_row(model, ids, clips, labels, keep):
    """The plain form of `splice`: a loop over rows and tokens; `clips` maps a placeholder to its clips' tokens."""
    clips = {placeholder: iter(tokens) for placeholder, tokens in clips.items()}
    rows, targets = [], []
    for row, targets_of_row, kept in zip(ids.tolist(), labels.tolist(), keep.tolist()):
        rows.append([])
        targets.append([])
        for token, target, k in zip(row, targets_of_row, kept):
            if k:
                piece = next(clips[token]) if token in clips else model.model.embed_tokens.weight[token][None]
                rows[-1] += piece
                targets[-1] += [IGNORE] * len(piece) if token in clips else [target]
    width = max(map(len, rows))
    zero = torch.zeros(model.config.text.hidden_size)
    return (torch.stack([torch.stack(row + [zero] * (width - len(row))) for row in rows]),
            torch.tensor([t + [IGNORE] * (width - len(t)) for t in targets]),
            torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]))


@pytest.mark.parametrize("seed", range(5))
def test_splice_equals_a_loop_over_tokens(toy, seed):
    """Any number of clips per row, masked placeholders, holes and empty rows: same bits, and the same gradients."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (4, 9), generator=g)
    ids = ids.masked_fill(ids == 10, VIDEO).masked_fill(ids == 11, AUDIO)  # words come several times
    keep = torch.rand(4, 9, generator=g) < 0.8
    keep[seed % 4] &= seed % 2 == 0
    labels = torch.randint(0, 500, (4, 9), generator=g)
    video, audio = (torch.randn(int(((ids == x) & keep).sum()), n, 96, generator=g, requires_grad=True)
                    for x, n in ((VIDEO, 3), (AUDIO, 2)))
    words = toy.model.embed_tokens.weight.requires_grad_(True)
    expected = spliced_row_by_row(toy, ids, {VIDEO: video, AUDIO: audio}, labels, keep)
    got = toy.splice(ids, video, audio, labels, keep)
    weight = torch.randn(expected[0].shape, generator=g)
    for a, b in zip((got.embeds, got.labels, got.mask), expected):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad((x * weight).sum(), (video, audio, words), materialize_grads=True)
             for x in (got.embeds, expected[0])]
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    torch.testing.assert_close(grads[0][2], grads[1][2])


@torch.no_grad()
def test_rows_of_any_modality_in_one_batch(toy):
    """Both, video alone, audio alone, text alone and two videos, with questions of their own: each as if by itself."""
    video, audio = clips(4), clips(2, 1)
    video, audio = video[0], audio[1]
    rows = [[3, VIDEO, 4, AUDIO, 5], [VIDEO, 6], [7, 8, AUDIO], [9, 10, 11, 12], [VIDEO, 13, VIDEO]]
    gate_ids = torch.randint(5, 250, (5, 6), generator=torch.Generator().manual_seed(2))
    gate_mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6, [1] * 6, [1] * 3 + [0] * 3])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])  # padded on the left
    keep = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    logits = toy(ids, video, audio, gate_ids, gate_mask, attention_mask=keep).logits
    mine = [(video[:1], audio[:1]), (video[1:2], None), (None, audio[1:]), (None, None), (video[2:], None)]
    for b, (row, (v, a)) in enumerate(zip(rows, mine)):
        question = gate_ids[b][gate_mask[b].bool()][None]
        alone = toy(torch.tensor([row]), v, a, question).logits[0]
        close(logits[b, : len(alone)], alone, 2e-6)
    assert len(alone) == 1 + 2 * toy.config.video_tokens == 33


@torch.no_grad()
def test_one_question_for_all_clips_and_a_clip_without_its_batch_dimension(toy):
    video, audio = clips(2)
    ids, gate = torch.tensor([[1, VIDEO, AUDIO, 2]] * 2), torch.tensor([[7, 8, 9]])
    both = toy(ids, video, audio, gate).logits
    assert both.shape == (2, 2 + 16 + 16, 800)
    close(toy(ids, video, audio, gate.expand(2, -1)).logits, both, 2e-6)
    close(toy(ids[:1], video[0], audio[0], gate).logits, both[:1], 2e-6)
    with pytest.raises(DataError, match=r"vision_features has shape \[1, 4, 9, 48\].*16, 48"):
        toy.prompt_embeds(ids, torch.zeros(1, 4, 9, 48), gate_ids=gate)


@torch.no_grad()
def test_a_masked_video_takes_no_question(toy):
    """Row 0's <video> is dropped, so that the one clip is row 1's, and is gated by row 1's question."""
    ids, keep, gate = torch.tensor([[VIDEO, 5], [6, VIDEO]]), torch.tensor([[0, 1], [1, 1]]), torch.tensor([[7], [9]])
    vision = toy.vision_features(clips(1)[0])
    got = toy.prompt_embeds(ids, vision, None, gate, attention_mask=keep)
    alone = toy.prompt_embeds(ids[1:], vision, None, gate[1:])
    assert got.lengths.tolist() == [1, 1 + toy.config.video_tokens]
    close(got.embeds[1], alone.embeds[0], 1e-6)
    assert (toy.prompt_embeds(ids[1:], vision, None, gate[:1]).embeds - alone.embeds).abs().max() > 1e-5


def test_what_the_released_sizes_leave_to_their_defaults():
    """No released file that is read here states them all, and a model of random weights has no file."""
    for name in ("0.5b", "7b"):
        c = humanomni(name)
        assert (c.text.rope_theta, c.text.rms_norm_eps, c.num_frames, c.mm_vision_select_layer, c.gate_hidden_size) == (
            1e6, 1e-6, 8, -2, 3584)
        assert (c.vision.layer_norm_eps, c.gate.layer_norm_eps, c.audio_tokens) == (1e-6, 1e-12, 500)
    assert [humanomni(name).video_tokens for name in ("0.5b", "7b")] == [8 * 7 * 7, 8 * 14 * 14]


@pytest.mark.parametrize("change, message", [
    (dict(video=torch.zeros(1, 4, 3, 50, 50)), r"video has shape \[1, 4, 3, 50, 50\].*48"),
    (dict(video=torch.zeros(1, 4, 48, 48, 3)), "video has shape"),
    (dict(audio=torch.zeros(1, 128, 100)), r"audio has shape \[1, 128, 100\], the model takes \[clips, 32,"),
    (dict(audio=torch.zeros(1, 32, 101)), "5 to 100"),
    (dict(video=torch.zeros(2, 4, 3, 48, 48)), r"holds 1 <video> \(-201\), but video holds 2"),
    (dict(video=None), r"holds 1 <video> \(-201\), but video holds 0"),
    (dict(audio=None), r"holds 1 <audio> \(-202\), but audio holds 0"),
    (dict(gate_ids=None), "needs gate_ids"),
    (dict(gate_ids=torch.zeros(1, 161, dtype=torch.long)), r"gate_ids has shape \[1, 161\].*160"),
    (dict(gate_ids=torch.zeros(3, 5, dtype=torch.long)), "3 rows for 1 videos"),
    (dict(gate_mask=torch.ones(1, 4)), "gate_mask has shape"),
    (dict(input_ids=torch.tensor([1, VIDEO])), r"input_ids has shape \[2\]"),
    (dict(input_ids=torch.tensor([[800, VIDEO, AUDIO]])), "holds 800"),
    (dict(input_ids=torch.tensor([[-200, VIDEO, AUDIO]])), "holds -200"),
    (dict(labels=torch.full((1, 3), IGNORE)), "no target"),
    (dict(labels=torch.zeros(1, 4, dtype=torch.long)), "labels has shape"),
])
def test_wrong_inputs_name_field_and_shape(toy, change, message):
    inputs = dict(input_ids=torch.tensor([[1, VIDEO, AUDIO]]), video=clips(1)[0], audio=clips(1)[1],
                  gate_ids=torch.tensor([[5, 6, 7]]))
    toy(**inputs)
    with pytest.raises(DataError, match=message):
        toy(**{**inputs, **change})


@pytest.mark.parametrize("questions", [1, 3])
def test_some_rows_of_a_batch(questions):
    """One question to all clips serves any of them; a missing modality stays missing."""
    ids, vision = torch.arange(12).view(3, 4), torch.rand(3, 2, 5, 6)
    gate = torch.arange(questions * 2).view(questions, 2)
    part = Batch(["a", "b", "c"], ids, ids > 0, gate, gate > 0, vision, None)[1:3]
    rows = slice(1, 3) if questions == 3 else slice(0, 1)
    assert part.examples == ["b", "c"] and len(part) == 2 and part.audio is None
    assert torch.equal(part.input_ids, ids[1:3]) and torch.equal(part.attention_mask, (ids > 0)[1:3])
    assert torch.equal(part.gate_ids, gate[rows]) and torch.equal(part.gate_mask, (gate > 0)[rows])
    assert torch.equal(part.vision, vision[1:3])


def test_features_leave_the_clip_as_it_was(toy, tmp_path):
    """The towers' features of a clip, pixels if the vision tower trains, or the features that it brings."""
    model = deepcopy(toy).requires_grad_(False)
    (video, audio), collate = clips(1), Collator(model, None, None)
    item = Inputs(Example("1", tmp_path, "happy", "toy"), Clip(video[0], audio[0]))
    vision, heard = collate.features(item)
    assert item.features is None and item.clip.video is not None
    assert torch.equal(vision, model.vision_features(video)[0]) and torch.equal(heard, model.audio_features(audio)[0])
    assert collate.features(Inputs(item.example, None, (vision, None))) == (vision, None)
    freeze_except(model, ["vision_tower"])
    assert collate.features(item)[0] is item.clip.video


# ---- what trains, and from where it starts --------------------------------------------------------------------------


def test_unused_parameters_are_exactly_what_gets_no_gradient(toy):
    toy.requires_grad_(True)
    video, audio = clips(1)
    ids = torch.tensor([[1, VIDEO, AUDIO, 2, 3]])
    toy(ids, video, audio, torch.tensor([[5, 6, 7]]), labels=ids.clamp(min=0)).loss.backward()
    untouched = {name for name, p in toy.named_parameters() if p.grad is None}
    toy.zero_grad()
    assert untouched == unused_parameters(toy) and len(untouched) > 20


def test_trainable_parts():
    model = HumanOmni(humanomni("toy"))
    freeze_except(model, ["language_model", "text_encoder"])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    prefixes = ("model.layers.", "model.embed_tokens.", "model.norm.", "model.bert_model.")
    assert all(n.startswith(prefixes) for n in names)
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names  # tied: listed once
    assert not any("pooler" in n for n in names) and any("bert_model.encoder" in n for n in names)
    freeze_except(model, PARTS)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if "audio_tower" in n} | unused_parameters(model)


def test_the_reference_is_a_frozen_copy_without_towers(toy):
    """Same log-probs from the same features; a step of the policy, or its freezing, leaves it as it was."""
    policy = deepcopy(toy)
    freeze_except(policy, ["language_model", "vision_tower"])
    reference = frozen_reference(policy)
    names = {name for name, _ in policy.named_parameters() if "_tower." not in name}
    assert {name for name, _ in reference.named_parameters()} == names
    assert not any(p.requires_grad for p in reference.parameters())
    assert policy.head_weight.requires_grad
    assert all(p.requires_grad for p in policy.vision_tower.encoder["layers"][0].parameters())
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
    ids, (video, audio), gate = torch.tensor([[1, VIDEO, AUDIO, 2]]), clips(1), torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        features = policy.vision_features(video), policy.audio_features(audio)
        expected = policy.prompt_embeds(ids, *features, gate).embeds
        policy.head_weight.zero_()
        assert torch.equal(reference.prompt_embeds(ids, *features, gate).embeds, expected)


def test_random_weights_depend_on_the_seed_alone():
    config = humanomni("toy")
    torch.manual_seed(5)
    model = HumanOmni(config)
    init_weights(model, 3)
    filled = random_humanomni(config, 3)
    for (name, a), b in zip(model.state_dict().items(), filled.state_dict().values()):
        assert torch.equal(a, b), name
    assert filled.lm_head.weight is filled.model.embed_tokens.weight
    assert not torch.equal(random_humanomni(config, 4).head_weight, filled.head_weight)
    assert filled.head_weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert random_humanomni(config, 3, dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 8), (2, 5, 8), (3, 1, 8), (0, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_without_gradients_is_the_same_linear(shape, bias):
    """oneDNN's product against PyTorch's own, on any number of rows; float64 and autocast keep their types."""
    layer, x = use_onednn(torch.nn.Linear(8, 6, bias=bias)), torch.randn(shape)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach())
        strided = x.transpose(0, -1).contiguous().transpose(0, -1)
        torch.testing.assert_close(layer(strided), expected.detach())
        assert layer.double()(x.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(x).dtype == torch.bfloat16
    assert layer(x).requires_grad


def test_products_of_many_shapes_leave_little_behind():
    """By default half a megabyte per shape stays, for 1,024 of them; completions have another length at each step."""
    grown = subprocess.run([sys.executable, "-c", """
import re, torch
from pathlib import Path
from erv_min.base.onednn import linear
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
weight, before = torch.zeros(512, 128), None
with torch.no_grad():
    for rows in range(264, 64, -1):
        linear(torch.zeros(rows, 128), weight)
        before = before or resident()
print(resident() - before)"""], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert float(grown.stdout) < 75  # MiB; it is about 50, and 95 to 110 if one of the two keeps all


def test_use_onednn_changes_the_class_alone():
    """Names, parameters and numbers stay; a copy keeps the class; a subclass of nn.Linear is left alone."""
    model = HumanOmni(humanomni("toy"))
    names = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    parameters = dict(model.named_parameters())
    assert use_onednn(model) is model
    for same in (model, deepcopy(model)):
        assert {name for name, module in same.named_modules() if type(module) is Linear} == names and len(names) > 50
        assert "Linear" in repr(same) and same.state_dict().keys() == model.state_dict().keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert type(model.vision_tower.head.attention.out_proj) not in (Linear, torch.nn.Linear)
    for loaded in (random_humanomni(humanomni("toy")), load_humanomni(GOLDEN / "humanomni_small")):
        assert {type(module) for module in loaded.modules() if type(module).__name__ == "Linear"} == {Linear}


def test_whispers_positions_by_hand():
    # Width 4: two sines, two cosines, of frequencies 1 and 1 / 10000; rows are the positions 0 and 1.
    one, slow = torch.tensor(1.0), torch.tensor(1e-4)
    rows = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.stack([one.sin(), slow.sin(), one.cos(), slow.cos()])
    torch.testing.assert_close(sinusoids(2, 4), torch.stack(rows))


def test_random_weights_have_the_spread_that_is_told():
    """Linear layers 0.6 / sqrt(inputs), embeddings 0.02, norms 1, biases 0; Whisper's positions are the sinusoids."""
    model = random_humanomni(humanomni("toy"), 2)
    layer = model.model.layers[0]
    for linear in (layer.mlp.gate_proj, layer.mlp.down_proj, model.model.audio_projector[0]):
        assert linear.weight.std().item() * linear.in_features**0.5 == pytest.approx(0.6, rel=0.05)
    assert model.vision_tower.embeddings["position_embedding"].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (layer.input_layernorm.weight == 1).all() and (layer.self_attn.q_proj.bias == 0).all()
    positions = model.model.audio_tower["audio_tower"]["encoder"].embed_positions.weight
    assert torch.equal(positions, sinusoids(50, 48))


# ---- the pieces of the language model -------------------------------------------------------------------------------


class OnCuda(torch.Tensor):
    """A CPU tensor that says it lies on CUDA."""

    is_cuda = True


@pytest.mark.parametrize("kind", [torch.Tensor, OnCuda])
def test_causal_attention_of_grouped_heads(kind):
    """Against the formula, head by head; with and without repeated keys: query head h reads key head h // (H / KV)."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 4, generator=g, requires_grad=True) for heads in (6, 2, 2))
    out = attend_causal(q, k, v.as_subclass(kind))
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = torch.stack([(q[:, h] @ k[:, h // 3].mT / 2).masked_fill(later, -torch.inf).softmax(-1) @ v[:, h // 3]
                            for h in range(6)], 1)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v), retain_graph=True) for x in (out, expected)]
    for got, wanted in zip(*grads):
        torch.testing.assert_close(got.as_subclass(torch.Tensor), wanted)


def test_float32_on_cuda_never_asks_for_grouped_heads(monkeypatch):
    """There enable_gqa is computed by the kernel that writes down all scores (pytorch#181528)."""
    asked, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **options):
        asked.append((options["enable_gqa"], args[1].shape[1]))
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    q, k = torch.randn(1, 6, 3, 4), torch.randn(1, 2, 3, 4)
    for dtype in (torch.float32, torch.bfloat16):
        attend_causal(q.to(dtype), k.to(dtype), k.to(dtype).as_subclass(OnCuda))
    attend_causal(q, k, k)
    assert asked == [(False, 6), (True, 2), (True, 2)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a kernel's choice shows on CUDA alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_scores_are_written_down_on_cuda(dtype):
    q, k = (torch.randn(1, heads, 64, 64, device="cuda", dtype=dtype) for heads in (6, 2))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):  # raises where neither can
        attend_causal(q, k, k)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("length", [0, 3])
def test_a_pass_without_packed_tokens_keeps_its_graph(toy, length, recompute):
    """Completions of one token each have none that predicts another: hidden [1, 0, D], and gradients that are zeros."""
    embeds = torch.randn(2, 4, 96)
    none = torch.zeros(1, 0, dtype=torch.long)
    language = toy.model.requires_grad_(True)
    language.zero_grad()
    language.recompute = recompute
    try:
        _, kv = language(embeds, keep_kv=True)
        past = PackedGroups.of(kv, torch.ones(2, 4).bool(), torch.zeros(6, length).bool(), 2)  # 3 per prompt
        hidden, _ = language(language.embed_tokens(none), none, past)
    finally:
        language.recompute = False
    assert hidden.shape == (1, 0, 96)
    hidden.sum().backward()
    used = [*language.layers.parameters(), *language.norm.parameters(), language.embed_tokens.weight]
    assert all(p.grad is not None and not p.grad.any() for p in used)
    language.zero_grad()
