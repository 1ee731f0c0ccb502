"""The numbers of annotate.py's page: what the real functions return, and how they come to it, as HTML tables.

Each `numbers_NAME(group)` is called when the page is built. Every number is written by `num`: rounded for the eye, and
whole in the element's `value`, where the tests compare it with what the function returns.
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from pages import read_objects, text

from erv_min.config import AUDIO, VIDEO, humanomni
from erv_min.emotions import ERV_LABELS, LABELS
from erv_min.erv import Verifier, erv_loss
from erv_min.fsdp import Sharded, storage_of
from erv_min.generate import sample_token, sampling_noise
from erv_min.grpo import group_advantages, grpo_loss, kl_k3
from erv_min.logps import Completions, Prompts, completion_logps, token_logps
from erv_min.metrics import COLUMNS, score
from erv_min.model.humanomni import random_humanomni
from erv_min.rewards import (RewardSettings, explanation_reward, extract_explanation, score_completions, select_labels,
                             split_sentences)
from erv_min.run.errors import DataError
from erv_min.sft import sft_loss

# ---- the completions on the page -------------------------------------------------------------------------------------

EXAMPLE = (  # of a clip whose label is sad: the page's own small numbers
    "<think>A man stands in a kitchen. He keeps still and looks down. His eyes are wet and his voice shakes. His hands "
    "move a little. He smiles at the end. He looks sad.</think>\n<answer>sad</answer>",
    "<think>A man stands in a kitchen. His eyes are wet and his voice shakes.</think>\n<answer>sad</answer>",
    "<think>He smiles at the end. He looks sad.</think>\n<answer>happy</answer>",
    "He looks sad. <answer>sad</answer>")
PROBABILITIES = {  # what the verifier might say of each sentence; of a longer text, the largest of its sentences
    "A man stands in a kitchen.": {"neutral": 0.93, "sadness": 0.04},
    "He keeps still and looks down.": {"neutral": 0.56, "sadness": 0.53, "anxiety": 0.12},
    "His eyes are wet and his voice shakes.": {"sadness": 0.71, "anxiety": 0.64, "fear": 0.21},
    "His hands move a little.": {"surprise": 0.31, "sadness": 0.27, "neutral": 0.09},
    "He smiles at the end.": {"happiness": 0.81, "neutral": 0.11},
    "He looks sad.": {"sadness": 0.97}}


@dataclass
class Group:
    """Completions of one prompt, the one that algorithm 1 is shown on first, and the verifier that reads them."""

    completions: list[str]
    e_gt: str
    dataset: str
    labels: tuple[str, ...]
    probabilities: Callable[[list[str]], torch.Tensor]  # sentences -> [S, K]
    source: str


def small_verifier(sentences: list[str]) -> torch.Tensor:
    rows = [[p for s, p in PROBABILITIES.items() if s in sentence] for sentence in sentences]
    return torch.tensor([[max(p.get(label, 0.01) for p in row) for label in ERV_LABELS] for row in rows])


def read_group(run: str) -> Group:
    """The group of a run's completions.jsonl whose completion shows most: 0 < R_E < 1, then most kinds of labels."""
    if not run:
        return Group(list(EXAMPLE), "sad", "dfew", ERV_LABELS, small_verifier, "small numbers in annotate_numbers.py")
    path = Path(run) / "completions.jsonl"
    fields = {"step": int, "video_id": str, "ground_truth": str, "completion": str, "labels": list,
              "reward_explanation": (int, float)}
    rows = read_objects(path, fields) if path.exists() else []
    if not rows or not (Path(run) / "erv").is_dir():
        what = "erv" if rows else "completions.jsonl, or it is empty"
        raise DataError(f"{run} lacks {what}: --run is the folder of a toy run of scripts/grpo.py; without --run the "
                        "page shows its own small numbers")
    best = max(rows, key=lambda r: (0 < r["reward_explanation"] < 1, len(set(map(tuple, r["labels"])))))
    group = [best["completion"]] + [r["completion"] for r in rows if r is not best
                                    and (r["step"], r["video_id"]) == (best["step"], best["video_id"])]
    dataset = next((name for name, names in LABELS.items() if best["ground_truth"] in names), "dfew")
    verifier = Verifier.load(Path(run) / "erv")
    return Group(group, best["ground_truth"], dataset, verifier.labels, verifier.probabilities,
                 f"{run}, step {best['step']}, clip {best['video_id']}")


# ---- numbers: what the real functions return -------------------------------------------------------------------------


