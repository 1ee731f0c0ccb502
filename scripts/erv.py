"""The verifier's training, section 3.2: `[torchrun] scripts/erv.py [--preset toy|paper] [--out DIR] [--data FILES] ...`

Multi-label binary cross entropy on [CLS]. The paper's preset starts from RoBERTa with GoEmotions weights under a fresh
11-way head: `--preset paper --data emer.jsonl,merr.jsonl,pseudo.jsonl,complement.jsonl`. Rows are JSONL of {"text",
"labels", "source"}, as scripts/augment.py writes them; `--sources emer,merr` is table 2's row without augmentation.
Leaves in OUT: model.safetensors, config.json, tokenizer.json (a folder that --erv takes), metrics.jsonl, report.json.
`scripts/erv.py harden --init DIR [--second DIR --predictions FILES] ...` trains a verifier for one more round, on the
same rows and on ways to cheat it (`hardening_rows`), and prints its F1 on honest text before and after.
Departures: the paper names neither schedule, dropout nor validation; ours are linear decay, RoBERTa's 0.1, 10% by clip.
What the reward made from a verifier pays for: scripts/tools/audit.py.
"""

import itertools
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erv_min import checkpoint
from erv_min.base.errors import DataError, SettingsError
from erv_min.base.files import append_jsonl, atomic_write, read_jsonl, write_json
from erv_min.base.processes import Processes, all_reduce_sum, join_processes, run_script
from erv_min.data.loader import batch_of_step
from erv_min.data.pairs import (Row, cheat, counts_table, positive_weights, read_rows, sampling_weights, split_rows,
                                targets)
from erv_min.data.quality import verifier_report
from erv_min.emotions import ERV_LABELS, GOEMOTIONS
from erv_min.erv import Verifier, erv_columns, erv_loss, fresh_head, max_tokens, scratch
from erv_min.model.bert import RobertaClassifier
from erv_min.rewards import extract_explanation, select_labels, split_sentences
from erv_min.tokenizer import EncoderTokenizer
from erv_min.toy.chain import prepare_world
from erv_min.train.folder import Run, open_folder
from erv_min.train.optimizer import learning_rate, make_optimizer, update
from erv_min.train.settings import Training, parse, setting
from erv_min.train.sharding import Replicated


@dataclass
class ERVSettings(Training):
    preset: str = setting("toy", "toy: the embedded world, from random weights; paper-*: section 4.3, one verifier for "
                                 "both sizes", ("toy", "paper", "paper-0.5b", "paper-7b"))
    data: str = setting("", "JSONL files, separated by commas (default: the embedded world's erv_train.jsonl)",
                        path="files")
    valid: str = setting("", "JSONL files to measure on (default: the world's erv_valid.jsonl, else --holdout)",
                         path="files")
    holdout: float = setting(0.1, "share of clips held out where --valid gives no file", least=0, most=1)
    sources: str = setting("", "train on rows of these sources only, e.g. emer,merr (table 2: without augmentation)")
    init: str = setting("SamLowe/roberta-base-go_emotions", "starting weights: folder, hub repository, or scratch:toy, "
                        "scratch:base for random ones (as --random-weights)", path="hub")
    tokenizer: str = setting("", "folder of tokenizer.json, where --init is scratch (default: the world's)",
                             path="files")
    head: int = setting(11, "classes of the output layer: 11, or 28 to keep GoEmotions' (divergence 4)", (11, 28))
    dropout: float = setting(0.1, "dropout rate, attention's included (RoBERTa: 0.1)", least=0, most=0.99)
    balance: str = setting("none", "class imbalance: none (the paper's way is its complement set), positives weighted, "
                                   "or rows of rare classes drawn more often", ("none", "weight", "resample"))
    patience: int = setting(0, "stop after so many epochs without a better macro F1 and keep the best; 0: never",
                            least=0)
    tau: float = setting(0.5, "threshold of algorithm 1 that the report is for", least=0, most=1)
    k: int = setting(2, "labels per sentence at most (algorithm 1)", least=1)
    second: str = setting("", "harden: another verifier, trained on other data", path="hub")
    predictions: str = setting("", "harden: what a policy wrote, JSONL files with 'output' (as evaluate.py leaves) or "
                                   "'completion' (grpo.py)", path="files")


PAPER = dict(epochs=10, batch_size=64, lr=3e-5, warmup=0.0, schedule="linear", save_every=200)  # section 4.3; ours
PRESETS = {"toy": dict(PAPER, init="scratch:toy", lr=3e-3, epochs=4, warmup=0.05, dropout=0.0, seed=0),
           "paper": PAPER, "paper-0.5b": PAPER, "paper-7b": PAPER}
HARDEN = {name: preset | {"init": "", "epochs": 2} for name, preset in PRESETS.items()}


