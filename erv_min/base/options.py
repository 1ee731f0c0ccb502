"""Settings as dataclasses: `option` declares an option once; its range, its help and its check come from there.

Every script reads its settings by `parse`, which checks all of them before anything is loaded.
"""

import argparse
import dataclasses
import math
import re
from pathlib import Path

from erv_min.base.errors import SettingsError


def option(default, help: str, choices: tuple = (), *, least: float | None = None, over: float | None = None,
            most: float | None = None, why: str = "", path: str = "", option: bool = True):
    """A field with its help text and what is allowed: one of `choices`; >= `least`; > `over`; <= `most`.

    why: ends the message of a refusal. path: what the text names, see PATHS. option=False: not on the command line.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, least=least, over=over, most=most, why=why, path=path, option=option))


def option_name(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---- one check of everything -----------------------------------------------------------------------------------------

BOUNDS = (("least", "at least {}", lambda value, bound: value >= bound),
          ("over", "more than {}", lambda value, bound: value > bound),
          ("most", "at most {}", lambda value, bound: value <= bound))
PATHS = {  # kind of text -> the paths in it
    "files": lambda text: text.split(","),
    "hub": lambda text: [text],  # a folder, or a hub repository
    "hubs": lambda text: text.split(","),
    "data": lambda text: [path for part in re.split(r",(?=\w+:)", text) for path in  # examples.load_examples
                          re.fullmatch(r"json:(?:\w+:)?(.+?)(?:@(.+))?|(?:\w+:)?(.*)", part.strip()).groups() if path]}


def check(settings) -> None:
    """Raises SettingsError, one line, on the first value out of its range, and on a path that is not there."""
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


def missing_path(text: str, kind: str) -> str | None:
    """The first path in an option's text that does not exist. What may be a hub repository counts as a path where it
    is absolute, begins with a dot, or lies in a folder that exists."""
    for part in filter(None, map(str.strip, PATHS[kind](text))):
        path = Path(part)
        local = not kind.startswith("hub") or part.startswith(("/", ".")) or ("/" in part and path.parent.is_dir())
        if local and not path.exists():
            return part
    return None


# ---- command line ----------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Exits with one line and status 2 where a command line is wrong: the usage of sixty options would hide it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def parser_for(cls: type, description: str, presets: dict[str, dict] = {}) -> argparse.ArgumentParser:
    """A parser with one option per field of the settings dataclass `cls`. Options are not to be abbreviated."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                           allow_abbrev=False)
    add_options(parser, cls, presets)
    return parser


def add_options(parser: argparse.ArgumentParser, cls: type, presets: dict[str, dict] = {}) -> None:
    """One option per field of `cls`. What is not given is not in the parsed arguments."""
    for f in dataclasses.fields(cls):
        how = dict(type=type(f.default), metavar=f.name.rsplit("_", 1)[-1].upper())
        if isinstance(f.default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif f.metadata["choices"]:
            how = dict(type=type(f.default), choices=f.metadata["choices"])
        if f.metadata["option"]:
            parser.add_argument(option_name(f.name), dest=f.name, default=argparse.SUPPRESS,
                                help=(f.metadata["help"] + shown_default(f, presets)).replace("%", "%%"), **how)


def shown_default(f: dataclasses.Field, presets: dict[str, dict]) -> str:
    """What the help text ends with: the default in brackets, where presets differ each one's value."""
    values = {preset: given.get(f.name, f.default) for preset, given in presets.items()} or {"": f.default}
    texts = {preset: {True: "on", False: "off"}[x] if isinstance(x, bool) else str(x) for preset, x in values.items()}
    if len(set(texts.values())) > 1:
        return " [" + ", ".join(preset + ": " + (text or "none") for preset, text in texts.items()) + "]"
    text = next(iter(texts.values()))
    return f" [{text}]" if text else ""


def checked(parser: argparse.ArgumentParser, cls: type, values: dict):
    """Checked settings from parsed values; exits with a usage error where one is refused."""
    try:
        settings = cls(**values)
        check(settings)
    except SettingsError as error:
        parser.error(str(error))
    return settings


def parse(cls: type, presets: dict[str, dict], description: str, argv: list[str] | None = None):
    """Settings from the command line: the preset's values, overridden by what is given. Exits with a usage error."""
    parser = parser_for(cls, description, presets)
    given = vars(parser.parse_args(argv))
    return checked(parser, cls, presets.get(given.get("preset", "toy"), {}) | given)
