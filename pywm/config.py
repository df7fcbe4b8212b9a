"""Configurations: dataclasses that read and write JSON strictly, presets, and what may change on resume."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypeVar, Union

from pywm.errors import UserError

__all__ = [
    "Change",
    "Preset",
    "check_fields",
    "check_resume",
    "diff",
    "from_json",
    "suggest",
    "table",
    "to_json",
]

T = TypeVar("T")

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings for a family of environments, with what to expect from them.

    Attributes:
        config: the fields of the algorithm's ``Config`` that differ from its defaults.
        envs: environment ids the preset suits, as shell patterns (``"ALE/*"``).
        expected: the return to expect, with its conditions, as one line for people.
    """

    config: Mapping[str, Any]
    envs: tuple[str, ...]
    expected: str

    def suits(self, env: str) -> bool:
        """Whether the preset was made for this environment id."""
        return any(fnmatch.fnmatchcase(env, pattern) for pattern in self.envs)


class Change(NamedTuple):
    """One field that differs between two configurations; ``key`` is dotted for nested ones."""

    key: str
    old: Any
    new: Any


def suggest(name: str, options: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest option, else ``" Choose from a, b, c."``."""
    options = sorted(options)
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {by_lower[close[0]]!r}?"
    return f" Choose from {', '.join(options)}." if options else ""


def to_json(config: Any) -> dict[str, Any]:
    """Turn a dataclass into a dict of JSON values; tuples become lists, non-finite floats strings."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_json: config is {type(config).__name__}, but expected a dataclass instance")
    return {field.name: _encode(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_json(cls: type[T], data: Mapping[str, Any], *, name: str = "") -> T:
    """Build a dataclass from JSON values, refusing unknown keys and wrong types.

    Args:
        cls: the dataclass to build.
        data: what :func:`to_json` returned, perhaps after a round trip through a file; missing keys
            keep their defaults.
        name: what to call it in messages; the class's name by default.

    Raises:
        UserError: a key is unknown (with a suggestion) or a value has the wrong type.
    """
    return _build(cls, data, f"from_json: {name or cls.__name__}")


def check_fields(config: Any, name: str) -> None:
    """Check every field of a dataclass against its annotation; for its ``__post_init__``, frozen or not.

    What fits without loss is taken as annotated: an int where a float is expected, NumPy's numbers, a list for a
    tuple.

    Args:
        config: a dataclass instance.
        name: what to call it in messages, like ``"ppo.Config"``.

    Raises:
        UserError: a value has the wrong type or is none of the permitted ones; the message names the field.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if field.init:
            value = _decode(hints[field.name], getattr(config, field.name), f"{name}: {field.name}")
            object.__setattr__(config, field.name, value)


def _build(cls: type[T], data: Any, name: str) -> T:
    if not isinstance(data, Mapping):
        raise UserError(f"{name} is {_show(data)}, but expected a JSON object")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        if key not in fields:
            raise UserError(f"{name} has no field {key!r}.{suggest(str(key), fields)}")
        values[key] = _decode(hints[key], value, f"{name}.{key}")
    try:
        return cls(**values)
    except TypeError as error:  # a field without a default is missing
        raise UserError(f"{name}: {error}") from error


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """List the fields in which two JSON configurations differ; a missing side is None."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    keys = [*flat_old, *(key for key in flat_new if key not in flat_old)]
    return [
        Change(key, flat_old.get(key), flat_new.get(key))
        for key in keys
        if flat_old.get(key) != flat_new.get(key)
    ]


def check_resume(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str] = ("steps",)
) -> list[Change]:
    """Compare a run's configuration with the one it is resumed with.

    Args:
        old: configuration the checkpoint was trained with.
        new: configuration asked for now.
        may_change: fields (dotted, or the first part of a dotted name) that a resumed run may change.

    Returns:
        The permitted changes, for the caller to show.

    Raises:
        UserError: a field that shapes the networks, the data or the random streams differs.
    """
    changes = diff(old, new)
    fixed = [c for c in changes if c.key not in may_change and c.key.split(".")[0] not in may_change]
    if fixed:
        keys = ", ".join(change.key for change in fixed)
        raise UserError(
            f"resume: {keys} cannot change in a run that has checkpoints\n"
            f"{table(changes, marked=[change.key for change in fixed])}\n"
            "Leave it as it was, or start anew with --fresh or another --run-dir."
        )
    return changes


def table(changes: Iterable[Change], marked: Collection[str] = ()) -> str:
    """Lay out changes as aligned text with the columns key, old, new."""
    rows = [("key", "old", "new", "")]
    rows += [(c.key, _show(c.old), _show(c.new), "<- fixed" if c.key in marked else "") for c in changes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"to_json: a field is {type(value).__name__}, but expected a JSON value")


def _decode(hint: Any, value: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, name)
    if origin is Literal:
        for option in args:
            if option == value and type(option) is type(value):
                return option
        options = ", ".join(map(_show, args))
        raise UserError(f"{name} is {_show(value)}, but expected one of {options}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, name)  # type: ignore[arg-type]
    container = origin or hint
    if container in (tuple, list):
        return _decode_sequence(container, args, value, name)
    if container in (dict, Mapping) or origin is Mapping or getattr(origin, "__name__", "") == "Mapping":
        if not isinstance(value, Mapping):
            raise UserError(f"{name} is {_show(value)}, but expected a JSON object")
        item = args[1] if len(args) == 2 else Any
        return {key: _decode(item, entry, f"{name}.{key}") for key, entry in value.items()}
    return _decode_scalar(hint, value, name)


def _decode_union(options: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    # bool before int before float, so that 1 stays an int where both are permitted.
    for option in sorted((o for o in options if o is not type(None)), key=lambda o: o is float):
        try:
            return _decode(option, value, name)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _decode_sequence(container: type, args: tuple[Any, ...], value: Any, name: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} is {_show(value)}, but expected a list")
    if container is tuple and args and not (len(args) == 2 and args[1] is ...):
        if len(value) != len(args):
            raise UserError(f"{name} has {len(value)} items, but expected {len(args)}")
        hints = list(args)
    else:
        hints = [args[0] if args else Any] * len(value)
    items = [_decode(h, item, f"{name}[{i}]") for i, (h, item) in enumerate(zip(hints, value, strict=True))]
    return container(items)


def _decode_scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is float:
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        if isinstance(value, Real) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an int beyond all floats
                return float(value)
    elif hint is int:
        if isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    elif hint in (None, type(None)) and value is None:
        return None
    expected = getattr(hint, "__name__", str(hint))
    raise UserError(f"{name} is {_show(value)}, but expected {expected}")


def _flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