def num(name: str, value) -> str:
    """A number of the page, rounded for the eye; its full value stands in the element, where the test looks for it."""
    value = value.tolist() if isinstance(value, torch.Tensor) else value

    def short(x) -> str:
        if isinstance(x, list):
            return ("; " if x and isinstance(x[0], list) else ", ").join(map(short, x))
        if isinstance(x, int):
            return f"{x:,}".replace("-", "−")
        small = 1e-12 < abs(x) < 5e-4
        return (f"{x:.0e}" if small else f"{round(x, 3) or 0:g}").replace("-", "−")
    return f'<data data-name="{text(name)}" value="{text(json.dumps(value))}">{short(value)}</data>'


def table(head: list[str], rows: list[list[str]], note: str = "") -> str:
    """Cells are HTML; the first of a row is its heading."""
    body = "".join(f"<tr><th scope=row>{r[0]}</th>{''.join(f'<td>{cell}</td>' for cell in r[1:])}</tr>" for r in rows)
    top = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    return (f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
            + (f'<p class="note">{note}</p>' if note else ""))


def watched(function, call: Callable):
    """What `call` returns, and `function`'s local variables when it last returned: its real intermediate values."""
    seen, before = {}, sys.getprofile()

    def watch(frame, event, _):
        if event == "return" and frame.f_code is function.__code__:
            seen.update(frame.f_locals)
    sys.setprofile(watch)
    try:
        return call(), seen
    finally:
        sys.setprofile(before)


@cache
def tiny():
    """A HumanOmni of the toy's dimensions with random weights."""
    return random_humanomni(humanomni("toy"), seed=0)


def numbers_splice(_) -> str:
    model, draw = tiny(), torch.Generator().manual_seed(0)
    vision, config = model.config.vision, model.config
    features = torch.randn(1, config.num_frames, vision.grid**2, vision.hidden_size, generator=draw)
    gate_ids, ids = torch.tensor([[2, 30, 31, 3]]), torch.tensor([[5, VIDEO, 6, AUDIO, 7, 8]])
    with torch.no_grad():
        gate, X_v = model.gate_weights(gate_ids)[0], model.project_video(features, gate_ids)
        X_a = model.project_audio(torch.randn(1, config.audio_tokens, config.audio.d_model, generator=draw))
        X_m = model.splice(ids, X_v, X_a).embeds
        words = model.model.embed_tokens.weight
        known = {"word": words, "X_v": X_v[0], "X_a": X_a[0]}
        kinds = [next(k for k, x in known.items() if (x == row).all(1).any()) for row in X_m[0]]
    starts = [i for i, kind in enumerate(kinds) if not i or kind != kinds[i - 1]]
    runs = ", ".join(f"{kinds[a]} {num(f'splice.{a}', b - a)}" for a, b in zip(starts, [*starts[1:], len(kinds)]))
    return table(["", "value"], [
        ["input_ids", num("splice.input_ids", ids[0])], ["gate: video, body, face", num("splice.gate", gate)],
        *([f"shape of {name}", num(f"splice.{name}", list(x.shape))]
          for name, x in (("X_v", X_v), ("X_a", X_a), ("X_m", X_m))),
        ["X_m, position by position", runs]],
        "The toy's dimensions, random weights. Positions are told by comparing each row of X_m with what went in.")


LOGPS, TARGETS = [[-1.0, -2.0], [-4.0, 9.0]], [[1, 1], [1, 0]]  # the 9 is padding


def numbers_sft(_) -> str:
    logps, mask = torch.tensor(LOGPS), torch.tensor(TARGETS)
    return table(["log π<sub>θ</sub>", "mask", "mean over label tokens", "sum over tokens, mean over targets"], [
        [num("sft.logps", logps), num("sft.mask", mask), num("sft.mean", sft_loss(logps, mask)),
         num("sft.sum", sft_loss(logps, mask, len(mask)))]])


def numbers_verifier(group: Group) -> str:
    S = split_sentences(extract_explanation(group.completions[0]))
    u = group.probabilities(S)
    best = u.max(0).values.argsort(descending=True)[:5].tolist()
    rows = [[text(s), *(num(f"u.{k}.{group.labels[j]}", u[k, j]) for j in best)] for k, s in enumerate(S)]
    wanted = torch.tensor([[float(group.labels[j] in ("sadness", "anxiety")) for j in range(len(group.labels))]])
    loss = erv_loss(u[:1].logit(eps=1e-6), wanted)
    return table(["sentence", *(group.labels[j] for j in best)], rows,
                 f"u of five labels; from {text(group.source)}. Were the first sentence labelled {{sadness, anxiety}}, "
                 f"erv_loss of it would be {num('erv_loss', loss)}.")


