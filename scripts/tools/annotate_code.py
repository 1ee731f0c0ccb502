"""The code on annotate.py's page: sources by qualified name, and who opens whom, from the text alone."""

import ast
import builtins
import keyword
import re
import textwrap
from functools import cache
from pathlib import Path

import torch
from pages import text

from erv_min.run.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


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
        raise DataError(f"the page names {name} of {path.relative_to(ROOT)}, which is not there")
    return definitions(path)[name]


def find_test(name: str) -> Path:
    paths = [p for p in sorted((ROOT / "tests").rglob("*.py")) if f"def {name}(" in p.read_text(encoding="utf-8")]
    if len(paths) != 1:
        raise DataError(f"the page names {name}, which {len(paths)} files under tests/ define; it must be one")
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


def anchor(key: tuple) -> str:
    return f"{key[0].stem}.{key[1]}"


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


@cache
def walk() -> Walk:
    """The repository's, read once."""
    return Walk()
