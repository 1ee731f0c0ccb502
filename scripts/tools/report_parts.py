"""The parts of report.py's page, each as HTML: curves as SVG, tables, completions, settings.

Every text that a model, a file or a user wrote goes through pages.text.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pages import PLAYABLE, data_uri, jpeg, table, text

from erv_min.base.errors import ClipError
from erv_min.emotions import canonical
from erv_min.media import load_frames
from erv_min.metrics import COLUMNS
from erv_min.rewards import explanation_reward

POINTS, TEXT, SETTING = 400, 6000, 600  # at most: points of a curve, characters of a completion, of a setting
WIDTH, HEIGHT, LEFT, BOTTOM = 340, 200, 44, 20  # of a plot, and of its margins for numbers
DASHES = ("", "6 2", "2 1.5", "7 2 2 2", "4 3", "1 1", "9 3", "3 1 1 1")  # a run is not told by colour alone
HUES = {"anger": 4, "disgust": 84, "fear": 268, "happiness": 44, "sadness": 212, "surprise": 324,
        "contempt": 22, "anxiety": 296, "helplessness": 186, "disappointment": 236}
PANELS = {  # key of metrics.jsonl -> (title, unit)
    "reward": ("R", "weighted sum"), "reward_explanation": ("R_E", "explanation, Eq. 4"),
    "reward_answer": ("R_answer", "share right"), "reward_format": ("R_format", "share kept"),
    "held_out_EEA": ("Held-out EEA", "percent"), "held_out_EPC": ("Held-out EPC", "percent"),
    "kl": ("KL to the reference", "nats per token, k3"), "entropy": ("Entropy", "nats per token"),
    "completion_length": ("Length", "tokens per completion"), "frac_zero_std": ("Groups of equal rewards", "share"),
    "sentences": ("Sentences", "per explanation"), "distinct_sentence_rate": ("Distinct sentences", "share of a text"),
    "neutral_share": ("Neutral sentences", "share"), "label_word_rate": ("Emotion named", "share of sentences"),
    "loss": ("Loss", ""), "grad_norm": ("Gradient norm", "before clipping"), "lr": ("Learning rate", ""),
    "tokens_per_s": ("Speed", "tokens per second")}


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly, the first and the last among them."""
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, min(len(items), count)).round()]


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the points, at least 3."""
    half = max(1, len(values) // 40)
    sums, counts = (np.convolve(x, np.ones(2 * half + 1))[half : half + len(values)] for x in (values, values * 0 + 1))
    return sums / counts


def panel(series: dict[int, tuple[np.ndarray, np.ndarray]]) -> str:
    """A small plot as SVG in the page's colours. series: the run's number -> (steps, values)."""
    steps, values = (np.concatenate(parts) for parts in zip(*series.values()))
    low, high, first, last = values.min(), values.max(), steps.min(), steps.max()
    if high - low <= 1e-9 * abs(high):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)

    def x(step):
        return LEFT + (WIDTH - LEFT - 8) * (step - first) / max(1, last - first)

    def y(value):
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 8) * (value - low) / (high - low)

    parts = []
    for value in (low, (low + high) / 2, high):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH}" stroke="var(--line)" stroke-width=".6"/>'
                     f'<text x="{LEFT - 5}" y="{y(value) + 3:.1f}" text-anchor="end">{value:.3g}</text>')
    for step in sorted({first, last}):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 5}" text-anchor="middle">{step}</text>')
    for run, (steps, values) in series.items():
        shown = spread(range(len(steps)), POINTS)
        for curve, style in ((values, 'stroke-width=".7" opacity=".28"'),
                             (smooth(values), f'stroke-width="1.7" stroke-dasharray="{DASHES[run]}"')):
            points = [f"{px:.1f} {py:.1f}" for px, py in zip(x(steps[shown]), y(curve[shown]))]
            parts.append(f'<path d="M{"L".join(points)}" fill="none" stroke="var(--run{run})" {style}/>')
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="10" fill="var(--muted)">'
            f"{''.join(parts)}</svg>")


def curves(runs: list) -> str:
    """All panels of which any run has a value; of a run without R_E the verifier's are 0 throughout, and left out."""
    figures, legend = "", ""
    for key, (title, unit) in PANELS.items():
        series = {}
        for number, run in enumerate(runs):
            values = np.array([row.get(key) for row in run.metrics], dtype=float)  # NaN for None
            there = np.isfinite(values)
            if values[there].any():
                series[number] = np.array([row["step"] for row in run.metrics])[there], values[there]
        if series:
            figures += (f"<figure><figcaption>{text(title)} <small>{text(unit)}</small></figcaption>"
                        f"{panel(series)}</figure>")
    for number, run in enumerate(runs):
        legend += (f'<li><svg width="30" height="8" aria-hidden="true"><path d="M0 4H30" stroke="var(--run{number})" '
                   f'stroke-width="2.5" stroke-dasharray="{DASHES[number]}"/></svg>{text(run.name)}</li>')
    return (f'<ul class="legend">{legend}</ul><p class="note">Thin: each step; thick: running mean over a twentieth of '
            f'the run. The horizontal axis counts steps.</p><div class="panels">{figures}</div>')


