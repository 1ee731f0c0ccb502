"""GRPO with the explanation reward, Eq. 3 to 5: `torchrun scripts/grpo.py [--preset toy|paper-0.5b|paper-7b] ...`

With no argument it runs the whole method on the embedded world, from nothing: renders clips, trains towers, SFT and
the verifier, then GRPO, and prints a table like the paper's table 1 on held-out clips. With the paper's presets:
`--data dfew:/path,mafw:/path --erv Rhatanii/Emo_Classifier`, and --model where the preset names none.
Departures from the release, each with its switch: tau 0.5 (divergence 1), neutral as the only label (2), G = 16 (5),
mu updates per batch (6), rollouts without top-k (9), the inference prompt (10), padded frames (11).
Leaves in OUT: model.safetensors, config.json, tokenizers, metrics.jsonl, completions.jsonl; toy: evaluation.json.
"""

import copy
import time
from functools import partial
from pathlib import Path

import torch

from erv_min.base.errors import SettingsError
from erv_min.base.files import append_jsonl
from erv_min.base.processes import all_reduce_sum, barrier, gather_lists, join_processes, run_script
from erv_min.data.loader import item_at, training_inputs
from erv_min.emotions import ERV_LABELS
from erv_min.erv import explanation_statistics
from erv_min.generate import prompts_at_once, rollout, sampling_noise
from erv_min.grpo import TokenSums, ended, group_advantages, grpo_loss, loss_length, step_metrics, token_sums
from erv_min.inputs import Batch, embed
from erv_min.logps import Completions, completion_logps
from erv_min.model.humanomni import Prompts, freeze_except
from erv_min.rewards import Reward, score_completions
from erv_min.toy import chain
from erv_min.train.answers import evaluate_held_out
from erv_min.train.folder import Run, open_folder
from erv_min.train.optimizer import learning_rate, make_optimizer, update
from erv_min.train.settings import PRESETS, GRPOSettings, parse, reward_settings, trained_parts
from erv_min.train.sharding import save_model, shard
from erv_min.train.start import FailedClips, clip_options, load_held_out, load_start, load_verifier, training_examples


