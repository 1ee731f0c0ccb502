"""The annotated paper: each equation beside the code that runs, its test and its numbers, on one page without network.

    python scripts/tools/annotate.py [--run runs/toy] --out annotated.html

Prose and equations stand in templates/annotated_sections.html, whose first lines say how they are written. Sources are
read from their files, and functions run (annotate_numbers.py), when the page is built: neither can be out of date. With
--run the verifier and the completions are a run's: RUN/erv, RUN/completions.jsonl.
"""

import argparse
import ast
import html
import importlib
import json
import re
import textwrap
from functools import cache
from itertools import groupby
from pathlib import Path

import torch
from annotate_numbers import NUMBERS, TEXT, Group, read_group, seen_in
from pages import fill, text

from erv_min.run.errors import DataError
from erv_min.run.files import atomic_write
from erv_min.run.processes import run_script

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(r"<!--code (\S+) (\S+)(?: as (\S+))?-->")  # path, name, and how a call of it is written


class Html(str):
    """A value that is HTML already."""


def short(x) -> str:
    """A number, or a nested list of them, rounded; what repeats is counted."""
    if isinstance(x, list):
        runs = [(one, len(list(same))) for one, same in groupby(map(short, x))]
        return ", ".join(f"{one} ({n} times)" if n > 3 else ", ".join([one] * n) for one, n in runs)
    if isinstance(x, float):
        x = f"{x:.0e}" if 1e-12 < abs(x) < 5e-4 else f"{round(x, 3) or 0:g}"
    return str(x).replace("-", "−")


def value(x) -> str:
    """Text with `code`; a number or a small tensor, rounded, and whole in the element; of a large tensor the shape."""
    if isinstance(x, tuple):
        return "; ".join(map(value, x))
    if isinstance(x, torch.Tensor):
        x = x.tolist() if x.numel() < 32 else f"{x.dtype} {list(x.shape)}".removeprefix("torch.")
    if x is None:
        return "–"
    if isinstance(x, str):
        return x if isinstance(x, Html) else re.sub(r"`([^`]+)`", r"<code>\1</code>", text(x))
    return f'<data value="{text(json.dumps(x))}">{short(x)}</data>'


def table(rows: dict[str, dict]) -> str:
    """name -> {column -> value}; a single row stands upright."""
    if len(rows) == 1:
        ((only, row),) = rows.items()
        rows = {name: {only: x} for name, x in row.items()}
    head = "".join(f"<th scope=col>{value(name)}</th>" for name in ("", *next(iter(rows.values()))))
    body = [f"<tr><th scope=row>{value(name)}</th>{''.join(f'<td>{value(x)}</td>' for x in row.values())}</tr>"
            for name, row in rows.items()]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


TOKEN = re.compile(  # an element that is complete, a tag, or a word, number or sign with an index
    r"<(m[ino]|mtext)\b.*?</\1>|<[^>]+>|(?P<base>&\w+;|[^\W\d_]+|\d+|\S)(_\{(?P<long>.+?)\}|_(?P<index>\w+))?", re.S)


def mathml(found: re.Match) -> str:
    """What stands bare in an equation, as MathML."""
    base, index = found["base"], found["long"] or found["index"]
    if base is None:
        return found[0]
    kind = "mi" if base[0].isalpha() else "mn" if base[0].isdigit() else "mo"
    leaf = f"<{kind}>{base}</{kind}>" + '<mspace width="0.2em"/>' * (base == "log")
    return f"<msub>{leaf}<mrow>{TOKEN.sub(mathml, index)}</mrow></msub>" if index else leaf


