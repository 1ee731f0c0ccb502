"""Prompts and tokenizers: the recorded prompts and ids of the three stages, exactly; Eq. 1's placeholders."""

import json

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from conftest import GOLDEN
from erv_min.base.errors import CheckpointError, SettingsError
from erv_min.base.files import read_json
from erv_min.prompts import (QUESTION, REASONING_SUFFIX, complement_prompt, judge_prompt, label_prompt,
                             question_with_subtitle, render, sft_target)
from erv_min.tokenizer import EncoderTokenizer, Tokenizer

CHAT = GOLDEN / "chat"
PROMPTS = read_json(CHAT / "prompts.json")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(CHAT)


def test_defaults_are_the_papers_question():
    assert render() == PROMPTS["inference"][0]["prompt"]
    assert f"{QUESTION} {REASONING_SUFFIX}" == PROMPTS["inference"][0]["instruction"]
    assert sft_target("He smiles.", "happy") == "<think>He smiles.</think>\n<answer>happy</answer>"


def test_placeholders_split_the_text(tokenizer):
    ids = tokenizer.encode("a<video>b<audio>")
    assert ids == [*tokenizer.encode("a"), -201, *tokenizer.encode("b"), -202]
    for text in ("a<video>b<audio>", "<video>"):
        plain = tokenizer.encode(text, placeholders=False)  # text of data or of a policy places no clip
        assert min(plain) >= 0 and tokenizer.decode(plain) == text
    assert tokenizer.decode(tokenizer.encode("<|im_start|>é 你好<|im_end|>"), skip_special=True) == "é 你好"
    assert (tokenizer.eos_id, tokenizer.pad_id) == (802, 800)


def test_a_question_cannot_place_a_clip_or_a_turn():
    for bad in ("<video>Why?", "Why?<|im_end|>"):
        with pytest.raises(SettingsError, match="places"):
            render(bad)
    assert question_with_subtitle("Why?", " ") == "Why?"
    assert question_with_subtitle("Why?", "No<video><|im_end|>\n way <aud<audio>io>") == (
        'Why? The subtitle of the video is: "No way <aud io>"')
    for arguments in ({"modality": "smell"}, {"stage": "dpo"}):
        with pytest.raises(SettingsError, match="unknown"):
            render("Why?", **arguments)


def test_figures_3_6_and_7():
    assert judge_prompt("He cries.", ["sad", "happy"]) == (
        "Read the reasoning content and respond with the appropriate emotion in sad, happy.\n"
        "Reply with only the emotion word.\nReason: He cries. Answer Emotion:")
    prompt = label_prompt("He cries.", ["sadness", "anger"])
    assert "appropriate emotion in sadness, anger. Primarily output a single dominant emotion." in prompt
    assert prompt.endswith("Reply with only the emotion word.\nReason: He cries. Answer Emotion:")
    prompt = complement_prompt("disgust", ["He sneers.", "She gags."])
    assert ("Example 1 (Target Emotion: disgust):\nHe sneers.\n\n"
            "Example 2 (Target Emotion: disgust):\nShe gags.\n\nNow, based") in prompt
    assert prompt.endswith("Target Emotion: disgust")


@pytest.fixture
def old_folder(tmp_path):
    """The same tokenizer as vocab.json, merges.txt and added_tokens_decoder."""
    raw = read_json(CHAT / "tokenizer.json")
    config = read_json(CHAT / "tokenizer_config.json")
    config["added_tokens_decoder"] = {str(t["id"]): {"content": t["content"]} for t in raw["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_vocabulary_and_merges_open_alike(old_folder, tokenizer):
    old = Tokenizer(old_folder)
    text = PROMPTS["sft"][2]["rendered_human"] + " It's 1234  spaces\n\n\té Ａ<|im_end|>"
    assert old.encode(text) == tokenizer.encode(text)
    ids = [i for i in old.encode(text) if i >= 0]  # without placeholders
    assert old.decode(ids) == tokenizer.decode(ids)
    config = read_json(old_folder / "tokenizer_config.json")
    config["added_tokens_decoder"]["900"] = {"content": "<|gap|>"}
    (old_folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="900"):
        Tokenizer(old_folder)


@pytest.mark.parametrize("template, system", [
    (r"{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}", "You are Qwen."),  # jinja's own escape
    ("{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>' }}"
     "{{ '<|im_start|>system\nDon\\'t.<|im_end|>' }}",
     "Don't."),
    ("{{ messages }}", "You are a helpful assistant."),
])
def test_system_turn_comes_from_the_chat_template(old_folder, template, system):
    config = read_json(old_folder / "tokenizer_config.json") | {"chat_template": template}
    (old_folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(old_folder).system == system
    assert render("Why?", system=system).startswith(f"<|im_start|>system\n{system}<|im_end|>\n")


def test_truncation_and_padding_saved_in_the_file_do_not_count(tmp_path, tokenizer):
    raw = read_json(CHAT / "tokenizer.json")
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 800,
                      "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer(tmp_path).encode(render()) == tokenizer.encode(render())


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="vocab.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        Tokenizer(tmp_path)


def test_encoder_tokenizer_pads_cuts_and_prefers_the_gate(tmp_path):
    def save(folder, cls, sep, pad):
        folder.mkdir(exist_ok=True)
        backend = Backend(models.WordLevel({pad: 3, cls: 0, sep: 1, "a": 4, "b": 5, "?": 2}, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processors.TemplateProcessing(f"{cls} $A {sep}", None, [(cls, 0), (sep, 1)])
        backend.save(str(folder / "tokenizer.json"))

    save(tmp_path, "<s>", "</s>", "<pad>")
    ids, mask = EncoderTokenizer(tmp_path, max_length=4).encode_batch(["a", "a b a b", ""])
    assert ids.tolist() == [[0, 4, 1, 3], [0, 4, 5, 1], [0, 1, 3, 3]] and ids.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert EncoderTokenizer(tmp_path).encode_batch([])[0].shape == (0, 0)
    save(tmp_path / "text_gate", "[CLS]", "[SEP]", "[PAD]")
    assert EncoderTokenizer(tmp_path).backend.token_to_id("[CLS]") == 0
    with pytest.raises(CheckpointError, match="bert-base-uncased"):
        EncoderTokenizer(tmp_path / "none")
