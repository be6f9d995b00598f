"""Options said once: the fields of a frozen dataclass are click's options, and a command gets an instance.

Checks run while the arguments are parsed: what is wrong is wrong usage, and found out before any work is done.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from ..engine.errors import InputError

__all__ = [
    "AGE",
    "COUNT",
    "PATH",
    "RATE",
    "checked_device",
    "checked_metric",
    "checked_policy",
    "holds",
    "json_option",
    "one_line",
    "option",
    "split_names",
    "state_pairs",
    "takes",
    "writable",
]

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
AGE = click.IntRange(min=0)
RATE = click.FloatRange(min=0, min_open=True)
_TYPES: dict[Any, dict[str, Any]] = {
    Path: {"type": PATH},
    int: {"type": int},
    float: {"type": float},
    bool: {"is_flag": True},
}


def option(
    flag: str, help: str | None = None, *, default: Any = MISSING, factory: Any = MISSING, **attributes: Any
) -> Any:
    """A dataclass's field that is an option: without a default it has to be given.

    Args:
        flag: Its name, as in ``--runs``.
        help: What is said of it; its default is added where it says something.
        default: The field's default, which is the option's too.
        factory: Makes the default of a field whose option makes one by its callback.
        attributes: What else `click.option` takes. A simple type follows from the annotation, choices from a Literal,
            and a tuple can be given repeatedly.
    """
    metadata = {"flag": flag, "help": help, **attributes}
    if factory is not MISSING:
        return dataclasses.field(default_factory=factory, kw_only=True, metadata=metadata)
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


def holds(options: type[Any], *, default: Any) -> Any:
    """A dataclass's field that holds what another class of options makes of its own."""
    return dataclasses.field(default=default, kw_only=True, metadata={"options": options})


def takes(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that are the fields of `options`; it gets an instance as its argument `options`.

    A class with a method `settled` has it called at the end: it raises `click.UsageError` where options do not go
    together, and returns what takes the instance's place. A class's own options come before those that it inherits.
    What other decorators give the command it gets by name.
    """

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @wraps(main)
        def command(*positional: Any, **given: Any) -> None:
            chosen = _settled(options, given)
            main(*positional, options=chosen, **given)

        for declared in reversed(list(_declared(options))):
            command = declared(command)
        return command

    return decorate


def _declared(options: type[Any]) -> Iterator[Callable[..., Any]]:
    """click's decorators, a field each."""
    fields = {field.name: field for field in dataclasses.fields(options)}
    hints = get_type_hints(options)
    for name in dict.fromkeys(name for base in options.__mro__ for name in inspect.get_annotations(base)):
        field, metadata = fields[name], dict(fields[name].metadata)
        if "options" in metadata:
            yield from _declared(metadata["options"])
            continue
        attributes = dict(_typed(hints[name]))
        if field.default is not MISSING:
            shown = field.default is not None and field.default is not False and field.default != ()
            attributes |= {"default": field.default, "show_default": shown}
        elif field.default_factory is MISSING:
            attributes["required"] = True
        yield click.option(name, metadata.pop("flag"), **(attributes | metadata))


def _typed(hint: Any) -> dict[str, Any]:
    """What an annotation says of an option."""
    if get_origin(hint) is tuple:
        return {**_typed(get_args(hint)[0]), "multiple": True}
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return {"type": click.Choice(choices)}
    return next((_TYPES[kind] for kind in kinds if kind in _TYPES), {})


def _settled(options: type[Any], given: dict[str, Any]) -> Any:
    """What `options` makes of what was given, which is taken out of `given`."""
    values = {
        field.name: _settled(field.metadata["options"], given) if "options" in field.metadata else given.pop(field.name)
        for field in dataclasses.fields(options)
    }
    chosen = options(**values)
    return chosen.settled() if hasattr(chosen, "settled") else chosen


def one_line(message: str) -> str:
    """`message` on one line: a library underneath may have put line breaks into it."""
    return " ".join(message.split())


def checked_policy(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Check policies.

    Raises:
        click.BadParameter: If a name is no policy.
    """
    from ..engine.schedule.policy import Policy

    return _checked(Policy.parse, ctx, param, value)


def checked_device(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Check names of devices; whether they are there is found out when they are used.

    Raises:
        click.BadParameter: If a name is no device's.
    """
    from ..engine.cuda.options import parse_device

    return _checked(parse_device, ctx, param, value)


def checked_metric(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Check a metric that quality is promised in.

    Raises:
        click.BadParameter: If there is no such metric.
    """
    if value is None:
        return None
    from ..engine.promise.calibration import canonical_metric

    return _checked(canonical_metric, ctx, param, value)


def split_names(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Names joined by commas, apart.

    Raises:
        click.BadParameter: If one of them is empty.
    """
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise click.BadParameter(f"{text!r} has an empty name between its commas", ctx, param)
    return names


def state_pairs(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    """State as output -> input.

    Raises:
        click.BadParameter: If a pair is none, or names what another one names too.
    """
    state: dict[str, str] = {}
    for pair in pairs:
        output, colon, name = (part.strip() for part in pair.partition(":"))
        if not (output and colon and name):
            raise click.BadParameter(f"{pair!r} is no pair of names; write OUT:IN, e.g. memory_next:memory", ctx, param)
        for named, others in ((output, state.keys()), (name, state.values())):
            if named in others:
                raise click.BadParameter(f"{named!r} is named twice; a state has one output and one input", ctx, param)
        state[output] = name
    return state


def _checked(parse: Callable[[str], object], ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    for text in value if isinstance(value, tuple) else [value]:
        if text is not None:
            try:
                parse(text)
            except InputError as exc:
                raise click.BadParameter(one_line(str(exc)), ctx, param) from exc
    return value


def writable(*suffixes: str) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """A check that a path to write has one of the suffixes (none given: any) and is where writing is allowed.

    Found out while the arguments are parsed, and not after twenty minutes of work.
    """

    def check(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
        if path is None:
            return None
        if suffixes and path.suffix.lower() not in suffixes:
            raise click.BadParameter(f"{str(path)!r} must end in {' or '.join(suffixes)}", ctx, param)
        # The finished file takes the place of what is there, which would be the end of a device like /dev/stdout.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise click.BadParameter(f"{str(path)!r} is no regular file", ctx, param)
        # Missing folders are made when the file is written.
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir():
            raise click.BadParameter(f"{str(parent)!r} is no folder", ctx, param)
        if not os.access(parent, os.W_OK):
            raise click.BadParameter(f"no permission to write into {str(parent)!r}", ctx, param)
        return path

    return check


json_option = click.option(
    "--json", "json_path", type=PATH, callback=writable(), help="Write the figures to this file too."
)
