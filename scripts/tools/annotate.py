"""The annotated paper: each equation beside the code that runs, its test and its numbers, on one page without network.

    python scripts/tools/annotate.py [--run runs/toy] --out annotated.html

Prose and equations stand in templates/annotated_sections.html, whose first lines say how they are written. Sources are
read from their files, and functions run, when the page is built: neither can be out of date. A function's local
variables are its intermediate values. With --run, RUN/erv and RUN/completions.jsonl are verifier and completions.
"""

import ast
import html
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from pkgutil import resolve_name

import torch
from pages import TEMPLATES, fill, table, text
from report import read_completions
from torch import Tensor

from erv_min import erv, grpo, metrics, rewards
from erv_min.base.errors import DataError
from erv_min.base.files import atomic_write
from erv_min.base.options import OneLineParser
from erv_min.base.processes import run_script
from erv_min.config import AUDIO, VIDEO, humanomni
from erv_min.emotions import ERV_LABELS
from erv_min.model.humanomni import HumanOmni
from erv_min.model.parameters import random_humanomni
from erv_min.rewards import RewardSettings

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = (TEMPLATES / "annotated_sections.html").read_text(encoding="utf-8").partition("-->")[2]  # behind its head
SMALL = json.loads((TEMPLATES / "annotated_example.json").read_text(encoding="utf-8"))


def seen_in(function: Callable, call: Callable | None = None, /, **arguments) -> dict:
    """`function`'s local variables as it last returns during a call, by default of itself; its result as "returned"."""
    seen = {}

    def watch(frame, event, result):
        if event == "return" and frame.f_code is function.__code__:
            seen.update(frame.f_locals, returned=result)
    sys.setprofile(watch)
    try:
        (call or function)(**arguments)
    finally:
        sys.setprofile(None)
    return seen


def small_verifier(sentences: list[str]) -> Tensor:
    """What the small example says of each sentence [S, K]; of a longer text, the largest of its sentences."""
    rows = [[p for s, p in SMALL["probabilities"].items() if s in sentence] for sentence in sentences]
    return torch.tensor([[max(p.get(label, 0.01) for p in row) for label in ERV_LABELS] for row in rows])


@dataclass
class Examples:
    """Completions of one prompt, and the verifier. All methods but `rewards` give a table, row -> column -> value, or
    (with arguments) one row of it."""

    completions: list[str]  # algorithm 1 and Eq. 4 are shown on the first
    e_gt: str
    probabilities: Callable[[list[str]], Tensor]
    labels: Sequence[str]
    source: str

    def rewards(self, first: int | None = None, **settings) -> list[rewards.Reward]:
        o = self.completions[:first]
        return rewards.score_completions(o, [self.e_gt] * len(o), "dfew", self.probabilities, self.labels,
                                         RewardSettings(**settings))

    def algorithm1(self) -> dict:
        """Each sentence's largest probabilities and labels, and what explanation_reward counts of it alone."""
        S, rows = rewards.sentences_of(self.completions[0], RewardSettings()), {}
        seen = seen_in(rewards.select_labels, probs=self.probabilities(S), labels=self.labels)
        shown = seen["u"].amax(0).topk(5).indices.tolist()
        for k, (s, p, over, EL_k) in enumerate(zip(S, seen["u"], seen["over"], seen["returned"]), 1):
            counts = seen_in(rewards.explanation_reward, label_sets=[EL_k], e_gt=self.e_gt)
            rows[f"{k}. {s}"] = {**{self.labels[j]: p[j] for j in shown}, "over tau": over, "EL_k": ", ".join(EL_k),
                                 "c": counts["c"], "N_neu": counts["N_neu"]}
        return rows

    def eq4(self, **settings) -> dict:
        return seen_in(rewards.explanation_reward, self.rewards, first=1, **settings)

    def eq5(self) -> dict:
        return {f"{i}. {o}": vars(reward) for i, (o, reward) in enumerate(zip(self.completions, self.rewards()), 1)}

    def advantages(self) -> dict:
        R = torch.tensor([reward.total for reward in self.rewards()])
        seen = seen_in(grpo.group_advantages, rewards=R, group_size=len(R))
        return {"this group": {**seen, "mean": R.mean(), "std": R.std()}}

    def kl(self) -> dict:
        """Means under pi_theta of a policy over four tokens; which token is drawn carries no gradient."""
        logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
        ref_logps, logps = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log(), logits.log_softmax(0)
        pi, d = logps.detach().exp(), ref_logps - logps
        means = {"KL(π_θ ‖ π_ref), exact": logps.exp() * -d, "KL(π_ref ‖ π_θ), exact": ref_logps.exp() * d,
                 "k1: −d": pi * -d, "k2: d² / 2": pi * d**2 / 2, "k3, kl_k3": pi * grpo.kl_k3(logps, ref_logps)}
        return {name: {"mean": x.sum(), "gradient": torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]}
                for name, x in means.items()}

    def splice(self) -> dict:
        model = random_humanomni(humanomni("toy"), seed=0)
        X_v, X_a = (torch.zeros(1, n, model.config.text.hidden_size) for n in (4, 2))
        ids = torch.tensor([[5, VIDEO, 6, AUDIO, 7, 8]])
        return {"one prompt": seen_in(HumanOmni.splice, lambda: model.splice(ids, X_v, X_a))}

    def clips(self) -> dict:
        return {row["video_id"]: row for row in SMALL["clips"]}

    def five_metrics(self, rule: str) -> dict:
        return metrics.score(SMALL["clips"], "dfew", rule)


