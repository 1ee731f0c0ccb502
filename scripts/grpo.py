"""GRPO with the explanation reward, Eq. 3 to 5: `torchrun scripts/grpo.py [--preset toy|paper-0.5b|paper-7b] ...`

With no argument it runs the whole method on the embedded world, from nothing: renders clips, trains towers, SFT and
the verifier, then GRPO, and prints a table like the paper's table 1 on held-out clips. With the paper's presets:
`--data dfew:/path,mafw:/path --erv Rhatanii/Emo_Classifier`, and --model where the preset names none.
Departures from the release, each with its switch: tau 0.5 (divergence 1), neutral as the only label (2), G = 16 (5),
mu updates a batch (6), rollouts without top-k (9), the inference prompt (10), padded frames (11).
Leaves in OUT: model.safetensors, config.json, tokenizers, metrics.jsonl, completions.jsonl; toy: evaluation.json.
"""

import copy
import json
import math
import time
from pathlib import Path

import torch

from erv_min.checkpoint import load_humanomni
from erv_min.data.examples import load_examples
from erv_min.emotions import ERV_LABELS
from erv_min.run.errors import ClipError, SettingsError
from erv_min.erv import explanation_statistics
from erv_min.run.files import append_jsonl, atomic_write, write_json
from erv_min.generate import rollout, sampling_noise
from erv_min.grpo import clip_fraction, group_advantages, grpo_loss, kl_k3
from erv_min.inputs import PromptBuilder, clip_inputs
from erv_min.judge import judge_rows, make_judge
from erv_min.metrics import score, table
from erv_min.run.processes import Processes, run_script
from erv_min.model.humanomni import trainable
from erv_min.run.sharding import idle_loss, rounds, save_model, spread
from erv_min.logps import Completions
from erv_min.data.predictions import predict
from erv_min.rewards import RewardSettings, format_reward, score_completions
from erv_min.run.settings import PRESETS, TRAINABLE, Answers, GRPOSettings, parse
from erv_min.run.start import (SCRIPTS, finish, prepare_world, start, start_model, start_verifier, training_examples,
                               world_folder)
from erv_min.run.folder import Run, prepare_out
from erv_min.run.optimizer import batch_of_step, learning_rate, make_optimizer, update
from erv_min.run.processes import Processes, gather_lists, main_process, join_processes, all_reduce_sum


def prepare_toy(settings: GRPOSettings) -> None:
    """World, verifier and SFT of the toy preset, where they are not there yet, each by the command a user would type."""
    world = world_folder(settings)
    same = ("--preset", "toy", "--world", str(world), "--seed", str(settings.seed), "--device", settings.device or "cpu")
    prepare_world(world, settings.seed, base=not settings.model)
    sources = ("--sources", "human") if settings.ablate == "augmentation" else ()
    for given, name, more in ((settings.erv or not settings.w_explanation, erv_name(settings), sources),
                              (settings.model, "sft", ())):
        folder = Path(settings.out, name)
        if not given and not (folder / "model.safetensors").exists():
            finish(start(str(SCRIPTS / f"{name[:3]}.py"), *same, "--out", str(folder), "--resume", *more))
    folder = Path(settings.out, "baseline")
    if settings.baseline and not (folder / "model.safetensors").exists():
        finish(start(str(SCRIPTS / "grpo.py"), *same, "--out", str(folder), "--model", settings.model or f"{settings.out}/sft",
                     "--w-explanation", "0", "--steps", str(settings.steps), "--eval-clips", "-1", "--resume"))


def erv_name(settings: GRPOSettings) -> str:
    """The toy verifier's folder in OUT; one trained without augmentation (table 2) has a name of its own."""
    return "erv-unaugmented" if settings.ablate == "augmentation" else "erv"


def reward_settings(settings: GRPOSettings) -> RewardSettings:
    return RewardSettings(
        tau=settings.tau, k=settings.k, neutral_rule=settings.neutral_rule, answer_rule=settings.answer_rule,
        sentence_rule=settings.sentence_rule,
        neutral_filter=settings.ablate != "neutral-filtering", sentence_level=settings.ablate != "sentence-level",
        w_format=settings.w_format, w_answer=settings.w_answer, w_explanation=settings.w_explanation,
        gate_on_answer=settings.gate_on_answer, phase_in_steps=settings.phase_in_steps,
        length_target=settings.length_target, repeat_discount=settings.repeat_discount)


