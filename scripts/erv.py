"""The verifier's training, section 3.2: `[torchrun] scripts/erv.py [--preset toy|paper] [--out DIR] [--data FILES] ...`

Multi-label binary cross entropy on [CLS]. The paper's preset starts from RoBERTa with GoEmotions weights under a fresh
11-way head: `--preset paper --data emer.jsonl,merr.jsonl,pseudo.jsonl,complement.jsonl`. Rows are JSONL of {"text",
"labels", "source"}, as scripts/augment.py writes them; `--sources emer,merr` is table 2's row without augmentation.
Leaves in OUT: model.safetensors, config.json, tokenizer.json (a folder that --erv takes), metrics.jsonl, report.json.
Departures: the paper names neither schedule, dropout nor validation; ours are linear decay, RoBERTa's 0.1, 10% by clip.
What the reward made from a verifier pays for: scripts/tools/audit.py.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erv_min import checkpoint
from erv_min.base.errors import SettingsError
from erv_min.base.files import append_jsonl, atomic_write, read_jsonl, write_json
from erv_min.base.processes import Processes, all_reduce_sum, join_processes, run_script
from erv_min.data.loader import batch_of_step
from erv_min.data.pairs import Row, counts_table, positive_weights, read_rows, sampling_weights, split_rows, targets
from erv_min.data.quality import verifier_report
from erv_min.emotions import ERV_LABELS, GOEMOTIONS
from erv_min.erv import Verifier, erv_columns, erv_loss, fresh_head, max_tokens, scratch
from erv_min.model.bert import RobertaClassifier
from erv_min.tokenizer import EncoderTokenizer
from erv_min.toy.chain import prepare_world
from erv_min.train.folder import Run, open_folder
from erv_min.train.optimizer import learning_rate, make_optimizer, update
from erv_min.train.settings import Training, option, parse
from erv_min.train.sharding import Replicated


@dataclass
class ERVSettings(Training):
    preset: str = option("toy", "toy: the embedded world, from random weights; paper-*: section 4.3, one verifier for "
                                 "both sizes", ("toy", "paper", "paper-0.5b", "paper-7b"))
    data: str = option("", "JSONL files, separated by commas (default: the embedded world's erv_train.jsonl)",
                        path="files")
    valid: str = option("", "JSONL files to measure on (default: the world's erv_valid.jsonl, else --holdout)",
                         path="files")
    holdout: float = option(0.1, "share of clips held out where --valid gives no file", least=0, most=1)
    sources: str = option("", "train on rows of these sources only, e.g. emer,merr (table 2: without augmentation)")
    init: str = option("SamLowe/roberta-base-go_emotions", "starting weights: folder, hub repository, or scratch:toy, "
                        "scratch:base for random ones (as --random-weights)", path="hub")
    tokenizer: str = option("", "folder of tokenizer.json, where --init is scratch (default: the world's)",
                             path="files")
    head: int = option(11, "classes of the output layer: 11, or 28 to keep GoEmotions' (divergence 4)", (11, 28))
    dropout: float = option(0.1, "dropout rate, attention's included (RoBERTa: 0.1)", least=0, most=0.99)
    balance: str = option("none", "class imbalance: none (the paper's way is its complement set), positives weighted, "
                                   "or rows of rare classes drawn more often", ("none", "weight", "resample"))
    patience: int = option(0, "stop after so many epochs without a better macro F1 and keep the best; 0: never",
                            least=0)
    tau: float = option(0.5, "threshold of algorithm 1 that the report is for", least=0, most=1)
    k: int = option(2, "labels per sentence at most (algorithm 1)", least=1)


PAPER = dict(epochs=10, batch_size=64, lr=3e-5, warmup=0.0, schedule="linear", save_every=200)  # section 4.3; ours
PRESETS = {"toy": dict(PAPER, init="scratch:toy", lr=3e-3, epochs=4, warmup=0.05, dropout=0.0, seed=0),
           "paper": PAPER, "paper-0.5b": PAPER, "paper-7b": PAPER}


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
    settings = parse(ERVSettings, PRESETS, __doc__, argv)
    settings.out = settings.out or ("runs/toy/erv" if settings.preset == "toy" else "runs/erv")
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
        run.track_rows([rows[i].key[:80] for i in part], logits)
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
          f"{report['macro_f1_at_best_tau']:.3f}); ECE {report['ece']:.3f} over all pairs; "
          f"{report['sentences']} held-out rows")
    unseen = report["unseen"]
    print(f"{unseen['sentences']} of these texts are not in training"
          + (f": macro F1 {unseen['macro_f1']:.3f} on them" if unseen["sentences"] else ""))


if __name__ == "__main__":
    run_script(main)
