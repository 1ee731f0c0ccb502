"""Sentences a second of the batched verifier, against a call a completion and transformers' pipeline (same weights)."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benches.common import Options, Peak, ceilings, fraction
from erv_min.emotions import ERV_LABELS
from erv_min.erv import Verifier, scratch, throughput
from erv_min.errors import SettingsError
from erv_min.tokenizer import EncoderTokenizer
from erv_min.toy.vocab import roberta_tokenizer

WORDS = ("the man in the video looks at the woman beside him and his voice is low and trembling while his brows draw "
         "together so that he seems worried about what she has just told him").split()


def completions_of(count: int) -> list[list[str]]:
    """`count` explanations of 5 sentences, 8 to 23 words each, no two alike."""
    return [[" ".join(WORDS[(7 * i + 3 * j + k) % len(WORDS)] for k in range(8 + (5 * i + 3 * j) % 16)) + f" {i} {j}."
             for j in range(5)] for i in range(count)]


def measure(options: Options) -> Iterator[dict]:
    name = "toy" if options.size == "toy" else "base"
    completions = completions_of(options.group)
    sentences = [s for group in completions for s in group]
    ceiling = ceilings(options)
    with tempfile.TemporaryDirectory() as folder:
        roberta_tokenizer(sentences).save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        tokenizer = EncoderTokenizer(folder, max_length=128)
        verifier = Verifier(scratch(name, 512, len(ERV_LABELS)), tokenizer, ERV_LABELS, options.device)
        tokens = int(tokenizer.encode_batch(sentences)[1].sum())
        with Peak(options.device) as peak:
            rate = throughput(verifier, completions, rounds=max(3, options.rounds))
        weights = sum(p.numel() for n, p in verifier.model.named_parameters() if "embeddings" not in n)

        def row(variant: str, sentences_per_s: float, peak_bytes) -> dict:
            seconds = len(sentences) / sentences_per_s
            flops, traffic = 2.0 * weights * tokens, 4 * weights
            return {"variant": variant, "seconds": seconds, "sentences_per_s": sentences_per_s,
                    "tokens_per_s": tokens / seconds, "peak_bytes": peak_bytes, "flops": flops, "bytes": traffic,
                    "ceiling_fraction": fraction(seconds, flops, traffic, ceiling)}

        ours = row("ours", rate["batched"], peak.bytes)
        other = row("loop over completions", rate["loop"], None)
        yield other
        if options.versus == "transformers":
            other = row("transformers pipeline", *pipeline_rate(verifier, folder, sentences, options))
            yield other
    yield ours | {"ratio_time": other["seconds"] / ours["seconds"],
                  "ratio_memory": other["peak_bytes"] and other["peak_bytes"] / max(1, ours["peak_bytes"])}


def pipeline_rate(verifier: Verifier, folder: str, sentences: list[str], options: Options) -> tuple[float, int]:
    """Their text-classification pipeline, one call with all sentences, checked to give our probabilities."""
    try:
        from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification, pipeline
    except ImportError as error:
        raise SettingsError("--versus transformers needs transformers: pip install transformers") from error
    c = verifier.model.config
    config = RobertaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, intermediate_size=c.intermediate_size,
        type_vocab_size=c.type_vocab_size, max_position_embeddings=c.max_position_embeddings,
        layer_norm_eps=c.layer_norm_eps, pad_token_id=c.pad_token_id, id2label=dict(enumerate(verifier.labels)))
    model = RobertaForSequenceClassification(config)
    model.load_state_dict(verifier.model.state_dict(), strict=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token="<pad>")
    classify = pipeline("text-classification", model=model.to(options.device).eval(), tokenizer=tokenizer, top_k=None,
                        function_to_apply="sigmoid", device=options.device)
    scores = {x["label"]: x["score"] for x in classify(sentences[:1])[0]}
    probs = verifier.probabilities(sentences[:1])[0]
    torch.testing.assert_close(torch.tensor([scores[x] for x in verifier.labels]), probs, atol=1e-4, rtol=1e-3)
    times = []
    for _ in range(3):
        with Peak(options.device) as peak:
            started = time.perf_counter()
            classify(sentences)
            times.append(time.perf_counter() - started)
    return len(sentences) / sorted(times)[1], peak.bytes
