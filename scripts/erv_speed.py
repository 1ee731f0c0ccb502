"""How fast the verifier scores a GRPO step: `python scripts/erv_speed.py [--size toy|base] [--repeats 0.3] ...`

The same sentences, with the same weights, in turn, in one process on one machine:
  batched     Verifier.probabilities: all completions at once, sorted by length, a repeated sentence scored once
  loop        our network, a forward pass a completion, its sentences padded to their longest, repeats and all
  their loop  the same with transformers' RobertaForSequenceClassification
  pipeline    transformers' text-classification pipeline a completion, as it comes (one sentence a forward pass)
  pipeline-64 the same over all completions at once with batch_size 64
Sentences: the embedded world's, joined to the paper's lengths (figures 8 to 11: some 15 to 60 tokens). What is measured
is the way, not the verifier's skill: its weights are random. Left out: the labels' selection, which is the same in all.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erv_min import checkpoint
from erv_min.emotions import ERV_LABELS
from erv_min.errors import ErvMinError, SettingsError
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


def measure(size: str = "toy", prompts: int = 4, repeats: float = 0.3, rounds: int = 3, device: str = "cpu",
            transformers: bool = True) -> Iterator[dict]:
    """A row a way: what was measured on, sentences per second, and how many times the loop's."""
    completions = step_sentences(prompts, repeats=repeats)
    flat = [s for own in completions for s in own]
    with tempfile.TemporaryDirectory() as folder:
        verifier = prepare(size, flat, Path(folder), device)
        tokens = verifier.tokenizer.encode_batch(flat)[1].sum().item() / len(flat)
        rate = throughput(verifier, completions, rounds, Path(folder) if transformers else None)
    for name, value in rate.items():
        yield {"way": name, "size": size, "device": str(device), "threads": torch.get_num_threads(),
               "sentences": len(flat), "distinct": len(set(flat)), "tokens_a_sentence": round(tokens, 1),
               "sentences_per_s": round(value, 2), "times_the_loop": round(value / rate["loop"], 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="toy", choices=("toy", "base"), help="the verifier's dimensions")
    parser.add_argument("--prompts", type=int, default=4, help="of 16 completions of 5 sentences each")
    parser.add_argument("--repeats", type=float, default=0.3, help="share of sentences that repeat one of their group")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers' pipeline out")
    arguments = vars(parser.parse_args())
    try:
        for line in measure(transformers=not arguments.pop("no_transformers"), **arguments):
            print(json.dumps(line), flush=True)
    except ErvMinError as error:
        sys.exit(f"{type(error).__name__}: {error}")
