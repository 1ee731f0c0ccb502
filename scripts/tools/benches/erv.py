"""How fast the verifier scores a GRPO step, in several ways.

The same sentences with the same weights in turn, in one process on one machine:
  ours        Verifier.probabilities: all completions at once, sorted by length, a repeated sentence scored once
  loop        our network, a forward pass a completion, its sentences padded to their longest, repeats and all
  their loop  the same with transformers' RobertaForSequenceClassification
  pipeline    transformers' text-classification pipeline a completion, as it comes (one sentence a forward pass)
  pipeline-64 the same over all completions at once with batch_size 64
Sentences: the embedded world's, joined to the paper's lengths (figures 8 to 11: some 15 to 60 tokens). What is measured
is the way, not the verifier's skill: its weights are random. Left out: the labels' selection, which is the same in all.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benches.common import Options, Peak, ceilings, fraction
from erv_min import checkpoint
from erv_min.base.errors import SettingsError
from erv_min.emotions import ERV_LABELS
from erv_min.erv import Verifier, scratch
from erv_min.toy.render import Look
from erv_min.toy.text import EMOTIONS, explain
from erv_min.toy.vocab import roberta_tokenizer

BATCH = 64  # of the batched pipeline


def step_sentences(prompts: int, group: int = 16, per_completion: int = 5, repeats: float = 0.3, seed: int = 0,
                   ) -> list[list[str]]:
    """Sentences of prompts * group completions; a share `repeats` of them is one that the group has already."""
    rng, completions = np.random.default_rng(seed), []
    for prompt in range(prompts):
        look = Look(bool(prompt % 2), "red", "dark", True, False, "office", 0)
        said: list[str] = []
        for _ in range(group):
            own = []
            for _ in range(per_completion):
                if said and rng.random() < repeats:
                    own.append(said[rng.integers(len(said))])
                    continue
                parts = [s.text.rstrip(".") for _ in range(2) for s in explain(rng, look, EMOTIONS[rng.integers(7)])]
                parts = [parts[i] for i in rng.permutation(len(parts))[: rng.integers(2, 6)]]
                own.append(f"At second {len(said)}, {' and then '.join(parts)}.")  # the number: repeats are ours alone
            said += own
            completions.append(own)
    return completions


def ways(verifier: Verifier, folder: Path | None) -> dict[str, Callable[[list[list[str]]], Tensor]]:
    """Name -> a function of completions that gives [S, K] probabilities; transformers' where `folder` is given."""
    def loop(model, completions: list[list[str]]) -> Tensor:
        rows = []
        with torch.inference_mode():
            for sentences in completions:
                ids, mask = (x.to(verifier.device) for x in verifier.tokenizer.encode_batch(sentences))
                out = model(ids, mask)
                rows.append(torch.sigmoid(getattr(out, "logits", out).float()).cpu())
        return torch.cat(rows)

    found = {"batched": lambda completions: verifier.probabilities([s for own in completions for s in own]),
             "loop": lambda completions: loop(verifier.model, completions)}
    if folder is None:
        return found
    try:
        from transformers import PreTrainedTokenizerFast, RobertaForSequenceClassification, pipeline
    except ImportError as error:
        raise SettingsError("to compare with transformers: pip install transformers") from error
    theirs = RobertaForSequenceClassification.from_pretrained(folder).to(verifier.device).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>")
    classify = pipeline("text-classification", model=theirs, tokenizer=tokenizer, device=verifier.device)

    def through(completions: list[list[str]], size: int) -> Tensor:
        options = dict(top_k=None, function_to_apply="sigmoid", batch_size=size)
        given = [[s for own in completions for s in own]] if size > 1 else completions
        said = [{x["label"]: x["score"] for x in row} for sentences in given for row in classify(sentences, **options)]
        return torch.tensor([[row[label] for label in verifier.labels] for row in said])

    return found | {"their loop": lambda completions: loop(theirs, completions),
                    "pipeline": lambda completions: through(completions, 1),
                    f"pipeline-{BATCH}": lambda completions: through(completions, BATCH)}


def throughput(verifier: Verifier, completions: list[list[str]], rounds: int = 3, folder: Path | None = None,
               ) -> dict[str, float]:
    """Sentences a second of each way: the median of `rounds`, taken in turn after a short warm-up, so that all meet the
    same load of the machine. Raises SettingsError where two differ by more than 1e-3 in any probability."""
    found, expected = ways(verifier, folder), None
    seconds = {name: [] for name in found}
    for i in range(rounds + 1):
        for name, way in found.items():
            start = time.perf_counter()
            probs = way(completions if i else completions[:8])
            seconds[name] += [time.perf_counter() - start] if i else []
            expected = probs if name == "batched" else expected
            if (probs - expected).abs().max() > 1e-3:
                raise SettingsError(f"{name} and batched give different probabilities: nothing to compare")
    return {name: sum(map(len, completions)) / sorted(times)[len(times) // 2] for name, times in seconds.items()}


def prepare(size: str, sentences: list[str], folder: Path, device: str = "cpu") -> Verifier:
    """A verifier of random weights, "toy" or "base", in `folder` as transformers reads it too."""
    tokenizer = roberta_tokenizer(sentences)
    torch.manual_seed(0)
    checkpoint.save_erv(scratch(size, tokenizer.get_vocab_size(), len(ERV_LABELS)), folder, ERV_LABELS)
    tokenizer.save(str(folder / "tokenizer.json"))
    return Verifier.load(folder, device)


def measure(options: Options) -> Iterator[dict]:
    completions = step_sentences(options.prompts, options.group, repeats=options.repeats)
    sentences = [s for own in completions for s in own]
    ceiling = ceilings(options)
    with tempfile.TemporaryDirectory() as folder:
        verifier = prepare("toy" if options.size == "toy" else "base", sentences, Path(folder), options.device)
        tokens = int(verifier.tokenizer.encode_batch(sentences)[1].sum())
        with Peak(options.device) as peak:
            verifier.probabilities(sentences)
        theirs = Path(folder) if options.versus == "transformers" else None
        rate = throughput(verifier, completions, options.rounds, theirs)
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
