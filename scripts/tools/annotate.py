"""The annotated paper: each equation beside the code that runs, its test and its numbers, on one page without network.

    python scripts/tools/annotate.py [--run runs/toy] --out annotated.html

templates/annotated_sections.html holds prose and equations (MathML by hand). Its comments say what is put in when the page
is built: `code PATH NAME` and `test NAME`, read from their files; `numbers NAME`, a function `numbers_NAME` of this file
that calls the real ones; `divergence N ...`, rows of erv_min/README.md; `walk`; `symbols`, one a line: MathML | name in the
code | shape and type. With --run the verifier and the completions are a run's (RUN/erv, RUN/completions.jsonl).
"""

import argparse
import ast
import builtins
import io
import json
import re
import sys
import textwrap
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from pages import TEMPLATES, fill, read_objects, text

from erv_min import fsdp
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
from erv_min.run.errors import DataError, ErvMinError
from erv_min.run.files import atomic_write
from erv_min.sft import sft_loss

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = TEMPLATES / "annotated_sections.html"

# ---- the completions on the page -------------------------------------------------------------------------------------

EXAMPLE = (  # of a clip whose label is sad: the page's own small numbers
    "<think>A man stands in a kitchen. He keeps still and looks down. His eyes are wet and his voice shakes. His hands "
    "move a little. He smiles at the end. He looks sad.</think>\n<answer>sad</answer>",
    "<think>A man stands in a kitchen. His eyes are wet and his voice shakes. He looks sad.</think>\n<answer>sad</answer>",
    "<think>He smiles at the end. He looks sad.</think>\n<answer>happy</answer>",
    "He looks sad. <answer>sad</answer>")
