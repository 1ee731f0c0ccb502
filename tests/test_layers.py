"""Arrows only go down: base < model and config < the flat method < data < train < toy."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "erv_min"
LAYERS = {"base": 0, "config": 1, "model": 1, "data": 3, "train": 4, "toy": 5}  # any other file: the method, 2


def layer(module: str) -> int:
    return LAYERS.get(module.split(".")[1], 2)


def test_arrows_only_go_down():
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [f"{node.module}.{x.name}" for x in node.names] if names == ["erv_min"] else []
            names += [x.name for x in node.names] if isinstance(node, ast.Import) else []
            for name in [name for name in names if name.startswith("erv_min.")]:
                assert layer(name) <= layer(module), f"{module} imports {name}"
                assert layer(module) > 0 or layer(name) == 0, f"{module} imports {name}"
