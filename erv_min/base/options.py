"""Settings as dataclasses: `option` declares one in one place, with its presets, its range, its help and its group.

    beta: float = option(0.04, "weight of the KL term (Eq. 3)", toy=0.07, least=0)

Every script reads its settings by `parse`, which checks all of them before anything is loaded.
"""

import argparse
import dataclasses
import math
import re
from pathlib import Path

from erv_min.base.errors import SettingsError

# Group of options -> its title. --help lists those of LISTED, --help all every one.
GROUPS = {"method": "the method", "reward": "the reward", "variant": "named variants of the objective, divergences",
          "data": "data and what the model is shown", "machine": "machine, memory, checkpoints",
          "toy": "the embedded world, and what is watched"}
LISTED = ("method", "reward")
PRESETS = ("toy", "paper-0.5b", "paper-7b")


def option(default, help: str, choices: tuple = (), *, group: str = "method", path: str = "", needed: bool = False,
           least: float | None = None, over: float | None = None, most: float | None = None, why: str = "", **presets):
    """A field with its help text and what is allowed: one of `choices`; >= `least`; > `over`; <= `most`.

    path: what the text names, see PATHS. needed: a command line must name it. why: ends the message of a refusal.
    presets: the values of presets that differ from the default: toy=, paper= (both sizes), paper_7b=.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, group=group, path=path, needed=needed, least=least, over=over, most=most, why=why,
        presets=presets))


def option_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def preset_value(f: dataclasses.Field, preset: str):
    """The value of a field in a preset: "toy", "paper-0.5b", "paper-7b", or "paper" for both sizes."""
    names = {"paper-7b": ("paper_7b", "paper"), "toy": ("toy",)}.get(preset, ("paper",))
    return next((f.metadata["presets"][name] for name in names if name in f.metadata["presets"]), f.default)


def preset_values(cls: type, preset: str) -> dict:
    """Every field of the settings dataclass `cls` -> its value in a preset."""
    return {f.name: preset_value(f, preset) for f in dataclasses.fields(cls)}


# ---- one check of everything -----------------------------------------------------------------------------------------

BOUNDS = (("least", "at least {}", lambda value, bound: value >= bound),
          ("over", "more than {}", lambda value, bound: value > bound),
          ("most", "at most {}", lambda value, bound: value <= bound))
PATHS = {  # kind of text -> the paths in it
    "files": lambda text: file_list(text),
    "hub": lambda text: [text],  # a folder, or a hub repository
    "hubs": lambda text: text.split(","),
    "run": lambda text: [],  # a run's own folder: need not be there, and is none that another option names
    "data": lambda text: [path for part in re.split(r",(?=\w+:)", text) for path in  # examples.load_examples
                          re.fullmatch(r"json:(?:\w+:)?(.+?)(?:@(.+))?|(?:\w+:)?(.*?)(?:@set_[1-5])?",
                                       part.strip()).groups() if path]}


def check(settings) -> None:
    """Raises SettingsError, one line, on the first value out of its range, on a path that is not there, and on a run's
    own folder that another option names."""
    own_folder = any(f.metadata["path"] == "run" for f in dataclasses.fields(settings))
    for f in dataclasses.fields(settings):
        value, m, name = getattr(settings, f.name), f.metadata, option_name(f.name)
        if m["choices"] and value not in m["choices"]:
            raise SettingsError(f"{name} must be one of {', '.join(map(repr, m['choices']))}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{name} must be a number, not {value}")
        bounds = [(text.format(m[key]), holds(value, m[key])) for key, text, holds in BOUNDS if m[key] is not None]
        if not all(ok for _, ok in bounds):
            raise SettingsError(f"{name} must be {' and '.join(text for text, _ in bounds)}, not {value}"
                                + (f": {m['why']}" if m["why"] else ""))
        if m["path"] and (gone := missing_path(value, m["path"])):
            raise SettingsError(f"{name} {value}: there is no file or folder {gone}")
        other = getattr(settings, "out", "") if m["path"] == "hub" and own_folder else ""
        if value and other and Path(value).resolve() == Path(other).resolve():
            raise SettingsError(f"--out {other}: {name} names this folder, too, which would be overwritten: give another "
                                "--out")


def file_list(text: str) -> list[str]:
    """The files of an option's text, separated by commas; what is there by this name, comma and all, is one file."""
    return [text] if Path(text).exists() else text.split(",")


