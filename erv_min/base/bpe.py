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
    """A folder's tokenizer_config.json, {} if it has none. If that file has no added_tokens_decoder, the older
    special_tokens_map.json and added_tokens.json count, as in transformers."""
    config = _object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        added = _object(folder / "added_tokens.json")
        config = _object(folder / "special_tokens_map.json") | config
        config["added_tokens_decoder"] = {id: {"content": text} for text, id in added.items()}
    return config


def _object(file: Path) -> dict:
    return read_object(file) if file.exists() else {}


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, without its padding and truncation. Raises CheckpointError naming the file."""
    raw, config = _object(folder / "tokenizer.json"), settings_of(folder)
    try:
        tokens = added_tokens(raw.get("added_tokens") or [], config)
        bare = raw | {"added_tokens": [], "padding": None, "truncation": None}
        tokenizer = Tokenizer.from_str(json.dumps(bare)) if raw else _qwen2(folder)
        tokenizer.add_tokens([AddedToken(text, **{flag: token[flag] for flag in FLAGS if flag in token})
                              for text, token in tokens.items()])
    except Exception as error:  # tokenizers raises plain Exception, whatever the reason; JSON may hold anything
        raise CheckpointError(f"{folder}: its tokenizer.json, or vocab.json with merges.txt, gives no tokenizer "
                              f"({error!r}); copy them from the repository that the checkpoint came from") from None
    for text, token in tokens.items():
        found = tokenizer.token_to_id(text)
        if token["id"] not in (None, found):
            raise CheckpointError(f"{folder}: the added token {text} is to have the id {token['id']}, and gets {found}")
    return tokenizer


def added_tokens(in_file: list[dict], config: dict) -> dict[str, dict]:
    """The added tokens of tokenizer.json and of `settings_of` by text, in the order of their ids. The latter's flags
    count; what is named as a special token is one, and has the id None if it stands in no list."""
    tokens = {token["content"]: token for token in in_file}
    for id, token in config["added_tokens_decoder"].items():
        tokens[token["content"]] = tokens.get(token["content"], {}) | token | {"id": int(id)}
    tokens = dict(sorted(tokens.items(), key=lambda item: item[1]["id"]))
    named = [config.get(key) for key in NAMED]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        named += more.values() if isinstance(more, dict) else more
    for value in filter(None, named):
        token = {"content": value} if isinstance(value, str) else value
        tokens[token["content"]] = {"id": None} | tokens.get(token["content"], token) | {"special": True}
    return tokens


def _qwen2(folder: Path) -> Tokenizer:
    """Qwen2's byte-level BPE from vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
