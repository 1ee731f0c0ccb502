"""The parts of report.py's page, each as HTML: curves (matplotlib SVG), tables, completions, settings.

Every text that a model, a file or a user wrote goes through pages.text. Sizes do not grow with a run: a curve has at
most POINTS points per run, a completion at most TEXT characters, a setting SETTING.
"""

import re

import numpy as np
from pages import ClipMedia, table, text

from erv_min.base.errors import SettingsError
from erv_min.emotions import ERV_LABELS, canonical
from erv_min.metrics import COLUMNS
from erv_min.rewards import explanation_reward, extract_answer

POINTS, TEXT, SETTING = 400, 6000, 600
DASHES = ((), (6, 2), (2, 1.5), (7, 2, 2, 2), (4, 3), (1, 1), (9, 3), (3, 1, 1, 1))  # a run is not told by colour alone
HUES = {"anger": 4, "disgust": 84, "fear": 268, "happiness": 44, "sadness": 212, "surprise": 324,
        "contempt": 22, "anxiety": 296, "helplessness": 186, "disappointment": 236}
PANELS = {  # group -> key of metrics.jsonl -> (title, unit)
    "Rewards (Eq. 5), means over a step's completions": {
        "reward": ("R", "weighted sum"), "reward_explanation": ("R_E", "explanation, Eq. 4"),
        "reward_answer": ("R_answer", "share right"), "reward_format": ("R_format", "share kept")},
    "Policy": {
        "kl": ("KL to the reference", "nats a token, k3"), "entropy": ("Entropy", "nats a token"),
        "completion_length": ("Length", "tokens a completion"),
        "frac_zero_std": ("Groups of equal rewards", "share")},
    "What a policy that cheats R_E would move": {
        "sentences": ("Sentences", "an explanation"),
        "distinct_sentence_rate": ("Distinct sentences", "share of a text"),
        "neutral_share": ("Neutral sentences", "share"), "label_word_rate": ("Emotion named", "share of sentences"),
        "held_out_EEA": ("Held-out EEA", "percent"), "held_out_EPC": ("Held-out EPC", "percent")},
    "Optimizer": {
        "loss": ("Loss", ""), "grad_norm": ("Gradient norm", "before clipping"), "lr": ("Learning rate", ""),
        "tokens_per_s": ("Speed", "tokens per second")}}

OF_VERIFIER = ("reward_explanation", "sentences", "distinct_sentence_rate", "neutral_share", "label_word_rate")

