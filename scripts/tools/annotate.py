"""The annotated paper: each equation beside the code that runs, its test and its numbers, on one page without network.

    python scripts/tools/annotate.py [--run runs/toy] --out annotated.html

Prose and equations (MathML by hand) stand in templates/annotated_sections.html. Its comments say what is put in when
the page is built: `code PATH NAME` and `test NAME`, read from their files; `numbers NAME`, a function of
annotate_numbers.py that calls the real ones; `divergence N ...`, rows of erv_min/README.md; `tree`, the walk of a GRPO
step; `precisions`, fsdp.py's table; `symbols`, one per line: MathML | name in the code | shape and type. With --run the
verifier and the completions are a run's (RUN/erv, RUN/completions.jsonl).
"""

import argparse
import ast
import builtins
import keyword
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import annotate_numbers
import torch
from annotate_numbers import Group, read_group, table
from pages import TEMPLATES, fill, text

from erv_min import fsdp
from erv_min.run.errors import DataError, ErvMinError
from erv_min.run.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = TEMPLATES / "annotated_sections.html"

# ---- code: read from its files, and who opens whom -------------------------------------------------------------------


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def definitions(path: Path) -> dict[str, ast.AST]:
    """Functions, classes and methods of a file by qualified name."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = {node.name: node for node in tree(path).body if isinstance(node, kinds)}
    return top | {f"{name}.{x.name}": x for name, node in top.items() if isinstance(node, ast.ClassDef)
                  for x in node.body if isinstance(x, kinds)}


def find(path: Path, name: str) -> ast.AST:
    if not path.is_file() or name not in definitions(path):
        raise DataError(f"{SECTIONS.name} names {name} of {path.relative_to(ROOT)}, which is not there")
    return definitions(path)[name]


def find_test(name: str) -> Path:
    paths = [p for p in sorted((ROOT / "tests").rglob("*.py")) if f"def {name}(" in p.read_text(encoding="utf-8")]
    if len(paths) != 1:
        raise DataError(f"{SECTIONS.name} names {name}, which {len(paths)} files under tests/ define; it must be one")
    return paths[0]


STRING = r'"""[\s\S]*?"""|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\''
MARKED = re.compile(rf"({STRING})|(#[^\n]*)|\b({'|'.join(keyword.kwlist)})\b")


def highlighted(path: Path, node: ast.AST) -> tuple[str, int, int]:
    """The source as HTML, strings, comments and keywords marked, and its first and last line."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    source = textwrap.dedent("\n".join(path.read_text(encoding="utf-8").splitlines()[first - 1 : node.end_lineno]))
    out, at = "", 0
    for m in MARKED.finditer(source):
        kind = "sck"[m.lastindex - 1]
        marked = "\n".join(f'<i class="{kind}">{text(line)}</i>' for line in m[0].split("\n"))
        out, at = out + text(source[at : m.start()]) + marked, m.end()
    lines = (out + text(source[at:])).split("\n")
    numbered = (f'<span class="l" data-l="{n}">{line}\n</span>' for n, line in enumerate(lines, first))
    return "".join(numbered), first, node.end_lineno


# Variables whose class the text of their function does not say.
HELD = {"policy": "Sharded", "reference": "Sharded", "verifier": "Verifier", "model": "HumanOmni"}
COMMON = {x for kind in (torch, torch.Tensor, torch.nn.Module, dict, list, str, set, Path, builtins) for x in dir(kind)}


