"""The prompts and ids of the three released stages."""

import pytest
from conftest import GOLDEN
from erv_min.base.files import read_json
from erv_min.prompts import gate_text, render, user_turn
from erv_min.tokenizer import Tokenizer


CHAT = GOLDEN / "chat"


PROMPTS = read_json(CHAT / "prompts.json")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(CHAT)


def test_inference_prompts_and_ids(tokenizer):
    assert {x["modality"] for x in PROMPTS["inference"]} == {"video_audio", "video", "audio", "text"}
    for x in PROMPTS["inference"]:
        prompt = render(x["instruction"], x["modality"], "inference", system=tokenizer.system)
        assert prompt == x["prompt"]
        assert tokenizer.encode(prompt) == x["input_ids"]
        assert gate_text(x["instruction"], x["modality"]) == x["instruction"]


def test_sft_prompts_ids_labels_and_gate_text(tokenizer):
    for x in PROMPTS["sft"]:
        question = x["human"].replace("<video>", "").replace("<audio>", "").strip()
        assert user_turn(question, "video", "sft") == x["rendered_human"]  # both tags, even where the clip has one
        assert gate_text(question, "video", "sft") == x["gate_prompt"]
        prompt = tokenizer.encode(render(question, "video", "sft"))
        target = tokenizer.encode(x["assistant"]) + tokenizer.turn_end  # as scripts/sft.py makes it
        assert prompt + target == x["input_ids"] and [-100] * len(prompt) + target == x["labels"]


def test_grpo_prompts_and_ids(tokenizer):
    for x in PROMPTS["grpo"]:
        prompt = render(x["question"], "video_audio", "grpo")
        assert prompt == x["prompt"] and tokenizer.encode(prompt) == x["input_ids"]