def prepare_toy(settings: ERVSettings, processes: Processes) -> None:
    """Fills in the embedded world's files where the command names none. The main process makes a missing world."""
    scratch_start = settings.init.startswith("scratch:")
    if settings.data and (settings.tokenizer or not scratch_start):
        return
    world = prepare_world(settings, processes)
    if not settings.data:
        settings.data, settings.valid = str(world / "erv_train.jsonl"), settings.valid or str(world / "erv_valid.jsonl")
    settings.tokenizer = settings.tokenizer or (str(world / "tokenizers" / "erv") if scratch_start else "")


def starting_point(settings: ERVSettings) -> tuple[RobertaClassifier, Path]:
    """The network to train and the folder of its tokenizer.json. Raises SettingsError, CheckpointError."""
    torch.manual_seed(settings.seed)
    if settings.init.startswith("scratch:"):
        if not settings.tokenizer:
            raise SettingsError(f"--init {settings.init} needs --tokenizer, a folder with a tokenizer.json")
        folder = Path(settings.tokenizer)
        vocabulary = EncoderTokenizer(folder).vocab_size
        return scratch(settings.init.removeprefix("scratch:"), vocabulary, settings.head), folder
    folder = checkpoint.resolve(settings.init)
    model = checkpoint.load_erv(folder)
    keep = settings.head == model.config.num_labels
    return model if keep else fresh_head(model, settings.head), Path(settings.tokenizer or folder)


