"""Settings that are checked where they are stored: a frozen dataclass whose annotations say what a value may be.

    @settings
    class Training:
        \"\"\"How to train.

        Args:
            rounds: Rounds of simulation and training.
        \"\"\"

        rounds: Count = 200

Python and the command line then refuse alike, in one sentence that names the field. NaN is in no range. Nothing here needs
torch, so that a command line can be built, and can refuse, before torch is imported.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from tiltflow.core.errors import TiltflowError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included unless ``above`` excludes the lower one; infinity never is."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high and abs(value) < math.inf

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return ""
        if self.high == math.inf:
            return f" above {self.low:g}" if self.above else f" of at least {self.low:g}"
        return f" above {self.low:g} and at most {self.high:g}" if self.above else f" from {self.low:g} to {self.high:g}"


LARGEST = 2**53
"""Of a whole number: what a float64, a JSON reader and torch hold exactly."""
Count = Annotated[int, Range(1, LARGEST)]
Steps = Annotated[int, Range(1, 100_000)]
Whole = Annotated[int, Range(0, LARGEST)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Real = Annotated[float, Range()]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]


class Field(NamedTuple):
    """One setting: its name, what it may be, its default (None if it has none), and its sentence in the docstring."""

    name: str
    kind: Any
    default: Any
    help: str


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass of keywords that checks its fields, and then itself by its method ``validate``, if it has one."""

    def check_all(self: Any) -> None:
        for name, kind in hints(type(self)).items():
            check_value(name, getattr(self, name), kind)
        getattr(self, "validate", lambda: None)()

    cls.__post_init__ = check_all  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


def hints(cls: Any) -> dict[str, Any]:
    """The fields of a settings class with their annotations."""
    return _hints(cls)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    found = get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in fields(cls)}


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raises TiltflowError unless ``value`` is of the annotated ``kind``."""
    if not _fits(value, kind):
        raise TiltflowError(f"{name} must be {describe(kind)}, got {value!r}.")


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin is Annotated:
        base, *limits = get_args(kind)
        return _fits(value, base) and all(value in limit for limit in limits if isinstance(limit, Range))
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if origin is tuple:
        parts = get_args(kind)
        parts = parts[:1] * len(value) if isinstance(value, tuple) and parts[1:] == (...,) else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if kind in (None, type(None)):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) else True


def describe(kind: Any) -> str:
    """What a value may be, in words."""
    origin = get_origin(kind)
    if origin is Annotated:
        base, limit = get_args(kind)[:2]
        return f"{describe(base)}{'' if limit.high == LARGEST and limit.low == -math.inf else _limit(limit)}"
    if origin in (Union, UnionType):
        parts = [describe(part) for part in get_args(kind) if part is not type(None)]
        return " or ".join([*parts, "None"] if type(None) in get_args(kind) else parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if origin is tuple:
        return "a tuple of " + ", ".join("…" if part is ... else describe(part) for part in get_args(kind))
    names: dict[Any, str] = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _limit(limit: Range) -> str:
    return str(Range(limit.low, math.inf, limit.above)) if limit.high >= LARGEST else str(limit)


@cache
def describe_fields(cls: Any) -> tuple[Field, ...]:
    """The settings of a class in their order, with the sentences of its docstring and of those that it extends."""
    told: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        told |= _sentences(part.__doc__ or "")
    defaults = {f.name: f for f in fields(cls)}
    return tuple(
        Field(name, kind, _default(defaults[name]), told.get(name, "")) for name, kind in hints(cls).items()
    )


def _default(field: Any) -> Any:
    if callable(field.default_factory):
        return field.default_factory()
    return field.default


def _sentences(doc: str) -> dict[str, str]:
    """name → sentence of the section "Args:" of a docstring, one name an entry."""
    section = re.search(r"\n[ \t]*Args:\n(.*?)(?:\n[ \t]*\n|\Z)", doc, re.S)
    if section is None:
        return {}
    lines = section[1].split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        start = re.match(rf"[ ]{{{indent}}}(\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def as_json(value: Any) -> Any:
    """Settings, and what they hold, as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [as_json(part) for part in value]
    return value


def from_json(cls: type[T], saved: Any, where: str) -> T:
    """The settings that :func:`as_json` wrote. Raises TiltflowError naming ``where`` and what does not belong there."""
    if not isinstance(saved, dict):
        raise TiltflowError(f"{where} must be an object with the fields of {cls.__name__}, got {saved!r:.80}.")
    known = hints(cls)
    unknown = sorted(saved.keys() - known.keys())
    if unknown:
        raise TiltflowError(f"{where} has the unknown field {unknown[0]!r}; {cls.__name__} has {', '.join(known)}.")
    values = {name: _thawed(value, known[name], f"{where}.{name}") for name, value in saved.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise TiltflowError(f"{where} is not complete: {error}.") from error


def _thawed(value: Any, kind: Any, where: str) -> Any:
    if isinstance(value, list):
        return tuple(tuple(part) if isinstance(part, list) else part for part in value)
    kinds = [part for part in (kind, *get_args(kind)) if isinstance(part, type) and is_dataclass(part)]
    return from_json(kinds[0], value, where) if kinds and isinstance(value, dict) else value
