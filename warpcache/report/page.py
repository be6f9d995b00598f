"""Pages that stand alone: rendered from the package's templates, written whole or not at all."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..media.files import written_beside
from .drawing import Chart
from .tables import LegendEntry, Sheet

__all__ = ["LegendEntry", "Section", "Tile", "write_page"]


@dataclass(frozen=True)
class Tile:
    """A figure to see first: what it is, its value with a unit, and what to know about it."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page: sentences, charts with one legend, tables.

    Attributes:
        title: Heading.
        sentences: What to know first.
        legend: The charts' colours.
        charts: Drawings.
        sheets: Tables.
    """

    title: str
    sentences: Sequence[str] = ()
    legend: Sequence[LegendEntry] = ()
    charts: Sequence[Chart] = ()
    sheets: Sequence[Sheet] = ()


def write_page(path: str | os.PathLike[str], template: str, **values: Any) -> None:
    """Render one of the package's templates into a file; whatever is not named ``safe`` there is escaped.

    Args:
        path: The ``.html`` file.
        template: Name of the template.
        values: What the template shows; each of its names has to be given.

    Raises:
        InputError: If the file cannot be written.
    """
    import jinja2

    def read(name: str) -> str:
        folder = importlib.resources.files("warpcache").joinpath("templates")
        return folder.joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template(template).render(**values)
    with written_beside(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
