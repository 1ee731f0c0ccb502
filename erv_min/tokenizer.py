"""Text with placeholders -> ids and back, from a folder's own files; left out: any template engine.

`Tokenizer` is the language model's byte-level BPE, `EncoderTokenizer` that of the text gate (BERT) and of the verifier
(RoBERTa). Both read tokenizer.json; the first also opens Qwen2's older pair of vocab.json and merges.txt.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from erv_min.base.bpe import from_vocabulary, open_tokenizer
from erv_min.base.errors import CheckpointError
from erv_min.base.files import read_object
from erv_min.config import AUDIO, VIDEO
from erv_min.prompts import SYSTEM

PLACEHOLDERS = {"<video>": VIDEO, "<audio>": AUDIO}
DEFAULT_SYSTEM = re.compile(r"""<\|im_start\|>system(?:\n|\\n)((?:\\'|[^'"{}<])*)<\|im_end\|>""")


class Tokenizer:
    """Qwen2's tokenizer with -201 and -202 for `<video>` and `<audio>`; adds no special tokens of its own.

    `.system`: the default system turn of the folder's chat template (SYSTEM if it names none). `.eos_id` is
    <|im_end|>, `.turn_end` the ids of "<|im_end|>\\n", which close a turn and count in the SFT loss.
    Raises CheckpointError naming the file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        settings = self.folder / "tokenizer_config.json"
        config = read_object(settings) if settings.exists() else {}
        if (self.folder / "tokenizer.json").exists():
            self.backend = open_tokenizer(self.folder / "tokenizer.json")
        elif (self.folder / "vocab.json").exists() and (self.folder / "merges.txt").exists():
            self.backend = from_vocabulary(self.folder, config)
        else:
            raise CheckpointError(f"{self.folder}: no tokenizer.json, nor vocab.json with merges.txt; copy them from "
                                  "the repository that the checkpoint came from")
        self.eos_id = self._id("<|im_end|>")
        self.pad_id = self._id("<|endoftext|>")
        self.system = _default_system(self.folder, config.get("chat_template"))
        self.turn_end = self.encode("<|im_end|>\n")

    def _id(self, token: str) -> int:
        if (found := self.backend.token_to_id(token)) is None:
            raise CheckpointError(f"{self.folder}: the tokenizer has no {token}; is it Qwen2's?")
        return found

    def encode(self, text: str, placeholders: bool = True) -> list[int]:
        """Text -> ids; the text on each side of a placeholder is tokenized by itself (Eq. 1). placeholders=False: for
        text of data or of a policy, in which `<video>` is no more than what it reads."""
        ids = []
        for part in re.split("(<video>|<audio>)", text) if placeholders else [text]:
            ids += ([PLACEHOLDERS[part]] if placeholders and part in PLACEHOLDERS
                    else self.backend.encode(part, add_special_tokens=False).ids)
        return ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Ids -> text; `skip_special` leaves <|im_end|> and its like out."""
        return self.backend.decode(ids, skip_special)


class EncoderTokenizer:
    """BERT's or RoBERTa's tokenizer.json, in the folder's text_gate/ if it has one, else in the folder itself."""

    def __init__(self, folder: str | Path, max_length: int = 512):
        gate = Path(folder) / "text_gate" / "tokenizer.json"
        path = gate if gate.exists() else Path(folder) / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{path}: no such file; a text gate needs google-bert/bert-base-uncased's "
                                  "tokenizer.json, a verifier that of its RoBERTa")
        self.backend = open_tokenizer(path)
        self.backend.enable_truncation(max_length)
        pad = next((token for token in ("<pad>", "[PAD]") if self.backend.token_to_id(token) is not None), None)
        if pad is None:
            raise CheckpointError(f"{path}: neither <pad> nor [PAD] is in its vocabulary; is it RoBERTa's or BERT's?")
        self.pad_id = self.backend.token_to_id(pad)
        self.backend.enable_padding(pad_id=self.pad_id, pad_token=pad)
        self.vocab_size = self.backend.get_vocab_size()

    def encode_batch(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> (ids [S, L], mask [S, L]), int64, with the file's special tokens, cut and padded on the right."""
        rows = self.backend.encode_batch(list(texts))
        shape = len(rows), len(rows[0].ids) if rows else 0
        ids = torch.tensor([row.ids for row in rows], dtype=torch.long)
        mask = torch.tensor([row.attention_mask for row in rows], dtype=torch.long)
        return ids.view(shape), mask.view(shape)


def _default_system(folder: Path, template: str | None) -> str:
    """The text of the template's own system turn, found as text: templates are not run."""
    if not template and (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = DEFAULT_SYSTEM.search(template) if isinstance(template, str) else None
    return found[1].replace("\\n", "\n").replace("\\'", "'") if found else SYSTEM
