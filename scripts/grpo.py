"""GRPO with the explanation reward, Eq. 3 to 5: `torchrun scripts/grpo.py [--preset toy|paper-0.5b|paper-7b] ...`

With no argument it runs the whole method on the embedded world, from nothing: renders clips, trains towers, SFT and
the verifier, then GRPO, and prints a table like the paper's table 1 on held-out clips. With the paper's presets:
`--data dfew:/path,mafw:/path --erv Rhatanii/Emo_Classifier --out FOLDER`, and --model if the preset names none.
Departures from the release, each with its switch: tau 0.5 (divergence 1), neutral as the only label (2), G = 16 (5),
mu updates per batch (6), rollouts without top-k (9), the inference prompt (10), padded frames (11).
Leaves in OUT: model.safetensors, config.json, tokenizers, metrics.jsonl, completions.jsonl; toy: evaluation.json.
"""

from pathlib import Path

import torch

from erv_min.base.options import parse
from erv_min.base.processes import Processes, join_processes, run_script
from erv_min.grpo import MiniBatch, group_advantages, grpo_loss, normaliser, split_batch
from erv_min.inputs import Collator, embed
from erv_min.logps import completion_logps
from erv_min.toy import chain
from erv_min.train.folder import Run, open_folder
from erv_min.train.hooks import HeldOut, TrainingClips, sample, step_rewards
from erv_min.train.log import StepLog
from erv_min.train.optimizer import learning_rate, make_optimizer, update
from erv_min.train.settings import GRPOSettings
from erv_min.train.sharding import save_model
from erv_min.train.start import check_names, check_start, data_of, load_policies, load_verifier, training_examples


def main(argv: list[str] | None = None) -> None:
    settings = parse(GRPOSettings, __doc__, argv)
    processes = join_processes(settings.device, settings.deterministic)
    check_names(settings)
    settings.resume = open_folder(settings.out, settings.resume, processes)
    chain.prepare(settings, Path(__file__).parent, processes)  # the embedded world: what of it is not there yet
    collate = train(settings, processes)
    chain.compare(settings, collate, processes)  # its table


def train(settings: GRPOSettings, processes: Processes) -> Collator:
    """Eq. 3: maximise E[R(o) - beta KL(pi_theta || pi_ref)] over o ~ pi_theta(. | x)."""
    # What is cheap is checked before any weights are fetched or read.
    check_start(settings, processes)
    examples = training_examples(settings, "train", processes)
    clips = TrainingClips(settings, processes, [[x] for x in examples], settings.batch_size)
    run = Run(settings.out, settings, processes, clips.total_steps, data_of(examples))
    held_out = HeldOut(settings, processes)
    verifier = load_verifier(settings, processes.device)
    policy, reference, collate = load_policies(settings, processes)
    optimizer = make_optimizer(policy.named_parameters().values())
    clips.start(run.begin(policy, optimizer), collate)

    for step in range(run.first_step, clips.total_steps):
        log = StepLog(run, collate.tokenizer.eos_id, held_out(policy, collate, step))

        # 1. o_1 .. o_G ~ pi_theta(. | x) for each prompt x. The frozen towers run here, once per clip.
        with policy.unsharded():
            prompts = collate(clips.next())
            completions = sample(collate, embed(policy.model, prompts), clips.places, step, settings)
        minibatches = split_batch(prompts, completions, settings.micro_batch, collate.tokenizer.eos_id,
                                  settings.mask_truncated)
        log.sampled()

        # 2. log pi_ref(o | x), once.
        with torch.no_grad():
            for part in minibatches:
                part.ref_logps, _ = log_probs(reference, part, settings.temperature)

        # 3. R = R_E + R_format + R_answer (Eq. 4, 5).
        texts, rewards = step_rewards(minibatches, collate.tokenizer, verifier, settings)

        # 4. A_i = (R_i - mean) / std within each group of G.
        R = torch.tensor([each.total for each in rewards], dtype=torch.float32)
        A = group_advantages(R, settings.group_size, divide=settings.advantages == "grpo").to(processes.device)
        for part, rows in zip(minibatches, A.split(settings.micro_batch * settings.group_size)):
            part.advantages = rows

        # 5. mu times: descend -min(ratio A, clip(ratio) A) + beta KL.
        lr = learning_rate(step, clips.total_steps, settings.lr, settings.warmup, settings.schedule)
        length = normaliser(minibatches, settings.loss_type, settings.max_new_tokens)
        for _ in range(settings.mu):
            for part in minibatches:
                logps, entropy = log_probs(policy, part, settings.temperature)
                run.track_rows(part.names, logps)
                if part.old_logps is None:
                    part.old_logps = logps.detach()  # pi_old is pi_theta before the first update: the ratio is 1
                loss = grpo_loss(logps, part.old_logps, part.ref_logps, part.advantages, part.loss_mask, settings.beta,
                                 settings.epsilon, settings.kl, length)
                (loss * part.share).backward()  # `update` takes the mean over processes
                log.add(part, logps, entropy, loss)
            log.updated(update(policy, optimizer, lr, settings.max_grad_norm, log.loss_of_all()))

        clips.check_failed()
        log.write(step, minibatches[0], texts, rewards, lr)
        run.checkpoint(step + 1)

    save_model(policy, settings.out)
    run.finish()
    return collate


def log_probs(policy, part: MiniBatch, temperature: float):
    """log pi(o_t | x, o_<t) of a mini-batch's completions [R, T] at the sampling temperature, and the entropy (None
    without gradients): one forward pass of `policy`, which holds its model whole or sharded."""
    with policy.forward_pass():
        prompts = embed(policy.model, part.prompts)
        return completion_logps(policy.model, prompts, part.completions, temperature, torch.is_grad_enabled())


if __name__ == "__main__":
    run_script(main)
