"""The verifier, section 3.2: `python scripts/erv.py [train] [--preset toy|paper] [--out DIR] ...`, and its worth.

  train   multi-label BCE on [CLS]: `--preset paper --data emer.jsonl,merr.jsonl,pseudo.jsonl,complement.jsonl`
  audit   ways to cheat R_E and the remedies, agreement with a judge: `erv.py audit --erv DIR --data toy:/world`
  score   R_E and the emotions of each sentence: `erv.py score --erv DIR --predictions rows.jsonl` (or --text "...")

The paper's preset starts from RoBERTa with GoEmotions weights under a fresh 11-way head. Rows are JSONL of {"text",
"labels", "source"}, as scripts/augment.py writes them; `--sources emer,merr` is table 2's row without augmentation.
Leaves in OUT: model.safetensors, config.json, tokenizer.json (a folder that --erv takes), metrics.jsonl, report.json.
Departures: the paper names neither schedule, dropout nor validation; ours are linear decay, RoBERTa's 0.1, 10% by clip.
"""

import argparse
import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erv_min import audit as measures
from erv_min import checkpoint
from erv_min.data.examples import load_examples
from erv_min.emotions import ERV_LABELS, GOEMOTIONS, labels as dataset_labels
from erv_min.run.errors import SettingsError
from erv_min.erv import (Row, Verifier, counts_table, erv_columns, erv_loss, explanation_statistics, fresh_head,
                         max_tokens, positive_weights, read_rows, sampling_weights, scratch, split_rows, targets)
from erv_min.run.files import append_jsonl, atomic_write, read_jsonl, write_json
from erv_min.judge import make_judge
from erv_min.model.bert import RobertaClassifier, set_dropout
from erv_min.run.processes import run_script
from erv_min.prompts import sft_target
from erv_min.rewards import RewardSettings, extract_explanation, score_completions, split_sentences
from erv_min.run.settings import check, parse, setting
from erv_min.toy.chain import one_thread, prepare_world, world_folder
from erv_min.tokenizer import EncoderTokenizer
from erv_min.run.folder import Run, prepare_out
from erv_min.run.optimizer import batch_of_step, learning_rate, make_optimizer, update
from erv_min.run.processes import join_processes


@dataclass
class ERVSettings:
    preset: str = setting("toy", "toy: the embedded world, from random weights; paper-*: section 4.3, one verifier for both sizes",
                          ("toy", "paper", "paper-0.5b", "paper-7b"))
    out: str = setting("", "folder of this run (default: runs/toy/erv, runs/erv)")
    data: str = setting("", "JSONL files, separated by commas (default: the embedded world's erv_train.jsonl)")
    valid: str = setting("", "JSONL files to measure on (default: the world's erv_valid.jsonl, else --holdout)")
    holdout: float = setting(0.1, "share of clips held out where --valid gives no file")
    sources: str = setting("", "train on rows of these sources only, e.g. emer,merr (table 2: without augmentation)")
    world: str = setting("", "folder of the embedded world (default: beside OUT)")
    init: str = setting("SamLowe/roberta-base-go_emotions", "starting weights: folder, hub repository, or scratch:toy, "
                                                            "scratch:base for random ones")
    tokenizer: str = setting("", "folder of tokenizer.json, where --init is scratch (default: the world's)")
    random_weights: bool = setting(False, "the same as --init scratch:base, on the embedded world's text (to try a machine)")
    steps: int = setting(0, "optimizer steps; 0: as many as the epochs give")
    head: int = setting(11, "classes of the output layer: 11, or 28 to keep GoEmotions' (divergence 4)", (11, 28))
    epochs: int = setting(10, "passes over the data (section 4.3)")
    batch_size: int = setting(64, "descriptions an optimizer step, over all processes (section 4.3)")
    lr: float = setting(3e-5, "peak learning rate (section 4.3)")
    warmup: float = setting(0.0, "share of the steps with a rising learning rate")
    schedule: str = setting("linear", "learning rate after the warm-up", ("cosine", "linear", "constant"))
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "global norm that gradients are clipped to")
    dropout: float = setting(0.1, "dropout rate, attention's included (RoBERTa: 0.1)")
    balance: str = setting("none", "class imbalance: none (the paper's way is its complement set), positives weighted, "
                                   "or rows of rare classes drawn more often", ("none", "weight", "resample"))
    patience: int = setting(0, "stop after so many epochs without a better macro F1 and keep the best; 0: never")
    tau: float = setting(0.5, "threshold of algorithm 1 that the report is for")
    k: int = setting(2, "labels a sentence at most (algorithm 1)")
    seed: int = setting(17, "seed of data order, dropout, split and random weights")
    resume: bool = setting(False, "go on from the last checkpoint in OUT")
    save_every: int = setting(200, "steps between checkpoints")
    keep: int = setting(2, "checkpoints kept, the newest ones; where one is damaged the one before it is used")
    device: str = setting("", "cpu, cuda, cuda:1 (default: cuda where there is one)")
    dtype: str = setting("float32", "compute type; weights and optimizer stay float32", ("float32", "bfloat16"))


