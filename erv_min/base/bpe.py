"""Tokenizer files -> tokenizers' own object: tokenizer.json, or Qwen2's older pair of vocab.json and merges.txt; the
tokens added to the vocabulary may also stand in tokenizer_config.json, added_tokens.json, special_tokens_map.json."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from erv_min.base.errors import CheckpointError
from erv_min.base.files import read_object

QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


def settings_of(folder: Path) -> dict:
    """A folder's tokenizer_config.json, {} if it has none; if that file has no added_tokens_decoder, the older
    special_tokens_map.json and added_tokens.json count, as in transformers."""
    config = _optional(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        added = _optional(folder / "added_tokens.json")
        config = _optional(folder / "special_tokens_map.json") | config
        config["added_tokens_decoder"] = {id: {"content": content} for content, id in added.items()}
    return config


def _optional(file: Path) -> dict:
    return read_object(file) if file.exists() else {}


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, without its padding and truncation. Raises CheckpointError naming the folder."""
    file = folder / "tokenizer.json"
    raw = _optional(file)
    listed = raw.pop("added_tokens", None) or []
    try:
        tokenizer = Tokenizer.from_str(json.dumps(raw | {"added_tokens": []})) if raw else _qwen2(folder)
        tokens = added_tokens(listed, settings_of(folder))
        tokenizer.add_tokens([AddedToken(text, **{flag: token[flag] for flag in FLAGS if flag in token})
                              for text, token in tokens.items()])
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain Exception, whatever the reason; JSON may hold anything
        name = file if raw else f"{folder}/vocab.json and merges.txt"
        raise CheckpointError(f"{name}, with its added tokens, is no tokenizer ({error!r}); fetch it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for text, token in tokens.items():
        if token["id"] not in (None, tokenizer.token_to_id(text)):
            raise CheckpointError(f"{folder}: among the added tokens {text} has the id {token['id']}, and here it would "
                                  f"get {tokenizer.token_to_id(text)}")
    return tokenizer


def added_tokens(in_file: list[dict], config: dict) -> dict[str, dict]:
    """The added tokens of tokenizer.json and of `settings_of` by text, in the order of their ids. The latter's flags
    count; what is named as a special token is one, and has the id None if it stands in no list."""
    tokens = {token["content"]: token for token in in_file}
    for id, token in config["added_tokens_decoder"].items():
        tokens[token["content"]] = tokens.get(token["content"], {}) | token | {"id": int(id)}
    named = [config.get(key) for key in NAMED]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        named += more.values() if isinstance(more, dict) else more
    ordered = dict(sorted(tokens.items(), key=lambda item: item[1]["id"]))
    for value in filter(None, named):
        token = {"content": value} if isinstance(value, str) else value
        ordered[token["content"]] = {"id": None} | ordered.get(token["content"], token) | {"special": True}
    return ordered


def _qwen2(folder: Path) -> Tokenizer:
    """Qwen2's byte-level BPE from vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
