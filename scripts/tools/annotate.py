"""The annotated paper: each equation beside the code that runs, its test and its numbers, on one page without network.

    python scripts/tools/annotate.py [--run runs/toy] --out annotated.html

Prose and equations (MathML by hand) stand in templates/annotated_sections.html. Its comments say what is put in when
the page is built: `code PATH NAME` and `test NAME`, read from their files; `numbers NAME`, a function of
annotate_numbers.py that calls the real ones; `divergence N ...`, rows of erv_min/README.md; `tree`, the walk of a GRPO
step; `precisions`, fsdp.py's table; `symbols`, one per line: MathML | name in the code | shape and type. With --run the
verifier and the completions are a run's (RUN/erv, RUN/completions.jsonl).
"""

import argparse
import re

import annotate_numbers
from annotate_code import ROOT, anchor, find, find_test, highlighted, walk
from annotate_numbers import Group, read_group, table
from pages import TEMPLATES, fill, text

from erv_min import fsdp
from erv_min.run.errors import DataError
from erv_min.run.files import atomic_write
from erv_min.run.processes import run_script

SECTIONS = TEMPLATES / "annotated_sections.html"


class Page:
    """Sections with what their comments ask for put in."""

    def __init__(self, sections: str, group: Group):
        self.group, self.walk, self.sections = group, walk(), sections
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
        name = key[1] if "." in key[1] or (key in self.shown and key[1] != "main") else anchor(key)
        return (f'<a href="#{anchor(key)}">{name}</a>' if key in self.shown else
                f'<span title="{key[0].relative_to(ROOT)}">{name}</span>')

    def code(self, path: str, name: str) -> str:
        key = ROOT / path, name
        body, first, last = highlighted(key[0], find(*key))
        self.sources += "\n".join(key[0].read_text(encoding="utf-8").splitlines()[first - 1 : last])
        sides = {"opened by": self.walk.opened_by[key], "opens": self.walk.opens[key]}
        margin = "".join(f"<dt>{side}</dt><dd>{', '.join(map(self.link, keys)) or '–'}</dd>"
                         for side, keys in sides.items())
        step = '<p class="step">part of a GRPO step</p>' if key in self.walk.reached else ""
        where = f"{path}, lines {first} to {last}"
        return (f'<div class="code" id="{anchor(key)}"><h3><code>{name}</code> <small>{where}</small></h3><aside>'
                f'{step}<dl>{margin}</dl></aside><pre tabindex="0">{body}</pre></div>')

    def test(self, name: str) -> str:
        path = find_test(name)
        body, first, last = highlighted(path, find(path, name))
        where = f"{path.relative_to(ROOT)}, lines {first} to {last}"
        return (f'<details class="test"><summary>Test: <code>{name}</code> <small>{where}</small></summary>'
                f'<pre tabindex="0">{body}</pre></details>')

    def numbers(self, name: str) -> str:
        if not hasattr(annotate_numbers, f"numbers_{name}"):
            raise DataError(f"{SECTIONS.name} names numbers {name}: annotate_numbers.py has no numbers_{name}")
        return f'<div class="numbers">{getattr(annotate_numbers, f"numbers_{name}")(self.group)}</div>'

    def divergence(self, *numbers: str) -> str:
        parts = []
        for number in numbers:
            if self.divergences and number not in self.divergences:
                raise DataError(f"{SECTIONS.name} names divergence {number}, which {self.divergences_at} does not list")
            cells = [re.sub(r"`([^`]+)`", r"<code>\1</code>", text(cell)) for cell in self.divergences.get(number, [])]
            heads = ("", "Paper: ", "Released code: ", "Here: ") if len(cells) == 4 else ("",) * len(cells)
            said = ". ".join(head + cell for head, cell in zip(heads, cells))
            parts.append(f'<p><b>Divergence {number}{"," if said else ""}</b> {said}</p>')
        return f'<aside class="divergence">{"".join(parts)}</aside>'

    def nested(self, keys: list[tuple], seen: set) -> str:
        """Of `keys` and what they open in turn, what a GRPO step reaches on the page, each once, as list items."""
        items = ""
        for key in keys:
            if key not in seen and key in self.walk.reached:
                seen.add(key)
                below = self.nested(self.walk.opens[key], seen)
                inner = f"<ol>{below}</ol>" if below else ""
                items += f"<li>{self.link(key)}{inner}</li>" if key in self.shown else below
        return items

    def tree(self) -> str:
        return f'<ol class="walk">{self.nested(self.walk.step, set())}</ol>'

    def precisions(self) -> str:
        """The table of types in fsdp's docstring."""
        rows = [line.strip("| ").split("|") for line in (fsdp.__doc__ or "").splitlines() if line.startswith("| ")]
        if not rows:
            raise DataError(f"{SECTIONS.name} asks for the table of types in erv_min/fsdp.py's docstring: it is gone")
        head, *body = [[text(cell.strip()) for cell in row] for row in rows]
        return table(head, body)

    def symbols(self, found: re.Match) -> str:
        rows = [line.split(" | ") for line in found[1].strip().splitlines()]
        for symbol, name, _ in rows:
            if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", self.sources):
                raise DataError(f"{SECTIONS.name} gives {name} for a symbol, which no function of its section has")
        return table(["symbol", "name in the code", "shape and type"], [
            [f"<math>{symbol}</math>", f"<code>{text(name)}</code>", text(kind)] for symbol, name, kind in rows])


def build(group: Group, sections: str | None = None) -> str:
    """The page as HTML. Raises DataError where a section names a function, a test or a symbol that is gone."""
    sections = SECTIONS.read_text(encoding="utf-8") if sections is None else sections
    headings = re.findall(r'<section id="([^"]+)"[^>]*>\s*<h2>(.*?)</h2>', sections)
    return fill("annotated.html", css=fill("page.css") + fill("annotated.css"), source=text(group.source),
                nav="".join(f'<a href="#{name}">{heading}</a>' for name, heading in headings),
                sections=Page(sections, group).build())


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