def rows_of(completions: Completions, start: int, count: int) -> Completions:
    """Completions start..start+count, without the padding that others need."""
    mask = completions.mask[start : start + count]
    width = max(2, int(mask.sum(1).max()))  # two at least: see pad_together
    return Completions(completions.ids[start : start + count, :width], mask[:, :width])


def pad_together(parts: list[Completions], fill: int) -> Completions:
    """Completions of several rollouts as one, padded to the longest, and to two tokens: then a pass has two halves."""
    width = max(2, *(p.ids.shape[1] for p in parts))
    ids = [torch.nn.functional.pad(p.ids, (0, width - p.ids.shape[1]), value=fill) for p in parts]
    masks = [torch.nn.functional.pad(p.mask, (0, width - p.mask.shape[1])) for p in parts]
    return Completions(torch.cat(ids), torch.cat(masks))


def main(argv: list[str] | None = None) -> None:
    settings = parse(GRPOSettings, PRESETS["grpo"], __doc__, argv)
    settings.out = settings.out or "runs/toy"
    settings.resume = prepare_out(Path(settings.out), settings.resume)
    toy = settings.preset == "toy" and not settings.random_weights
    if toy:
        if main_process():  # the others wait for it where the process group forms
            prepare_toy(settings)
        settings.model = settings.model or f"{settings.out}/sft"
        settings.erv = settings.erv or f"{settings.out}/{erv_name(settings)}"
    elif settings.ablate == "augmentation" and not settings.erv:
        raise SettingsError("--ablate augmentation needs a verifier trained on the annotated sources alone: "
                            "scripts/erv.py --sources emer,merr --data ... --out runs/erv-unaugmented, given as --erv")
    elif settings.random_weights and main_process():
        prepare_world(world_folder(settings), settings.seed, base=False)
    elif settings.w_explanation and not settings.erv and not settings.random_weights:
        raise SettingsError("R_E needs a verifier: --erv FOLDER_OR_REPO (e.g. Rhatanii/Emo_Classifier), or --w-explanation 0")
    processes = join_processes(settings.device)

    # Policy, frozen reference (the features of the towers are the policy's), verifier, optimizer.
    model, builder = start_model(settings, "grpo", processes)
    towers = (model.model.vision_tower, model.model.audio_tower)
    ref_model = copy.deepcopy(model, {id(tower): tower for tower in towers}).requires_grad_(False).eval()
    ref_model.model.vision_tower = ref_model.model.audio_tower = None
    ref_builder = PromptBuilder(ref_model, builder.tokenizer, builder.gate_tokenizer, None, settings.modality,
                                settings.prompt_stage)
    trainable(model, TRAINABLE["grpo"])
    policy = spread(model, settings.sharding, processes.device, getattr(torch, settings.dtype))
    reference = spread(ref_model, settings.sharding, processes.device, getattr(torch, settings.dtype), frozen=True)
    params = policy.parameters()
    optimizer = make_optimizer(list(params.values()), settings.weight_decay)
    verifier = start_verifier(settings, processes.device)
    rules, G, eos = reward_settings(settings), settings.group_size, builder.tokenizer.eos_id
    examples = training_examples(settings, "train", processes)
    total = settings.steps or max(1, settings.epochs * len(examples) // settings.batch_size)
    run = Run(settings.out, settings, processes, total, model.tower_source)
    first = run.begin(params, optimizer, settings.resume, policy)
    if processes.main:
        print(f"GRPO: {len(examples)} clips, {total} steps of {settings.batch_size} prompts x {G} completions, "
              f"{sum(p.numel() for p in params.values()) / 1e6:.2f} M trainable parameters on this process", flush=True)

    # Each process takes every processes.size-th prompt of a step's batch; clips are decoded ahead in that order.
    batches = [batch_of_step(len(examples), settings.batch_size, settings.seed, s)[processes.rank :: processes.size]
               for s in range(first, total)]
    stream = clip_inputs([examples[i] for batch in batches for i in batch], model, builder.cache, settings.modality,
                         settings.num_frames, settings.geometry, settings.workers)
    for step, batch in zip(range(first, total), batches):
        started = time.time()
        inputs, numbers = [], []
        for i in batch:
            x = next(stream)
            if isinstance(x, ClipError):
                append_jsonl(run.out / "failed_clips.jsonl", {"step": step, "error": str(x)})
            else:
                inputs.append(x)
                numbers.append(i)
        passes = range(0, len(inputs), settings.micro_batch)

        # 1. Sample G completions of each prompt. Towers run here, once a clip and step.
        model.eval()
        with policy.whole():
            parts = []
            for at in passes:
                noise = sampling_noise(settings.seed, step, numbers[at : at + settings.micro_batch], G, settings.max_new_tokens)
                parts.append(rollout(model, builder.prompts(inputs[at : at + settings.micro_batch]), G,
                                     settings.max_new_tokens, eos, noise, settings.temperature, settings.top_k))
        rolled = time.time() - started
        sums, scored = dict.fromkeys(SUMS, 0.0), []
        if inputs:
            completions = pad_together(parts, eos)
            texts = [builder.tokenizer.decode(ids[mask].tolist(), skip_special=True)
                     for ids, mask in zip(completions.ids, completions.mask)]

            # 2. Score them (Eq. 5), 3. advantages within each group.
            truths = [x.example.label for x in inputs for _ in range(G)]
            datasets = [x.example.dataset for x in inputs for _ in range(G)]
            scored = score_completions(texts, truths, datasets, verifier.probabilities if verifier else None,
                                       verifier.labels if verifier else ERV_LABELS, rules, step=step)
            rewards = torch.tensor([r.total for r in scored], dtype=torch.float32, device=processes.device)
            advantages = group_advantages(rewards, G)

        # Reference log-probs, once. With shards every process makes as many passes as the busiest.
        todo, ref_logps = rounds(policy, len(passes)), []
        with torch.no_grad():
            for j in range(todo):
                if j >= len(passes):
                    reference(idle_loss, ref_model, settings.modality)
                    continue
                own = rows_of(completions, passes[j] * G, settings.micro_batch * G)
                ref_logps.append(reference(ref_builder.logps, inputs[passes[j] : passes[j] + settings.micro_batch], own)[0])
        rows = all_reduce_sum({"rows": float(len(inputs) * G)})["rows"]

        # 4. mu updates on this batch.
        lr = learning_rate(step, total, settings.lr, settings.warmup, settings.schedule)
        old, norms = [None] * len(passes), []
        for iteration in range(settings.mu):
            loss_sum = 0.0
            for j in range(todo):
                if j >= len(passes):
                    policy(idle_loss, model, settings.modality).backward()
                    continue
                at = passes[j]
                chunk = inputs[at : at + settings.micro_batch]
                part = slice(at * G, (at + len(chunk)) * G)
                own = rows_of(completions, at * G, settings.micro_batch * G)
                logps, entropy = policy(builder.logps, chunk, own, with_entropy=True)
                run.watch([f"{x.example.video_id}, completion {i}" for x in chunk for i in range(G)], logps)
                old[j] = logps.detach() if old[j] is None else old[j]
                loss = grpo_loss(logps, old[j], ref_logps[j], advantages[part], own.mask, settings.beta, settings.epsilon)
                (loss * len(own.ids) / rows * processes.size).backward()  # the update averages over processes
                loss_sum += loss.detach()
                if iteration == settings.mu - 1:
                    count = own.mask.sum().item()
                    sums["loss"] += loss.item() * len(own.ids)
                    sums["kl"] += (kl_k3(logps.detach(), ref_logps[j]) * own.mask).sum().item()
                    sums["entropy"] += (entropy * own.mask).sum().item()
                    sums["clip_fraction"] += clip_fraction(logps.detach(), old[j], advantages[part], own.mask,
                                                           settings.epsilon).item() * count
            norms.append(update(optimizer, list(params.values()), lr, settings.max_grad_norm, processes, policy.clip,
                                float(loss_sum)))
        norm = next((x for x in norms if not math.isfinite(x)), norms[-1])
        if inputs:
            sums.update(
                rows=float(len(texts)), tokens=float(completions.mask.sum()), reward=float(rewards.sum()),
                reward_format=sum(r.format for r in scored), reward_answer=sum(r.answer for r in scored),
                reward_explanation=sum(r.explanation for r in scored), groups=float(len(inputs)),
                groups_without_spread=float((rewards.view(-1, G).std(1) == 0).sum()) if G > 1 else float(len(inputs)),
                ended=float((completions.ids.masked_fill(~completions.mask, -1) == eos).any(1).sum()))
        totals = all_reduce_sum(sums)
        n, tokens, seconds = max(1, totals["rows"]), max(1, totals["tokens"]), time.time() - started
        run.log(step, {
            **{k: totals[k] / n for k in ("loss", "reward", "reward_format", "reward_answer", "reward_explanation")},
            **{k: totals[k] / tokens for k in ("kl", "entropy", "clip_fraction")},
            "completion_length": tokens / n, "ended": totals["ended"] / n,
            "groups_without_spread": totals["groups_without_spread"] / max(1, totals["groups"]),
            "lr": lr, "grad_norm": norm, "tokens_per_s": tokens / seconds, "seconds": seconds, "seconds_rollout": rolled,
            **explanation_statistics(gather_lists(scored))})
        if inputs and (step % settings.sample_every == 0 or step + 1 == total) and processes.main:
            show(run, step, inputs[0], texts[:G], scored[:G])
        run.checkpoint(step + 1, params, optimizer, policy)
    save_model(policy, settings.out)
    if processes.main:
        run.finish()
        print(f"GRPO done: {settings.out}/model.safetensors", flush=True)
    if toy and not settings.data and settings.eval_clips >= 0:  # other data: scripts/evaluate.py on its own test split
        evaluate(settings, builder, processes)


SUMS = ("loss", "kl", "entropy", "clip_fraction", "rows", "tokens", "reward", "reward_format", "reward_answer",
        "reward_explanation", "groups", "groups_without_spread", "ended")


def show(run: Run, step: int, x, texts: list[str], scored: list) -> None:
    """Prints one completion with its sentences' labels, and keeps its whole group in completions.jsonl."""
    for text, r in zip(texts, scored):
        append_jsonl(run.out / "completions.jsonl", {
            "step": step, "video_id": x.example.video_id, "ground_truth": x.example.label, "completion": text,
            "sentences": r.sentences, "labels": r.label_sets, "reward_format": r.format, "reward_answer": r.answer,
            "reward_explanation": r.explanation})
    r = scored[0]
    print(f"  {x.example.video_id} is {x.example.label}; R_format {r.format:g} R_answer {r.answer:g} R_E {r.explanation:.2f}")
    for sentence, labels in zip(r.sentences, r.label_sets):
        print(f"    [{', '.join(labels)}] {sentence}")
    print(f"    {texts[0].rsplit('</think>', 1)[-1].strip()}", flush=True)


def evaluate(settings: GRPOSettings, builder: PromptBuilder, processes: Processes) -> None:
    """Held-out clips through SFT, the baseline where asked, and this run: a table like table 1, and evaluation.json."""
    examples = load_examples(f"toy:{world_folder(settings)}", "test")[: settings.eval_clips or None]
    systems = {"SFT": settings.model, "GRPO with R_E" if settings.w_explanation else "GRPO without R_E": settings.out}
    if settings.baseline:
        systems = {"SFT": settings.model, "GRPO without R_E": f"{settings.out}/baseline", "GRPO with R_E": settings.out}
    judge, scores, kept = make_judge("lexicon"), {}, {}
    for name, folder in systems.items():
        model = load_humanomni(folder, torch.float32, processes.device)
        own = PromptBuilder(model, builder.tokenizer, builder.gate_tokenizer, builder.cache, settings.modality,
                            settings.prompt_stage)
        rows, _ = predict(own, examples, processes, Answers(
            max_new_tokens=settings.max_new_tokens, temperature=settings.eval_temperature, seed=settings.seed,
            num_frames=settings.num_frames, geometry=settings.geometry, workers=settings.workers), batch_size=64)
        if processes.main:
            judge_rows(rows, judge)
            scores[name] = score(rows, rows[0]["dataset"])
            kept[name] = 100 * sum(format_reward(row["output"]) for row in rows) / len(rows)
            atomic_write(Path(settings.out, f"predictions-{name.replace(' ', '-')}.jsonl"),
                         "".join(json.dumps(row) + "\n" for row in rows))
    if not processes.main:
        return
    write_json(Path(settings.out, "evaluation.json"), scores)
    print(f"\n{len(examples)} held-out clips, explanations judged by the lexicon, percent:\n{table(scores)}\n\nfiles: "
          + ", ".join(f"{k} {v}" for k, v in systems.items()) + f", evaluation {settings.out}/evaluation.json")
    ours, sft = scores[name], scores["SFT"]
    print(f"{name} over SFT on {len(examples)} held-out clips: "
          + ", ".join(f"{m} {ours[m] - sft[m]:+.1f}" for m in ("EEA", "FCR", "EPC", "WAR", "UAR"))
          + f"; {kept[name]:.1f}% of its outputs keep the format (SFT: {kept['SFT']:.1f}%)", flush=True)


if __name__ == "__main__":
    run_script(main)