def main(argv: list[str] | None = None) -> None:
    settings = parse(GRPOSettings, PRESETS["grpo"], __doc__, argv)
    settings.out = settings.out or "runs/toy"
    processes = join_processes(settings.device, settings.deterministic)
    if settings.deterministic and not settings.rollout_batch and processes.device.type == "cuda":
        raise SettingsError("--deterministic needs --rollout-batch N: how many fit depends on free memory")
    settings.resume = open_folder(settings.out, settings.resume, processes)
    toy = settings.preset == "toy" and not settings.random_weights
    if toy or settings.random_weights:
        chain.prepare(settings, Path(__file__).parent, processes)
    elif settings.ablate == "augmentation" and not settings.erv:
        raise SettingsError("--ablate augmentation needs a verifier trained on the annotated sources alone: "
                            "scripts/erv.py --sources emer,merr --data ... --out runs/erv-unaugmented, given as --erv")
    elif settings.w_explanation and not settings.erv:
        raise SettingsError("R_E needs a verifier: --erv FOLDER_OR_REPO (e.g. Rhatanii/Emo_Classifier), or "
                            "--w-explanation 0")

    # pi_theta; the frozen pi_ref, which shares the frozen towers' features; the verifier; the optimizer.
    model, collate = load_start(settings, "grpo", processes)
    towers = (model.model.vision_tower, model.model.audio_tower)
    ref_model = copy.deepcopy(model, {id(tower): tower for tower in towers}).requires_grad_(False).eval()
    ref_model.model.vision_tower = ref_model.model.audio_tower = None
    freeze_except(model, trained_parts("grpo", settings))
    policy = shard(model.eval(), settings.sharding, processes.device, getattr(torch, settings.dtype))
    reference = shard(ref_model, settings.sharding, processes.device, getattr(torch, settings.dtype), frozen=True)
    verifier, rules = load_verifier(settings, processes.device), reward_settings(settings)
    held_out, judge = load_held_out(settings, processes)
    eos, decode = collate.tokenizer.eos_id, partial(collate.tokenizer.decode, skip_special=True)
    optimizer = make_optimizer(policy.named_parameters().values())

    # Each process takes an equal share of a step's prompts, cut into passes of micro_batch; clips are decoded ahead.
    examples = training_examples(settings, "train", processes)
    total = settings.steps or max(1, settings.epochs * len(examples) // settings.batch_size)
    own = processes.share(settings.batch_size)  # of the places 0 .. batch_size - 1
    G, M = settings.group_size, settings.micro_batch
    cuts = [(slice(at, at + M), slice(at * G, (at + M) * G)) for at in range(0, len(own), M)]  # prompts, completions
    run = Run(settings.out, settings, processes, total, model.tower_source)
    first = run.begin(policy, optimizer)
    failed = FailedClips(settings, settings.batch_size, len(examples))
    stream = training_inputs(
        (step * settings.batch_size + place for step in range(first, total) for place in own),
        lambda place: examples[item_at(place, len(examples), settings.seed)], len(examples), failed.add,
        config=model.config, cache=collate.cache, **clip_options(settings))
    if processes.main:
        trained = sum(p.numel() for p in policy.named_parameters().values())
        print(f"GRPO: {len(examples)} clips, {total} steps of {settings.batch_size} prompts x {G} completions, "
              f"{trained / 1e6:.2f} M trainable parameters on this process", flush=True)

    for step in range(first, total):
        seen = {}  # of the policy that also samples in this step
        if held_out and step % settings.watch_every == 0:
            with policy.unsharded():
                seen = evaluate_held_out(collate, held_out, judge, processes, settings, len(own))
        started = time.time()

        # 1. o_1 .. o_G ~ pi_theta(. | x) for each prompt x. The frozen towers run here, once per clip.
        with policy.unsharded():
            batch = collate([x for _, (_, x) in zip(own, stream)])
            completions = sample(model, embed(model, batch), own, step, settings, eos)
        rolled = time.time() - started

        # 2. log pi_ref(o | x), once, in passes of (x, o).
        passes = [(batch[x], completions[o]) for x, o in cuts]
        with torch.no_grad():
            ref_logps = [log_probs(reference, ref_model, x, o, settings.temperature)[0] for x, o in passes]

        # 3. R = R_E + R_format + R_answer (Eq. 4, 5).
        texts = [decode(ids[mask].tolist()) for _, o in passes for ids, mask in zip(o.ids, o.mask)]
        rewards = score(texts, batch, verifier, rules, settings.group_size)

        # 4. A_i = (R_i - mean) / std in each group.
        A = advantages(rewards, settings).to(processes.device)

        # 5. mu updates: descend the clipped surrogate plus beta KL.
        lr = learning_rate(step, total, settings.lr, settings.warmup, settings.schedule)
        passes = [(x, o, A[rows]) for (x, o), (_, rows) in zip(passes, cuts)]
        loss, norm, sums = descend(policy, model, optimizer, passes, ref_logps, lr, run, settings, eos)

        failed.check()
        everyones, seconds = gather_lists(rewards), time.time() - started
        values = step_metrics(everyones, gather_lists(sums), G)
        run.log(step, {"loss": loss, **values, "lr": lr, "grad_norm": norm,
                       "tokens_per_s": values["completion_length"] * len(everyones) / seconds, "seconds": seconds,
                       "seconds_rollout": rolled, **explanation_statistics(everyones), **seen})
        if processes.main and (step % settings.sample_every == 0 or step + 1 == total):
            show(run, step, batch.examples[0], texts[:G], rewards)
        run.checkpoint(step + 1)

    save_model(policy, settings.out)
    run.finish()
    if processes.main:
        print(f"GRPO done: {settings.out}/model.safetensors", flush=True)
    barrier()
    if toy and not settings.data and settings.eval_clips >= 0:  # other data: scripts/evaluate.py on its own test split
        chain.compare(settings, collate, processes)


def sample(model, prompts: Prompts, places: list[int], step: int, settings: GRPOSettings, eos: int) -> Completions:
    """G completions of each prompt of this process, as many prompts at once as memory allows; the noise of a completion
    is keyed by its prompt's place, so that tokens do not depend on that."""
    parts, G, N = [], settings.group_size, settings.max_new_tokens
    size = settings.rollout_batch or prompts_at_once(model, prompts, G, N)
    for part in (slice(at, at + size) for at in range(0, len(places), size)):
        noise = sampling_noise(settings.seed, step, places[part], G, N)
        parts.append(rollout(model, prompts[part], G, N, eos, noise, settings.temperature, settings.top_k))
    return Completions.cat(parts, eos)


def score(texts: list[str], batch: Batch, verifier, rules, group_size: int) -> list[Reward]:
    """The rewards of all completions; the verifier reads every distinct sentence of them in one call."""
    each = [x for x in batch.examples for _ in range(group_size)]
    labels, datasets = [x.label for x in each], [x.dataset for x in each]
    return score_completions(texts, labels, datasets, verifier and verifier.probabilities,
                             verifier.labels if verifier else ERV_LABELS, rules)


def advantages(rewards: list[Reward], settings: GRPOSettings) -> torch.Tensor:
    """A [R], as --advantages says. Groups are whole on one process."""
    R = torch.tensor([reward.total for reward in rewards], dtype=torch.float32)
    return group_advantages(R, settings.group_size, settings.advantages == "grpo")


def log_probs(policy, model, batch: Batch, completions: Completions, temperature: float):
    """log pi(o_t | x, o_<t) of a pass's completions [R, T] at the sampling temperature, and the entropy (None without
    gradients): one forward pass of `model`, which `policy` shards."""
    with policy.forward_pass():
        return completion_logps(model, embed(model, batch), completions, temperature, torch.is_grad_enabled())


def descend(policy, model, optimizer, passes: list[tuple[Batch, Completions, torch.Tensor]], ref_logps: list, lr: float,
            run: Run, settings: GRPOSettings, eos: int) -> tuple[float, float, list[TokenSums]]:
    """mu updates on one batch, in passes of (x, o, A) whose gradients add up. log pi_old is the first update's log
    pi_theta. Returns the last one's loss, over all processes, the mean gradient norm (NaN: an update was skipped), and
    TokenSums of this process's completions."""
    old_logps, prompts, mean_norm = [], sum(len(x) for x, _, _ in passes), 0.0
    masks = [o.mask & (ended(o, eos)[:, None] | (not settings.mask_truncated)) for _, o, _ in passes]
    batch = all_reduce_sum({"tokens": sum(int(mask.sum()) for mask in masks), "prompts": prompts})
    length = loss_length(settings.loss_type, batch["tokens"], batch["prompts"] * settings.group_size,
                         settings.max_new_tokens)
    for iteration in range(settings.mu):
        loss, sums = 0.0, []
        for i, (x, o, A) in enumerate(passes):
            logps, entropy = log_probs(policy, model, x, o, settings.temperature)
            run.track_rows([f"{e.video_id}, completion {k}" for e in x.examples for k in range(settings.group_size)], logps)
            if iteration == 0:
                old_logps.append(logps.detach())
            part_loss = grpo_loss(logps, old_logps[i], ref_logps[i], A, masks[i], settings.beta, settings.epsilon,
                                  settings.kl, length)
            share = len(x) / prompts
            (part_loss * share).backward()  # `update` takes the mean over processes
            loss += part_loss.item() * share / run.processes.size
            sums += token_sums(logps.detach(), old_logps[i], ref_logps[i], entropy, o, A, eos, settings.epsilon)
        loss = all_reduce_sum({"loss": loss})["loss"]
        mean_norm += update(policy, optimizer, lr, settings.max_grad_norm, loss) / settings.mu
    return loss, mean_norm, sums


def show(run: Run, step: int, x, texts: list[str], rewards: list[Reward]) -> None:
    """Prints one completion with its sentences' labels, and keeps its whole group in completions.jsonl."""
    for text, r in zip(texts, rewards):
        append_jsonl(run.out / "completions.jsonl", {
            "step": step, "video_id": x.video_id, "ground_truth": x.label, "completion": text,
            "sentences": r.sentences, "labels": r.label_sets, "reward_format": r.format, "reward_answer": r.answer,
            "reward_explanation": r.explanation})
    r = rewards[0]
    print(f"  {x.video_id} is {x.label}; R_format {r.format:g} R_answer {r.answer:g} R_E {r.explanation:.2f}")
    for sentence, labels in zip(r.sentences, r.label_sets):
        print(f"    [{', '.join(labels)}] {sentence}")
    print(f"    {texts[0].rsplit('</think>', 1)[-1].strip()}", flush=True)


if __name__ == "__main__":
    run_script(main)
