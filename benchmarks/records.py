"""How every benchmark shows a table and writes its record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from warpcache.report.records import SCHEMA, environment
from warpcache.report.tables import Column, Sheet, print_sheet

__all__ = ["console", "show_table", "write_record"]

_WIDTH = 150
"""Of tables, in columns: they are read in logs."""


def console() -> Console:
    """Where tables go: stdout, wide whatever reads it."""
    return Console(width=_WIDTH, highlight=False)


def show_table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; None is shown as a dash."""
    print_sheet(Sheet(title, columns, rows), console())


def write_record(path: Path | None, command: str, **more: Any) -> None:
    """Write ``{"schema", "command", "environment"}`` and what else is given as JSON, unless `path` is None.

    NaN and infinity, which JSON does not know, become null.
    """
    if path is None:
        return
    document = {"schema": SCHEMA, "command": command, "environment": environment(), **more}
    plain = json.loads(json.dumps(document), parse_constant=lambda _: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")
