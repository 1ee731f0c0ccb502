"""The verifier's training, section 3.2: `[torchrun] scripts/erv.py [--preset toy|paper] [--out DIR] [--data FILES] ...`

Multi-label binary cross entropy on [CLS]. The paper's preset starts from RoBERTa with GoEmotions weights under a fresh
11-way head: `--preset paper --data emer.jsonl,merr.jsonl,pseudo.jsonl,complement.jsonl`. Rows are JSONL of {"text",
"labels", "source"}, as scripts/augment.py writes them; `--sources emer,merr` is table 2's row without augmentation.
Leaves in OUT: model.safetensors, config.json, tokenizer.json (a folder that --erv takes), metrics.jsonl, report.json.
Departures: the paper names neither schedule, dropout nor validation; ours are linear decay, RoBERTa's 0.1, 10% by clip.
What the reward made from a verifier pays for: scripts/tools/audit.py.
"""

import time
from pathlib import Path

import torch

from erv_min import checkpoint
from erv_min.base.errors import SettingsError
from erv_min.base.files import append_jsonl, atomic_write, write_json
from erv_min.base.options import file_list, parse
from erv_min.base.processes import Processes, all_reduce_sum, join_processes, run_script
from erv_min.data.loader import batch_of_step, steps_per_epoch
from erv_min.data.pairs import Row, counts_table, read_rows, split_rows, targets, verifier_report
from erv_min.emotions import ERV_LABELS, GOEMOTIONS
from erv_min.erv import Verifier, erv_columns, erv_loss, fresh_head, max_tokens, scratch
from erv_min.tokenizer import EncoderTokenizer
from erv_min.toy import chain
from erv_min.train.folder import Run, check_disk, open_folder
from erv_min.train.optimizer import learning_rate, make_optimizer, update
from erv_min.train.settings import ERVSettings
from erv_min.train.sharding import Replicated


def main(argv: list[str] | None = None) -> None:
    settings = parse(ERVSettings, __doc__, argv)
    processes = join_processes(settings.device, settings.deterministic)
    settings.resume = open_folder(settings.out, settings.resume, processes)
    settings.init = "scratch:base" if settings.random_weights else settings.init
    chain.prepare_erv(settings, processes)  # the embedded world: what of it is not there yet
    if not settings.data:
        raise SettingsError("--data: name JSONL files of {'text', 'labels', 'source'}; scripts/augment.py writes them")
    if settings.init.startswith("scratch:") and not settings.tokenizer:
        raise SettingsError(f"--init {settings.init} needs --tokenizer, a folder with a tokenizer.json")
    if not settings.tokenizer:
        checkpoint.check_checkpoint(settings.init, "erv")
    train(settings, processes)


