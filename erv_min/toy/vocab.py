"""Tokenizers of the small world, trained on its own text: the language model's, the text gate's, the verifier's.

lm: Qwen2's form (NFC, its word pattern, byte-level BPE) with its special tokens last, and room for every word of prompt
and grammar as one token: where words are pieces, GRPO learns to put pieces of two emotions together, and verifiers pay.
text_gate: BERT uncased (WordPiece), at most 256. erv: RoBERTa (byte-level BPE, <s>=0 <pad>=1 </s>=2), 512.
The same text gives the same files.
"""

import re
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from erv_min.config import humanomni
from erv_min.run.files import atomic_write, write_json
from erv_min.prompts import QUESTION, REASONING_SUFFIX, render
from erv_min.tokenizer import QWEN2_WORDS

QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def write_tokenizers(folder: Path, spoken: list[str], described: list[str]) -> None:
    """Trains and writes all three: `spoken` is what the policy writes, `described` what the verifier reads."""
    lm = qwen_tokenizer(spoken)
    atomic_write(folder / "lm" / "tokenizer.json", lm.to_str())
    write_json(folder / "lm" / "tokenizer_config.json", {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 2048})
    atomic_write(folder / "text_gate" / "tokenizer.json", bert_tokenizer(spoken).to_str())
    atomic_write(folder / "erv" / "tokenizer.json", roberta_tokenizer(described).to_str())


def qwen_tokenizer(spoken: list[str], size: int = humanomni("toy").text.vocab_size) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    prompt = re.sub("|".join(map(re.escape, QWEN_SPECIALS)), "", render(modality="video_audio", stage="inference"))
    tokenizer.train_from_iterator([*spoken, prompt], trainers.BpeTrainer(
        vocab_size=size - len(QWEN_SPECIALS), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    _sized(tokenizer, size - len(QWEN_SPECIALS)).add_special_tokens(QWEN_SPECIALS)  # last, as in Qwen2's own vocabulary
    return tokenizer


def roberta_tokenizer(described: list[str], size: int = 512) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(described, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return _sized(tokenizer, size)


def _sized(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """Fills a vocabulary that stayed short of `size` (little text) with placeholders, so that model dimensions hold."""
    missing = size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<unused{i}>" for i in range(missing)])
    return tokenizer


def bert_tokenizer(spoken: list[str], size: int = 256) -> Tokenizer:
    """WordPiece over whole words of the question, then the commonest words, above an alphabet of pieces.

    The vocabulary is listed, not trained: the library's WordPiece trainer gives other ids in each process.
    """
    words = re.findall(r"\w+", f"{QUESTION} {REASONING_SUFFIX}".lower())
    common = Counter(word for line in spoken for word in re.findall(r"\w+", line.lower()))
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *"!'(),-./:;<>?_",
               *words, *sorted(common, key=lambda w: (-common[w], w))]
    vocab = {entry: i for i, entry in enumerate(list(dict.fromkeys(entries))[:size])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return tokenizer