# ---- curves ----------------------------------------------------------------------------------------------------------


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means over equal runs of steps; NaN where a run holds none that is finite."""
    if len(steps) <= POINTS:
        return steps, values
    kept = [(s.mean(), v[np.isfinite(v)].mean() if np.isfinite(v).any() else np.nan)
            for s, v in zip(np.array_split(steps, POINTS), np.array_split(values, POINTS))]
    return tuple(np.array(kept).T)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the points (at least 3), of what is finite."""
    half = max(1, len(values) // 40)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([w[np.isfinite(w)].mean() if np.isfinite(w).any() else np.nan for w in windows])


def need_matplotlib() -> None:
    """Raises SettingsError with the way to get it where it is missing: it is an extra, for the curves alone."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SettingsError('the curves need matplotlib: pip install -e ".[report]"') from None


def panel(name: str, series: dict[int, tuple[np.ndarray, np.ndarray]]) -> str:
    """One small plot as SVG whose colours are the page's CSS variables. series: the run's number -> (steps, values)."""
    import io

    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ink, muted, line = "#010101", "#020202", "#030303"  # stand for var(--...) below
    rc = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.edgecolor": line, "xtick.color": muted,
          "ytick.color": muted, "text.color": ink, "axes.linewidth": 0.8, "axes.formatter.limits": (-3, 4)}
    with matplotlib.rc_context(rc):
        figure = Figure(figsize=(3.4, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for run, (steps, values) in series.items():
            steps, values = thin(steps, values)
            colour = f"#0400{run + 16:02x}"
            axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.7)
            axes.plot(steps, smooth(values), color=colour, linewidth=1.7, dashes=DASHES[run] or (None, None))
        axes.grid(axis="y", color=line, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelcolor=muted)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.01)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.S)
    svg = re.sub(r"#0400(1[0-7])", lambda m: f"var(--run{int(m[1], 16) - 16})", svg)
    for colour, variable in ((ink, "ink"), (muted, "muted"), (line, "line")):
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)  # the page's own typeface
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)  # as other versions of matplotlib write it
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)  # ids are unique in the page
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)


def curves(runs: list) -> str:
    """All panels of which any run has a value; the last group folded."""
    series_of, parts, left_out = {}, [], []
    for number, run in enumerate(runs):
        for key in {key for group in PANELS.values() for key in group}:
            rows = [row for row in run.metrics if key in row]
            steps = np.array([row["step"] for row in rows], float)
            values = np.array([np.nan if row[key] is None else row[key] for row in rows], float)
            if key in OF_VERIFIER and not run.settings.get("w_explanation", 1) and not values.any():
                left_out.append(run.name)  # zeros that were written because no verifier ran
            elif np.isfinite(values).any():
                series_of.setdefault(key, {})[number] = (steps, values)
    for group, panels in PANELS.items():
        figures = []
        for key, (title, unit) in panels.items():
            if key in series_of:
                last = "; ".join(f"{runs[n].name} {smooth(thin(*s)[1])[-1]:.3g}" for n, s in series_of[key].items())
                figures.append(f'<figure><figcaption>{math(title)} <small>{text(unit)}</small></figcaption>'
                               f'<div role="img" aria-label="{text(title)} over steps; at the end: {text(last)}">'
                               f"{panel(key, series_of[key])}</div></figure>")
        if figures:
            body = f'<div class="panels">{"".join(figures)}</div>'
            parts.append(f"<details><summary>{group}</summary>{body}</details>" if group == "Optimizer" and parts
                         else f"<h3>{math(group)}</h3>{body}")
    legend = "".join(
        f'<li><svg width="30" height="8" aria-hidden="true"><line x1="0" x2="30" y1="4" y2="4" stroke="var(--run{n})" '
        f'stroke-width="2.5" stroke-dasharray="{" ".join(str(1.7 * d) for d in DASHES[n])}"/></svg>'
        f"{math(run.name)}</li>"
        for n, run in enumerate(runs) if run.metrics)
    note = "Thin: each step; thick: running mean over a twentieth of the run. The horizontal axis counts steps."
    if left_out:
        note += f" R_E and sentences were not measured in {', '.join(dict.fromkeys(left_out))}."
    return f'<ul class="legend">{legend}</ul><p class="note">{math(note)}</p>{"".join(parts)}'


# ---- tables ----------------------------------------------------------------------------------------------------------


def score_table(systems: list) -> str:
    """Table 1's columns with 95% intervals under the figures."""
    columns = [*COLUMNS, "FCR/WAR"]
    rows = []
    for system in systems:
        cells = []
        for name in columns:
            value, span = system.score.get(name), (system.score.get("intervals") or {}).get(name)
            cells.append(f'<td data-name="{name}">{"–" if value is None else f"{value:.1f}"}'
                         + (f"<small>{span[0]:.1f} to {span[1]:.1f}</small>" if span else "") + "</td>")
        about = f"{text(system.dataset)}, {system.score['n']} clips"
        rows.append(f"<tr><th scope=row>{math(system.name)}<small>{about}</small></th>{''.join(cells)}</tr>")
    return table_of("Percent", columns, rows)


def table_of(corner: str, columns: list[str], rows: list[str]) -> str:
    """Rows (HTML) under a head of metric names."""
    head = "".join(f"<th scope=col>{name}</th>" for name in columns)
    return (f'<table class="scores"><thead><tr><th scope=col>{corner}</th>{head}</tr></thead>'
            f'<tbody>{"".join(rows)}</tbody></table>')


def paired_table(differences: list[tuple[str, dict]]) -> str:
    """(what is compared, metrics.paired of it) -> a table; a difference whose interval leaves out 0 is bold."""
    columns, rows = [*COLUMNS, "FCR/WAR"], []
    for name, values in differences:
        cells = []
        for metric in columns:
            point, low, high = values.get(metric, (None, 0, 0))
            sure = ' class="sure"' if point is not None and (low > 0 or high < 0) else ""
            cells.append(f'<td data-name="{metric}"{sure}>' + ("–" if point is None else
                         f"{point:+.1f}<small>{low:+.1f} to {high:+.1f}</small>".replace("-", "−")) + "</td>")
        rows.append(f"<tr><th scope=row>{math(name)}</th>{''.join(cells)}</tr>")
    return table_of("Points", columns, rows)


def confusion(system) -> str:
    """A row a true label, a column a prediction; the shade is the share of the row."""
    names, score = [*system.score["labels"], "unknown"], system.score
    head = "".join(f"<th scope=col><span>{text(name)}</span></th>" for name in [*names, "recall"])
    rows = []
    for name, counts in zip(score["labels"], score["confusion"]):
        total = max(1, sum(counts))
        cells = "".join(f'<td style="--r:{count / total:.3f}"{"" if count else " class=zero"}>{count}</td>'
                        for count in counts)
        recall = score["recall"].get(name)
        rows.append(f"<tr><th scope=row>{text(name)}</th>{cells}"
                    f'<td class="recall">{"–" if recall is None else f"{recall:.0f}%"}</td></tr>')
    return (f"<figure tabindex=0><figcaption>{math(system.name)}</figcaption><table class=matrix>"
            f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></figure>")


# ---- completions -----------------------------------------------------------------------------------------------------


def hue(label: str) -> int | None:
    """Hue of a label of either head; None for neutral and for GoEmotions' classes that the paper does not use."""
    return HUES.get(canonical(label))


def math(value) -> str:
    """`pages.text` with R_E, R_answer, R_format as the paper sets them."""
    return re.sub(r"\bR_(E|answer|format)\b", r"R<sub>\1</sub>", text(value))


def sentence(words: str, labels: list[str], e_gt: str) -> tuple[str, bool]:
    """A sentence with its labels beside it, and whether it counts for e_gt (c of Eq. 4)."""
    def names(label: str) -> bool:
        return explanation_reward([[label]], e_gt, neutral_filter=False) > 0

    counts = any(map(names, labels))
    colour = hue(next(filter(names, labels), labels[0])) if labels else None
    kind = "" if colour is not None else " grey" if counts else " plain"
    style = "" if colour is None else f' style="--h:{colour}"'
    return (f'<span class="sentence{kind}"{style}>{text(words)}<span class="tag">'
            f'{text(", ".join(labels) or "no label")}{" ✓" if counts else ""}</span></span>'), counts


def completion(title: str, output: str, e_gt: str, sentences: list[str], labels: list[list[str]], facts: list[tuple],
               run: int | None = None) -> str:
    """One completion: its sentences with their labels, its answer, and `facts` [(name, value, right or None)]."""
    cut = len(output) > TEXT
    if sentences:
        shown, room = [], TEXT
        for words, names in zip(sentences, labels):
            if room <= 0:
                break
            shown.append(sentence(words[:room], names, e_gt)[0])
            room -= len(words)
        body = f'<p class="text">{" ".join(shown)}</p>'
        if extract_answer(output) is None:
            body += f"<details><summary>as it was written</summary><pre>{text(output[:TEXT])}</pre></details>"
    else:
        body = f"<pre>{text(output[:TEXT])}</pre>"
    if cut:
        body += f'<p class="note">cut after {TEXT} of {len(output)} characters</p>'
    marks = {True: ' <span class="ok">✓</span>', False: ' <span class="no">✗</span>', None: ""}
    line = "".join(f"<span>{math(name)} <b>{text(value)}</b>{marks[right]}</span>" for name, value, right in facts)
    edge = "" if run is None else f' style="--edge:var(--run{run})"'
    return f'<article class="completion"{edge}><h4>{math(title)}</h4>{body}<p class="rewards">{line}</p></article>'


def case(heading: str, media: ClipMedia | None, columns: list[str]) -> str:
    """A clip with what was said about it. heading is HTML."""
    shown = ""
    if media and media.frames:
        pictures = "".join(f'<img src="{uri}" alt="frame {n} of the clip">' for n, uri in enumerate(media.frames, 1))
        alone, player = " alone", ""
        if media.player:
            alone, player = "", (f'<video src="{media.player}" poster="{media.frames[0]}" controls playsinline '
                                 'preload="none"></video>')
        shown = f'<div class="media{alone}" style="--ratio:{media.ratio:.3f}">{pictures}{player}</div>'
    if media and media.note:
        shown += f'<p class="note">{text(media.note)}</p>'
    return (f'<figure class="case"><figcaption>{heading}</figcaption>{shown}'
            f'<div class="columns">{"".join(columns)}</div></figure>')


def label_legend(labels: set[str]) -> str:
    """The emotions that occur, in the order of ERV_LABELS, each as a marked sentence shows it."""
    order = {name: i for i, name in enumerate(ERV_LABELS)}
    def mark(label: str) -> str:
        colour = hue(label)
        return (f'<li><span class="sentence plain">{text(label)}</span></li>' if colour is None else
                f'<li><span class="sentence" style="--h:{colour}">{text(label)}</span></li>')
    return f'<ul class="legend">{"".join(mark(x) for x in sorted(labels, key=lambda x: (order.get(x, 99), x)))}</ul>'


# ---- settings --------------------------------------------------------------------------------------------------------


def settings_tables(runs: list) -> str:
    """What differs between the runs in sight, everything else folded; versions, commit and command."""
    def shown(rows: list[tuple[str, list]]) -> str:
        cells = [[text(name), *(text(str(value)[:SETTING]) for value in values)] for name, values in rows]
        return table(["", *(text(run.name) for run in runs)], cells,
                     f' class="settings" style="min-width:{8 + 7 * len(runs)}rem"')

    def gathered(field: str) -> list[tuple[str, list]]:
        names = dict.fromkeys(name for run in runs for name in run.config.get(field) or {})
        return [(name, [(run.config.get(field) or {}).get(name, "–") for run in runs]) for name in names]

    rows = gathered("settings")
    differ = [row for row in rows if len(set(map(str, row[1]))) > 1]
    commands = [" ".join(map(str, run.config.get("command") or ["–"])) for run in runs]
    about = [*gathered("versions"), ("commit", [run.config.get("git_commit") or "–" for run in runs]),
             ("command", commands)]
    parts = [f"<h3>Settings in which the runs differ</h3>{shown(differ)}"] if len(runs) > 1 and differ else []
    parts.append(f"<details><summary>All {len(rows)} settings</summary>{shown(rows)}</details>")
    parts.append(f"<h3>Versions</h3>{shown(about)}")
    return "".join(parts)
