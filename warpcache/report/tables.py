"""A table as it is shown in a terminal and on a page: one `Sheet`, so that the two cannot disagree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Sheet", "plain_table"]


@dataclass(frozen=True)
class Sheet:
    """A titled table of text.

    Attributes:
        title: What it shows.
        columns: Headings, left to right.
        rows: One text a column each.
        numeric: The headings whose columns hold numbers; these are set flush right.
        note: How to read it, below the table; may be empty.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[str] = frozenset()
    note: str = ""

    def table(self) -> Table:
        """The sheet for a terminal; text in square brackets is text, no markup."""
        from rich.markup import escape
        from rich.text import Text

        table = plain_table(escape(self.title), *map(escape, self.columns), numeric=map(escape, self.numeric))
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
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