def numbers_algorithm1(group: Group) -> str:
    settings = RewardSettings()
    S = split_sentences(extract_explanation(group.completions[0]))
    u = group.probabilities(S)
    rows = []
    for k, (s, EL) in enumerate(zip(S, select_labels(u, group.labels, settings.tau, settings.k))):
        _, seen = watched(explanation_reward, lambda: explanation_reward([EL], group.e_gt))
        chosen = ", ".join(f"{x} {num(f'EL.{k}.{x}', u[k, group.labels.index(x)])}" for x in EL)
        rows.append([text(s), chosen, num(f"EL.{k}.over", int((u[k] > settings.tau).sum())),
                     "✓" if seen["c"] else "", "✓" if seen["N_neu"] else ""])
    return (f'<pre class="plain">{text(group.completions[0])}</pre>' +
            table(["s<sub>k</sub>", "EL<sub>k</sub>", "over τ", "in c", "in N<sub>neu</sub>"], rows,
                  f"e<sub>gt</sub> = {text(group.e_gt)}; from {text(group.source)}."))


WAYS = {"default": ("as it runs", RewardSettings()),
        "any": ("line 15 as printed: <code>--neutral-rule any</code>", RewardSettings(neutral_rule="any")),
        "no_filter": ("W/o Neutral Filtering (table 2)", RewardSettings(neutral_filter=False)),
        "whole": ("W/o Sentence-Level Verification (table 2)", RewardSettings(sentence_level=False)),
        "released": ("the release, τ = 0.1", RewardSettings.released())}


def rewards_of(group: Group, settings: RewardSettings, n: int | None = None) -> list:
    o = group.completions[:n]
    return score_completions(o, [group.e_gt] * len(o), group.dataset, group.probabilities, group.labels, settings)


def numbers_eq4(group: Group) -> str:
    rows = []
    for key, (name, settings) in WAYS.items():
        (reward,), seen = watched(explanation_reward, lambda: rewards_of(group, settings, 1))
        rows.append([name, *(num(f"eq4.{key}.{x}", seen[x]) for x in ("c", "N", "N_neu", "denominator")),
                     num(f"eq4.{key}.R_E", reward.explanation)])
    return table(["", "c", "N", "N<sub>neu</sub>", "denominator", "R<sub>E</sub>"], rows,
                 "The completion above. c, N, N_neu: the local variables of explanation_reward as it returned.")


def numbers_eq5(group: Group) -> str:
    parts = ("explanation", "format", "answer", "total")
    rows = [[f"o<sub>{i + 1}</sub>", *(num(f"eq5.{i}.{x}", getattr(r, x)) for x in parts),
             text("".join(o.rpartition("</think>")[1:])[-60:])]
            for i, (o, r) in enumerate(zip(group.completions, rewards_of(group, RewardSettings())))]
    return table(["", "R<sub>E</sub>", "R<sub>format</sub>", "R<sub>answer</sub>", "R", "how it ends"], rows)


def numbers_advantages(group: Group) -> str:
    R = torch.tensor([r.total for r in rewards_of(group, RewardSettings())])
    return table(["R", "mean", "std, unbiased", "A"], [
        [num("A.rewards", R), num("A.mean", R.mean()), num("A.std", R.std()), num("A", group_advantages(R, len(R)))]])


RATIOS, EPSILON = [0.02 * i for i in range(5, 101)], 0.2


def surrogate(A: float) -> tuple[list[float], list[bool]]:
    """Of one token at each of RATIOS: min(ratio A, clip(ratio) A), and whether it has a gradient; beta = 0."""
    logps = torch.tensor(RATIOS).log()[:, None].requires_grad_()
    zeros, ones = torch.zeros_like(logps), torch.ones_like(logps)
    loss, seen = watched(grpo_loss, lambda: grpo_loss(logps, zeros, zeros, ones[:, 0] * A, ones, 0.0, EPSILON))
    return seen["surrogate"][:, 0].tolist(), (torch.autograd.grad(loss, logps)[0][:, 0] != 0).tolist()


