"""The released model's logits, loss, gradients, greedy tokens and what lies between; every name and shape at full size."""

import json
import pytest
import torch
from safetensors.torch import load_file
from conftest import GOLDEN
from erv_min.checkpoint import load_humanomni
from erv_min.config import humanomni
from erv_min.generate import generate
from erv_min.model.humanomni import HumanOmni
from tiny import close, plain_rollout


LAYOUTS = ["humanomni_small", "humanomni_large"]


def golden(layout):
    return load_humanomni(GOLDEN / layout), load_file(GOLDEN / layout / "expected.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_gradients(layout):
    model, e = golden(layout)
    out = model(e["input_ids"], video=e["images"], audio=e["audios"], gate_ids=e["prompts.input_ids"],
                gate_mask=e["prompts.attention_mask"], labels=e["labels"])
    close(out.logits, e["logits"], 2e-5)
    assert abs(out.loss.item() - e["loss"].item()) <= 1e-6 * e["loss"].item()
    out.loss.backward()
    parameters = dict(model.named_parameters())
    names = [k for k in e if k.startswith("grad.")]
    assert len(names) == 7
    for name in names:
        close(parameters[name.removeprefix("grad.")].grad, e[name], 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_what_lies_between(layout):
    model, e = golden(layout)
    gate = e["prompts.input_ids"], e["prompts.attention_mask"]
    close(model.model.bert_model(*gate)[:, 0], e["bert_cls"], 3e-6)
    close(model.gate_weights(*gate), e["gate"], 1e-6)
    close(model.encode_audio(e["audios"]), e["audio_embeds"], 3e-6)
    features = model.vision_features(e["images"])
    close(features[0], e["vision_features"], 3e-6)
    grid = model.config.vision.grid
    maps, projector = features.unflatten(2, (grid, grid)), model.model.mm_projector
    close(projector.convolve("video", maps).flatten(1, 3), e["branch_video"], 3e-6)
    close(projector.convolve("body", maps).flatten(1, 3), e["branch_body"], 3e-6)
    close(projector.mlp_2xgelu_face(features).flatten(0, 1), e["branch_face"], 3e-6)
    close(model.encode_video(e["images"], *gate), e["visual_embeds"], 3e-6)
    assert e["visual_embeds"].shape[1] == model.config.video_tokens
    assert e["audio_embeds"].shape[1] == model.config.audio_tokens


@pytest.mark.parametrize("name, millions", [("0.5b", 1373.2), ("7b", 9581.6)])
def test_full_size_names_and_shapes(name, millions):
    with torch.device("meta"):
        model = HumanOmni(humanomni(name))
    expected = json.loads((GOLDEN / f"manifest_{name}.json").read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected
    assert not list(model.buffers())  # nothing that loading on the meta device would leave unfilled
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_greedy_tokens(layout):
    model, expected = golden(layout)
    eos = json.loads((GOLDEN / layout / "config.json").read_text())["eos_token_id"]
    ids = generate(model, expected["input_ids"][0], video=expected["images"][0], audio=expected["audios"][0],
                   gate_ids=expected["prompts.input_ids"][:1], gate_mask=expected["prompts.attention_mask"][:1],
                   group_size=2, max_new_tokens=16, temperature=0, eos_token_id=eos)
    features = model.vision_features(expected["images"][:1]), model.audio_features(expected["audios"][:1])
    prompts = model.prompt_embeds(expected["input_ids"][:1], *features, expected["prompts.input_ids"][:1],
                                  expected["prompts.attention_mask"][:1])
    for row in [*ids, *plain_rollout(model, prompts, 2, 16, eos, temperature=0).ids]:
        assert row.tolist() == expected["greedy_tokens"][0].tolist()