def read_examples(run: str) -> Examples:
    """The small example; or the group of a run's completion that shows most: 0 < R_E < 1, most kinds of labels."""
    if not run:
        return Examples(SMALL["completions"], SMALL["e_gt"], small_verifier, ERV_LABELS, "a small example")
    if not (sampled := read_completions(Path(run, "completions.jsonl"))):  # step -> group
        raise DataError(f"{run}/completions.jsonl: no completion in it")
    best = max(sum(sampled.values(), []), key=lambda row: (0 < row["reward_explanation"] < 1,
                                                           len(set(map(tuple, row["labels"])))))
    group, verifier = sorted(sampled[best["step"]], key=lambda row: row is not best), erv.Verifier.load(f"{run}/erv")
    return Examples([row["completion"] for row in group], best["ground_truth"], verifier.probabilities,
                    verifier.labels, f"{run}, step {best['step']}, clip {best['video_id']}")


def value(x) -> str:
    """Text with `code`; a number or a small tensor, rounded, and whole in the element; of a large tensor the shape."""
    if isinstance(x, Tensor):
        x = x.tolist() if x.numel() < 32 else f"{x.dtype} {list(x.shape)}".removeprefix("torch.")
    if isinstance(x, str):
        return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(x))
    whole = json.dumps(x)
    short = re.sub(r"-?\d+(\.\d+|e-)[-\de]*", lambda number: f"{round(float(number[0]), 4) + 0:g}", whole)  # + 0: no -0
    return f'<data value="{whole}">{short.replace("-", "−")}</data>'


def functions_of(module: str) -> list[str]:
    text = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    return [f"{module}:{name}" for name in re.findall(r"^(?:def|class) (\w+)", text, re.M)]


@cache
def source(key: str) -> tuple[str, str, str]:
    """MODULE:NAME, a function, class or (as Class.method) method -> its text; a heading with path and lines, the text
    with line numbers, docstrings and comments marked, as HTML."""
    module, name = key.split(":")
    path = module.replace(".", "/") + ".py"
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    node = ast.parse("\n".join(lines))
    for part in name.split("."):
        node = next((x for x in node.body if getattr(x, "name", "") == part), None)
        if node is None:
            raise DataError(f"the page names {name} of {path}, which is not there")
    first, last = min(x.lineno for x in (node, *node.decorator_list)), node.end_lineno
    code, numbers = textwrap.dedent("\n".join(lines[first - 1 : last])), "\n".join(map(str, range(first, last + 1)))
    marked = re.sub(r'(""".*?"""|(?<=\s)# [^\n]*)', r"<i>\1</i>", html.escape(code, quote=False), flags=re.S)
    return (code, f"<code>{name}</code> <small>{path}, lines {first} to {last}</small>",
            f'<pre tabindex="0"><span>{numbers}</span><code>{marked}</code></pre>')