PROBABILITIES = {  # what the verifier might say of each sentence; of a longer text, the largest of its sentences
    "A man stands in a kitchen.": {"neutral": 0.93, "sadness": 0.04},
    "He keeps still and looks down.": {"neutral": 0.56, "sadness": 0.53, "anxiety": 0.12},
    "His eyes are wet and his voice shakes.": {"sadness": 0.71, "anxiety": 0.64, "fear": 0.21},
    "His hands move a little.": {"surprise": 0.31, "neutral": 0.27, "anxiety": 0.22},
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
    return torch.tensor([[max((p.get(label, 0.01) for p in row), default=0.01) for label in ERV_LABELS] for row in rows])


def read_group(run: str) -> Group:
    """The group of a run's completions.jsonl whose completion shows most: 0 < R_E < 1, then most kinds of labels."""
    if not run:
        return Group(list(EXAMPLE), "sad", "dfew", ERV_LABELS, small_verifier, "the small numbers of annotate.py")
    path = Path(run) / "completions.jsonl"
    fields = {"step": int, "video_id": str, "ground_truth": str, "completion": str, "labels": list,
              "reward_explanation": (int, float)}
    rows = read_objects(path, fields) if path.exists() else []
    if not rows or not (Path(run) / "erv").is_dir():
        raise DataError(f"{run} lacks {'erv' if rows else 'completions.jsonl, or it is empty'}: --run is the folder of a "
                        "toy run of scripts/grpo.py; without --run the page shows its own small numbers")
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
            return ", ".join(map(short, x))
        return f"{x:,}" if isinstance(x, int) else f"{x:.3f}".rstrip("0").rstrip(".").replace("-0.000", "0").replace("-", "−")
    return f'<data data-name="{text(name)}" value="{text(json.dumps(value))}">{short(value)}</data>'


def table(head: list[str], rows: list[list[str]], note: str = "") -> str:
    """Cells are HTML; the first of a row is its heading."""
    body = "".join(f"<tr><th scope=row>{r[0]}</th>{''.join(f'<td>{cell}</td>' for cell in r[1:])}</tr>" for r in rows)
    return (f'<div class="scroll"><table><thead><tr>{"".join(f"<th scope=col>{cell}</th>" for cell in head)}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>" + (f'<p class="note">{note}</p>' if note else ""))


def watched(function, call: Callable):
    """What `call` returns, and the local variables of `function` when it last returned: its real intermediate values."""
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
        X_m, _, mask = model.splice(ids, X_v, X_a)
        words = model.model.embed_tokens.weight
        known = {"word": words, "X_v": X_v[0], "X_a": X_a[0]}
        kinds = [next(k for k, x in known.items() if (x == row).all(1).any()) for row in X_m[0]]
    starts = [i for i, kind in enumerate(kinds) if not i or kind != kinds[i - 1]]
    runs = ", ".join(f"{kinds[a]} {num(f'splice.{a}', b - a)}" for a, b in zip(starts, [*starts[1:], len(kinds)]))
    return table(["", "value"], [
        ["input_ids", num("splice.input_ids", ids[0])], ["gate: video, body, face", num("splice.gate", gate)],
        ["X_v", "shape " + num("splice.X_v", list(X_v.shape))], ["X_a", "shape " + num("splice.X_a", list(X_a.shape))],
        ["X_m", "shape " + num("splice.X_m", list(X_m.shape))], ["X_m, position by position", runs]],
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
        one = [explanation_reward([EL], group.e_gt, neutral_filter=False) > 0, EL == ["neutral"]]
        rows.append([text(s), ", ".join(f"{label} {num(f'EL.{k}.{label}', u[k, group.labels.index(label)])}" for label in EL),
                     num(f"EL.{k}.over", int((u[k] > settings.tau).sum())), *("✓" if x else "" for x in one)])
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
                 "The completion above. c, N and N_neu are explanation_reward's own local variables, read as it returns.")


def numbers_eq5(group: Group) -> str:
    parts = ("explanation", "format", "answer", "total")
    rows = [[f"o<sub>{i + 1}</sub>", *(num(f"eq5.{i}.{x}", getattr(r, x)) for x in parts), text(o[-60:])]
            for i, (o, r) in enumerate(zip(group.completions, rewards_of(group, RewardSettings())))]
    return table(["", "R<sub>E</sub>", "R<sub>format</sub>", "R<sub>answer</sub>", "R", "how it ends"], rows)


def numbers_advantages(group: Group) -> str:
    R = torch.tensor([r.total for r in rewards_of(group, RewardSettings())])
    return table(["R", "mean", "std, unbiased", "A"], [
        [num("A.rewards", R), num("A.mean", R.mean()), num("A.std", R.std()), num("A", group_advantages(R, len(R)))]])


RATIOS, EPSILON = [0.02 * i for i in range(5, 101)], 0.2


def numbers_clip(_) -> str:
    """min(ratio A, clip(ratio) A) of one token, and its gradient, by grpo_loss with beta = 0."""
    plots = []
    for A in (1.0, -1.0):
        logps = torch.tensor(RATIOS).log()[:, None].requires_grad_()
        zeros, ones = torch.zeros_like(logps), torch.ones_like(logps)
        loss, seen = watched(grpo_loss, lambda: grpo_loss(logps, zeros, zeros, ones[:, 0] * A, ones, 0.0, EPSILON))
        y = seen["surrogate"][:, 0].tolist()
        moves = (torch.autograd.grad(loss, logps)[0][:, 0] != 0).tolist()
        low, high = min(0.0, A * 2), max(0.0, A * 2)
        place = [(30 + 120 * x, 135 - 110 * (v - low) / (high - low)) for x, v in zip(RATIOS, y)]
        line = {state: " ".join(f"{'M' if not i or moves[i - 1] != m else 'L'}{a:.1f} {b:.1f}"
                                for i, ((a, b), m) in enumerate(zip(place, moves)) if m == state) for state in (True, False)}
        rules = "".join(f'<line x1="{30 + 120 * x}" x2="{30 + 120 * x}" y1="20" y2="140"/><text x="{30 + 120 * x}" y="152">{x:g}'
                        "</text>" for x in (1 - EPSILON, 1 + EPSILON))
        plots.append(
            f'<figure><figcaption>A = {A:+g}</figcaption><svg viewBox="0 0 280 172" role="img" aria-label="surrogate over '
            f'ratio" data-name="clip.{A:+g}" data-value="{json.dumps(y)}"><g class="rule">{rules}</g>'
            f'<path class="moves" d="{line[True]}"/><path class="held" d="{line[False]}"/><text x="150" y="168">ratio</text>'
            f'<text class="y" x="26" y="{place[0][1]:.0f}">{y[0]:.1f}</text>'
            f'<text class="y" x="26" y="{place[-1][1]:.0f}">{y[-1]:.1f}</text></svg></figure>')
    return ('<div class="plots">' + "".join(plots) + '</div><p class="note">min(ratio A, clip(ratio) A) of one token with '
            "ε = 0.2. Solid: the token moves the policy. Dotted: its gradient is 0, the clip holds it back.</p>")


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
        "A policy over four tokens. k1's and k3's means are the KL, k2's is not; as a loss k2 has that KL's gradient, k3 "
        "has the other direction's, and k1 has none.")


NOISE, THREE = [0.1, 0.3, 0.6, 0.9], [0.2, 0.3, 0.5]


def numbers_sampling(_) -> str:
    noise, logits = torch.tensor(NOISE, dtype=torch.float64), torch.tensor(THREE).log().expand(len(NOISE), 3)
    ways = {"1": (1.0, 0, 1.0), "0.3": (0.3, 0, 1.0), "top-k 2": (1.0, 2, 1.0), "top-p 0.5": (1.0, 0, 0.5), "0": (0, 0, 1.0)}
    rows = [[f"temperature {key}" if key[0] in "01" else key, *(num(f"sample.{key}.{i}", x) for i, x in enumerate(
        sample_token(logits, noise, *how).tolist()))] for key, how in ways.items()]
    both, alone = sampling_noise(0, 7, [3, 4], 2, 3), sampling_noise(0, 7, [4], 2, 3)
    return (table(["", *(f"u = {u}" for u in NOISE)], rows, f"The token drawn from probabilities {THREE} at a noise u.") +
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
    by_hand = [num(f"token_logps.{t:g}", token_logps(hidden, weight, torch.tensor([1]), t)[0].exp()) for t in (1.0, 0.5)]
    return table(["", "log π<sub>θ</sub>(o<sub>t</sub>)"], rows, (
        f"Positions computed: {num('logps.shared', PROMPT + sum(n - 1 for n in LENGTHS))} on the shared prompt, "
        f"{num('logps.repeated', G * (PROMPT + max(LENGTHS)))} where it is repeated and padded; largest difference of the log-probs with "
        f"the prompt repeated: {(shared - each).abs().max():.0e}. Of logits 0 and ln 3, token_logps gives the second the "
        f"probability {by_hand[0]} at temperature 1 and {by_hand[1]} at 0.5.").replace("-", "−"))


def numbers_fsdp(_) -> str:
    """Bytes of one decoder layer, measured in this process: the shard, what is gathered, the gradient."""
    run = Sharded(random_humanomni(humanomni("toy"), seed=0), "cpu", torch.bfloat16)
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
    handle.remove()
    measure("after the backward pass")
    rows = [[moment, *(num(f"fsdp.{moment}.{n}", x) for n, x in zip(("shard", "gathered", "gradient"), sizes)),
             text(", ".join(sizes[3]) or "–")] for moment, sizes in seen.items()]
    return table(["bytes of " + name, "shard, float32", "gathered, bfloat16", "gradient of the shard, float32", "prefetched"],
                 rows, f"{num('fsdp.numel', sum(u.numel for u in units))} elements with padding. One process holds the whole "
                       "as its shard; N processes hold 1/N of it each, and gather the same whole. Second pass of two: the "
                       "gradient is the first one's until the backward pass adds to it.")


CLIPS = (("happy", "happy", "happy"), ("happy", "happy", "sad"), ("happy", "sad", "sad"), ("sad", "angry", "sad"),
         ("angry", "smug", "angry"))  # truth, predicted, judged


def clip_rows() -> list[dict]:
    return [{"video_id": i, "output": f"<think>...</think>\n<answer>{predicted}</answer>", "ground_truth": truth,
             "judged_emotion": judged} for i, (truth, predicted, judged) in enumerate(CLIPS)]


def numbers_metrics(_) -> str:
    rows = [[str(i + 1), *map(text, x)] for i, x in enumerate(CLIPS)]
    return (table(["clip", "truth", "answer", "judged"], rows) + table(["percent", *COLUMNS], [
        [rule, *(num(f"metrics.{rule}.{name}", score(clip_rows(), "dfew", rule)[name]) for name in COLUMNS)]
        for rule in ("paper", "released")], "<code>smug</code> is no label of DFEW. The released UAR divides by all seven "
        "classes, present or not."))


# ---- code: read from its files, and who opens whom -------------------------------------------------------------------


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def definitions(path: Path) -> dict[str, ast.AST]:
    """Functions, classes and methods of a file by qualified name."""
    kinds, found = (ast.FunctionDef, ast.ClassDef), {}
    for node in tree(path).body:
        if isinstance(node, kinds):
            found[node.name] = node
            found |= {f"{node.name}.{x.name}": x for x in node.body if isinstance(node, ast.ClassDef) and isinstance(x, kinds)}
    return found


def find(path: Path, name: str) -> ast.AST:
    if not path.is_file() or name not in definitions(path):
        raise DataError(f"{SECTIONS.name} names {name} of {path.relative_to(ROOT)}, which is not there: renamed or moved?")
    return definitions(path)[name]


def find_test(name: str) -> Path:
    paths = [p for p in sorted((ROOT / "tests").rglob("*.py")) if f"def {name}(" in p.read_text(encoding="utf-8")]
    if len(paths) != 1:
        raise DataError(f"{SECTIONS.name} names {name}, which {len(paths)} files under tests/ define; it must be one")
    return paths[0]


def highlighted(path: Path, node: ast.AST) -> tuple[str, int, int]:
    """The source as HTML, comments, strings and keywords marked, and its first and last line."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    source = "\n".join(path.read_text(encoding="utf-8").splitlines()[first - 1 : node.end_lineno])
    source = textwrap.dedent(source) + "\n"
    lines, out, at = source.splitlines(keepends=True), [], (1, 0)

    def between(start, end) -> str:
        (a, i), (b, j) = start, end
        return lines[a - 1][i:j] if a == b else lines[a - 1][i:] + "".join(lines[a : b - 1]) + (lines[b - 1][:j] if j else "")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = {tokenize.COMMENT: "c", tokenize.STRING: "s"}.get(token.type)
        if token.type == tokenize.NAME and (token.string in KEYWORDS):
            kind = "k"
        if kind:
            marked = "\n".join(f'<i class="{kind}">{text(part)}</i>' for part in token.string.split("\n"))
            out += [text(between(at, token.start)), marked]
            at = token.end
    out.append(text(between(at, (len(lines) + 1, 0))))
    numbered = (f'<span class="l" data-l="{first + i}">{line}\n</span>' for i, line in enumerate("".join(out).splitlines()))
    return "".join(numbered), first, node.end_lineno


KEYWORDS = frozenset("and as assert break class continue def del elif else except finally for from if import in is lambda "
                     "not or pass raise return try while with yield None True False".split())
COMMON = {x for kind in (torch.Tensor, torch.nn.Module, dict, list, str, set, Path) for x in dir(kind)} | set(dir(builtins))


class Walk:
    """Which function names which, from the text alone: a function is written (path, qualified name)."""

    def __init__(self):
        self.paths = [p for p in [*sorted((ROOT / "erv_min").rglob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]
                      if "toy" not in p.parts]
        self.known = {(p, name): node for p in self.paths for name, node in definitions(p).items()}
        self.methods, self.built = {}, {}
        for path, name in self.known:
            if "." in name:
                self.methods.setdefault(name.split(".")[1], []).append((path, name))
        classes = {name: (p, name) for (p, name), node in self.known.items() if isinstance(node, ast.ClassDef)}
        for (_, name), node in self.known.items():  # self.mm_projector = VisualProjector(...): calls of it are its forward
            for x in ast.walk(node) if name.endswith(".__init__") else ():
                if isinstance(x, ast.Assign) and isinstance(x.targets[0], ast.Attribute) and isinstance(x.value, ast.Call):
                    path, cls = classes.get(getattr(x.value.func, "id", ""), (None, ""))
                    if (path, f"{cls}.forward") in self.known:
                        self.built[x.targets[0].attr] = path, f"{cls}.forward"
        self.opens = {key: self.named_in(key, node) for key, node in self.known.items() if isinstance(node, ast.FunctionDef)}
        self.opened_by = {key: [k for k, named in self.opens.items() if key in named] for key in self.known}
        grpo = ROOT / "scripts" / "grpo.py"
        loop = next((x for x in find(grpo, "main").body if isinstance(x, ast.For)), find(grpo, "main"))
        self.step = self.named_in((grpo, "main"), loop)  # what one GRPO step opens itself
        self.reached, todo = set(), list(self.step)
        while todo:
            key = todo.pop()
            if key not in self.reached:
                self.reached.add(key)
                todo += self.opens.get(key, [])

    @cache
    def names(self, path: Path) -> dict[str, tuple]:
        """What a file's top level calls by which name: its own definitions and what it imports."""
        found = {name: (path, name) for name in definitions(path) if "." not in name}
        for node in tree(path).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("erv_min"):
                base = ROOT.joinpath(*node.module.split("."))
                for alias in node.names:
                    module = base / f"{alias.name}.py"
                    found[alias.asname or alias.name] = ((module, "") if module in self.paths else
                                                         (base.with_suffix(".py"), alias.name))
        return found

    def named_in(self, key: tuple, node: ast.AST) -> list[tuple]:
        path, name = key
        names, owner, found = self.names(path), name.partition(".")[0], {}
        whole = list(ast.walk(node))
        local = {x.id for x in whole if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        local |= {x.arg for x in whole if isinstance(x, ast.arg)}
        called = {id(x.func) for x in whole if isinstance(x, ast.Call)}
        for x in whole:
            target = None
            if isinstance(x, ast.Name) and x.id not in local:
                target = names.get(x.id)
            elif isinstance(x, ast.Attribute):
                at = getattr(x.value, "id", None)
                if at in names and at not in local:  # a module's function, a class's method
                    base, cls = names[at]
                    target = base, f"{cls}.{x.attr}".lstrip(".")
                elif at in ("self", "ctx", "cls") and (path, f"{owner}.{x.attr}") in self.known:
                    target = path, f"{owner}.{x.attr}"
                elif id(x) in called and x.attr in self.built:
                    target = self.built[x.attr]
                elif x.attr not in COMMON and len(self.methods.get(x.attr, ())) == 1:
                    target = self.methods[x.attr][0]
            if target in self.known and target != key and target not in found:
                found[target] = (x.lineno, x.col_offset)
        return sorted(found, key=found.get)


# ---- the page --------------------------------------------------------------------------------------------------------


def anchor(key: tuple) -> str:
    return f"{key[0].stem}.{key[1]}"


class Page:
    """Sections with what their comments ask for put in."""

    def __init__(self, sections: str, group: Group):
        self.group, self.walk, self.sections = group, Walk(), sections
        self.shown = {(ROOT / path, name) for path, name in re.findall(r"<!--code (\S+) (\S+)-->", sections)}
        readme = ROOT / "erv_min" / "README.md"
        rows = re.findall(r"^\| *(\d+) *\|(.+)\|", readme.read_text(encoding="utf-8"), re.M) if readme.exists() else []
        self.divergences = {number: [cell.strip() for cell in row.split("|")] for number, row in rows}
        self.divergences_at = readme.relative_to(ROOT) if rows else None

    def build(self) -> str:
        return re.sub(r"<section.*?</section>", self.section, self.sections, flags=re.S)

    def section(self, found: re.Match) -> str:
        self.sources = ""
        body = re.sub(r"<!--(code|test|numbers|divergence|tree|precisions)(?: (.*?))?-->",
                      lambda m: getattr(self, m[1])(*(m[2] or "").split()), found[0])
        return re.sub(r"<!--symbols\n(.*?)-->", self.symbols, body, flags=re.S)

    def link(self, key: tuple) -> str:
        name = key[1] if key[1] != "main" else f"{key[0].stem}.py main"
        return (f'<a href="#{anchor(key)}">{text(name)}</a>' if key in self.shown else
                f'<span title="{key[0].relative_to(ROOT)}">{text(name)}</span>')

    def code(self, path: str, name: str) -> str:
        key = ROOT / path, name
        body, first, last = highlighted(key[0], find(*key))
        self.sources += "\n".join(key[0].read_text(encoding="utf-8").splitlines()[first - 1 : last])
        sides = {"opened by": self.walk.opened_by[key], "opens": self.walk.opens.get(key, [])}
        margin = "".join(f"<dt>{side}</dt><dd>{', '.join(map(self.link, keys)) or '–'}</dd>" for side, keys in sides.items())
        step = '<p class="step">part of a GRPO step</p>' if key in self.walk.reached else ""
        source = f'<pre tabindex="0">{body}</pre>'
        if last - first > 70:
            source = f"<details><summary>{last - first + 1} lines</summary>{source}</details>"
        return (f'<div class="code" id="{anchor(key)}"><h3><code>{text(name)}</code> <small>{path}, lines {first} to {last}'
                f'</small></h3><aside>{step}<dl>{margin}</dl></aside>{source}</div>')

    def test(self, name: str) -> str:
        path = find_test(name)
        body, first, last = highlighted(path, find(path, name))
        return (f'<details class="test"><summary>Test: <code>{name}</code> <small>{path.relative_to(ROOT)}, lines {first} '
                f'to {last}</small></summary><pre tabindex="0">{body}</pre></details>')

    def numbers(self, name: str) -> str:
        if f"numbers_{name}" not in globals():
            raise DataError(f"{SECTIONS.name} names numbers {name}: annotate.py has no numbers_{name}")
        return f'<div class="numbers" data-numbers="{name}">{globals()[f"numbers_{name}"](self.group)}</div>'

    def divergence(self, *numbers: str) -> str:
        parts = []
        for number in numbers:
            if self.divergences and number not in self.divergences:
                raise DataError(f"{SECTIONS.name} names divergence {number}, which {self.divergences_at} does not list")
            cells = [re.sub(r"`([^`]+)`", r"<code>\1</code>", text(cell)) for cell in self.divergences.get(number, [])]
            heads = ("", "Paper: ", "Released code: ", "Here: ") if len(cells) == 4 else ("",) * len(cells)
            said = ". ".join(head + cell for head, cell in zip(heads, cells))
            parts.append(f'<p data-divergence="{number}"><b>Divergence {number}</b> {said}</p>')
        return f'<aside class="divergence">{"".join(parts)}</aside>'

    def walk_of_step(self, keys: list[tuple], seen: set) -> str:
        items = ""
        for key in keys:
            if key not in seen and key in self.walk.reached:
                seen.add(key)
                below = self.walk_of_step(self.walk.opens.get(key, []), seen)
                items += f"<li>{self.link(key)}{f'<ol>{below}</ol>' if below else ''}</li>" if key in self.shown else below
        return items

    def tree(self) -> str:
        return f'<ol class="walk">{self.walk_of_step(self.walk.step, set())}</ol>'

    def precisions(self) -> str:
        """The table of types in fsdp's docstring."""
        rows = [line.strip("| ").split("|") for line in (fsdp.__doc__ or "").splitlines() if line.startswith("| ")]
        return table(*[[text(cell.strip()) for cell in rows[0]], [[text(cell.strip()) for cell in row] for row in rows[1:]]])

    def symbols(self, found: re.Match) -> str:
        rows = [line.split(" | ") for line in found[1].strip().splitlines()]
        for symbol, name, _ in rows:
            if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", self.sources):
                raise DataError(f"{SECTIONS.name} gives {name} for a symbol, and no function of its section has that name")
        return table(["symbol", "name in the code", "shape and type"], [
            [f"<math>{symbol}</math>", f"<code>{text(name)}</code>", text(kind)] for symbol, name, kind in rows])


def build(group: Group, sections: str | None = None) -> str:
    """The page as HTML. Raises DataError where a section names a function, a test or a symbol that is gone."""
    sections = SECTIONS.read_text(encoding="utf-8") if sections is None else sections
    nav = "".join(f'<a href="#{a}">{b}</a>' for a, b in re.findall(r'<section id="([^"]+)"[^>]*>\s*<h2>(.*?)</h2>', sections))
    return fill("annotated.html", css=fill("page.css") + fill("annotated.css"), nav=nav, sections=Page(sections, group).build(),
                source=text(group.source))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="", help="a toy run of scripts/grpo.py: its verifier and completions")
    parser.add_argument("--out", default="annotated.html", help="the page")
    args = parser.parse_args(argv)
    page = build(read_group(args.run))
    atomic_write(args.out, page)
    print(f"{args.out}: {len(page.encode()) / 1e6:.2f} MB, numbers from {args.run or 'small examples'}")


if __name__ == "__main__":
    try:
        main()
    except ErvMinError as error:
        sys.exit(f"{type(error).__name__}: {error}")
