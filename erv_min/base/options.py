"""Settings as dataclasses: `option` declares one in one place, with its presets, its range, its help and its group.

    beta: float = option(0.04, "weight of the KL term (Eq. 3)", toy=0.07, least=0)

Every script reads its settings by `parse`, which checks all of them before anything is loaded.
"""

import argparse
import dataclasses
import math
import operator
from pathlib import Path

from erv_min.base.errors import SettingsError

# Group of options -> its title. --help lists those of LISTED, --help all every one.
GROUPS = {"method": "the method", "reward": "the reward", "variant": "named variants of the objective, divergences",
          "data": "data and what the model is shown", "machine": "machine, memory, checkpoints",
          "toy": "the embedded world, and what is watched"}
LISTED = ("method", "reward")
PRESETS = ("toy", "paper-0.5b", "paper-7b")
BOUNDS = {"least": ("at least", operator.ge), "over": ("more than", operator.gt), "most": ("at most", operator.le)}


def option(default, help: str, choices: tuple = (), *, group: str = "method", **more):
    """A field with its help text and what is allowed: one of `choices`; >= `least`; > `over`; <= `most`.

    own_folder=True: where a run writes. A command line must name it, and no other option may.
    toy=, paper= (both sizes), paper_7b=: the values of presets that differ from the default.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, group=group, **more))


def option_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def preset_values(cls: type, preset: str) -> dict:
    """Every field of the settings dataclass `cls` -> its value in a preset of PRESETS; in "paper", what both sizes
    have; in "", the default."""
    names = {"": (), "toy": ("toy",), "paper-7b": ("paper_7b", "paper")}.get(preset, ("paper",))
    return {f.name: next((f.metadata[name] for name in names if name in f.metadata), f.default)
            for f in dataclasses.fields(cls)}


def check(settings) -> None:
    """Raises SettingsError, one line, on the first value out of its range, and if another option names the run's own
    folder, whatever there is would be overwritten."""
    fields = dataclasses.fields(settings)
    out = next((getattr(settings, f.name) for f in fields if "own_folder" in f.metadata), "")
    for f in fields:
        value, m, name = getattr(settings, f.name), f.metadata, option_name(f.name)
        if m["choices"] and value not in m["choices"]:
            raise SettingsError(f"{name} must be one of {', '.join(map(repr, m['choices']))}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{name} must be a number, not {value}")
        for bound, (words, holds) in BOUNDS.items():
            if bound in m and not holds(value, m[bound]):
                raise SettingsError(f"{name} must be {words} {m[bound]}, not {value}")
        names_folder = out and value and isinstance(value, str) and not m["choices"] and "own_folder" not in m
        if names_folder and Path(value).resolve() == Path(out).resolve():
            raise SettingsError(f"--out {out}: {name} names this folder, too, which would be overwritten: give another "
                                "--out")


def file_list(text: str) -> list[str]:
    """The files of an option's text, separated by commas; what is there by this name, comma and all, is one file."""
    return [text] if Path(text).exists() else text.split(",")


# ---- command line ----------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A number of things, as argparse's `type`."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


class OneLineParser(argparse.ArgumentParser):
    """Exits with one line and status 2 if a command line is wrong: the usage of sixty options would hide it. Options
    are not to be abbreviated; the description is shown as it is written."""

    def __init__(self, **how):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **how)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class Help(argparse.Action):
    """--help: the options of LISTED; --help all: every option."""

    def __call__(self, parser, namespace, value, option_string=None):
        hidden = [title for name, title in GROUPS.items() if value != "all" and name not in LISTED]
        parser._action_groups = [group for group in parser._action_groups if group.title not in hidden]
        parser.print_help()
        parser.exit()


def parser_for(cls: type, description: str, parents: list[argparse.ArgumentParser] = ()) -> argparse.ArgumentParser:
    """A parser with one option per field of the settings dataclass `cls`, under the title of its group. What is not
    given is not in the parsed arguments."""
    parser = OneLineParser(usage="%(prog)s [options]", description=description, parents=parents, add_help=False)
    parser.add_argument("-h", "--help", action=Help, nargs="?", choices=("all",), default=argparse.SUPPRESS,
                        help="show this; --help all lists every option")
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    presets = {name: preset_values(cls, name) for name in (PRESETS if hasattr(cls, "preset") else ("",))}
    for f in dataclasses.fields(cls):
        texts = [{"True": "on", "False": "off"}.get(x, x) for x in (str(each[f.name]) for each in presets.values())]
        named = [f"{name}: {text or 'none'}" for name, text in zip(presets, texts)]
        shown = named if len(set(texts)) > 1 else texts[:1]
        how = dict(type=type(f.default), metavar=f.name.rsplit("_", 1)[-1].upper())
        if isinstance(f.default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif f.metadata["choices"]:
            how = dict(type=type(f.default), choices=f.metadata["choices"])
        groups[f.metadata["group"]].add_argument(
            option_name(f.name), dest=f.name, default=argparse.SUPPRESS,
            help=(f.metadata["help"] + f" [{', '.join(shown)}]" * any(shown)).replace("%", "%%"), **how)
    return parser


def checked(parser: argparse.ArgumentParser, cls: type, values: dict):
    """Checked settings from parsed values; exits with a usage error if one is refused, or the run's folder missing."""
    try:
        settings = cls(**values)
        check(settings)
        for f in dataclasses.fields(cls):
            if "own_folder" in f.metadata and not getattr(settings, f.name):
                raise SettingsError(f"{option_name(f.name)} is needed: {f.metadata['help']}")
    except SettingsError as error:
        parser.error(str(error))
    return settings


def parse(cls: type, description: str, argv: list[str] | None = None):
    """Settings from the command line: the preset's values, overridden by what is given. Exits with a usage error."""
    parser = parser_for(cls, description)
    given = vars(parser.parse_args(argv))
    return checked(parser, cls, preset_values(cls, given.get("preset", "toy")) | given)