class Walk:
    """Which function names which, from the text alone. A function or class is written (path, qualified name)."""

    def __init__(self):
        paths = [*sorted((ROOT / "erv_min").rglob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]
        self.known = {(p, name): node for p in paths if "toy" not in p.parts for name, node in definitions(p).items()}
        self.methods, classes, self.built = {}, {}, {}
        for path, name in self.known:
            if "." in name:
                self.methods.setdefault(name.split(".")[1], []).append((path, name))
            elif isinstance(self.known[path, name], ast.ClassDef):
                classes[name] = path, name
        self.held = {variable: classes[name] for variable, name in HELD.items() if name in classes}
        for x in (x for node in self.known.values() for x in ast.walk(node)):
            if isinstance(x, ast.Assign) and isinstance(x.targets[0], ast.Attribute) and isinstance(x.value, ast.Call):
                path, name = classes.get(getattr(x.value.func, "id", ""), (None, ""))
                if (path, f"{name}.forward") in self.known:  # self.bert_model = BertEncoder(...): its calls are forward
                    self.built[x.targets[0].attr] = path, f"{name}.forward"
        self.opens = {key: self.named_in(key, node) for key, node in self.known.items()}
        functions = [key for key, node in self.known.items() if isinstance(node, ast.FunctionDef)]
        self.opened_by = {key: [k for k in functions if key in self.opens[k]] for key in self.known}
        grpo = ROOT / "scripts" / "grpo.py"
        loop = next((x for x in find(grpo, "main").body if isinstance(x, ast.For)), find(grpo, "main"))
        self.step = self.named_in((grpo, "main"), loop)  # what one GRPO step names itself
        self.reached, todo = set(), list(self.step)
        while todo:
            if (key := todo.pop()) not in self.reached:
                self.reached.add(key)
                todo += self.opens[key]

    @cache
    def names(self, path: Path) -> dict[str, tuple]:
        """What stands under which name at a file's top level: its own definitions, and what it imports."""
        found = {name: (path, name) for name in definitions(path) if "." not in name}
        for node in tree(path).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("erv_min"):
                base = ROOT.joinpath(*node.module.split("."))
                for alias in node.names:
                    module = base / f"{alias.name}.py"
                    target = (module, "") if module.is_file() else (base.with_suffix(".py"), alias.name)
                    found[alias.asname or alias.name] = target
        return found

    def named_in(self, key: tuple, node: ast.AST) -> list[tuple]:
        """In the order of the text. A method counts where its class is plain or no other known class has its name."""
        path, owner, names, found = key[0], key[1].partition(".")[0], self.names(key[0]), {}
        skip = {id(y) for x in ast.walk(node) for note in ("annotation", "returns") if getattr(x, note, None)
                for y in ast.walk(getattr(x, note))}
        parts = sorted((x for x in ast.walk(node) if hasattr(x, "lineno") and id(x) not in skip),
                       key=lambda x: (x.lineno, x.col_offset))  # an attribute before the name that it is of
        local = {x.id for x in parts if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        local |= {x.arg for x in parts if isinstance(x, ast.arg)}
        called = {id(x.func) for x in parts if isinstance(x, ast.Call)}
        for x in parts:
            target = None
            if isinstance(x, ast.Name) and x.id not in local and id(x) not in skip:
                target = names.get(x.id)
            elif isinstance(x, ast.Attribute):
                at = getattr(x.value, "id", None)
                base = names.get(at) if at not in local else None
                base = (path, owner) if at in ("self", "cls") else base or self.held.get(at)
                if base and (base[0], f"{base[1]}.{x.attr}".lstrip(".")) in self.known:
                    target = base[0], f"{base[1]}.{x.attr}".lstrip(".")
                    skip.add(id(x.value))
                elif id(x) in called and x.attr in self.built and at != "self":
                    target = self.built[x.attr]
                elif x.attr not in COMMON and len(self.methods.get(x.attr, ())) == 1:
                    (method,) = self.methods[x.attr]
                    is_property = any(getattr(d, "id", "") == "property" for d in self.known[method].decorator_list)
                    target = method if id(x) in called or is_property else None
            if target in self.known and target != key and target[0].stem != "errors":
                found[target] = None
        return list(found)


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

    def walk_of_step(self, keys: list[tuple], seen: set) -> str:
        items = ""
        for key in keys:
            if key not in seen and key in self.walk.reached:
                seen.add(key)
                below = self.walk_of_step(self.walk.opens[key], seen)
                nested = f"<ol>{below}</ol>" if below else ""
                items += f"<li>{self.link(key)}{nested}</li>" if key in self.shown else below
        return items

    def tree(self) -> str:
        return f'<ol class="walk">{self.walk_of_step(self.walk.step, set())}</ol>'

    def precisions(self) -> str:
        """The table of types in fsdp's docstring."""
        rows = [line.strip("| ").split("|") for line in (fsdp.__doc__ or "").splitlines() if line.startswith("| ")]
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
    try:
        main()
    except ErvMinError as error:
        sys.exit(f"{type(error).__name__}: {error}")
