"""Text with placeholders -> ids and back, from a folder's own files (base/bpe.py): `Tokenizer` for the language model,
`EncoderTokenizer` for the text gate (BERT) and the verifier (RoBERTa)."""

import re
from pathlib import Path

import torch
from torch import Tensor

from erv_min.base.bpe import default_system, open_tokenizer
from erv_min.base.errors import CheckpointError
from erv_min.config import AUDIO, VIDEO
from erv_min.prompts import SYSTEM

PLACEHOLDERS = {"<video>": VIDEO, "<audio>": AUDIO}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Qwen2's tokenizer with -201 and -202 for `<video>` and `<audio>`; adds no special tokens of its own.

    `.system`: the system turn that the folder's chat template writes by default, None if none. `.eos_id` is
    <|im_end|>, `.turn_end` the ids of "<|im_end|>\\n", which close a turn and count in the SFT loss.
    Raises CheckpointError naming the file."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.backend = open_tokenizer(self.folder)
        self.eos_id, self.pad_id = map(self.backend.token_to_id, ("<|im_end|>", "<|endoftext|>"))
        if self.eos_id is None or self.pad_id is None:
            raise CheckpointError(f"{folder}: the tokenizer has no <|im_end|> or no <|endoftext|>; is it Qwen2's?")
        self.system = default_system(self.folder, SYSTEM)
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
