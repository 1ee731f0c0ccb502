"""Supervised fine-tuning, Eq. 2: `torchrun scripts/sft.py [--preset toy|paper-0.5b|paper-7b] [--out DIR] ...`

The toy preset makes what it needs first: it renders the embedded world and trains a base model that describes it.
With the paper's presets: `--data emer:/path` and, if wished, `--model REPO_OR_FOLDER`.
Departures from the release: the paper's prompt in every stage (divergence 10), padded frames (11), and the targets of
one clip can share its prompt. Leaves in OUT: model.safetensors, config.json, tokenizers, metrics.jsonl.
"""

import dataclasses
import time
from pathlib import Path

import torch

from erv_min.run.errors import ClipError, DataError, SettingsError
from erv_min.run.files import append_jsonl
from erv_min.inputs import clip_inputs
from erv_min.run.processes import run_script
from erv_min.model.humanomni import trainable
from erv_min.run.sharding import idle_loss, rounds, save_model, spread
from erv_min.logps import pad_targets
from erv_min.prompts import sft_target
from erv_min.run.settings import PRESETS, TRAINABLE, SFTSettings, parse
from erv_min.sft import group_targets, sft_loss
from erv_min.run.start import start_model, training_examples
from erv_min.toy.chain import one_thread, prepare_world, world_folder
from erv_min.run.folder import Run, prepare_out
from erv_min.run.optimizer import batch_of_step, learning_rate, make_optimizer, update
from erv_min.run.processes import main_process, join_processes, all_reduce_sum


def main(argv: list[str] | None = None) -> None:
    settings = parse(SFTSettings, PRESETS["sft"], __doc__, argv)
    settings.out = settings.out or "runs/toy/sft"
    settings.resume = prepare_out(Path(settings.out), settings.resume)
    if settings.train_vision_tower and settings.cache_features:
        raise SettingsError("--train-vision-tower changes the features that --cache-features keeps: leave one out")
    if settings.preset == "toy" or settings.random_weights:
        one_thread(settings.preset)
        base = not (settings.model or settings.random_weights)
        settings.world = str(world_folder(settings))
        if main_process():
            prepare_world(Path(settings.world), settings.seed, base)
        settings.model = f"{settings.world}/base" if base else settings.model
    processes = join_processes(settings.device)

    # Model, targets and optimizer.
    model, builder = start_model(settings, "sft", processes)
    tokenizer = builder.tokenizer
    parts = TRAINABLE["sft"] if settings.train_projectors else ("language_model",)
    parts += ("vision_tower",) if settings.train_vision_tower else ()
    trainable(model, parts)
    policy = spread(model, settings.sharding, processes.device, getattr(torch, settings.dtype))
    params = policy.parameters()
    optimizer = make_optimizer(list(params.values()), settings.weight_decay)
    examples = training_examples(settings, "sft", processes)
    if settings.answers_only:
        examples = [dataclasses.replace(e, explanation="") for e in examples]
    elif empty := [e.video_id for e in examples if not e.explanation]:
        raise DataError(f"{len(empty)} of {len(examples)} training examples have no explanation, e.g. {empty[0]}: "
                        "fine-tuning on bare labels unlearns <think>; give data with explanations (EMER, or a training JSON), or "
                        "--answers-only")
    units = group_targets(examples, settings.targets_per_clip)
    units_per_step = max(1, settings.batch_size // settings.targets_per_clip)
    units_per_pass = max(1, settings.micro_batch // settings.targets_per_clip)
    total = settings.steps or max(1, settings.epochs * len(units) // units_per_step)
    run = Run(settings.out, settings, processes, total, model.tower_source)
    first = run.begin(params, optimizer, settings.resume, policy)
    if processes.main:
        print(f"SFT: {len(examples)} targets of {len({e.path for e in examples})} clips, {total} steps, "
              f"{sum(p.numel() for p in params.values()) / 1e6:.2f} M trainable parameters on this process", flush=True)

    # Each process takes every processes.size-th unit of a step's batch; clips are decoded ahead in that order.
    batches = [batch_of_step(len(units), units_per_step, settings.seed, s)[processes.rank :: processes.size] for s in range(first, total)]
    stream = clip_inputs([units[i][0] for batch in batches for i in batch], model, builder.cache, settings.modality,
                         settings.num_frames, settings.geometry, settings.workers)
    model.train()
    for step, batch in zip(range(first, total), batches):
        started = time.time()
        inputs = []
        for i in batch:
            x = next(stream)
            if isinstance(x, ClipError):
                append_jsonl(Path(settings.out) / "failed_clips.jsonl", {"step": step, "error": str(x)})
            else:
                inputs.append((units[i], x))
        targets = [[tokenizer.encode(sft_target(e.explanation, e.label)) + tokenizer.turn_end for e in unit] for unit, _ in inputs]
        totals = all_reduce_sum({"tokens": sum(len(t) for ts in targets for t in ts),
                                     "targets": sum(map(len, targets))})
        denominator = totals["tokens"] if settings.loss_reduction == "mean" else totals["targets"]
        passes, loss_sum = range(0, len(inputs), units_per_pass), 0.0
        if not settings.train_vision_tower:  # frozen towers run first, so that no process waits for another's
            with policy.whole("model.vision_tower", "model.audio_tower"):
                for at in passes:
                    builder.features([x for _, x in inputs[at : at + units_per_pass]])
        for j in range(rounds(policy, len(passes))):
            if j >= len(passes):
                policy(idle_loss, model, settings.modality).backward()
                continue
            at = passes[j]
            labels = pad_targets([t for ts in targets[at : at + units_per_pass] for t in ts], tokenizer.pad_id, processes.device)
            logps, _ = policy(builder.logps, [x for _, x in inputs[at : at + units_per_pass]], labels)
            run.watch([f"{unit[0].video_id}, target {i}" for unit, _ in inputs[at : at + units_per_pass]
                       for i in range(len(unit))], logps)
            loss = sft_loss(logps, labels.mask, max(1, denominator)) * processes.size  # the update averages over processes
            loss.backward()
            loss_sum += loss.item() / processes.size
        lr = learning_rate(step, total, settings.lr, settings.warmup, settings.schedule)
        norm = update(optimizer, list(params.values()), lr, settings.max_grad_norm, processes, policy.clip,
                      loss_sum)
        run.log(step, {"loss": all_reduce_sum({"loss": loss_sum})["loss"], "lr": lr, "grad_norm": norm,
                       "tokens": totals["tokens"], "tokens_per_s": totals["tokens"] / (time.time() - started)})
        run.checkpoint(step + 1, params, optimizer, policy)
    save_model(policy, settings.out)
    if processes.main:
        run.finish()
        print(f"SFT done: {settings.out}/model.safetensors")


if __name__ == "__main__":
    run_script(main)