PRESETS = {"toy": dict(init="scratch:toy", lr=3e-3, epochs=4, warmup=0.05, dropout=0.0, seed=0), "paper": {}, "paper-0.5b": {}, "paper-7b": {}}


# ---- train -----------------------------------------------------------------------------------------------------------


def prepare_toy(settings: ERVSettings) -> None:
    """Fills in the embedded world's files where the command names none; makes the world where it is not there yet."""
    scratch_start = settings.init.startswith("scratch:")
    if settings.data and (settings.tokenizer or not scratch_start):
        return
    world = world_folder(settings)
    prepare_world(world, settings.seed, base=False)
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


def evaluate(verifier: Verifier, valid: list[Row], settings: ERVSettings) -> dict:
    """The held-out report of a verifier with either head, over the 11 emotions."""
    verifier.model.eval()
    probs = verifier.probabilities([row.text for row in valid])[:, erv_columns(verifier.labels)]
    return measures.verifier_report(probs, targets([row.truth for row in valid]).bool(), settings.tau, settings.k)


def batch_rows(settings: ERVSettings, weights: Tensor | None, count: int, step: int) -> list[int]:
    """Rows of step `step`: a share of the epoch's permutation, or drawn by `weights` [N] with --balance resample."""
    if weights is None:
        return batch_of_step(count, settings.batch_size, settings.seed, step)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    return torch.multinomial(weights, settings.batch_size, replacement=True, generator=generator).tolist()


