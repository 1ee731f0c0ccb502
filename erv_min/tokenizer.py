"""Text with placeholders -> ids and back, from a folder's own files.

`Tokenizer` is the language model's byte-level BPE, `EncoderTokenizer` that of the text gate (BERT) and of the verifier
(RoBERTa). Both read tokenizer.json; the first also opens Qwen2's older pair of vocab.json and merges.txt.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from erv_min.base.bpe import open_tokenizer, settings_of
from erv_min.base.errors import CheckpointError
from erv_min.config import AUDIO, VIDEO
from erv_min.prompts import SYSTEM

PLACEHOLDERS = {"<video>": VIDEO, "<audio>": AUDIO}
# How chat templates write a system turn: in quotes, as bare text, or from a variable.
SYSTEM_QUOTED = re.compile(r"""(['"])<\|im_start\|>system(?:\\n|\n)(?P<text>(?:\\.|(?!\1).)*?)<\|im_end\|>""",
                           re.DOTALL)
SYSTEM_BARE = re.compile(r"""(?<!['"])<\|im_start\|>system\n(?P<text>[^{}]*?)<\|im_end\|>""")
SYSTEM_VARIABLE = re.compile(r"""<\|im_start\|>system(?:\\n|\n)['"]\s*(?:[+~]|-?\}\}\s*\{\{-?)\s*"""
                             r"""(?P<name>\w+)\b(?![\[.(])""")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Qwen2's tokenizer with -201 and -202 for `<video>` and `<audio>`; adds no special tokens of its own.

    `.system`: the system turn that the folder's chat template writes by default, None if none. `.eos_id` is
    <|im_end|>, `.turn_end` the ids of "<|im_end|>\\n", which close a turn and count in the SFT loss.
    Raises CheckpointError naming the file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.backend = open_tokenizer(self.folder)
        self.eos_id = self._id("<|im_end|>")
        self.pad_id = self._id("<|endoftext|>")
        self.system = _default_system(self.folder, settings_of(self.folder).get("chat_template"))
        self.turn_end = self.encode("<|im_end|>\n")

    def _id(self, token: str) -> int:
        if (found := self.backend.token_to_id(token)) is None:
            raise CheckpointError(f"{self.folder}: the tokenizer has no {token}; is it Qwen2's?")
        return found

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
        pad = next((token for token in ("<pad>", "[PAD]") if self.backend.token_to_id(token) is not None), None)
        if pad is None:
            raise CheckpointError(f"{path}: neither <pad> nor [PAD] is in its vocabulary; is it RoBERTa's or BERT's?")
        self.pad_id = self.backend.token_to_id(pad)
        self.backend.enable_padding(pad_id=self.pad_id, pad_token=pad)
        self.vocab_size = max(self.backend.get_vocab().values()) + 1
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


def _default_system(folder: Path, template) -> str | None:
    """The system turn that the folder's chat template writes before a user's, None if it writes none. `template`: that
    of tokenizer_config.json, a string or several by name. A folder without any template has Qwen2's, SYSTEM.

    It is found as text, since templates are not run: a literal turn, or a variable that is set to a literal.
    """
    if (file := folder / "chat_template.jinja").exists():
        template = file.read_text(encoding="utf-8")
    if isinstance(template, list):
        template = next((x.get("template") for x in template if x.get("name") == "default"), "")
    if template is None:
        return SYSTEM
    if not template or not isinstance(template, str):
        raise CheckpointError(f"{folder}: its chat_template is no text, and no list with one called default")
    if found := SYSTEM_QUOTED.search(template) or SYSTEM_BARE.search(template):
        return _unescaped(found["text"])
    if not (variable := SYSTEM_VARIABLE.search(template)):
        return None
    if found := re.search(rf"set {variable['name']}\s*=\s*(['\"])(?P<text>(?:\\.|(?!\1).)*)\1", template, re.DOTALL):
        return _unescaped(found["text"])
    raise CheckpointError(f"{folder}: its chat template takes the system turn from {variable['name']}, which is set to "
                          "no text there")


def _unescaped(literal: str) -> str:
    """The text of a template's literal."""
    return re.sub(r"\\(.)", lambda escape: {"n": "\n", "t": "\t"}.get(escape[1], escape[1]), literal, flags=re.DOTALL)
