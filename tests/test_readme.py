"""What the README files say holds: their commands are ones that the scripts take, what they name is there, links lead."""

import argparse
import ast
import re
import shlex
import sys
from collections import defaultdict
from itertools import takewhile
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "tools")]
import annotate  # noqa: E402
import audit  # noqa: E402
import augment  # noqa: E402
import bench  # noqa: E402
import erv  # noqa: E402
import evaluate  # noqa: E402
import gpu_check  # noqa: E402
import infer  # noqa: E402
import plan  # noqa: E402
import report  # noqa: E402
import reproduce  # noqa: E402
import survey  # noqa: E402

from erv_min.base.hub import TEXT_FILES
from erv_min.base.options import parse
from erv_min.rewards import Reward
from erv_min.train.log import explanation_statistics, step_metrics
from erv_min.train.settings import ERVSettings, GRPOSettings, SFTSettings

PAGES = [ROOT / "README.md", *sorted(path for folder in ("erv_min", "scripts", "tests")
                                     for path in (ROOT / folder).rglob("README.md") if "golden" not in path.parts)]


class Started(Exception):
    """The command line was read, and the work would begin."""


def begin(*_, **__):
    raise Started


def parse_only(script: str, argv: list[str], patch) -> None:
    """Reads the command line as the script does, and exits with its usage error. The page's paths need not exist."""
    if script == "augment":
        augment.parser().parse_args(argv)
    elif script == "erv":
        parse(ERVSettings, "", argv)
    elif script == "audit":
        parse(audit.AuditSettings, "", argv)
    elif script in ("sft", "grpo"):
        parse({"sft": SFTSettings, "grpo": GRPOSettings}[script], "", argv)
    elif script in ("evaluate", "infer", "plan"):
        module, name = {"evaluate": (evaluate, "join_processes"), "infer": (infer, "find_clips"),
                        "plan": (plan, "plan")}[script]
        patch.setattr(module, name, begin)
        with pytest.raises(Started):
            module.main(argv)
    else:
        whole = argparse.ArgumentParser.parse_args
        with patch.context() as after, pytest.raises(Started):
            after.setattr(argparse.ArgumentParser, "parse_args", lambda *args: (whole(*args), begin()))
            {"annotate": annotate, "bench": bench, "gpu_check": gpu_check, "report": report, "reproduce": reproduce,
             "survey": survey}[script].main(argv)


KNOWN = ("sft", "grpo", "erv", "evaluate", "augment", "infer", "plan", "annotate", "audit", "bench", "gpu_check", "report",
         "reproduce", "survey")


def spans(text: str) -> list[str]:
    """What stands in backticks, outside of the blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of each command in the page's bash blocks and in its sentences; "..." stands for any."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
             for line in re.split(r"\n|&&", block.replace("\\\n", " "))]
    lines += [span.replace("\n", " ") for span in spans(text) if re.match(r"(python|torchrun) ", span)]
    lines += [f"scripts/tools/bench.py {span}" for span in spans(text) if re.match(rf"({'|'.join(bench.BENCHES)}) --", span)]
    found = []
    for line in lines:
        words = [*takewhile(lambda word: word not in (">", ">>", "|"), shlex.split(line, comments=True))]
        at = next((i for i, word in enumerate(words) if re.fullmatch(r"(?:.*/)?scripts/(?:tools/)?\w+\.py", word)), None)
        if at is not None and not {"--help", "..."} & {*words}:
            found.append((Path(words[at]).stem, words[at + 1:]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_page(page, monkeypatch, capsys):
    for script, argv in commands(page.read_text(encoding="utf-8")):
        assert script in KNOWN, f"{page}: {script}.py"
        try:
            parse_only(script, argv, monkeypatch)
        except SystemExit as error:
            assert error.code == 0, f"{page.name}: {script}.py {' '.join(argv)}: {capsys.readouterr().err}"


def test_a_command_with_an_unknown_option_is_seen(monkeypatch):
    for line in ("`python scripts/reproduce.py --sseds 2`", "```bash\nx && torchrun scripts/grpo.py --mu 0 \\\n --out x\n```",
                 "`python scripts/tools/audit.py --er x`", "`step --sizes 0.5b`"):
        (found,) = commands(line)
        with pytest.raises(SystemExit):
            parse_only(*found, monkeypatch)


def defined(path: Path) -> set[str]:
    """Names of a file's functions, classes, methods (Class.name) and module-level values."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}
    return names


