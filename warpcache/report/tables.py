"""A table as a terminal and a page show it and as JSON is made from it: one `Sheet`, so that they cannot disagree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .words import PIPE_WIDTH

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Cell", "Column", "LegendEntry", "Sheet", "plain_table", "print_sheet", "terminal"]

_STYLES = {"good": "green", "bad": "yellow", "problem": "bold red", "note": "cyan"}


@dataclass(frozen=True)
class LegendEntry:
    """What one colour of the charts means: the number of the colour, 0 is grey, and its words."""

    series: int
    title: str


@dataclass(frozen=True)
class Cell:
    """A text that stands out: ``good`` or ``bad`` news, ``problem``, ``note``, ``even`` (neither), ``last`` (look)."""

    text: str
    tone: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Column:
    """A column: its heading, and how its values are worded.

    Attributes:
        heading: What stands above it.
        form: A format such as ``.2f``, or a function of a value; None shows text as it is.
        numeric: Whether it is set flush right.
        legend: The colour and the words that a page puts to the heading.
    """

    heading: str
    form: str | Callable[[Any], str] | None = None
    numeric: bool = False
    legend: LegendEntry | None = None

    @classmethod
    def number(cls, heading: str, form: str | Callable[[Any], str] | None = None) -> Column:
        """A column of numbers, flush right."""
        return cls(heading, form, numeric=True)

    def word(self, value: Any) -> str | Cell:
        """What is shown for a value; a dash where there is none, or no number for a format."""
        if isinstance(value, Cell):
            return value
        if value is None or (isinstance(self.form, str) and not isinstance(value, int | float)):
            return "-"
        if self.form is None:
            return str(value)
        return self.form(value) if callable(self.form) else format(value, self.form)


@dataclass(frozen=True)
class Sheet:
    """A titled table of values.

    Attributes:
        title: What it shows.
        columns: Left to right.
        rows: One value a column each; a row of one value alone is a heading of the rows below it.
        note: How to read it, below the table; may be empty.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def is_heading(self, row: Sequence[Any]) -> bool:
        """Whether a row, of values or of cells, is a heading of those below it."""
        return len(row) < len(self.columns)

    def worded(self) -> Iterator[list[str | Cell]]:
        """The rows as they are shown."""
        for row in self.rows:
            yield [column.word(value) for column, value in zip(self.columns, row, strict=False)]

    def table(self) -> Table:
        """The sheet for a terminal; text in square brackets is text, no markup."""
        from rich.markup import escape
        from rich.text import Text

        headings = [escape(column.heading) for column in self.columns]
        table = plain_table(escape(self.title), *headings)
        for drawn, column in zip(table.columns, self.columns, strict=True):
            drawn.justify = "right" if column.numeric else "left"
        indent = "  " if any(map(self.is_heading, self.rows)) else ""
        for row in self.worded():
            if self.is_heading(row):
                table.add_row(Text(str(row[0]), style="bold"))
            else:
                cells = [Text(str(cell), style=_STYLES.get(getattr(cell, "tone", ""), "")) for cell in row]
                table.add_row(Text(indent) + cells[0], *cells[1:])
        return table


def plain_table(title: str, *columns: str, numeric: Iterable[str] = ()) -> Table:
    """An empty table in the style of this project.

    Args:
        title: Heading.
        columns: Headings of the columns.
        numeric: Those of them that hold numbers.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    right = set(numeric)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def terminal(console: Console | None = None) -> Console:
    """Where tables are printed: `console`, or stdout."""
    from rich.console import Console

    return console or Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def print_sheet(sheet: Sheet, out: Console) -> None:
    """Print a sheet, and below it how to read it."""
    out.print(sheet.table())
    if sheet.note:
        out.print(sheet.note, soft_wrap=True, markup=False)
