"""The numbers of annotate.py's page: what the real functions return on small examples, and how they come to it.

A function of NUMBERS takes the page's `Group` and returns rows: name -> {column -> value}. It calls real functions
alone; their local variables (`seen_in`) are the intermediate values, so that columns are called as in the code.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pages import TEMPLATES, read_objects
from torch import Tensor

from erv_min import erv, grpo, metrics, rewards
from erv_min.config import AUDIO, VIDEO, humanomni
from erv_min.emotions import ERV_LABELS, LABELS
from erv_min.fsdp import Sharded
from erv_min.model.humanomni import HumanOmni, random_humanomni
from erv_min.rewards import RewardSettings
from erv_min.run.errors import DataError

TEXT = (TEMPLATES / "annotated_sections.html").read_text(encoding="utf-8")
EXAMPLE = json.loads(re.search(r"<!--example(.*?)-->", TEXT, re.S)[1])


def seen_in(function: Callable, call: Callable) -> dict:
    """`function`'s local variables as it last returned during `call()`, and its result as "returned"."""
    seen, before = {}, sys.getprofile()

    def watch(frame, event, result):
        if event == "return" and frame.f_code is function.__code__:
            seen.update(frame.f_locals, returned=result)
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return seen


class SmallVerifier:
    """What the page's example says of each sentence; of a longer text, the largest of its sentences."""

    labels = ERV_LABELS

    def probabilities(self, sentences: list[str]) -> Tensor:
        rows = [[p for s, p in EXAMPLE["probabilities"].items() if s in sentence] for sentence in sentences]
        return torch.tensor([[max(p.get(label, 0.01) for p in row) for label in ERV_LABELS] for row in rows])


@dataclass(frozen=True)
class Group:
    """Completions of one prompt, the one that algorithm 1 is shown on first, and the verifier that reads them."""

    completions: list[str]
    e_gt: str
    dataset: str
    verifier: erv.Verifier | SmallVerifier
    source: str

    def rewards(self, settings: RewardSettings = RewardSettings()) -> list[rewards.Reward]:
        return rewards.score_completions(self.completions, [self.e_gt] * len(self.completions), self.dataset,
                                         self.verifier.probabilities, self.verifier.labels, settings)


def read_group(run: str) -> Group:
    """The group of a run's completions.jsonl whose completion shows most: 0 < R_E < 1, then most kinds of labels."""
    if not run:
        return Group(EXAMPLE["completions"], EXAMPLE["e_gt"], EXAMPLE["dataset"], SmallVerifier(),
                     f"a small example, whose truth is {EXAMPLE['e_gt']}")
    rows = read_objects(Path(run, "completions.jsonl"), {
        "step": int, "video_id": str, "ground_truth": str, "labels": list, "completion": str,
        "reward_explanation": (int, float)})
    if not rows or not Path(run, "erv").is_dir():
        raise DataError(f"{run}: completions.jsonl is empty, or there is no erv/: --run is the folder of a toy run")
    best = max(rows, key=lambda r: (0 < r["reward_explanation"] < 1, len(set(map(tuple, r["labels"])))))
    others = [r for r in rows if r is not best and (r["step"], r["video_id"]) == (best["step"], best["video_id"])]
    dataset = next((name for name, labels in LABELS.items() if best["ground_truth"] in labels), "dfew")
    return Group([r["completion"] for r in (best, *others)], best["ground_truth"], dataset,
                 erv.Verifier.load(Path(run, "erv")),
                 f"{run}, step {best['step']}, clip {best['video_id']}, whose truth is {best['ground_truth']}")


def algorithm1(group: Group) -> dict:
    """Each sentence's largest probabilities and labels, and what explanation_reward counts of it alone."""
    S, tau, rows = rewards.split_sentences(rewards.extract_explanation(group.completions[0])), RewardSettings().tau, {}
    u = group.verifier.probabilities(S)  # [S, K]
    shown = u.max(0).values.argsort(descending=True)[:5].tolist()
    for k, (s, p, EL_k) in enumerate(zip(S, u, rewards.select_labels(u, group.verifier.labels)), 1):
        counts = seen_in(rewards.explanation_reward, lambda: rewards.explanation_reward([EL_k], group.e_gt))
        rows[f"{k}. {s}"] = {**{group.verifier.labels[j]: p[j] for j in shown}, "over tau": (p > tau).sum(),
                             "EL_k": ", ".join(EL_k), "c": counts["c"], "N_neu": counts["N_neu"]}
    return rows


