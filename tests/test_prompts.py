"""Prompts and tokenizers: the recorded prompts and ids of the three stages, exactly; Eq. 1's placeholders."""

import json
import shutil

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
        with pytest.raises(KeyError):
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
    half = "He said \ud83d and left"  # of an emoji, as a cut reply of a server has it
    assert old.encode(half) == old.encode("He said \ufffd and left")


def turn(text):
    return "{{ '<|im_start|>system\\n" + text + "<|im_end|>\\n' }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("in_config, jinja, system", [
    (None, None, "You are a helpful assistant."),  # of Qwen2: transformers has no prompt for this folder
    (turn("You are Qwen."), None, "You are Qwen."),
    (turn("You are Qwen."), turn("Don\\'t {guess}.\\n"), "Don't {guess}.\n"),  # the file wins
    (None, turn("You watch."), "You watch."),
    ([{"name": "tool_use", "template": turn("Tools.")}, {"name": "default", "template": turn("First.")}], None, "First."),
    ("{{ '<|im_start|>user\n' + messages[0]['content'] + '<|im_end|>\n' }}", None, None),
    ("{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% else %}{% set s = 'Be exact.' %}"
     "{% endif %}{{ '<|im_start|>system\n' + s + '<|im_end|>\n' }}", None, "Be exact."),
    ("{% if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
     "{{ messages[0].content }}", None, None),  # Qwen3's: none unless one is given
    ("<|im_start|>system\nIt's bare.<|im_end|>\n{{ messages[0].content }}", None, "It's bare."),
    ("{%- if tools is not none %}{{ tools.x.y }}{%- endif %}\n{% for m in messages %}{% generation %}{{ m.content }}"
     "{% endgeneration %}\n{% break %}{% endfor %}{{ '<|im_start|>system\nHm.<|im_end|>\n' }}", None, "Hm."),
])
def test_system_turn_is_what_the_chat_template_writes(tmp_path, in_config, jinja, system):
    config = read_json(CHAT / "tokenizer_config.json") | {"chat_template": in_config}
    config = {key: value for key, value in config.items() if value is not None}
    shutil.copy(CHAT / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.system == system
    before = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert render("Why?", system=system).startswith(f"{before}<|im_start|>user\n")
    if in_config or jinja:
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
        theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
        text = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
        assert before in text and ("<|im_start|>system" in text) == (system is not None)


def test_a_chat_template_that_cannot_be_read_is_refused(tmp_path):
    shutil.copy(CHAT / "tokenizer.json", tmp_path)
    for template, said in ((7, "no text"), ([{"name": "rag", "template": "x"}], "called default"), (
            "{{ '<|im_start|>system\n' + s + '<|im_end|>' }}", "takes the system turn from s")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(CheckpointError, match=said):
            Tokenizer(tmp_path)


# What repositories hold: in tokenizer_config.json all added tokens, or none, which are then in added_tokens.json.
SPECIAL = {"<|endoftext|>": {}, "<|im_start|>": {}, "<|im_end|>": {}, "<|gap|>": {"lstrip": True}}
PLAIN = {"<think>": {}, "</think>": {}, "<\u00e9>": {}, "<answer>": {"normalized": True}}
TEXT = "<|im_start|>assistant\n<think>He smiles.  She <|gap|> shouts! <e\u0301> <\u00e9></think>\n<answer>happy<|im_end|>\n"


@pytest.mark.parametrize("spelling", ("decoder", "added_tokens.json", "both", "half", "named", "map", "other flags"))
@pytest.mark.parametrize("kind", ("tokenizer.json", "vocab.json"))
def test_added_tokens_are_those_of_transformers(tmp_path, kind, spelling):
    raw = read_json(CHAT / "tokenizer.json")
    old = {token["content"] for token in raw["added_tokens"]}
    vocab = {text: i for text, i in raw["model"]["vocab"].items() if text not in old}
    decoder, first = {}, max(vocab.values()) + 1
    for i, (text, flags) in enumerate((SPECIAL | PLAIN).items()):
        token = {"content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        decoder[str(first + i)] = token | {"special": text in SPECIAL} | (flags if spelling not in ("named", "map") else {})
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    config |= {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    ids = {token["content"]: int(i) for i, token in decoder.items()}
    if spelling in ("decoder", "both", "other flags"):
        config["added_tokens_decoder"] = decoder
    if spelling == "half":  # what is named as special in no list is added behind
        config["added_tokens_decoder"] = {i: x for i, x in decoder.items() if x["content"] in list(SPECIAL)[:3]}
        config["additional_special_tokens"] += ["<|vision_start|>", {"__type": "AddedToken", "content": "<|vision_end|>"}]
        config["bos_token"] = "<s>"
    if spelling == "named":  # in Qwen2's old files <|gap|> would be named, too
        config["additional_special_tokens"] += ["<|gap|>"]
    if spelling in ("added_tokens.json", "both", "named", "map"):
        (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    if spelling == "map":
        del config["additional_special_tokens"], config["eos_token"]
        named = {"additional_special_tokens": ["<|gap|>", "<|im_start|>"], "eos_token": {"content": "<|im_end|>", "lstrip": False}}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    if kind == "tokenizer.json":
        raw["model"]["vocab"] = vocab
        listed = [token | {"id": int(i)} for i, token in decoder.items()][: 3 if spelling == "half" else 8]
        listed = [token | {"special": not token["special"]} for token in listed] if spelling == "other flags" else listed
        raw["added_tokens"] = [] if spelling == "decoder" else listed
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    else:
        merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = Tokenizer(tmp_path)
    found = tokenizer.encode(TEXT)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert found == theirs(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.decode(found, skip_special=True) == theirs.decode(found, skip_special_tokens=True)
    for text in (*ids, "<|vision_start|>", "<|vision_end|>", "<s>"):
        assert tokenizer.backend.token_to_id(text) == theirs.get_vocab().get(text), text


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


def test_encoder_tokenizer_pads_and_cuts(tmp_path):
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
    assert EncoderTokenizer(tmp_path).encode_batch(["a \udc00 b", "a"])[0][0].tolist() == [0, 4, 2, 5, 1]
    save(tmp_path / "gate", "[CLS]", "[SEP]", "[PAD]")
    assert EncoderTokenizer(tmp_path / "gate", model_ids=6).pad_id == 3
    with pytest.raises(CheckpointError, match="gate/tokenizer.json: it has 6 ids, the model 5"):
        EncoderTokenizer(tmp_path / "gate", model_ids=5)
    with pytest.raises(CheckpointError, match="bert-base-uncased"):
        EncoderTokenizer(tmp_path / "none")
