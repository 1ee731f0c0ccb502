"""What a row of metrics.jsonl is made of: what the loss, the sampler and the explanations did in a step of GRPO.

scripts/README.md says what each key means, and what is a warning.
"""

import re
import time

import torch
from torch import Tensor

from erv_min.base.files import append_jsonl
from erv_min.base.processes import all_reduce_sum, gather_lists
from erv_min.emotions import ALIASES
from erv_min.grpo import MiniBatch, ended, kl_k3
from erv_min.rewards import Reward
from erv_min.train.folder import Run


def clipped(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor,
            epsilon: float = 0.2) -> tuple[Tensor, Tensor]:
    """Tokens whose update the clip holds back (none while mu = 1): ratio under 1 - epsilon with A < 0, and ratio over
    1 + epsilon with A > 0. [R, T] each, advantages [R] -> bool [R, T] twice."""
    ratio, inside = (logps - old_logps).exp(), mask.bool()
    low = (ratio < 1 - epsilon) & (advantages[:, None] < 0) & inside
    return low, (ratio > 1 + epsilon) & (advantages[:, None] > 0) & inside


def token_sums(part: MiniBatch, logps: Tensor, entropy: Tensor, eos_token_id: int,
               epsilon: float) -> list[dict[str, float]]:
    """What an update tells of each completion, summed over its tokens; logps, entropy [R, T]. ended: 1 if EOS was met
    before the limit; sampler_gap: |log-prob of the sampler - of the trainer|; sampler_gap_max: the largest, no sum."""
    mask = part.completions.mask
    low, high = clipped(logps, part.old_logps, part.advantages, mask, epsilon)
    gap = (part.completions.logps - part.old_logps).abs() * mask
    sums = {"tokens": mask.sum(1), "ended": ended(part.completions, eos_token_id),
            "kl": (kl_k3(logps, part.ref_logps) * mask).sum(1), "entropy": (entropy * mask).sum(1),
            "clip_fraction_low": low.sum(1), "clip_fraction_high": high.sum(1), "sampler_gap": gap.sum(1),
            "sampler_gap_max": gap.amax(1)}
    return [dict(zip(sums, row)) for row in torch.stack([x.float() for x in sums.values()], 1).tolist()]


def step_metrics(rewards: list[Reward], sums: list[dict[str, float]], group_size: int) -> dict[str, float]:
    """Over the completions of all processes, in groups of G. Means of "reward*" and lengths are over completions, of
    the others over tokens."""
    found, lengths = {}, [row["tokens"] for row in sums]
    for part in ("total", "format", "answer", "explanation"):
        name, values = f"reward_{part}".removesuffix("_total"), [getattr(reward, part) for reward in rewards]
        groups = torch.tensor(values, dtype=torch.float64).view(-1, group_size)
        found |= {name: sum(values) / len(rewards), f"{name}_std": groups.std(1).mean().item()}
        if part == "total":
            found["frac_zero_std"] = (groups.amax(1) == groups.amin(1)).double().mean().item()
    for name in ("kl", "entropy", "clip_fraction_low", "clip_fraction_high", "sampler_gap"):
        found[name] = sum(row[name] for row in sums) / sum(lengths)
    return found | {"sampler_gap_max": max(row["sampler_gap_max"] for row in sums),
                    "completion_length": sum(lengths) / len(sums), "completion_length_min": min(lengths),
                    "completion_length_max": max(lengths),
                    "truncated": 1 - sum(row["ended"] for row in sums) / len(sums)}


def explanation_statistics(rewards: list[Reward]) -> dict[str, float | None]:
    """What a policy that cheats R_E would move, as means over a step's completions. None: no sentence was read."""
    label_sets = [EL for reward in rewards for EL in reward.label_sets]
    sentences = [sentence for reward in rewards for sentence in reward.sentences]
    distinct = [len(set(reward.sentences)) / len(reward.sentences) for reward in rewards if reward.sentences]
    named = sum(not ALIASES.keys().isdisjoint(re.findall("[a-z]+", sentence.lower())) for sentence in sentences)
    count = max(1, len(rewards))
    return {"sentences": len(sentences) / count,
            "neutral_share": sum(EL == ["neutral"] for EL in label_sets) / len(label_sets) if label_sets else None,
            "label_word_rate": named / max(1, len(sentences)),  # a label or an alias stands there as a whole word
            "distinct_sentence_rate": sum(distinct) / len(distinct) if distinct else None,
            "explanation_words": sum(len(sentence.split()) for sentence in sentences) / count}


class StepLog:
    """One step's row: begun before sampling, told of each mini-batch's loss, written at the end. Of mu updates the row
    holds the last one's loss and sums, and the mean gradient norm."""

    def __init__(self, run: Run, eos_token_id: int, held_out: dict[str, float]):
        self.run, self.settings, self.eos_token_id, self.held_out = run, run.settings, eos_token_id, held_out
        self.started, self.norm, self.under_way, self.sums = time.time(), 0.0, 0.0, []

    def sampled(self) -> None:
        self.seconds_rollout = time.time() - self.started

    def add(self, part: MiniBatch, logps: Tensor, entropy: Tensor, loss: Tensor) -> None:
        """A mini-batch of the update under way."""
        self.under_way += loss.item() * part.share / self.run.processes.size
        self.sums += token_sums(part, logps.detach(), entropy, self.eos_token_id, self.settings.epsilon)

    def loss_of_all(self) -> float:
        """This update's loss over all processes, which must all call it, once."""
        self.loss, self.under_way = all_reduce_sum({"loss": self.under_way})["loss"], 0.0
        return self.loss

    def updated(self, norm: float) -> None:
        """The update is made; norm: of its gradient."""
        self.norm += norm / self.settings.mu

    def write(self, step: int, part: MiniBatch, texts: list[str], rewards: list[Reward], lr: float) -> None:
        """Writes the row; if it is due keeps the first group of `part` in completions.jsonl, and prints one of it.
        Every process must call it."""
        everyones, sums = gather_lists(rewards), gather_lists(self.sums[-len(rewards) :])
        seconds, values = time.time() - self.started, step_metrics(everyones, sums, self.settings.group_size)
        self.run.log(step, {
            "loss": self.loss, **values, "lr": lr, "grad_norm": self.norm,
            "tokens_per_s": values["completion_length"] * len(everyones) / seconds, "seconds": seconds,
            "seconds_rollout": self.seconds_rollout, **explanation_statistics(everyones), **self.held_out})
        due = step % self.settings.sample_every == 0 or step + 1 == self.run.total_steps
        if not due or not self.run.processes.main:
            return
        example = part.prompts.examples[0]
        for text, x in zip(texts[: self.settings.group_size], rewards):
            append_jsonl(self.run.out / "completions.jsonl", {
                "step": step, "video_id": example.video_id, "dataset": example.dataset, "ground_truth": example.label,
                "completion": text, "sentences": x.sentences, "labels": x.label_sets, "reward_format": x.format,
                "reward_answer": x.answer, "reward_explanation": x.explanation})
        x = rewards[0]
        print(f"  {example.video_id} is {example.label}; R_format {x.format:g} R_answer {x.answer:g} "
              f"R_E {x.explanation:.2f}", *(f"    [{', '.join(EL)}] {S}" for S, EL in zip(x.sentences, x.label_sets)),
              f"    {texts[0].rsplit('</think>', 1)[-1].strip()}", sep="\n", flush=True)
