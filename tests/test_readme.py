"""Every command that README.md shows is one that the scripts take: no invented options, no forgotten ones."""

import re
import shlex
import sys
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "tools")]
import audit  # noqa: E402
import augment  # noqa: E402
import erv  # noqa: E402
import evaluate  # noqa: E402
import infer  # noqa: E402
import plan  # noqa: E402

from erv_min.run.settings import PRESETS, GRPOSettings, SFTSettings, parse  # noqa: F401


class Started(Exception):
    """The command line was read, and the work would begin."""


def begin(*_, **__):
    raise Started


def parse_only(script: str, argv: list[str], patch) -> None:
    """Reads the command line as the script does, and exits with its usage error. The page's paths need not exist."""
    patch.setattr("erv_min.run.options.missing_path", lambda text, kind: None)
    if script == "augment":
        augment.parser().parse_args(argv)
    elif script == "erv":
        parse(erv.ERVSettings, erv.PRESETS, "", argv)
    elif script == "audit":
        parse(audit.AuditSettings, {}, "", argv[1:] if argv[:1] == ["score"] else argv)
    elif script in ("sft", "grpo"):
        parse({"sft": SFTSettings, "grpo": GRPOSettings}[script], PRESETS[script], "", argv)
    else:
        module, name = {"evaluate": (evaluate, "join_processes"), "infer": (infer, "find_clips"),
                        "plan": (plan, "plan")}[script]
        patch.setattr(module, name, begin)
        with pytest.raises(Started):
            module.main(argv)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(script, arguments) of each command in the page's bash blocks."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = [*takewhile(lambda word: word not in (">", ">>", "|"), shlex.split(line, comments=True))]
            at = next((i for i, word in enumerate(words) if re.fullmatch(r"(?:.*/)?scripts/(?:tools/)?\w+\.py", word)), None)
            if at is not None and "--help" not in words:
                found.append((Path(words[at]).stem, words[at + 1:]))
    return found


KNOWN = ("sft", "grpo", "erv", "evaluate", "augment", "infer", "plan", "audit")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_page(page, monkeypatch, capsys):
    for script, argv in (x for x in commands(page) if x[0] in KNOWN):
        try:
            parse_only(script, argv, monkeypatch)
        except SystemExit as error:
            assert error.code == 0, f"{page.name}: {script}.py {' '.join(argv)}: {capsys.readouterr().err}"
