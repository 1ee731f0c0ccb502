"""The promises about the source itself: few dependencies, few lines, no code run from a file, no path of one machine."""

import ast
import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("erv_min/**/*.py"), *ROOT.glob("scripts/**/*.py")])
RUNTIME = {"torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "soundfile", "av"}
EXTRAS = {"transformers"}  # parity, inside functions of scripts only


def imports(tree: ast.AST):
    """(top-level package, node, inside a function?) of every absolute import."""
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            yield name.split(".")[0], node, id(node) in inside


def test_imports_stay_within_the_contract():
    assert len(SOURCES) > 20
    for path in SOURCES:
        allowed = RUNTIME | {"erv_min"} | set(sys.stdlib_module_names)
        if "scripts" in path.parts:  # a script may import its neighbours
            allowed |= {neighbour.stem for folder in path.parents[:2] for neighbour in folder.glob("*.py")}
        for package, node, in_function in imports(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{node.lineno}: {package}"
            if package in EXTRAS:
                assert "scripts" in path.parts and in_function, where
            else:
                assert package in allowed, where
            if package in ("av", "soundfile"):  # a GPU machine may have neither
                assert in_function, f"{where} must be imported inside a function"


def test_pyproject_lists_exactly_the_runtime_dependencies():
    text = (ROOT / "pyproject.toml").read_text()
    if tomllib:
        listed = tomllib.loads(text)["project"]["dependencies"]
    else:
        listed = re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*?)\]", text, re.M | re.S)[1])
    assert {re.split(r"[<>=~!]", d)[0] for d in listed} == {
        "torch", "safetensors", "tokenizers", "huggingface-hub", "numpy", "soundfile", "av"}


def test_rooms_import_only_what_stands_above_them():
    """erv_min/ never imports scripts/, and the model knows nothing of data, rewards or training."""
    for path in ROOT.glob("erv_min/model/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("erv_min."):
                assert node.module in ("erv_min.config", "erv_min.base.errors", "erv_min.base.onednn") or node.module.startswith("erv_min.model."), (
                    f"{path.name}:{node.lineno} imports {node.module}")


def test_no_silent_except_and_no_code_from_files():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"{path}:{node.lineno}: except: pass"
                assert node.type is not None, f"{path}:{node.lineno}: bare except"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", "")
                keywords = {k.arg: k.value for k in node.keywords}
                if owner == "torch" and node.func.attr == "load":
                    assert getattr(keywords.get("weights_only"), "value", None) is True, f"{path}:{node.lineno}"
                assert not (isinstance(keywords.get("shell"), ast.Constant) and keywords["shell"].value), f"{path}:{node.lineno}: shell"
                assert "trust_remote_code" not in keywords, f"{path}:{node.lineno}"


def test_files_fit_a_sitting():
    for path in SOURCES:
        lines = path.read_text().count("\n")
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_path_of_one_machine():
    for path in [*SOURCES, *ROOT.glob("tests/*.py"), ROOT / "README.md", ROOT / ".ci" / "run"]:
        hit = re.search(r"/(home|mnt|root|data1|ssd)/\w+|/wo" + r"rk/", path.read_text())
        assert not hit, f"{path.relative_to(ROOT)}: {hit[0]}"
