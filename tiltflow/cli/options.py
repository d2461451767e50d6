"""Options of commands, generated from the settings they fill: one for every field, with its sentence and its default."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import Field, check_value, describe_fields

Command = Callable[..., Any]
NONE = "none"
"""What stands for no value, where a setting may have none."""


class Value(click.ParamType):
    """A value of an annotated kind, checked as the settings check it."""

    def __init__(self, field: Field) -> None:
        self.field, self.name = field, _word(field.kind)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text as a value; misuse is a usage error."""
        if not isinstance(value, str):
            return value
        found = _parsed(value, self.field.kind)
        try:
            check_value(param.opts[0] if param is not None else self.field.name, found, self.field.kind)
        except TiltflowError as error:
            raise click.UsageError(str(error), ctx) from error
        return found


def _plain(kind: Any) -> tuple[list[Any], bool]:
    """The kinds that a value may be of, without limits, and whether it may be None."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    bare = [get_args(part)[0] if get_origin(part) is Annotated else part for part in parts]
    return [part for part in bare if part is not NoneType], NoneType in bare


def _parsed(text: str, kind: Any) -> Any:
    parts, optional = _plain(kind)
    if optional and text.lower() == NONE:
        return None
    for part in parts:
        try:
            if get_origin(part) is tuple:
                inner = _plain(get_args(part)[0])[0][0]
                return tuple(word if get_origin(inner) is Literal else inner(word) for word in text.split(",") if word)
            if part in (int, float):
                return part(text)
        except ValueError:
            continue
    return text


def _word(kind: Any) -> str:
    """What stands for the value in a help text."""
    parts, optional = _plain(kind)
    words = {int: "integer", float: "number", str: "text"}
    shown = [
        "|".join(map(str, get_args(p))) if get_origin(p) is Literal
        else f"{_word(get_args(p)[0])},…" if get_origin(p) is tuple
        else words.get(p, "value")
        for p in parts
    ]  # fmt: skip
    return "|".join([*shown, NONE] if optional else shown)


def option(field: Field, default: Any = ...) -> Callable[[Command], Command]:
    """The option of a field; it is None where it was not given."""
    shown = field.default if default is ... else default
    said = "" if shown in (None, ()) or shown is ... else f"  [default: {_told(shown)}]"
    flag = ("-" if len(field.name) == 1 else "--") + field.name.replace("_", "-")
    help = field.help.rstrip(".") + said
    parts, _ = _plain(field.kind)
    if parts == [bool]:
        return click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=help)
    if get_origin(parts[0]) is tuple and get_args(parts[0])[0] is str:
        return click.option(flag.removesuffix("s"), field.name, multiple=True, help=help + "; may be repeated")
    return click.option(flag, field.name, type=Value(field), default=None, help=help)


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def options(*classes: Any, leave: tuple[str, ...] = ("settings",)) -> Callable[[Command], Command]:
    """Options for all fields of the classes, but for those to ``leave`` out; :func:`given` sorts them out again.

    In place of a class, settings may be given, whose values are then the defaults that are shown.
    """

    def decorate(command: Command) -> Command:
        for one in reversed(classes):
            for field in reversed(describe_fields(one if isinstance(one, type) else type(one))):
                if field.name not in leave:
                    command = option(field, ... if isinstance(one, type) else getattr(one, field.name))(command)
        return command

    return decorate


def given(values: dict[str, Any], cls: type) -> dict[str, Any]:
    """Those of a command's values that are fields of a class and were given."""
    names = {field.name for field in describe_fields(cls)}
    return {k: v for k, v in values.items() if k in names and v is not None and v != ()} | {
        k: None for k in _emptied(values, names)
    }


def _emptied(values: dict[str, Any], names: set[str]) -> list[str]:
    """The fields that were given as none."""
    context = click.get_current_context()
    said = click.core.ParameterSource.COMMANDLINE
    return [k for k in names if k in values and values[k] is None and context.get_parameter_source(k) == said]


def trust_option(command: Command) -> Command:
    """--trust."""
    help = "Import code that a run folder names: a folder that is yours"
    return click.option("--trust", is_flag=True, help=help)(command)


RUN = ("out", "resume", "overwrite", "log", "allow_changed")
"""Options of a run that is written down."""


def run_options(command: Command) -> Command:
    """Where a run goes, and how it is told."""
    from pathlib import Path

    for one in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output"),
        click.option("--log", help="Also log every round to tensorboard, wandb or trackio"),
        click.option("--allow-changed", is_flag=True, help="Resume although code, base weights or versions have changed"),
        click.option("--overwrite", is_flag=True, help="Replace the run in the folder, and no other file"),
        click.option("--resume", is_flag=True, help="Continue an interrupted run exactly, a finished one with more rounds"),
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder"),
    ):
        command = one(command)
    return command
