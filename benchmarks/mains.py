"""Options of a benchmark's command, said once: the fields of a frozen dataclass are click's options."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, get_type_hints

import click

__all__ = ["PATH", "option", "takes"]

PATH = click.Path(path_type=Path)
"""The type of options that are paths."""


def option(*flags: str, **attributes: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What is known of an option beside its type: ``Annotated[int, option("--runs")]``, as `click.option` takes it."""
    return flags, attributes


def takes(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that are the fields of `options`; it gets an instance as its last argument.

    What other decorators give the command, such as arguments, it gets by name.
    """
    hints = get_type_hints(options, include_extras=True)
    declared = {name: hint.__metadata__[0] for name, hint in hints.items()}

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @wraps(main)
        def command(*positional: Any, **given: Any) -> None:
            chosen = options(**{name: given.pop(name) for name in declared})
            main(*positional, options=chosen, **given)

        for name, (flags, attributes) in reversed(declared.items()):
            command = click.option(name, *flags, **attributes)(command)
        return command

    return decorate
