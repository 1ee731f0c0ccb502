"""Tokenizer files -> tokenizers' own object: tokenizer.json, or Qwen2's older pair of vocab.json and merges.txt."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from erv_min.base.errors import CheckpointError

QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without its padding and truncation. Raises CheckpointError naming the file."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception, whatever the reason
        raise CheckpointError(f"{path}: not a tokenizer file ({error}); fetch it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def from_vocabulary(folder: Path, config: dict) -> Tokenizer:
    """Qwen2's byte-level BPE from vocab.json and merges.txt, special tokens from `config`, the tokenizer_config.json.
    Raises CheckpointError naming the file."""
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: vocab.json and merges.txt do not form a BPE ({error})") from None
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    added = {int(i): token["content"] for i, token in (config.get("added_tokens_decoder") or {}).items()}
    tokenizer.add_special_tokens([AddedToken(added[i], normalized=False) for i in sorted(added)])
    for i, text in added.items():
        if tokenizer.token_to_id(text) != i:
            raise CheckpointError(f"{folder}/tokenizer_config.json: added_tokens_decoder gives {text} the id {i}, "
                                  "which vocab.json does not")
    return tokenizer