class Page:
    """Sections as HTML: `<!--NAME ...-->` is replaced by what the method NAME returns."""

    def __init__(self, examples: Examples, sections: str):
        sections = re.sub(r"<!--script (\S+)-->", lambda m: "".join(f"<!--code {key}-->" for key in functions_of(m[1])),
                          sections)
        words = dict(re.findall(r"<!--code (\S+)(?: as (\S+))?-->", sections))
        self.examples, self.calls = examples, {key: self.calls_of(key, words) for key in words}
        self.html = re.sub(r"<!--(\w+)\s(.*?)\s*-->", lambda m: getattr(self, m[1])(m[2]), sections, flags=re.S)

    def calls_of(self, key: str, words: dict[str, str]) -> list[str]:
        """Which functions of the page a function calls: their word, else name, before a bracket, outside of strings."""
        code = re.sub(r'""".*?"""|"[^"\n]*"', "", source(key)[0], flags=re.S)
        found = {other: re.search(rf"(?<!def )\b{re.escape(word or re.split('[.:]', other)[-1])}\(", code)
                 for other, word in words.items() if other != key}
        return sorted((other for other in found if found[other]), key=lambda other: found[other].start())

    def code(self, words: str) -> str:
        key, margin = words.split()[0], ""
        for side, keys in (("called by", [k for k in self.calls if key in self.calls[k]]), ("calls", self.calls[key])):
            links = ", ".join(f'<a href="#{k}">{k.split(":")[1]}</a>' for k in keys)
            margin += f"<dt>{side}</dt><dd>{links}</dd>" if keys else ""
        _, heading, listing = source(key)
        return f'<div class="code" id="{key}"><h3>{heading}</h3><aside><dl>{margin}</dl></aside>{listing}</div>'

    def test(self, key: str) -> str:
        _, heading, listing = source(key)
        return f'<details class="test"><summary>Test: {heading}</summary>{listing}</details>'

    def numbers(self, lines: str) -> str:
        """First line: a method of Examples, or a function MODULE:NAME whose variables are seen; and columns. Others, if
        there are: heading | arguments, of which lists are tensors; a row for each."""
        head, *calls = lines.split("\n")
        name, *columns = head.split()
        function = partial(seen_in, resolve_name(name)) if ":" in name else getattr(self.examples, name)
        rows = {} if calls else function()
        for row, arguments in (call.split(" | ") for call in calls):
            given = json.loads(arguments)
            rows[row] = function(**{k: torch.tensor(x) if isinstance(x, list) else x for k, x in given.items()})
        columns = columns or list(next(iter(rows.values())))
        cells = [[value(x) for x in (row, *(values[x] for x in columns))] for row, values in rows.items()]
        return f'<div class="numbers">{table(["", *columns], cells)}</div>'

    def points(self, numbers: str) -> str:
        """The surrogate of a token of advantage A over ratios from low to high: points of a curve, in hundredths."""
        A, low, high = map(float, numbers.split())
        logps = torch.linspace(low, high, 20).log()[:, None]  # [R, 1], the old ones 0
        zeros = torch.zeros_like(logps)
        seen = seen_in(grpo.grpo_loss, lambda: grpo.grpo_loss(logps, zeros, zeros, A + zeros[:, 0], zeros == 0))
        return " ".join(f"{100 * x:.1f},{-100 * y:.1f}" for x, y in torch.cat([seen["ratio"], seen["surrogate"]], 1))

    def symbols(self, lines: str) -> str:
        rows = [line.split(" | ") for line in lines.split("\n")]
        return table(["", "name in the code", "shape and type"],
                     [[f"<i>{symbol}</i>", f"<code>{name}</code>", kind] for symbol, name, kind in rows])

    def rows(self, words: str) -> str:
        path, *names = words.split()
        lines = re.search(r"(^\|.*\n)+", (ROOT / path).read_text(encoding="utf-8"), re.M)[0].splitlines()
        head, _, *rows = [[value(cell.strip()) for cell in line.strip("| ").split("|")] for line in lines]
        listed = {row[0]: row for row in rows}
        return table(head, [listed[name] for name in names or listed])


def build(examples: Examples, sections: str = SECTIONS) -> str:
    """The page. Raises an error where a section names a function, a test, numbers or a row that is gone."""
    return fill("annotated.html", css=fill("page.css") + fill("annotated.css"), source=text(examples.source),
                e_gt=text(examples.e_gt), sections=Page(examples, sections).html)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--run", default="", help="a toy run of scripts/grpo.py: its verifier and completions")
    parser.add_argument("--out", default="annotated.html", help="the page")
    args = parser.parse_args(argv)
    page = build(read_examples(args.run))
    atomic_write(args.out, page)
    print(f"{args.out}: {len(page.encode()) / 1e6:.2f} MB, numbers from {args.run or 'small examples'}")


if __name__ == "__main__":
    run_script(main)
