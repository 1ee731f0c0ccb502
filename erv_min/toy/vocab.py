"""Tokenizers of the small world, trained on its own text: the language model's, the text gate's, the verifier's.

lm: Qwen2's form (NFC, its word pattern, byte-level BPE) with its special tokens last, and room for every word of prompt
and grammar as one token: if words are pieces, GRPO learns to put pieces of two emotions together, and verifiers pay.
text_gate: BERT uncased (WordPiece), at most 256. erv: RoBERTa (byte-level BPE, <s>=0 <pad>=1 </s>=2), 512.
The same text gives the same files.
"""

import re
from collections import Counter
from pathlib import Path
from string import ascii_lowercase, digits

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from erv_min.base.bpe import QWEN2_WORDS
from erv_min.base.files import atomic_write, write_json
from erv_min.config import humanomni
from erv_min.prompts import QUESTION, REASONING_SUFFIX, render

QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def write_tokenizers(folder: Path, spoken: list[str], described: list[str]) -> None:
    """Makes and writes all three: `spoken` is what the policy writes, `described` what the verifier reads."""
    made = {"lm": qwen_tokenizer(spoken), "text_gate": bert_tokenizer(spoken), "erv": roberta_tokenizer(described)}
    for name, tokenizer in made.items():
        atomic_write(folder / name / "tokenizer.json", tokenizer.to_str())
    write_json(folder / "lm" / "tokenizer_config.json", {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 2048})


def byte_level_bpe(tokenizer: Tokenizer, lines: list[str], size: int, special_tokens: list[str] = []) -> None:
    """Trains `tokenizer`; a vocabulary that stays short of `size` is filled up, so that model dimensions hold."""
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=size, special_tokens=special_tokens, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.add_tokens([f"<unused{i}>" for i in range(size - tokenizer.get_vocab_size())])


def qwen_tokenizer(spoken: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    prompt = re.sub("|".join(map(re.escape, QWEN_SPECIALS)), "", render())
    byte_level_bpe(tokenizer, [*spoken, prompt], humanomni("toy").text.vocab_size - len(QWEN_SPECIALS))
    tokenizer.add_special_tokens(QWEN_SPECIALS)  # last, as in Qwen2's own vocabulary
    return tokenizer


def roberta_tokenizer(described: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level_bpe(tokenizer, described, 512, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def bert_tokenizer(spoken: list[str]) -> Tokenizer:
    """Pieces of one letter, then whole words of the question, then the commonest ones. The vocabulary is listed, not
    trained: the library's WordPiece trainer gives other ids in each process."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = ascii_lowercase + digits
    words = re.findall(r"\w+", f"{QUESTION} {REASONING_SUFFIX}".lower())
    common = Counter(re.findall(r"\w+", " ".join(spoken).lower()))
    entries = [*specials, *letters, *("##" + c for c in letters), *"!'(),-./:;<>?_", *words,
               *sorted(common, key=lambda w: (-common[w], w))]
    vocab = {entry: i for i, entry in enumerate(list(dict.fromkeys(entries))[:256])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return tokenizer
