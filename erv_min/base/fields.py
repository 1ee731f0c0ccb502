"""A dataclass from a JSON object, each field checked: a file that came with a checkpoint may hold anything."""

from dataclasses import MISSING, Field, fields
from typing import get_args

from erv_min.base.errors import CheckpointError


def from_json(kind: type, values, where: str, given: dict, keys: dict[str, str], limits: dict[str, tuple[int, int]]):
    """Builds the dataclass `kind`, whose fields are int, float, bool, str or Literal, from the values of a JSON object,
    in which null counts as absent.

    given: fields that are taken as they are; keys: fields that stand under another name there; limits: the least and
    the most of a field of type int, by default 1 and 2**24. Raises CheckpointError naming `where` and the field that
    is missing, of another type or size, or not supported.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(values).__name__}")
    found = dict(given)
    for field in fields(kind):
        if field.name in given:
            continue
        key = keys.get(field.name, field.name)
        value = field.default if values.get(key) is None else values[key]
        if value is MISSING:
            raise CheckpointError(f"{where}: field {key!r} is missing")
        _check(field, value, where, key, limits)
        found[field.name] = value
    return kind(**found)


def _check(field: Field, value, where: str, key: str, limits: dict[str, tuple[int, int]]) -> None:
    """Raises CheckpointError if `value` is not one that the field may have."""
    choices = get_args(field.type)  # of a Literal
    if choices:
        if value not in choices:
            raise CheckpointError(f"{where}: {key} is {value!r}, only {' or '.join(choices)} is supported")
        return
    if type(value) is not field.type and not (field.type is float and type(value) is int):
        raise CheckpointError(f"{where}: field {key!r} must be {field.type.__name__}, is {value!r}")
    if field.type in (int, float):
        low, high = limits.get(field.name, (1, 2**24)) if field.type is int else (0, 1e30)
        if not low <= value <= high:
            raise CheckpointError(f"{where}: field {key!r} is {value}, models have {low} to {high}")