def train(argv: list[str]) -> None:
    settings = parse(ERVSettings, PRESETS, __doc__, argv)
    check(settings)
    settings.out = settings.out or ("runs/toy/erv" if settings.preset == "toy" else "runs/erv")
    out, processes = Path(settings.out), join_processes(settings.device)
    settings.resume = prepare_out(out, settings.resume)
    if settings.random_weights:
        settings.init = "scratch:base"
    if settings.preset == "toy" or settings.random_weights:
        one_thread(settings.preset)
        prepare_toy(settings)
    if not settings.data:
        raise SettingsError("--data: name JSONL files of {'text', 'labels', 'source'}; scripts/augment.py writes them")

    # Data, table 5's counts, network.
    rows, valid = read_data(settings)
    model, folder = starting_point(settings)
    model.to(processes.device)
    set_dropout(model, settings.dropout)
    tokenizer = EncoderTokenizer(folder, max_length=max_tokens(model))
    labels = tuple(ERV_LABELS) if settings.head == len(ERV_LABELS) else tuple(GOEMOTIONS)
    ids, mask = tokenizer.encode_batch([row.text for row in rows])  # [N, L] each
    wanted = targets([row.labels for row in rows], settings.head)  # [N, K]
    pos_weight = positive_weights(wanted).to(processes.device) if settings.balance == "weight" else None
    weights = sampling_weights(wanted) if settings.balance == "resample" else None
    if processes.main:
        shared = len({row.text for row in valid} & {row.text for row in rows})
        print(f"{counts_table(rows)}\n{len(valid)} held-out rows, {shared} of their texts also in training\n"
              f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters from {settings.init}", flush=True)

    # Optimizer and the run's folder.
    params = dict(model.named_parameters())
    optimizer = make_optimizer(list(params.values()), settings.weight_decay)
    per_epoch = math.ceil(len(rows) / settings.batch_size)
    steps = settings.steps or per_epoch * settings.epochs
    run = Run(out, settings, processes, steps)
    first = run.begin(params, optimizer, settings.resume)
    verifier = Verifier(model, tokenizer, labels, processes.device)
    model.requires_grad_(True)
    epochs_done = [x for x in read_jsonl(out / "epochs.jsonl") if x["step"] <= first] if first else []
    if processes.main:
        atomic_write(out / "epochs.jsonl", "")
        for line in epochs_done:
            append_jsonl(out / "epochs.jsonl", line)
    compute = (torch.autocast(processes.device.type, torch.bfloat16) if settings.dtype == "bfloat16"
               else contextlib.nullcontext())
    began = time.perf_counter()

    for step in range(first, steps):
        model.train()
        start_time = time.perf_counter()
        torch.manual_seed((settings.seed * 1_000_003 + step) * 64 + processes.rank)  # dropout: a function of seed and step
        picked = batch_rows(settings, weights, len(rows), step)
        part = picked[processes.rank::processes.size]
        length = int(mask[part].sum(1).max())
        batch = [x[part].to(processes.device) for x in (ids[:, :length], mask[:, :length], wanted)]
        with compute:
            logits = model(batch[0], batch[1])
        run.watch([rows[i].key[:80] for i in part], logits)
        loss = erv_loss(logits.float(), batch[2], pos_weight) * (len(part) * processes.size / len(picked))
        loss.backward()
        lr = learning_rate(step, steps, settings.lr, settings.warmup, settings.schedule)
        norm = update(optimizer, list(params.values()), lr, settings.max_grad_norm, processes, loss=loss.item())
        seconds = time.perf_counter() - start_time
        run.log(step, {"epoch": step / per_epoch, "loss": loss.item(), "lr": lr, "grad_norm": norm,
                       "examples_per_s": len(picked) / seconds, "tokens_per_s": int(batch[1].sum()) / seconds,
                       "padding": 1 - batch[1].float().mean().item(), "seconds": seconds})
        if (step + 1) % per_epoch == 0 or step + 1 == steps:
            report = evaluate(verifier, valid, settings)
            line = {"step": step + 1, "macro_f1": report["at_tau"]["macro_f1"],
                    "micro_f1": report["at_tau"]["micro_f1"], "loss": report["loss"], "ece": report["ece"]}
            epochs_done.append(line)
            if processes.main:
                append_jsonl(out / "epochs.jsonl", line)
                print("held out: " + " ".join(f"{k} {v:.4g}" for k, v in line.items() if k != "step"), flush=True)
                if settings.patience and waited(epochs_done) == 0:
                    save_file({k: v.cpu() for k, v in model.state_dict().items()}, out / "best.safetensors")
            if settings.patience and waited(epochs_done) >= settings.patience:
                break
        run.checkpoint(step + 1, params, optimizer)
    trained = time.perf_counter() - began

    if not processes.main:
        return
    if settings.patience and (out / "best.safetensors").exists():
        model.load_state_dict(load_file(out / "best.safetensors"))
    report = evaluate(verifier, valid, settings) | {"train_seconds": trained, "training_rows": len(rows)}
    write_json(out / "report.json", report)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            atomic_write(out / name, (folder / name).read_bytes())
    checkpoint.save_erv(model, out, labels)  # weights last but for config.json: where they are, the rest is
    run.finish()
    print_report(report)
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
          f"{report['macro_f1_at_best_tau']:.3f}); ECE {report['ece']:.3f} over all pairs, {report['ece_top1']:.3f} of "
          f"the best label; {report['sentences']} held-out rows")


# ---- audit and score -------------------------------------------------------------------------------------------------