def score_table(systems: list) -> str:
    """Table 1's columns, with 95% intervals under the figures."""
    columns, rows = [*COLUMNS, "FCR/WAR"], []
    for system in systems:
        row = [f"{text(system.name)}<small>{text(system.dataset)}, {system.score['n']} clips</small>"]
        for name in columns:
            shown = name in system.intervals and system.score[name] is not None
            row.append("{:.1f}<small>{:.1f} to {:.1f}</small>".format(system.score[name], *system.intervals[name])
                       if shown else "–")
        rows.append(row)
    return table(["Percent", *columns], rows, ' class="scores"') + (
        '<p class="note">Under each figure its 95% interval (percentile bootstrap over clips). FCR/WAR: coherence of '
        "the right answers.</p>")


def matrices(systems: list) -> str:
    out = ""
    for system in systems:
        names, rows = system.score["labels"], ""
        head = "".join(f"<th scope=col><span>{text(name)}</span></th>" for name in [*names, "unknown", "recall"])
        for name, counts in zip(names, system.score["confusion"]):
            recall, shades = system.score["recall"][name], [count / max(1, sum(counts)) for count in counts]
            cells = "".join(f'<td style="--r:{shade:.3f}"{"" if count else " class=zero"}>{count}</td>'
                            for count, shade in zip(counts, shades))
            rows += (f"<tr><th scope=row>{text(name)}</th>{cells}"
                     f'<td class="recall">{"–" if recall is None else f"{recall:.0f}%"}</td></tr>')
        out += (f"<figure tabindex=0><figcaption>{text(system.name)}</figcaption><table class=matrix>"
                f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></figure>")
    return (f'<h3>Confusion matrices</h3><div class="matrices">{out}</div><p class="note">A row per true label, a '
            "column per answer; the shade is the share of the row.</p>")


def settings_table(runs: list) -> str:
    """What differs between the runs comes first."""
    columns = [{**run.settings, **run.about.get("versions", {}), "commit": run.about.get("git_commit") or "–",
                "command": " ".join(run.about.get("command", ["–"])), "steps done": len(run.metrics),
                "steps skipped": sum("skipped_because" in row for row in run.metrics)} for run in runs]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [str(column.get(name, "–"))[:SETTING] for column in columns]
        rows.append([text(name), *map(text, values)])
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    return table(["", *(text(run.name) for run in runs)], rows,
                 f' class="settings" style="min-width:{8 + 7 * len(runs)}rem"')


def sentence(words: str, labels: list[str], e_gt: str) -> str:
    """A sentence with its labels beside it; ✓ if it counts for e_gt (c of Eq. 4)."""
    right = [label for label in labels if explanation_reward([[label]], e_gt, neutral_filter=False) > 0]
    hue = HUES.get(canonical((right or labels)[0])) if labels else None  # neutral has none, nor GoEmotions' others
    kind = f'sentence" style="--h:{hue}' if hue is not None else f"sentence {'grey' if right else 'plain'}"
    named = text(", ".join(labels) or "no label") + (" ✓" if right else "")
    return f'<span class="{kind}">{text(words)}<span class="tag">{named}</span></span>'


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
        body += note(f"cut after {TEXT} of {len(output)} characters")
    marks = {True: ' <span class="ok">✓</span>', False: ' <span class="no">✗</span>', None: ""}
    told = "".join(f"<span>{text(name)} <b>{text(value)}</b>{marks[right]}</span>" for name, value, right in facts)
    edge = "" if run is None else f' style="--edge:var(--run{run})"'
    return f'<article class="completion"{edge}><h4>{text(title)}</h4>{body}<p class="rewards">{told}</p></article>'


def note(words) -> str:
    return f'<p class="note">{text(words)}</p>'


def clip(path: Path, max_bytes: int = 0) -> str:
    """A clip's sampled frames, and its player if the file is at most `max_bytes` (0: none) and browsers play it."""
    try:
        frames = load_frames(path, 4)
    except ClipError as error:
        return note(error)
    pictures = [data_uri("image/jpeg", jpeg(frame)) for frame in frames]
    shown = "".join(f'<img src="{uri}" alt="frame {n} of the clip">' for n, uri in enumerate(pictures, 1))
    kind, size, below, alone = PLAYABLE.get(path.suffix.lower()), path.stat().st_size, "", " alone"
    if max_bytes and size > max_bytes:
        below = note(f"frames only: the clip has {size / 1e6:.2f} MB")
    elif max_bytes and kind is None:
        below = note(f"frames only: browsers do not play {path.suffix or 'this file'}")
    elif max_bytes:
        player, alone = data_uri(kind, path.read_bytes()), ""
        shown += f'<video src="{player}" poster="{pictures[0]}" controls preload="none"></video>'
    return f'<div class="media{alone}" style="--ratio:{frames.shape[2] / frames.shape[1]:.3f}">{shown}</div>{below}'


def case(facts: dict[str, str], media: str, columns: list[str]) -> str:
    heading = "".join(f"<span>{name} <b>{text(value)}</b></span>" for name, value in facts.items())
    return (f'<figure class="case"><figcaption>{heading}</figcaption>{media}'
            f'<div class="columns">{"".join(columns)}</div></figure>')
