"""How a command fails: one sentence on stderr and an exit code."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["Failure"]


class Failure(click.ClickException):
    """A command that failed for a reason the user can mend: one sentence on stderr, exit code 1."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        """Write the sentence to stderr."""
        click.echo(f"warpcache: {self.format_message()}", file=file, err=file is None)