def read_data(settings: ERVSettings) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), the training rows of --sources only."""
    rows = read_rows([x for x in settings.data.split(",") if x])
    if settings.valid:
        valid = read_rows([x for x in settings.valid.split(",") if x])
    else:
        rows, valid = split_rows(rows, settings.holdout, settings.seed)
    if settings.sources:
        wanted, found = set(settings.sources.split(",")), {row.source for row in rows}
        if not wanted <= found:
            raise SettingsError(f"--sources {settings.sources}: the data has the sources {', '.join(sorted(found))}")
        rows = [row for row in rows if row.source in wanted]
    if not rows or not valid:
        raise SettingsError(f"{len(rows)} training and {len(valid)} held-out rows: both sides need some; see --holdout")
    return rows, valid


# ---- harden ----------------------------------------------------------------------------------------------------------

# Of the audit's ways to cheat those that a reader of single texts can tell; the others repeat or leave out honest ones.
CHEATS = ("stuff label words", "name the emotion in each", "two emotions in each", "claim calm around one",
          "copy the question", "another language")


def labels_of(verifier: Verifier, texts: list[str], settings: ERVSettings) -> list[list[str]]:
    """EL of each text, names of ERV_LABELS (of a 28-way head the other 17 are left out; neutral where none is left)."""
    columns = erv_columns(verifier.labels)
    return select_labels(verifier.probabilities(texts)[:, columns], ERV_LABELS, settings.tau, settings.k)


def cheating(rows: list[Row], verifier: Verifier, settings: ERVSettings, rng: random.Random) -> Iterator[tuple]:
    """(text, labels): a way to cheat with a training text's sentences, labelled with what it shows: neutral, or what
    its sentence conveys without the emotion that is added to it."""
    while True:
        row, way = rng.choice(rows), rng.choice(CHEATS)
        sentences = split_sentences(row.text)
        read = labels_of(verifier, sentences, settings)
        cheats = cheat(way, sentences, row.labels[0], [float(row.labels[0] in EL) for EL in read],
                       [EL == ["neutral"] for EL in read])
        at = rng.randrange(len(cheats))
        if way == "claim calm around one":
            yield " ".join(cheats), ["neutral"]
        else:
            yield cheats[at], read[at] if way.endswith("in each") else ["neutral"]


def broken(sentences: list[str], rng: random.Random) -> Iterator[tuple]:
    """(text, neutral): the beginning of one sentence and the end of another, each cut inside a word (a policy's scraps;
    2507.08794 takes pieces of a model's outputs as negatives)."""
    known = set(sentences)
    for _ in range(100 * len(sentences)):  # a text of short words alone may give none
        a, b = rng.choice(sentences), rng.choice(sentences)
        cuts = [[i for i in range(1, len(s)) if s[i - 1:i + 1].isalpha()] for s in (a, b)]
        text = a[:rng.choice(cuts[0])] + b[rng.choice(cuts[1]):] if all(cuts) else a
        if text not in known:
            yield text, ["neutral"]


def read_differently(settings: ERVSettings, verifier: Verifier, known: set[str], device) -> list[tuple]:
    """(text, labels): a policy's sentences, none of them a training sentence, of which two verifiers read different
    emotions. labels: those that both read, else neutral: what one alone pays for is no example of it (Adv-RM,
    2504.06141, takes such text as a negative)."""
    outputs = [row.get("output", row.get("completion")) for path in settings.predictions.split(",")
               for row in read_jsonl(path)]
    if None in outputs:
        raise DataError(f"--predictions {settings.predictions}: a row has neither 'output' nor 'completion'")
    said = {s: None for o in outputs for s in split_sentences(extract_explanation(o)) if s not in known}
    if not said:
        return []
    read = [labels_of(v, list(said), settings) for v in (verifier, Verifier.load(settings.second, device))]
    return [(s, [x for x in a if x in b] or ["neutral"]) for s, a, b in zip(said, *read) if {*a} != {*b}]


def hardening_rows(rows: list[Row], verifier: Verifier, settings: ERVSettings, device) -> list[Row]:
    """A quarter as many rows again: cheats, broken sentences, and what two verifiers read differently, in equal parts
    (of the last what there is). Their labels count as the truth; the draw is a function of --seed."""
    rng, sentences = random.Random(settings.seed), [s for row in rows for s in split_sentences(row.text)]
    found = {"cheat": cheating(rows, verifier, settings, rng), "broken": broken(sentences, rng)}
    if settings.second:
        apart = read_differently(settings, verifier, set(sentences), device)
        rng.shuffle(apart)
        found["read differently"] = iter(apart)
    return [Row(text, tuple(labels), source, text, tuple(labels)) for source, pairs in found.items()
            for text, labels in itertools.islice(pairs, len(rows) // 12)]


# ---- training --------------------------------------------------------------------------------------------------------


def evaluate(verifier: Verifier, valid: list[Row], seen: Tensor, settings: ERVSettings) -> dict:
    """The held-out report of a verifier with either head, over the 11 emotions; seen [S]: texts in training."""
    verifier.model.eval()
    probs = verifier.probabilities([row.text for row in valid])[:, erv_columns(verifier.labels)]
    return verifier_report(probs, targets([row.truth for row in valid]).bool(), settings.tau, settings.k, seen)


def batch_rows(settings: ERVSettings, weights: Tensor | None, count: int, step: int) -> list[int]:
    """Rows of step `step`: a share of the epoch's permutation, or drawn by `weights` [N] with --balance resample."""
    if weights is None:
        return batch_of_step(count, settings.batch_size, settings.seed, step)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    return torch.multinomial(weights, settings.batch_size, replacement=True, generator=generator).tolist()


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    harden = argv[:1] == ["harden"]
    settings = parse(ERVSettings, HARDEN if harden else PRESETS, __doc__, argv[harden:])
    settings.out = settings.out or ("runs/toy/erv" if settings.preset == "toy" else "runs/erv") + "-hardened" * harden
    if harden and (not settings.init or bool(settings.second) != bool(settings.predictions)):
        raise SettingsError("harden: --init names the verifier, a folder or hub repository; --second, another one, and "
                            "--predictions, what a policy wrote, go together")
    out, processes = Path(settings.out), join_processes(settings.device, settings.deterministic)
    settings.resume = open_folder(out, settings.resume, processes)
    if settings.random_weights:
        settings.init = "scratch:base"
    if settings.preset == "toy" or settings.random_weights:
        prepare_toy(settings, processes)
    if not settings.data:
        raise SettingsError("--data: name JSONL files of {'text', 'labels', 'source'}; scripts/augment.py writes them")

    # Data, table 5's counts, network.
    rows, valid = read_data(settings)
    model, folder = starting_point(settings)
    model.to(processes.device)
    model.dropout.p = settings.dropout
    tokenizer = EncoderTokenizer(folder, max_length=max_tokens(model))
    labels = tuple(ERV_LABELS) if settings.head == len(ERV_LABELS) else tuple(GOEMOTIONS)
    verifier = Verifier(model, tokenizer, labels, processes.device)
    texts = {row.text for row in rows}
    seen = torch.tensor([row.text in texts for row in valid])
    before = evaluate(verifier, valid, seen, settings)["at_tau"]["macro_f1"] if harden else None
    rows += hardening_rows(rows, verifier, settings, processes.device) if harden else []
    model.requires_grad_(True)
    ids, mask = tokenizer.encode_batch([row.text for row in rows])  # [N, L] each
    wanted = targets([row.labels for row in rows], settings.head)  # [N, K]
    pos_weight = positive_weights(wanted).to(processes.device) if settings.balance == "weight" else None
    weights = sampling_weights(wanted) if settings.balance == "resample" else None
    if processes.main:
        print(f"{counts_table(rows)}\n{len(valid)} held-out rows, {int(seen.sum())} of their texts also in training\n"
              f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters from {settings.init}", flush=True)

    # Optimizer and the run's folder.
    policy = Replicated(model, processes.device, getattr(torch, settings.dtype))
    optimizer = make_optimizer(policy.named_parameters().values())
    per_epoch = math.ceil(len(rows) / settings.batch_size)
    steps = settings.steps or per_epoch * settings.epochs
    run = Run(out, settings, processes, steps)
    first = run.begin(policy, optimizer)
    epochs = out / "epochs.jsonl"
    epochs_done = read_jsonl(epochs) if epochs.exists() else []
    own, began = processes.share(settings.batch_size), time.perf_counter()

    for step in range(first, steps):
        model.train()
        start_time = time.perf_counter()
        picked = batch_rows(settings, weights, len(rows), step)
        part = [picked[place] for place in own]
        length = int(mask[picked].sum(1).max())  # of the whole batch, as is its dropout: a function of seed and step
        torch.manual_seed(settings.seed * 1_000_003 + step)
        model.dropout.rows, model.dropout.count = slice(processes.rank, None, processes.size), len(picked)
        batch = [x[part].to(processes.device) for x in (ids[:, :length], mask[:, :length], wanted)]
        with policy.forward_pass():
            logits = model(batch[0], batch[1])
        run.watch([rows[i].key[:80] for i in part], logits)
        loss = erv_loss(logits.float(), batch[2], pos_weight) * (len(part) / len(picked))  # this process's share
        (loss * processes.size).backward()  # the update averages over processes
        lr = learning_rate(step, steps, settings.lr, settings.warmup, settings.schedule)
        total = all_reduce_sum({"loss": loss.item()})["loss"]
        norm = update(policy, optimizer, lr, settings.max_grad_norm, total)
        seconds = time.perf_counter() - start_time
        run.log(step, {"epoch": step / per_epoch, "loss": total, "lr": lr,
                       "grad_norm": norm, "examples_per_s": len(picked) / seconds, "seconds": seconds,
                       "tokens_per_s": int(mask[picked].sum()) / seconds,
                       "padding": 1 - mask[picked, :length].float().mean().item()})
        if (step + 1) % per_epoch == 0 or step + 1 == steps:
            report = evaluate(verifier, valid, seen, settings)
            line = {"step": step, "macro_f1": report["at_tau"]["macro_f1"],
                    "micro_f1": report["at_tau"]["micro_f1"], "loss": report["loss"], "ece": report["ece"]}
            epochs_done.append(line)
            if processes.main:
                append_jsonl(epochs, line)
                print("held out: " + " ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "step"), flush=True)
                if settings.patience and waited(epochs_done) == 0:
                    save_file({k: v.cpu() for k, v in model.state_dict().items()}, out / "best.safetensors")
            if settings.patience and waited(epochs_done) >= settings.patience:
                break
        run.checkpoint(step + 1)
    trained = time.perf_counter() - began

    if not processes.main:
        return
    if settings.patience and (out / "best.safetensors").exists():
        model.load_state_dict(load_file(out / "best.safetensors"))
    report = evaluate(verifier, valid, seen, settings) | {"train_seconds": trained, "training_rows": len(rows)}
    report |= {"macro_f1_before": before} if harden else {}
    write_json(out / "report.json", report)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            atomic_write(out / name, (folder / name).read_bytes())
    checkpoint.save_erv(model, out, labels)  # weights last but for config.json: where they are, the rest is
    run.finish()
    print_report(report)
    if harden:
        after = report["at_tau"]["macro_f1"]
        print(f"macro F1 on honest text: {before:.3f} before, {after:.3f} after"
              + (": more than a point less, try fewer --epochs or a smaller --lr" if after < before - 0.01 else ""))
    print(f"verifier in {out}, trained in {trained:.1f} s")


def waited(epochs: list[dict]) -> int:
    """Epochs since the best macro F1, of equals the first."""
    scores = [x["macro_f1"] for x in epochs]
    return len(scores) - 1 - scores.index(max(scores))


def print_report(report: dict) -> None:
    at = report["at_tau"]
    print(f"{'':>14}  precision  recall     F1  support   (tau {report['tau']}, at most {report['k']} labels)")
    for name, x in at["per_class"].items():
        if not x["support"] and not x["precision"]:
            continue  # a class that this data does not have
        print(f"{name:>14}  {x['precision']:9.3f}  {x['recall']:6.3f}  {x['f1']:5.3f}  {x['support']:7d}")
    print(f"macro F1 {at['macro_f1']:.3f}, micro F1 {at['micro_f1']:.3f}; best tau {report['best_tau']} (macro F1 "
          f"{report['macro_f1_at_best_tau']:.3f}); ECE {report['ece']:.3f} over all pairs; "
          f"{report['sentences']} held-out rows")
    unseen = report["unseen"]
    print(f"{unseen['sentences']} of these texts are not in training"
          + (f": macro F1 {unseen['macro_f1']:.3f} on them" if unseen["sentences"] else ""))


if __name__ == "__main__":
    run_script(main)
