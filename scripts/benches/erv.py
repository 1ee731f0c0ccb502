"""Sentences a second of the batched verifier, against a pass a completion and transformers' ways (erv_speed.py)."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benches.common import Options, Peak, ceilings, fraction
from erv_speed import prepare, step_sentences, throughput


def measure(options: Options) -> Iterator[dict]:
    completions = step_sentences(1, options.group)
    sentences = [s for own in completions for s in own]
    ceiling = ceilings(options)
    with tempfile.TemporaryDirectory() as folder:
        verifier = prepare("toy" if options.size == "toy" else "base", sentences, Path(folder), options.device)
        tokens = int(verifier.tokenizer.encode_batch(sentences)[1].sum())
        with Peak(options.device) as peak:
            verifier.probabilities(sentences)
        theirs = Path(folder) if options.versus == "transformers" else None
        rate = throughput(verifier, completions, max(3, options.rounds), theirs)
    weights = sum(p.numel() for n, p in verifier.model.named_parameters() if "embeddings" not in n)

    def row(variant: str, sentences_per_s: float) -> dict:
        seconds = len(sentences) / sentences_per_s
        flops, traffic = 2.0 * weights * tokens, 4 * weights
        return {"variant": variant, "seconds": seconds, "sentences_per_s": sentences_per_s,
                "tokens_per_s": tokens / seconds, "peak_bytes": None, "flops": flops, "bytes": traffic,
                "ceiling_fraction": fraction(seconds, flops, traffic, ceiling)}

    ours = rate.pop("batched")
    yield from (row(name, value) for name, value in rate.items())
    beside = rate["pipeline" if theirs else "loop"]
    yield row("ours", ours) | {"peak_bytes": peak.bytes, "ratio_time": ours / beside}
