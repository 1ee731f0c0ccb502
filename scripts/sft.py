"""Supervised fine-tuning, Eq. 2: `torchrun scripts/sft.py [--preset toy|paper-0.5b|paper-7b] [--out DIR] ...`

The toy preset makes what it needs first: it renders the embedded world and trains a base model that describes it.
With the paper's presets: `--data emer:/path --out FOLDER` and, if wished, `--model REPO_OR_FOLDER`.
Departures from the release: the paper's prompt in every stage (divergence 10), padded frames (11), and the targets of
one clip can share its prompt. Leaves in OUT: model.safetensors, config.json, tokenizers, metrics.jsonl.
"""

import dataclasses
import time

from erv_min.base.errors import DataError, SettingsError
from erv_min.base.options import parse
from erv_min.base.processes import Processes, all_reduce_sum, join_processes, run_script
from erv_min.inputs import embed
from erv_min.logps import Completions, completion_logps
from erv_min.model.humanomni import pad_rows
from erv_min.prompts import sft_target
from erv_min.sft import group_targets, sft_loss
from erv_min.tokenizer import Tokenizer
from erv_min.toy import chain
from erv_min.train.folder import Run, open_folder
from erv_min.train.hooks import TrainingClips
from erv_min.train.optimizer import learning_rate, make_optimizer, update
from erv_min.train.settings import SFTSettings
from erv_min.train.sharding import save_model
from erv_min.train.start import check_names, check_start, data_of, load_policies, training_examples


def main(argv: list[str] | None = None) -> None:
    settings = parse(SFTSettings, __doc__, argv)
    if settings.train_vision_tower and settings.cache_features:
        raise SettingsError("--train-vision-tower changes the features that --cache-features keeps: leave one out")
    processes = join_processes(settings.device, settings.deterministic)
    check_names(settings)
    settings.resume = open_folder(settings.out, settings.resume, processes)
    chain.prepare_sft(settings, processes)  # the embedded world: what of it is not there yet
    train(settings, processes)


def train(settings: SFTSettings, processes: Processes) -> None:
    """Eq. 2: minimise - sum_t log pi_theta(y_t | x, y_<t) over targets y = <think>..</think><answer>..</answer>."""
    # What is cheap is checked before any weights are fetched or read.
    check_start(settings, processes)
    examples = training_examples(settings, "sft", processes)
    if settings.answers_only:
        examples = [dataclasses.replace(x, explanation="") for x in examples]
    elif empty := [x.video_id for x in examples if not x.explanation]:
        raise DataError(f"{len(empty)} of {len(examples)} training examples have no explanation, e.g. {empty[0]}: give "
                        "data that has them (EMER, or a training JSON), or --answers-only")
    units = group_targets(examples, settings.targets_per_clip)  # targets that share a clip, and so its prompt x
    units_per_step = max(1, settings.batch_size // settings.targets_per_clip)
    units_per_pass = max(1, settings.micro_batch // settings.targets_per_clip)
    clips = TrainingClips(settings, processes, units, units_per_step)
    run = Run(settings.out, settings, processes, clips.total_steps, data_of(examples))
    policy, _, collate = load_policies(settings, processes)
    optimizer = make_optimizer(policy.named_parameters().values())
    clips.start(run.begin(policy, optimizer), collate)
    frozen = ["model.audio_tower"] if settings.train_vision_tower else ["model.audio_tower", "model.vision_tower"]

    for step in range(run.first_step, clips.total_steps):
        started = time.time()

        # x: the frozen towers run here, once per clip; y: the targets' tokens.
        with policy.unsharded(*frozen):
            batch = collate(clips.next())
        targets, names = encode_targets(clips, collate.tokenizer)
        totals = all_reduce_sum({"tokens": sum(map(len, targets)), "targets": len(targets)})
        denominator = totals["tokens" if settings.loss_reduction == "mean" else "targets"]
        clips.check_failed()

        # L_SFT = - sum_t log pi_theta(y_t | x, y_<t) / denominator, in passes whose gradients add up.
        loss_sum = 0.0
        for start in range(0, len(clips.taken), units_per_pass):
            some = slice(start, start + units_per_pass)
            rows = slice(start * settings.targets_per_clip, (start + units_per_pass) * settings.targets_per_clip)
            y = Completions(*pad_rows(targets[rows], collate.tokenizer.pad_id, processes.device))
            with policy.forward_pass():
                logps, _ = completion_logps(policy.model, embed(policy.model, batch[some]), y)
            run.track_rows(names[rows], logps)
            loss = sft_loss(logps, y.mask, denominator)
            (loss * processes.size).backward()  # `update` takes the mean over processes
            loss_sum += loss.item()

        lr = learning_rate(step, clips.total_steps, settings.lr, settings.warmup, settings.schedule)
        loss = all_reduce_sum({"loss": loss_sum})["loss"]
        norm = update(policy, optimizer, lr, settings.max_grad_norm, loss)
        run.log(step, {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": totals["tokens"],
                       "tokens_per_s": totals["tokens"] / (time.time() - started)})
        run.checkpoint(step + 1)

    save_model(policy, settings.out)
    run.finish()


def encode_targets(clips: TrainingClips, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str]]:
    """The tokens of each target of a step's clips, up to the end of the turn, and its name for messages."""
    targets, names = [], []
    for place in clips.taken:
        for number, x in enumerate(clips.unit_at(place)):
            target = sft_target(x.explanation, x.label)
            targets.append(tokenizer.encode(target, placeholders=False) + tokenizer.turn_end)
            names.append(f"{x.video_id}, target {number}")
    return targets, names


if __name__ == "__main__":
    run_script(main)