def train(settings: ERVSettings, processes: Processes) -> None:
    """Section 3.2: minimise the binary cross entropy of each of the 11 emotions on [CLS]."""
    # What is cheap is checked before any weights are fetched or read.
    rows, valid = read_data(settings)
    per_epoch = steps_per_epoch(len(rows), settings.batch_size)
    total_steps, places = settings.steps or per_epoch * settings.epochs, processes.share(settings.batch_size)
    run = Run(settings.out, settings, processes, total_steps, rows + valid)
    tokenizer_folder = Path(settings.tokenizer or checkpoint.resolve(settings.init))
    verifier = load_verifier(settings, tokenizer_folder, processes.device)
    model, training_texts = verifier.model.requires_grad_(True), {row.text for row in rows}
    check_disk(run.out, settings.keep, model)
    ids, mask = verifier.tokenizer.encode_batch([row.text for row in rows])  # [N, L] each
    wanted = targets([row.labels for row in rows], settings.head)  # [N, K]
    if processes.main:
        print(f"{counts_table(rows)}\n{len(valid)} held-out rows, "
              f"{sum(row.text in training_texts for row in valid)} of their texts also in training", flush=True)

    policy = Replicated(model, processes.device, getattr(torch, settings.dtype))
    optimizer = make_optimizer(policy.named_parameters().values())
    run.begin(policy, optimizer)

    for step in range(run.first_step, total_steps):
        model.train()
        started = time.perf_counter()
        picked = batch_of_step(len(rows), settings.batch_size, settings.seed, step)  # of the whole batch
        part = [picked[place] for place in places]  # of this process
        length = int(mask[picked].sum(1).max())
        torch.manual_seed(settings.seed * 1_000_003 + step * processes.size + processes.rank)  # of the dropout

        # u = ERV(s), and the mean over the batch of its binary cross entropy.
        with policy.forward_pass():
            logits = model(ids[part, :length].to(processes.device), mask[part, :length].to(processes.device))
        run.track_rows([rows[i].key[:80] for i in part], logits)
        share = len(part) / len(picked)
        loss = erv_loss(logits.float(), wanted[part].to(processes.device)) * share
        (loss * processes.size).backward()  # `update` takes the mean over processes
        lr = learning_rate(step, total_steps, settings.lr, settings.warmup, settings.schedule)
        total = all_reduce_sum({"loss": loss.item()})["loss"]
        norm = update(policy, optimizer, lr, settings.max_grad_norm, total)

        seconds = time.perf_counter() - started
        run.log(step, {"epoch": step / per_epoch, "loss": total, "lr": lr, "grad_norm": norm,
                       "examples_per_s": len(picked) / seconds, "seconds": seconds,
                       "tokens_per_s": int(mask[picked].sum()) / seconds,
                       "padding": 1 - mask[picked, :length].float().mean().item()})
        if processes.main and ((step + 1) % per_epoch == 0 or step + 1 == total_steps):
            report = evaluate(verifier, valid, settings)
            found = {name: report["at_tau"][name] for name in ("macro_f1", "micro_f1")} | {"loss": report["loss"]}
            append_jsonl(run.out / "epochs.jsonl", {"step": step, **found})
            print("held out: " + " ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
        run.checkpoint(step + 1)

    if processes.main:
        report = evaluate(verifier, valid, settings)
        per_class = report["at_tau"]["per_class"].items()
        print("F1: " + ", ".join(f"{label} {x['f1']:.3f}" for label, x in per_class if x["support"]))
        write_json(run.out / "report.json", report)
        for file in [tokenizer_folder / name for name in ("tokenizer.json", "tokenizer_config.json")]:
            if file.exists():
                atomic_write(run.out / file.name, file.read_bytes())
        checkpoint.save_erv(model, run.out, verifier.labels)  # last: if it is there, the rest is
    run.finish()


def load_verifier(settings: ERVSettings, tokenizer: Path, device: torch.device) -> Verifier:
    """The network to train, with the tokenizer.json of a folder. Raises CheckpointError."""
    torch.manual_seed(settings.seed)
    if settings.init.startswith("scratch:"):
        vocab_size = EncoderTokenizer(tokenizer).vocab_size
        model = scratch(settings.init.removeprefix("scratch:"), vocab_size, settings.head)
    else:
        model = checkpoint.load_erv(settings.init)
        if settings.head != model.config.num_labels:
            model = fresh_head(model, settings.head)
    model.dropout.p = settings.dropout
    labels = ERV_LABELS if settings.head == len(ERV_LABELS) else GOEMOTIONS
    return Verifier(model, EncoderTokenizer(tokenizer, max_tokens(model), model.config.vocab_size), labels, device)


def read_data(settings: ERVSettings) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), the training rows of --sources only."""
    rows = read_rows(file_list(settings.data))
    if settings.valid:
        valid = read_rows(file_list(settings.valid))
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
    probs = verifier.probabilities([row.text for row in valid])[:, list(erv_columns(verifier.labels).values())]
    return verifier_report(probs, [row.truth for row in valid], settings.tau, settings.k)


if __name__ == "__main__":
    run_script(main)
