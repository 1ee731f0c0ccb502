"""A folder's tokenizer files -> a tokenizer of the `tokenizers` library, and the system turn of its chat template.

tokenizer.json, or Qwen2's older pair of vocab.json and merges.txt. The tokens added to the vocabulary may also stand in
tokenizer_config.json, added_tokens.json, special_tokens_map.json: the ids and texts are those of transformers.
"""

import json
import re
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from erv_min.base.errors import CheckpointError
from erv_min.base.files import read_object, read_text

QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
# How chat templates write a system turn: in quotes, as bare text, or from a variable.
SYSTEM_QUOTED = re.compile(r"""(['"])<\|im_start\|>system(?:\\n|\n)(?P<text>(?:\\.|(?!\1).)*?)<\|im_end\|>""",
                           re.DOTALL)
SYSTEM_BARE = re.compile(r"""(?<!['"])<\|im_start\|>system\n(?P<text>[^{}]*?)<\|im_end\|>""")
SYSTEM_VARIABLE = re.compile(r"""<\|im_start\|>system(?:\\n|\n)['"]\s*(?:[+~]|-?\}\}\s*\{\{-?)\s*"""
                             r"""(?P<name>\w+)\b(?![\[.(])""")


def read_if_there(file: Path) -> dict:
    return read_object(file) if file.exists() else {}


def settings_of(folder: Path) -> dict:
    """A folder's tokenizer_config.json, {} if it has none. If that file has no added_tokens_decoder, the older
    special_tokens_map.json and added_tokens.json count, as in transformers."""
    config = read_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        added = read_if_there(folder / "added_tokens.json")
        config = read_if_there(folder / "special_tokens_map.json") | config
        config["added_tokens_decoder"] = {id: {"content": text} for text, id in added.items()}
    return config


def open_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder, without its padding and truncation. Raises CheckpointError naming the file."""
    raw, config = read_if_there(folder / "tokenizer.json"), settings_of(folder)
    try:
        if raw:
            bare = raw | {"added_tokens": [], "padding": None, "truncation": None}
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(bare))
        else:
            bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            tokenizer = tokenizers.Tokenizer(bpe)
            tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokens = added_tokens(raw.get("added_tokens") or [], config)
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


def default_system(folder: Path, untold: str) -> str | None:
    """The system turn that the folder's chat template writes before a user's, None if it writes none; `untold`
    without a template. It is found as text, since templates are not run: a literal, or a variable set to one."""
    template = settings_of(folder).get("chat_template")  # a text, or several by name
    if (file := folder / "chat_template.jinja").exists():
        template = read_text(file)
    if template is None:
        return untold
    if isinstance(template, list):
        template = next((x.get("template") for x in template if x.get("name") == "default"), "")
    if not template or not isinstance(template, str):
        raise CheckpointError(f"{folder}: its chat_template is no text, and no list with one called default")
    found = SYSTEM_QUOTED.search(template) or SYSTEM_BARE.search(template)
    if not found and (variable := SYSTEM_VARIABLE.search(template)):
        literal = rf"set {variable['name']}\s*=\s*(['\"])(?P<text>(?:\\.|(?!\1).)*)\1"
        if not (found := re.search(literal, template, re.DOTALL)):
            raise CheckpointError(f"{folder}: its chat template takes the system turn from {variable['name']}, which "
                                  "is set to no text there")
    escapes = {"n": "\n", "t": "\t"}
    return re.sub(r"\\(.)", lambda x: escapes.get(x[1], x[1]), found["text"], flags=re.DOTALL) if found else None