def missing_path(text: str, kind: str) -> str | None:
    """The first path in an option's text that does not exist. What may be a hub repository counts as a path if it is
    absolute, begins with a dot, or lies in a folder that exists."""
    for part in filter(None, map(str.strip, PATHS[kind](text))):
        path = Path(part)
        local = not kind.startswith("hub") or part.startswith(("/", ".")) or ("/" in part and path.parent.is_dir())
        if local and not path.exists():
            return part
    return None


# ---- command line ----------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A number of things, as argparse's `type`."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


class OneLineParser(argparse.ArgumentParser):
    """Exits with one line and status 2 if a command line is wrong: the usage of sixty options would hide it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class Help(argparse.Action):
    """--help: the options of LISTED; --help all: every option."""

    def __call__(self, parser, namespace, value, option_string=None):
        for action in parser._actions:
            if value != "all" and action.container.title in [GROUPS[x] for x in GROUPS if x not in LISTED]:
                action.help = argparse.SUPPRESS
        for group in parser._action_groups:  # an empty group shows no title, its description would stay
            if all(action.help == argparse.SUPPRESS for action in group._group_actions):
                group.description = None
        parser.print_help()
        if value != "all" and any(action.help == argparse.SUPPRESS for action in parser._actions):
            print("\n--help all lists every option")
        parser.exit()


def parser_for(cls: type, description: str, parents: list[argparse.ArgumentParser] = ()) -> argparse.ArgumentParser:
    """A parser with one option per field of the settings dataclass `cls`. Options are not to be abbreviated."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                           allow_abbrev=False, add_help=False, parents=parents)
    parser.add_argument("-h", "--help", action=Help, nargs="?", choices=("all",), default=argparse.SUPPRESS,
                        help="show this, or all options")
    add_options(parser, cls)
    return parser


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """One option per field of `cls`, under the title of its group. What is not given is not in the parsed arguments."""
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    presets = PRESETS if "preset" in [f.name for f in dataclasses.fields(cls)] else ("",)
    for f in dataclasses.fields(cls):
        how = dict(type=type(f.default), metavar=f.name.rsplit("_", 1)[-1].upper())
        if isinstance(f.default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif f.metadata["choices"]:
            how = dict(type=type(f.default), choices=f.metadata["choices"])
        groups[f.metadata["group"]].add_argument(
            option_name(f.name), dest=f.name, default=argparse.SUPPRESS,
            help=(f.metadata["help"] + shown_default(f, presets)).replace("%", "%%"), **how)


def shown_default(f: dataclasses.Field, presets: tuple[str, ...]) -> str:
    """What the help text ends with: the default in brackets; if presets differ, each one's value."""
    values = {preset: preset_value(f, preset) if preset else f.default for preset in presets}
    texts = {preset: {True: "on", False: "off"}.get(x, x) if isinstance(x, bool) else x for preset, x in values.items()}
    if len(set(texts.values())) > 1:
        return " [" + ", ".join(f"{preset}: {'none' if text == '' else text}" for preset, text in texts.items()) + "]"
    text = next(iter(texts.values()))
    return "" if text == "" else f" [{text}]"


def checked(parser: argparse.ArgumentParser, cls: type, values: dict):
    """Checked settings from parsed values; exits with a usage error if one is refused, or missing."""
    try:
        settings = cls(**values)
        check(settings)
        for f in dataclasses.fields(cls):
            if f.metadata["needed"] and not getattr(settings, f.name):
                raise SettingsError(f"{option_name(f.name)} is needed: {f.metadata['help']}")
    except SettingsError as error:
        parser.error(str(error))
    return settings


def parse(cls: type, description: str, argv: list[str] | None = None):
    """Settings from the command line: the preset's values, overridden by what is given. Exits with a usage error."""
    parser = parser_for(cls, description)
    given = vars(parser.parse_args(argv))
    return checked(parser, cls, preset_values(cls, given.get("preset", "toy")) | given)
