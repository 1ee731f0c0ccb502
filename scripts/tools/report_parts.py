"""The parts of report.py's page, each as HTML: curves as SVG, tables, completions, settings.

Every text that a model, a file or a user wrote goes through pages.text. Sizes do not grow with a run: a curve has at
most POINTS points per run, a completion at most TEXT characters, a setting SETTING.
"""

import math
import re

import numpy as np
from pages import ClipMedia, table, text

from erv_min.emotions import canonical
from erv_min.metrics import COLUMNS
from erv_min.rewards import explanation_reward

POINTS, TEXT, SETTING = 400, 6000, 600
WIDTH, HEIGHT, LEFT, BOTTOM = 340, 200, 44, 20  # of a plot, and of its margins for numbers
DASHES = ("", "6 2", "2 1.5", "7 2 2 2", "4 3", "1 1", "9 3", "3 1 1 1")  # a run is not told by colour alone
HUES = {"anger": 4, "disgust": 84, "fear": 268, "happiness": 44, "sadness": 212, "surprise": 324,
        "contempt": 22, "anxiety": 296, "helplessness": 186, "disappointment": 236}
PANELS = {  # group -> key of metrics.jsonl -> (title, unit)
    "Rewards (Eq. 5), means over a step's completions": {
        "reward": ("R", "weighted sum"), "reward_explanation": ("R_E", "explanation, Eq. 4"),
        "reward_answer": ("R_answer", "share right"), "reward_format": ("R_format", "share kept")},
    "Policy": {
        "kl": ("KL to the reference", "nats per token, k3"), "entropy": ("Entropy", "nats per token"),
        "completion_length": ("Length", "tokens per completion"),
        "frac_zero_std": ("Groups of equal rewards", "share")},
    "What a policy that cheats R_E would move": {
        "sentences": ("Sentences", "per explanation"),
        "distinct_sentence_rate": ("Distinct sentences", "share of a text"),
        "neutral_share": ("Neutral sentences", "share"), "label_word_rate": ("Emotion named", "share of sentences"),
        "held_out_EEA": ("Held-out EEA", "percent"), "held_out_EPC": ("Held-out EPC", "percent")},
    "Optimizer": {
        "loss": ("Loss", ""), "grad_norm": ("Gradient norm", "before clipping"), "lr": ("Learning rate", ""),
        "tokens_per_s": ("Speed", "tokens per second")}}
OF_VERIFIER = ("reward_explanation", "sentences", "distinct_sentence_rate", "neutral_share", "label_word_rate")


def symbols(value) -> str:
    """`pages.text` with R_E, R_answer, R_format as the paper sets them."""
    return re.sub(r"\bR_(E|answer|format)\b", r"R<sub>\1</sub>", text(value))


# ---- curves ----------------------------------------------------------------------------------------------------------


def finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return finite.mean() if len(finite) else np.nan


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means over equal runs of steps; NaN if a run holds none that is finite."""
    if len(steps) <= POINTS:
        return steps, values
    means = [finite_mean(part) for part in np.array_split(values, POINTS)]
    return np.array([part.mean() for part in np.array_split(steps, POINTS)]), np.array(means)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the points (at least 3), of what is finite."""
    half = max(1, len(values) // 40)
    return np.array([finite_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers from low to high, four steps at most, each at least `least` apart."""
    rough = max(least, (high - low) / 4)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line(x: np.ndarray, y: np.ndarray, style: str) -> str:
    """A curve through the points, which breaks at a y that is not finite."""
    points, pen = [], "M"
    for px, py in zip(x, y):
        if np.isfinite(py):
            points.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L" if np.isfinite(py) else "M"
    return f'<path d="{"".join(points)}" fill="none" {style}/>'


def panel(series: dict[int, tuple[np.ndarray, np.ndarray]]) -> str:
    """A small plot as SVG in the page's colours. series: the run's number -> (steps, values), some of them finite."""
    series = {run: thin(*of_run) for run, of_run in series.items()}
    low, high = (float(f([f(values[np.isfinite(values)]) for _, values in series.values()])) for f in (np.min, np.max))
    if high - low <= 1e-9 * abs(high):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    first, last = min(steps[0] for steps, _ in series.values()), max(steps[-1] for steps, _ in series.values())

    def x(step):
        return LEFT + (WIDTH - LEFT - 8) * (step - first) / max(1, last - first)

    def y(value):
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 8) * (value - low) / (high - low)

    parts = []
    for tick in ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH}" stroke="var(--line)" stroke-width=".6"/>'
                     f'<text x="{LEFT - 5}" y="{y(tick) + 3:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(first, max(last, first + 1), least=1):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 5}" text-anchor="middle">{tick:g}</text>')
    for run, (steps, values) in series.items():
        colour = f'stroke="var(--run{run})"'
        parts.append(line(x(steps), y(values), f'{colour} stroke-width=".7" opacity=".28"'))
        parts.append(line(x(steps), y(smooth(values)), f'{colour} stroke-width="1.7" stroke-dasharray="{DASHES[run]}"'))
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="10" fill="var(--muted)">'
            f"{''.join(parts)}</svg>")


def curves(runs: list) -> str:
    """All panels of which any run has a value."""
    series = {}
    for number, run in enumerate(runs):
        for key in (key for group in PANELS.values() for key in group):
            rows = [row for row in run.metrics if key in row]
            values = np.array([np.nan if row[key] is None else row[key] for row in rows], float)
            no_verifier = key in OF_VERIFIER and not run.settings.get("w_explanation", 1)  # then zeros were written
            if np.isfinite(values).any() and not (no_verifier and not values.any()):
                series.setdefault(key, {})[number] = (np.array([row["step"] for row in rows], float), values)
    body = ""
    for group, panels in PANELS.items():
        figures = ""
        for key in (key for key in panels if key in series):
            title, unit = panels[key]
            figures += (f"<figure><figcaption>{symbols(title)} <small>{text(unit)}</small></figcaption>"
                        f"{panel(series[key])}</figure>")
        body += f'<h3>{symbols(group)}</h3><div class="panels">{figures}</div>' if figures else ""
    legend = "".join(f'<li><svg width="30" height="8" aria-hidden="true"><path d="M0 4H30" stroke="var(--run{n})" '
                     f'stroke-width="2.5" stroke-dasharray="{DASHES[n]}"/></svg>{symbols(run.name)}</li>'
                     for n, run in enumerate(runs) if run.metrics)
    return (f'<ul class="legend">{legend}</ul><p class="note">Thin: each step; thick: running mean over a twentieth of '
            f"the run. The horizontal axis counts steps.</p>{body}")


# ---- tables ----------------------------------------------------------------------------------------------------------


def figures_table(corner: str, rows: list[tuple[str, dict[str, tuple[str, str, bool]]]]) -> str:
    """Rows of (heading as HTML, metric -> (figure, what stands under it, bold?)), in the order of table 1."""
    columns = [*COLUMNS, "FCR/WAR"]
    head = "".join(f"<th scope=col>{name}</th>" for name in columns)
    body = ""
    for heading, cells in rows:
        body += f"<tr><th scope=row>{heading}</th>"
        for name in columns:
            figure, under, bold = cells.get(name, ("–", "", False))
            mark = ' class="sure"' if bold else ""
            body += f'<td data-name="{name}"{mark}>{figure}<small>{under}</small></td>'
        body += "</tr>"
    return (f'<table class="scores"><thead><tr><th scope=col>{corner}</th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>")


def score_table(systems: list) -> str:
    """Table 1's columns with 95% intervals under the figures."""
    rows = []
    for system in systems:
        cells = {name: (f"{system.score[name]:.1f}", f"{low:.1f} to {high:.1f}", False)
                 for name, (low, high) in system.intervals.items() if system.score[name] is not None}
        about = f"{text(system.dataset)}, {system.score['n']} clips"
        rows.append((f"{symbols(system.name)}<small>{about}</small>", cells))
    return figures_table("Percent", rows)


def confusion(system) -> str:
    """A row per true label, a column per prediction; the shade is the share of the row."""
    names, score, rows = [*system.score["labels"], "unknown"], system.score, ""
    head = "".join(f"<th scope=col><span>{text(name)}</span></th>" for name in [*names, "recall"])
    for name, counts in zip(score["labels"], score["confusion"]):
        total, recall = max(1, sum(counts)), score["recall"].get(name)
        cells = "".join(f'<td style="--r:{count / total:.3f}"{"" if count else " class=zero"}>{count}</td>'
                        for count in counts)
        rows += (f"<tr><th scope=row>{text(name)}</th>{cells}"
                 f'<td class="recall">{"–" if recall is None else f"{recall:.0f}%"}</td></tr>')
    return (f"<figure tabindex=0><figcaption>{symbols(system.name)}</figcaption><table class=matrix>"
            f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></figure>")


def settings_table(runs: list) -> str:
    """Settings, versions, commit and command of each run; what differs between them comes first."""
    columns = [{**run.settings, **(run.config.get("versions") or {}), "commit": run.config.get("git_commit") or "–",
                "command": " ".join(map(str, run.config.get("command") or ["–"]))} for run in runs]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [str(column.get(name, "–"))[:SETTING] for column in columns]
        rows.append([text(name), *map(text, values)])
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    return table(["", *(text(run.name) for run in runs)], rows,
                 f' class="settings" style="min-width:{8 + 7 * len(runs)}rem"')


# ---- completions -----------------------------------------------------------------------------------------------------


def sentence(words: str, labels: list[str], e_gt: str) -> str:
    """A sentence with its labels beside it; ✓ if it counts for e_gt (c of Eq. 4)."""
    right = [label for label in labels if explanation_reward([[label]], e_gt, neutral_filter=False) > 0]
    hue = HUES.get(canonical((right or labels)[0])) if labels else None  # neutral has none, nor GoEmotions' others
    kind = "" if hue is not None else " grey" if right else " plain"
    style = "" if hue is None else f' style="--h:{hue}"'
    named = text(", ".join(labels) or "no label") + (" ✓" if right else "")
    return f'<span class="sentence{kind}"{style}>{text(words)}<span class="tag">{named}</span></span>'


def completion(title: str, output: str, e_gt: str, sentences: list[str], labels: list[list[str]], facts: list[tuple],
               run: int | None = None) -> str:
    """One completion: its sentences with their labels, its answer, and `facts` [(name, value, right or None)]."""
    shown, room = [], TEXT
    for words, names in zip(sentences, labels):
        if room > 0:
            shown.append(sentence(words[:room], names, e_gt))
        room -= len(words)
    body = f'<p class="text">{" ".join(shown)}</p>' if shown else f"<pre>{text(output[:TEXT])}</pre>"
    if len(output) > TEXT:
        body += f'<p class="note">cut after {TEXT} of {len(output)} characters</p>'
    marks = {True: ' <span class="ok">✓</span>', False: ' <span class="no">✗</span>', None: ""}
    told = "".join(f"<span>{symbols(name)} <b>{text(value)}</b>{marks[right]}</span>" for name, value, right in facts)
    edge = "" if run is None else f' style="--edge:var(--run{run})"'
    return f'<article class="completion"{edge}><h4>{symbols(title)}</h4>{body}<p class="rewards">{told}</p></article>'


def case(heading: str, media: ClipMedia | None, columns: list[str]) -> str:
    """A clip with what was said about it. heading is HTML."""
    shown = ""
    if media and media.frames:
        shown = "".join(f'<img src="{uri}" alt="frame {n} of the clip">' for n, uri in enumerate(media.frames, 1))
        if media.player:
            shown += f'<video src="{media.player}" poster="{media.frames[0]}" controls preload="none"></video>'
        alone = "" if media.player else " alone"
        shown = f'<div class="media{alone}" style="--ratio:{media.ratio:.3f}">{shown}</div>'
    if media and media.note:
        shown += f'<p class="note">{text(media.note)}</p>'
    return (f'<figure class="case"><figcaption>{heading}</figcaption>{shown}'
            f'<div class="columns">{"".join(columns)}</div></figure>')