def numbers_clip(_) -> str:
    plots = ""
    for A in (1.0, -1.0):
        y, moves = surrogate(A)
        place = [f"{30 + 120 * x:.1f} {80 - 55 * (v - A):.1f}" for x, v in zip(RATIOS, y)]
        paths = ""
        for state, kind in ((True, "moves"), (False, "held")):
            points = " L".join(p for p, m in zip(place, moves) if m == state)
            paths += f'<path class="{kind}" d="M{points}"/>'
        marks = "".join(f'<line x1="{x}" x2="{x}" y1="15" y2="140"/><text x="{x}" y="152">{r:g}</text>'
                        for r, x in ((r, 30 + 120 * r) for r in (1 - EPSILON, 1, 1 + EPSILON)))
        marks += "".join(f'<text class="y" x="26" y="{83 - 55 * (v - A):.1f}">{v:g}</text>' for v in (y[0], A, y[-1]))
        plots += (f'<figure><figcaption>A = {A:+g}</figcaption><svg viewBox="0 0 280 172" role="img" '
                  f'aria-label="surrogate over ratio" data-name="clip.{A:+g}" data-value="{json.dumps(y)}">{marks}'
                  f'{paths}<text x="150" y="168">ratio</text></svg></figure>')
    return (f'<div class="plots">{plots}</div><p class="note">min(ratio A, clip(ratio) A) of one token, ε = {EPSILON}. '
            "Solid: it moves the policy. Dotted: its gradient is 0, the clip holds it back.</p>")


POLICY, REFERENCE = [0.3, -0.2, 0.9, 0.0], [0.1, 0.4, 0.2, 0.3]  # logits of pi; probabilities of pi_ref


def numbers_kl(_) -> str:
    logits = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    ref, logp = torch.tensor(REFERENCE, dtype=torch.float64).log(), logits.log_softmax(0)
    pi = logp.detach().exp()  # on policy: which token is drawn carries no gradient
    lines = {"KL": ("KL(π<sub>θ</sub> ‖ π<sub>ref</sub>), exact", (logp.exp() * (logp - ref)).sum()),
             "reverse": ("KL(π<sub>ref</sub> ‖ π<sub>θ</sub>), exact", (ref.exp() * (ref - logp)).sum()),
             "k1": ("k1 = −d", (pi * (logp - ref)).sum()), "k2": ("k2 = d² / 2", (pi * (logp - ref) ** 2 / 2).sum()),
             "k3": ("k3 = e<sup>d</sup> − d − 1, <code>kl_k3</code>", (pi * kl_k3(logp, ref)).sum())}
    return table(["", "mean under π<sub>θ</sub>", "gradient with respect to the four logits"], [
        [name, num(f"kl.{key}", x), num(f"kl.{key}.gradient", torch.autograd.grad(x, logits, retain_graph=True)[0])]
        for key, (name, x) in lines.items()],
        "A policy over four tokens, d = log π<sub>ref</sub> − log π<sub>θ</sub>. k1's and k3's means are the KL, k2's "
        "is not; as a loss k2 has that KL's gradient, k3 has the other direction's, and k1 has none.")


NOISE, THREE = [0.1, 0.3, 0.6, 0.9], [0.2, 0.3, 0.5]
WAYS_TO_SAMPLE = {"temperature 1": (1.0, 0, 1.0), "temperature 0.3": (0.3, 0, 1.0), "temperature 0": (0, 0, 1.0),
                  "top-k 2": (1.0, 2, 1.0), "top-p 0.5": (1.0, 0, 0.5)}  # temperature, top_k, top_p


def numbers_sampling(_) -> str:
    noise, logits = torch.tensor(NOISE, dtype=torch.float64), torch.tensor(THREE).log().expand(len(NOISE), 3)
    rows = [[key, *(num(f"sample.{key}.{i}", x) for i, x in enumerate(sample_token(logits, noise, *how).tolist()))]
            for key, how in WAYS_TO_SAMPLE.items()]
    both, alone = sampling_noise(0, 7, [3, 4], 2, 3), sampling_noise(0, 7, [4], 2, 3)
    return (table(["", *(f"u = {u}" for u in NOISE)], rows, f"The token drawn from probabilities {THREE} at noise u.") +
            table(["noise of seed 0, step 7", "sample 0", "sample 1"], [
                [name, num(f"noise.{name}.0", x[0]), num(f"noise.{name}.1", x[1])]
                for name, x in (("prompt 4, beside prompt 3", both[2:]), ("prompt 4 alone", alone))]))


LENGTHS, PROMPT = (5, 3, 4), 6  # tokens of three completions, and of their prompt