def options(description: str, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--erv", required=True, help="the verifier: a folder or a hub repository; score: or several, A,B")
    parser.add_argument("--data", default="", help="explanations with labels: toy:/world, json:dfew:/file.json")
    parser.add_argument("--predictions", default="", help="or JSONL rows of video_id, output, ground_truth, dataset")
    parser.add_argument("--text", default="", help="score: one explanation")
    parser.add_argument("--judge", default="", help="lexicon, openai:gpt-4.1-mini, erv:/folder, ... (audit)")
    parser.add_argument("--limit", type=int, default=200, help="explanations at most; 0: all")
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--out", default="", help="JSON file of the result")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def read_completions(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(completion, e_gt, data set) from predictions or annotated explanations. Raises SettingsError without any."""
    if args.predictions:
        found = [(x["output"], x["ground_truth"], x["dataset"]) for x in read_jsonl(args.predictions)]
    elif args.data:
        found = [(sft_target(x.explanation, x.label), x.label, x.dataset)
                 for x in load_examples(args.data, "sft") if x.explanation]
    else:
        raise SettingsError("no explanations: give --predictions rows.jsonl or --data toy:/world")
    if not found:
        raise SettingsError(f"{args.predictions or args.data}: no explanation found")
    return found


def audit(argv: list[str]) -> None:
    """Pays each way to cheat; honest are the explanations that the judge (where given) reads as their label."""
    args = options("Ways to cheat R_E, the remedies, and the verifier's agreement with a judge.", argv)
    verifier, found = Verifier.load(args.erv, args.device), read_completions(args)
    dataset = found[0][2]
    names, judge = dataset_labels(dataset), make_judge(args.judge) if args.judge else None
    found = [(extract_explanation(c), e) for c, e, d in found if d == dataset]
    found = found[:args.limit * (4 if judge else 1) or None]

    def ask(texts: list[str]) -> list[str | None]:
        return [x.emotion if x.status == "ok" else None for x in judge.judge(texts, names)]

    result = {"erv": args.erv, "dataset": dataset, "judge": args.judge, "tau": args.tau, "k": args.k}
    if judge:
        sentences = list(dict.fromkeys(s for text, _ in found for s in split_sentences(text)))
        result["agreement"] = measures.agreement(measures.best_label(verifier, sentences, names), ask(sentences), names)
        honest = [x for x, emotion in zip(found, ask([text for text, _ in found])) if emotion == x[1]]
        print(f"{len(honest)} of {len(found)} explanations are honest: {args.judge} reads their label in them")
        found = honest[:args.limit or None]
    rows = measures.audit(verifier, [text for text, _ in found], [e for _, e in found], dataset, names,
                          ask if judge else None, RewardSettings(tau=args.tau, k=args.k))
    result |= {"explanations": len(found), "rows": [dataclasses.asdict(row) for row in rows]}
    print(measures.audit_table(rows))
    if judge:
        x = result["agreement"]
        kappa = "undefined" if x["kappa"] is None else f"{x['kappa']:.3f}"
        print(f"verifier and judge on {x['sentences']} different sentences ({x['unanswered']} without an answer): "
              f"accuracy {x['accuracy']:.3f}, kappa {kappa}; precision and recall, the judge as truth: "
              + ", ".join(f"{name} {y['precision'] or 0:.2f} {y['recall'] or 0:.2f}"
                          for name, y in x["per_class"].items()))
    if args.out:
        write_json(args.out, result)


def score(argv: list[str]) -> None:
    """Prints each sentence with its emotions for --text; for rows, mean R_E by each verifier and the watched statistics.

    A second verifier, trained on other data, shows what a policy gained from the first one's blind spots."""
    args = options("R_E and the emotions of each sentence, by one or several verifiers.", argv)
    settings, results = RewardSettings(tau=args.tau, k=args.k), {}
    if args.text:
        found = [(args.text if "<think>" in args.text else sft_target(args.text, "neutral"), "neutral", "mafw")]
    else:
        found = read_completions(args)[:args.limit or None]
    completions, truths, datasets = (list(column) for column in zip(*found))
    for folder in args.erv.split(","):
        verifier = Verifier.load(folder, args.device)
        rewards = score_completions(completions, truths, datasets, verifier.probabilities, verifier.labels, settings)
        if args.text:
            for sentence, names in zip(rewards[0].sentences, rewards[0].label_sets):
                print(f"{', '.join(names):>24}  {sentence}")
            continue
        mean = sum(r.explanation for r in rewards) / len(rewards)
        results[folder] = {"reward_explanation": mean, **explanation_statistics(rewards)}
        print(f"{folder}: " + ", ".join(f"{name} {'-' if value is None else round(value, 4)}"
                                        for name, value in results[folder].items()))
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    command, rest = ((sys.argv[1], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in ("train", "audit", "score")
                     else ("train", sys.argv[1:]))
    run_script(lambda: {"train": train, "audit": audit, "score": score}[command](rest))
