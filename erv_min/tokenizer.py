"""Text with placeholders -> ids and back, from a folder's own files.

`Tokenizer` is the language model's byte-level BPE, `EncoderTokenizer` that of the text gate (BERT) and of the verifier
(RoBERTa). Both read tokenizer.json; the first also opens Qwen2's older pair of vocab.json and merges.txt. The tokens
added to the vocabulary may also stand in tokenizer_config.json, added_tokens.json, special_tokens_map.json.
"""

import json
import re
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from erv_min.base.errors import CheckpointError
from erv_min.base.files import read_object
from erv_min.config import AUDIO, VIDEO
from erv_min.prompts import SYSTEM

PLACEHOLDERS = {"<video>": VIDEO, "<audio>": AUDIO}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
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


class Tokenizer:
    """Qwen2's tokenizer with -201 and -202 for `<video>` and `<audio>`; adds no special tokens of its own.

    `.system`: the system turn that the folder's chat template writes by default, None if none. `.eos_id` is
    <|im_end|>, `.turn_end` the ids of "<|im_end|>\\n", which close a turn and count in the SFT loss.
    Raises CheckpointError naming the file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.backend = open_tokenizer(self.folder)
        self.eos_id, self.pad_id = map(self.backend.token_to_id, ("<|im_end|>", "<|endoftext|>"))
        if self.eos_id is None or self.pad_id is None:
            raise CheckpointError(f"{folder}: the tokenizer has no <|im_end|> or no <|endoftext|>; is it Qwen2's?")
        self.system = default_system(self.folder)
        self.turn_end = self.encode("<|im_end|>\n")

    def encode(self, text: str, placeholders: bool = True) -> list[int]:
        """Text -> ids; the text on each side of a placeholder is tokenized by itself (Eq. 1). placeholders=False: for
        text of data or of a policy, in which `<video>` is no more than what it reads. Half a surrogate pair, which JSON
        may hold and UTF-8 may not, is read as U+FFFD."""
        text, ids = LONE_SURROGATE.sub("\ufffd", text), []
        for part in re.split("(<video>|<audio>)", text) if placeholders else [text]:
            ids += ([PLACEHOLDERS[part]] if placeholders and part in PLACEHOLDERS
                    else self.backend.encode(part, add_special_tokens=False).ids)
        return ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Ids -> text; `skip_special` leaves <|im_end|> and its like out."""
        return self.backend.decode(ids, skip_special)


class EncoderTokenizer:
    """A folder's tokenizer.json of BERT or RoBERTa. Raises CheckpointError naming the file, also if it has ids that a
    model of `model_ids` embeddings lacks."""

    def __init__(self, folder: str | Path, max_length: int = 512, model_ids: int | None = None):
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{path}: no such file; a text gate needs google-bert/bert-base-uncased's "
                                  "tokenizer.json, a verifier that of its RoBERTa")
        self.backend = open_tokenizer(path.parent)
        self.backend.enable_truncation(max_length)
        vocabulary = self.backend.get_vocab()
        pad = next((token for token in ("<pad>", "[PAD]") if token in vocabulary), None)
        if pad is None:
            raise CheckpointError(f"{path}: neither <pad> nor [PAD] is in its vocabulary; is it RoBERTa's or BERT's?")
        self.pad_id, self.vocab_size = vocabulary[pad], max(vocabulary.values()) + 1
        self.backend.enable_padding(pad_id=self.pad_id, pad_token=pad)
        if model_ids and self.vocab_size > model_ids:
            raise CheckpointError(f"{path}: it has {self.vocab_size} ids, the model {model_ids}: another model's?")

    def encode_batch(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> (ids [S, L], mask [S, L]), int64, with the file's special tokens, cut and padded on the right. Half
        a surrogate pair is read as U+FFFD."""
        rows = self.backend.encode_batch([LONE_SURROGATE.sub("\ufffd", text) for text in texts])
        shape = len(rows), len(rows[0].ids) if rows else 0
        ids = torch.tensor([row.ids for row in rows], dtype=torch.long)
        mask = torch.tensor([row.attention_mask for row in rows], dtype=torch.long)
        return ids.view(shape), mask.view(shape)


# ---- a folder's files ------------------------------------------------------------------------------------------------


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


def default_system(folder: Path) -> str | None:
    """The system turn that the folder's chat template writes before a user's, None if it writes none; SYSTEM, Qwen2's,
    without a template. It is found as text, since templates are not run: a literal, or a variable set to one."""
    template = settings_of(folder).get("chat_template")  # a text, or several by name
    if (file := folder / "chat_template.jinja").exists():
        template = file.read_text(encoding="utf-8")
    if template is None:
        return SYSTEM
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
