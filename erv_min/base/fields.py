"""Sizes of a model from a JSON object, checked field by field."""

from dataclasses import MISSING, fields
from typing import get_args

from erv_min.base.errors import CheckpointError

LIMITS = {int: (1, 2**24), float: (0, 1e30), bool: (False, True), "num_hidden_layers": (1, 1000),
          "encoder_layers": (1, 1000), "mm_vision_select_layer": (-1000, -1), "pad_token_id": (0, 2**24),
          "num_labels": (0, 2**24)}  # by field, else by type
MULTIPLES = (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads"),
             ("d_model", "encoder_attention_heads"))  # the second divides the first


def read_part(kind: type, values: dict, where: str, **given):
    """Builds the dataclass `kind` from a JSON object, in which null counts as absent and which may hold anything, since
    it came with a checkpoint; `given` are fields that are taken as they are. Raises CheckpointError naming `where` and
    the field that is missing, of another type or size, or not supported."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(values).__name__}")
    found = {}
    for of in fields(kind):
        name, value = of.name, of.default if values.get(of.name) is None else values[of.name]
        if name in given:
            continue
        if value is MISSING:
            raise CheckpointError(f"{where}: {name} is missing")
        if choices := get_args(of.type):  # of a Literal
            fits, wanted = value in choices, " or ".join(choices)
        else:
            low, high = LIMITS.get(name) or LIMITS[of.type]
            typed = type(value) is of.type or (of.type is float and type(value) is int)
            fits, wanted = typed and low <= value <= high, f"{of.type.__name__} from {low} to {high}"
        if not fits:
            raise CheckpointError(f"{where}: {name} is {value!r}, what can be read is {wanted}")
        found[name] = value
    for whole, divisor in MULTIPLES:
        if divisor in found and found[whole] % found[divisor]:
            raise CheckpointError(f"{where}: {whole} {found[whole]} is no multiple of {divisor} {found[divisor]}")
    if "pad_token_id" in found and found["pad_token_id"] >= found["vocab_size"]:
        raise CheckpointError(f"{where}: pad_token_id {found['pad_token_id']} is outside the vocabulary")
    return kind(**found, **given)
