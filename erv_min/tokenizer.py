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
GENERATION = re.compile(r"(\{%-?\s*)(end)?generation\b")  # transformers' marks around what an assistant says
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

    def encode(self, text: str) -> list[int]:
        """Text -> ids; the text on each side of a placeholder is tokenized by itself (Eq. 1). Half a surrogate pair,
        which JSON may hold and UTF-8 may not, is read as U+FFFD."""
        ids = []
        for part in re.split("(<video>|<audio>)", LONE_SURROGATE.sub("\ufffd", text)):
            ids += ([PLACEHOLDERS[part]] if part in PLACEHOLDERS
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
    """What the folder's chat template writes as a system turn before a user's; None if it writes none. `template`: that
    of tokenizer_config.json, a string or several by name. A folder without any template has Qwen2's, SYSTEM."""
    if (file := folder / "chat_template.jinja").exists():
        template = file.read_text(encoding="utf-8")
    if template is None:
        return SYSTEM
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # torch brings it

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    try:
        if not isinstance(template, str):
            named = template if isinstance(template, dict) else {x["name"]: x["template"] for x in template}
            template = named["default"]
        template = GENERATION.sub(lambda mark: mark[1] + ("endif" if mark[2] else "if true"), template)
        text = jinja.from_string(template).render(messages=[{"role": "user", "content": "Hi"}], tools=None,
                                                  documents=None, add_generation_prompt=True)
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its chat template cannot be rendered ({error!r})") from None
    found = re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return found and found[1]