def eq4(group: Group, **settings) -> dict:
    first = replace(group, completions=group.completions[:1])
    return seen_in(rewards.explanation_reward, lambda: first.rewards(RewardSettings(**settings)))


def eq5(group: Group) -> dict:
    return {f"{i}. {o}": vars(reward) for i, (o, reward) in enumerate(zip(group.completions, group.rewards()), 1)}


def advantages(group: Group) -> dict:
    R = torch.tensor([reward.total for reward in group.rewards()])
    seen = seen_in(grpo.group_advantages, lambda: grpo.group_advantages(R, len(R)))
    return {"this group": {**seen, "mean": R.mean(), "std": R.std()}}


def clip(_) -> dict:
    """The surrogate of one token over its ratio, apart where it has a gradient and where the clip holds it back."""
    logps = torch.arange(0.1, 2.01, 0.02).log()[:, None].requires_grad_()  # [R, 1], the old ones 0
    zeros, ones, rows = torch.zeros_like(logps), torch.ones_like(logps), {}
    for A in (1.0, -1.0):
        seen = seen_in(grpo.grpo_loss, lambda: grpo.grpo_loss(logps, zeros, zeros, A * ones[:, 0], ones, beta=0.0))
        moves = torch.autograd.grad(seen["returned"], logps)[0] != 0
        for name, here in (("moves", moves), ("held", ~moves)):
            rows[f"A={A:+g}:{name}"] = {x: seen[x].detach()[here] for x in ("ratio", "surrogate")}
    return rows


def kl(_) -> dict:
    """Means under pi_theta of a policy over four tokens; which token is drawn carries no gradient."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    ref_logps, logps = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log(), logits.log_softmax(0)
    pi, d = logps.detach().exp(), ref_logps - logps
    means = {"KL(π_θ ‖ π_ref), exact": logps.exp() * -d, "KL(π_ref ‖ π_θ), exact": ref_logps.exp() * d,
             "k1: −d": pi * -d, "k2: d² / 2": pi * d**2 / 2, "k3, kl_k3": pi * grpo.kl_k3(logps, ref_logps)}
    return {name: {"mean": x.sum(), "gradient": torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]}
            for name, x in means.items()}


def splice(_) -> dict:
    model = random_humanomni(humanomni("toy"), seed=0)
    X_v, X_a = (torch.zeros(1, n, model.config.text.hidden_size) for n in (8, 5))
    input_ids = torch.tensor([[5, VIDEO, 6, AUDIO, 7, 8]])
    return {"one prompt": seen_in(HumanOmni.splice, lambda: model.splice(input_ids, X_v, X_a))}


def fsdp(_) -> dict:
    """Bytes of one decoder layer on one process: of its shard, of what is gathered, of its gradient."""
    sharded, rows = Sharded(random_humanomni(humanomni("toy"), seed=0), "cpu", torch.bfloat16), {}
    layer, width = sharded.model.model.layers[1], sharded.model.config.text.hidden_size
    unit = next(unit for unit in sharded.units if unit.name == "model.layers.1")
    module, attribute = unit.places[0][0]

    def measure(moment: str) -> None:
        view, grad = module.__dict__.get(attribute), unit.shard.grad  # a parameter is a view of the gathered vector
        rows[moment] = {"shard": unit.shard.nbytes, "gathered": 0 if view is None else view.untyped_storage().nbytes(),
                        "gradient": 0 if grad is None else grad.nbytes}
    layer.self_attn.register_forward_hook(lambda *_: measure("during it"))
    measure("before its forward pass")
    with sharded.forward_pass():
        loss = sharded.model.model(torch.ones(1, 4, width, dtype=torch.bfloat16))[0].float().sum()
        measure("after it")
    loss.backward()
    measure("after the backward pass")
    return rows


def five_metrics(_) -> dict:
    rows = [{"video_id": clip, "output": f"<answer>{x['answer']}</answer>", "ground_truth": x["truth"],
             "judged_emotion": x["judged"]} for clip, x in EXAMPLE["clips"].items()]
    return {f"rule {rule}": metrics.score(rows, "dfew", rule) for rule in ("paper", "released")}


def clips(_) -> dict:
    return EXAMPLE["clips"]


NUMBERS = {function.__name__: function for function in (
    algorithm1, eq4, eq5, advantages, clip, kl, splice, fsdp, clips, five_metrics)}