def all_tests() -> set[str]:
    return {name for path in (ROOT / "tests").rglob("test_*.py") for name in defined(path) if name.startswith("test_")}


def missing_of_table(table: str) -> list[str]:
    """What the rows of a table "paper | function | test" name and is not there: files, and functions in their file."""
    gone = []
    for row in re.findall(r"^\| .* \|$", table, re.MULTILINE)[1:]:
        for cell, folders in zip(row.strip("| ").split(" | ")[1:], (("erv_min", ""), ("tests",))):
            file, names = None, 0
            for span in spans(cell):
                if span.endswith(".py"):
                    paths = [ROOT / folder / span for folder in folders if (ROOT / folder / span).exists()]
                    file, gone = paths[0] if paths else None, gone + ([] if paths else [span])
                elif file:
                    names, gone = names + 1, gone + ([] if span in defined(file) else [f"{file.name} {span}"])
            gone += [] if names else [f"no function in {cell!r}"]
    return gone


def test_equation_function_test():
    """Every file, function and test of the first page's table exists; one that is gone is found."""
    text = PAGES[0].read_text(encoding="utf-8")
    table = text[text.index("| paper | function | test |"):].split("\n\n")[0]
    assert missing_of_table(table) == [] and table.count("\n") > 12
    for there in ("`select_labels`", "`test_eq4`", "`sft.py`", "`test_survey.py`", "`HumanOmni.splice`"):
        assert there in table and missing_of_table(table.replace(there, there[:-1] + "x`"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_page_names_is_there(page):
    """Files of scripts/ and tests/, tests by name or file, and `module.name` of the package."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:scripts|tests|erv_min)/[\w/]+\.py\b", text):
        assert (ROOT / path).exists(), path
    files, there = {path.name for path in (ROOT / "tests").rglob("*.py")}, all_tests()
    for span in spans(text):
        if re.fullmatch(r"test_\w+", span):
            assert span in there, span
        elif re.fullmatch(r"test_\w+\.py", span):
            assert span in files, span
    modules = {path.stem: path for path in (ROOT / "erv_min").rglob("*.py")}
    for stem, name in re.findall(r"`(?:\w+/)*(\w+)\.([A-Za-z]\w*)`", text):
        if stem in modules and name not in ("py", "json", "jsonl", "safetensors"):
            assert name in defined(modules[stem]), f"{stem}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_first_page_is_short():
    text = PAGES[0].read_text(encoding="utf-8")
    assert text.count("\n") <= 200 and len(text.split()) <= 2000


def test_the_table_of_metrics_holds_what_a_step_logs():
    """scripts/README.md explains every key of a GRPO step's row, and none that is not there."""
    text = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| key |"):].split("\n\n")[0]
    explained = {key for row in table.splitlines() for key in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    reward = Reward(1.0, 1.0, 1.0, 3.0, [], [])
    logged = {*step_metrics([reward, reward], [defaultdict(lambda: 1.0)] * 2, 2), *explanation_statistics([])}
    log = ast.parse((ROOT / "erv_min" / "train" / "log.py").read_text(encoding="utf-8"))
    (call,) = [node for node in ast.walk(log) if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.run.log"]
    logged |= {key.value for key in call.args[1].keys if key is not None}
    assert explained == logged | {"held_out_EEA", "held_out_EPC", "skipped", "skipped_because"}  # watched; Run.log


def test_the_line_that_publishes_takes_the_models_files_alone():
    """What the released code loads and no log, no list of clips, no state."""
    text = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    patterns = ast.literal_eval(re.search(r"allow_patterns=(\[.*?\])", text)[1])
    model = ["config.json", "towers.json", "model.safetensors", *TEXT_FILES]
    beside = ["metrics.jsonl", "completions.jsonl", "missing_clips.txt", "failed_clips.jsonl", "evaluation.json", ".lock",
              "state-000004/state.json", "state-000004/00000.safetensors"]
    assert [*filter_repo_objects(model + beside, allow_patterns=patterns)] == model