@cache
def source(path: str, name: str) -> tuple[str, int, int]:
    """A function, class or (as Class.method) method of a file: its text, first and last line."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines() if (ROOT / path).is_file() else []
    node = ast.parse("\n".join(lines))
    for part in name.split("."):
        node = next((x for x in node.body if getattr(x, "name", "") == part), None)
        if node is None:
            raise DataError(f"the page names {name} of {path}, which is not there")
    first = min(x.lineno for x in (node, *node.decorator_list))
    return textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])), first, node.end_lineno


def listing(path: str, name: str) -> tuple[str, str]:
    """Of a function: heading with path and lines, and source, docstrings and comments marked."""
    code, first, last = source(path, name)
    code = re.sub(r'(""".*?"""|(?<=\s)# [^\n]*)', r"<i>\1</i>", html.escape(code, quote=False), flags=re.S)
    numbers = "\n".join(map(str, range(first, last + 1)))
    return (f"<code>{name}</code> <small>{path}, lines {first} to {last}</small>",
            f'<pre tabindex="0"><span>{numbers}</span><code>{code}</code></pre>')


def read_table(path: str) -> dict[str, dict]:
    """The first Markdown table of a file: its first column -> the others."""
    lines = re.search(r"(^\|.*\n)+", (ROOT / path).read_text(encoding="utf-8"), re.M)[0].splitlines()
    head, _, *rows = [[x.strip() for x in line.strip("| ").split("|")] for line in lines]
    return {row[0]: dict(zip(head[1:], row[1:])) for row in rows}


def anchor(key: tuple[str, str]) -> str:
    return f"{Path(key[0]).stem}.{key[1]}"


def link(key: tuple[str, str]) -> str:
    return f'<a href="#{anchor(key)}">{key[1]}</a>'


def head_and_calls(lines: str) -> tuple[list[str], dict[str, dict]]:
    """The words of the first line; of the others, heading | JSON object."""
    head, *calls = lines.strip().splitlines()
    return head.split(), {row: json.loads(given) for row, given in (line.split(" | ") for line in calls)}


def chosen(rows: dict[str, dict], columns: list[str]) -> str:
    """These columns of rows, all of them where none is named; one row need not have what another has."""
    for column in columns:
        if not any(column in row for row in rows.values()):
            raise DataError(f"the page asks for column {column}, which the numbers do not have")
    rows = {name: {x: row.get(x, "–") for x in columns or row} for name, row in rows.items()}
    return f'<div class="numbers">{table(rows)}</div>'


class Page:
    """Sections as HTML: `<!--code ...-->` is replaced by what the method `code` returns, and so on."""

    def __init__(self, group: Group, sections: str):
        self.group = group
        self.names = {(path, name): written or re.sub(r".*(?=\.)", "", name)  # a method: .name
                      for path, name, written in CODE.findall(sections)}
        self.opens = {key: self.calls(key) for key in self.names}
        self.html = re.sub(r"<section.*?</section>", self.section, sections[sections.index("<section"):], flags=re.S)

    def section(self, found: re.Match) -> str:
        self.source = "".join(source(path, name)[0] for path, name, _ in CODE.findall(found[0]))
        body = re.sub(r"<!--(\w+)\s*(.*?)-->", lambda m: getattr(self, m[1])(m[2]), found[0], flags=re.S)
        return re.sub(r"<math.*?</math>", lambda m: TOKEN.sub(mathml, m[0]), body, flags=re.S)

    def calls(self, key: tuple[str, str]) -> list[tuple[str, str]]:
        """Which functions of the page a function calls, in the order of its text; of two of one name its file's own."""
        calls = [x.func for x in ast.walk(ast.parse(source(*key)[0])) if isinstance(x, ast.Call)]
        found = []
        for function in sorted(calls, key=lambda x: (x.lineno, x.col_offset)):
            word = ast.unparse(function).removesuffix(".apply")
            fits = [k for k, name in self.names.items() if word == name or (name[0] == "." and word.endswith(name))]
            found += [k for k in fits if k[0] == key[0]] or fits
        return [k for k in dict.fromkeys(found) if k != key]

    def code(self, words: str) -> str:
        path, name = key = tuple(words.split()[:2])
        title, listed = listing(path, name)
        sides = (("opened by", [k for k in self.opens if key in self.opens[k]]), ("opens", self.opens[key]))
        margin = "".join(f"<dt>{side}</dt><dd>{', '.join(map(link, keys))}</dd>" for side, keys in sides if keys)
        return f'<div class="code" id="{anchor(key)}"><h3>{title}</h3><aside><dl>{margin}</dl></aside>{listed}</div>'

    def test(self, name: str) -> str:
        paths = [p for p in (ROOT / "tests").rglob("*.py") if f"def {name}(" in p.read_text(encoding="utf-8")]
        if len(paths) != 1:
            raise DataError(f"the page names {name}, which {len(paths)} files under tests/ define; it must be one")
        title, listed = listing(str(paths[0].relative_to(ROOT)), name)
        return f'<details class="test"><summary>Test: {title}</summary>{listed}</details>'

    def numbers(self, lines: str) -> str:
        """Rows of a function of NUMBERS; or a row of it for each line, which gives its arguments."""
        (name, *columns), calls = head_and_calls(lines)
        if name not in NUMBERS:
            raise DataError(f"the page names numbers {name}: there are {', '.join(NUMBERS)}")
        rows = {row: NUMBERS[name](self.group, **given) for row, given in calls.items()} or NUMBERS[name](self.group)
        return chosen(rows, columns)

    def call(self, lines: str) -> str:
        """Rows of a function's local variables, called with each line's arguments, of which a list is a tensor."""
        (path, name, *columns), calls = head_and_calls(lines)
        source(path, name)
        function, rows = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name), {}
        for row, given in calls.items():
            given = {k: torch.tensor(x) if isinstance(x, list) else x for k, x in given.items()}
            rows[row] = seen_in(function, lambda: function(**given))
        return chosen(rows, columns)

    def points(self, row: str) -> str:
        """The surrogate over the ratio, in hundredths: points of a curve."""
        x, y = (values.tolist() for values in NUMBERS["clip"](self.group)[row].values())
        return " ".join(f"{100 * a:.0f},{-100 * b:.1f}" for a, b in zip(x, y))

    def symbols(self, lines: str) -> str:
        rows = {}
        for symbol, name, kind in (line.split(" | ") for line in lines.strip().splitlines()):
            if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", self.source):
                raise DataError(f"the page gives {name} for a symbol, which no function of its section has")
            rows[Html(f"<math>{symbol}</math>")] = {"name in the code": f"`{name}`", "shape and type": kind}
        return table(rows)

    def divergence(self, numbers: str) -> str:
        listed = read_table("erv_min/README.md")
        if gone := set(numbers.split()) - listed.keys():
            raise DataError(f"the page names divergence {', '.join(gone)}, which erv_min/README.md does not list")
        return f'<aside class="divergence">{table({f"Divergence {n}": listed[n] for n in numbers.split()})}</aside>'

    def markdown(self, path: str) -> str:
        return table(read_table(path))


def build(group: Group, sections: str = TEXT) -> str:
    """The page. Raises DataError where a section names a function, a test, numbers or a symbol that is gone."""
    headings = re.findall(r'<section id="([^"]+)"[^>]*>\s*<h2>(.*?)</h2>', sections)
    return fill("annotated.html", css=fill("page.css") + fill("annotated.css"), source=text(group.source),
                nav="".join(f'<a href="#{name}">{heading}</a>' for name, heading in headings),
                sections=Page(group, sections).html)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="", help="a toy run of scripts/grpo.py: its verifier and completions")
    parser.add_argument("--out", default="annotated.html", help="the page")
    args = parser.parse_args(argv)
    page = build(read_group(args.run))
    atomic_write(args.out, page)
    print(f"{args.out}: {len(page.encode()) / 1e6:.2f} MB, numbers from {args.run or 'small examples'}")


if __name__ == "__main__":
    run_script(main)
