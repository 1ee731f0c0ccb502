"""Supervised fine-tuning, Eq. 2: `torchrun scripts/sft.py [--preset toy|paper-0.5b|paper-7b] [--out DIR] ...`

The toy preset makes what it needs first: it renders the embedded world and trains a base model that describes it.
With the paper's presets: `--data emer:/path` and, if wished, `--model REPO_OR_FOLDER`.
Departures from the release: the paper's prompt in every stage (divergence 10), padded frames (11), and the targets of
one clip can share its prompt. Leaves in OUT: model.safetensors, config.json, tokenizers, metrics.jsonl.
"""

import contextlib
import dataclasses
import time

import torch

from erv_min.base.errors import DataError, SettingsError
from erv_min.base.processes import all_reduce_sum, join_processes, run_script
from erv_min.data.loader import item_at, training_inputs
from erv_min.inputs import Example, embed
from erv_min.logps import Completions, completion_logps
from erv_min.model.humanomni import freeze_except, pad_rows
from erv_min.prompts import sft_target
from erv_min.sft import group_targets, sft_loss
from erv_min.toy.chain import prepare_world
from erv_min.train.folder import Run, open_folder
from erv_min.train.optimizer import learning_rate, make_optimizer, update
from erv_min.train.settings import PRESETS, SFTSettings, parse, trained_parts
from erv_min.train.sharding import save_model, shard
from erv_min.train.start import FailedClips, clip_options, load_start, training_examples


def main(argv: list[str] | None = None) -> None:
    settings = parse(SFTSettings, PRESETS["sft"], __doc__, argv)
    settings.out = settings.out or "runs/toy/sft"
    if settings.train_vision_tower and settings.cache_features:
        raise SettingsError("--train-vision-tower changes the features that --cache-features keeps: leave one out")
    processes = join_processes(settings.device, settings.deterministic)
    settings.resume = open_folder(settings.out, settings.resume, processes)
    if settings.preset == "toy" or settings.random_weights:
        base = not (settings.model or settings.random_weights)
        world = prepare_world(settings, processes, base)
        settings.model = str(world / "base") if base else settings.model

    # Model, optimizer, and targets y in units that share a clip and so its prompt x.
    model, collate = load_start(settings, "sft", processes)
    freeze_except(model, trained_parts("sft", settings))
    policy = shard(model.train(), settings.sharding, processes.device, getattr(torch, settings.dtype))
    optimizer = make_optimizer(policy.named_parameters().values())
    units = group_targets(explained(training_examples(settings, "sft", processes), settings), settings.targets_per_clip)
    units_per_step, units_per_pass = (max(1, n // settings.targets_per_clip)
                                      for n in (settings.batch_size, settings.micro_batch))
    total = settings.steps or max(1, settings.epochs * len(units) // units_per_step)

    # Each process takes an equal share of a step's units, in passes of micro_batch; clips are decoded ahead in order.
    own = processes.share(units_per_step)
    passes = [slice(at, at + units_per_pass) for at in range(0, len(own), units_per_pass)]
    run = Run(settings.out, settings, processes, total, model.tower_source)
    first = run.begin(policy, optimizer)
    failed = FailedClips(settings, units_per_step, len(units))

    def unit_at(place: int) -> list[Example]:
        return units[item_at(place, len(units), settings.seed)]

    stream = training_inputs((step * units_per_step + place for step in range(first, total) for place in own),
                             lambda place: unit_at(place)[0], len(units), failed.add, config=model.config,
                             cache=collate.cache, **clip_options(settings))
    if processes.main:
        trained = sum(p.numel() for p in policy.named_parameters().values())
        print(f"SFT: {len(units)} units of {settings.targets_per_clip} targets, {total} steps of {units_per_step} "
              f"units, {trained / 1e6:.2f} M trainable parameters on this process", flush=True)

    for step in range(first, total):
        started = time.time()
        places, inputs = zip(*(taken for _, taken in zip(own, stream)))
        frozen = policy.unsharded("model.vision_tower", "model.audio_tower")
        with contextlib.nullcontext() if settings.train_vision_tower else frozen:  # frozen towers: once per clip
            batch = collate(list(inputs))
        targets = [[collate.tokenizer.encode(sft_target(y.explanation, y.label)) + collate.tokenizer.turn_end
                    for y in unit_at(place)] for place in places]
        lengths = [len(y) for unit in targets for y in unit]
        totals = all_reduce_sum({"tokens": sum(lengths), "targets": len(lengths)})
        failed.check()

        # L_SFT = - sum_t log pi_theta(y_t | x, y_<t), over the label tokens of the whole batch (Eq. 2).
        denominator, loss_sum = totals["tokens" if settings.loss_reduction == "mean" else "targets"], 0.0
        for part in passes:
            labels = Completions(*pad_rows([y for unit in targets[part] for y in unit], collate.tokenizer.pad_id,
                                           processes.device))
            with policy.forward_pass():
                logps, _ = completion_logps(model, embed(model, batch[part]), labels)
            run.track_rows([f"{x.video_id}, target {i}" for x, unit in zip(batch.examples[part], targets[part])
                       for i in range(len(unit))], logps)
            loss = sft_loss(logps, labels.mask, denominator)
            (loss * processes.size).backward()  # `update` takes the mean over processes
            loss_sum += loss.item()

        loss = all_reduce_sum({"loss": loss_sum})["loss"]
        lr = learning_rate(step, total, settings.lr, settings.warmup, settings.schedule)
        norm = update(policy, optimizer, lr, settings.max_grad_norm, loss)
        run.log(step, {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": totals["tokens"],
                       "tokens_per_s": totals["tokens"] / (time.time() - started)})
        run.checkpoint(step + 1)

    save_model(policy, settings.out)
    run.finish()
    if processes.main:
        print(f"SFT done: {settings.out}/model.safetensors")


def explained(examples: list[Example], settings: SFTSettings) -> list[Example]:
    """The examples to learn from. Raises DataError where some have no explanation and --answers-only is not given."""
    if settings.answers_only:
        return [dataclasses.replace(e, explanation="") for e in examples]
    if empty := [e.video_id for e in examples if not e.explanation]:
        raise DataError(f"{len(empty)} of {len(examples)} training examples have no explanation, e.g. {empty[0]}: "
                        "fine-tuning on bare labels unlearns <think>; give data with explanations (EMER, or a training "
                        "JSON), or --answers-only")
    return examples


if __name__ == "__main__":
    run_script(main)