def numbers_logps(_) -> str:
    model, draw = tiny(), torch.Generator().manual_seed(1)
    embeds = torch.randn(1, PROMPT, model.config.text.hidden_size, generator=draw)
    ids, G = torch.randint(3, 500, (len(LENGTHS), max(LENGTHS)), generator=draw), len(LENGTHS)
    o = Completions(ids, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None])
    with torch.no_grad():
        shared = completion_logps(model, Prompts(embeds, torch.ones(1, PROMPT, dtype=torch.bool)), o)[0]
        each = completion_logps(model, Prompts(embeds.repeat(G, 1, 1), torch.ones(G, PROMPT, dtype=torch.bool)), o)[0]
    rows = [[f"o<sub>{i + 1}</sub>", num(f"logps.{i}", x[:n])] for i, (x, n) in enumerate(zip(shared, LENGTHS))]
    weight, hidden = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]]).log()  # logits 0 and ln 3
    one, half = (num(f"token_logps.{t:g}", token_logps(hidden, weight, torch.tensor([1]), t)[0][0].exp())
                 for t in (1.0, 0.5))
    few = num("logps.shared", PROMPT + sum(n - 1 for n in LENGTHS))
    many = num("logps.repeated", G * (PROMPT + max(LENGTHS)))
    difference = num("logps.difference", (shared - each).abs().max())
    return table(["", "log π<sub>θ</sub>(o<sub>t</sub>)"], rows, (
        f"Positions: {few} with the prompt shared, {many} where it is repeated and completions are padded. Largest "
        f"difference between the two ways: {difference}. Of logits 0 and ln 3, token_logps gives the second "
        f"the probability {one} at temperature 1 and {half} at temperature 0.5."))


def numbers_fsdp(_) -> str:
    """Bytes of one decoder layer, measured in this process: the shard, what is gathered, the gradient."""
    run = Sharded(copy.deepcopy(tiny()), "cpu", torch.bfloat16)
    name, layer = "model.layers.1", run.model.model.layers[1]
    units, seen = [unit for unit in run.units if unit.name == name], {}

    def measure(moment: str) -> None:
        full = {storage_of(p): p.untyped_storage().nbytes() for unit in units for (module, attribute), *_ in unit.places
                if (p := module.__dict__.get(attribute)) is not None}
        seen[moment] = (sum(u.shard.nbytes for u in units), sum(full.values()),
                        sum(u.shard.grad.nbytes for u in units if u.shard.grad is not None),
                        [u.name for u in run.units if u.pending is not None])
    measure("before its forward pass")
    handle = layer.self_attn.register_forward_hook(lambda *_: measure("during it"))
    x = torch.randn(1, 4, run.model.config.text.hidden_size, dtype=torch.bfloat16)
    for _ in range(2):  # the first pass learns the order of units, the second prefetches
        with run.forward_pass():
            loss = run.model.model(x)[0].float().sum()
            measure("after it")
        loss.backward()
        measure("after the backward pass")
        for unit in run.units:
            unit.shard.grad = None
    handle.remove()
    rows = [[moment, *(num(f"fsdp.{moment}.{n}", x) for n, x in zip(("shard", "gathered", "gradient"), sizes)),
             text(", ".join(sizes[3]) or "–")] for moment, sizes in seen.items()]
    note = (f"{num('fsdp.numel', sum(u.numel for u in units))} elements with padding. One process alone: its shard is "
            "the whole, of N processes each keeps 1/N and gathers the same whole. Prefetched: the unit whose "
            "all-gather has begun, in a second pass, which knows the order.")
    head = [f"bytes of {name}", "shard, float32", "gathered, bfloat16", "gradient, float32", "prefetched"]
    return table(head, rows, note)


CLIPS = (("happy", "happy", "happy"), ("happy", "happy", "sad"), ("happy", "sad", "sad"), ("sad", "angry", "sad"),
         ("angry", "smug", "angry"))  # truth, predicted, judged


def clip_rows() -> list[dict]:
    return [{"video_id": i, "output": f"<think>...</think>\n<answer>{predicted}</answer>", "ground_truth": truth,
             "judged_emotion": judged} for i, (truth, predicted, judged) in enumerate(CLIPS)]


def numbers_metrics(_) -> str:
    rows = [[str(i + 1), *map(text, x)] for i, x in enumerate(CLIPS)]
    return (table(["clip", "truth", "answer", "judged"], rows) + table(["percent", *COLUMNS], [
        [rule, *(num(f"metrics.{rule}.{name}", score(clip_rows(), "dfew", rule)[name]) for name in COLUMNS)]
        for rule in ("paper", "released")], "<code>smug</code> is no label of DFEW. The released UAR divides by all "
        "seven classes, whether a clip has them or not."))
