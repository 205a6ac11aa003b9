"""Tables as plain values, drawn in a terminal, in a notebook or in a model card.

A plan or a report says what is shown of it (`Shown.shown`); this module draws that. Rich is imported when
something is drawn, so that the values stay cheap.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Cell = str | int | None

# Characters of a line where there is no terminal: in `repr` and in notebooks.
WIDTH = 120
# Rows of a table in `repr`.
FEW = 5


@dataclass(frozen=True)
class Table:
    """Rows of cells under headers.

    Attributes:
        rows: header -> cell. A number is written with thousands separators, None as a dash; a column with
            nothing but None is left out.
        left: headers of the columns that are aligned left, the others are aligned right.
        bold: number of the row that is stressed.
        footer: what stands below.
    """

    title: str
    rows: tuple[Mapping[str, Cell], ...]
    left: tuple[str, ...] = ("",)
    bold: int | None = None
    footer: str = ""

    @property
    def headers(self) -> list[str]:
        return [
            header
            for header in dict.fromkeys(header for row in self.rows for header in row)
            if any(row.get(header) is not None for row in self.rows)
        ]

    def cells(self) -> list[list[str]]:
        """The text of every cell, row by row."""
        return [[_in_text(row.get(header)) for header in self.headers] for row in self.rows]

    def head(self, limit: int | None) -> Table:
        """The first rows, with a word about the others; the whole table if it is short."""
        if limit is None or len(self.rows) <= limit:
            return self
        left_out = f"and {len(self.rows) - limit + 1:,} rows more"
        return replace(self, rows=self.rows[: limit - 1], footer=left_out)

    def markdown(self) -> str:
        """As a card holds it; names, in the first column if it has a header, are code."""
        lines = [self.headers, ["---" if header in self.left else "---:" for header in self.headers]]
        lines += [[f"`{first}`" if self.headers[0] else first, *others] for first, *others in self.cells()]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def rich(self) -> RenderableType:
        from rich import table

        made = table.Table(title=self.title, title_justify="left", title_style="bold")
        for header in self.headers:
            made.add_column(header, justify="left" if header in self.left else "right", overflow="fold")
        for number, cells in enumerate(self.cells()):
            made.add_row(*map(escape, cells), style="bold" if number == self.bold else None)
        if self.footer:
            made.caption, made.caption_justify = self.footer, "left"
        return made


def _in_text(cell: Cell) -> str:
    if cell is None:
        return "–"
    return cell if isinstance(cell, str) else f"{cell:,}"


def escape(text: str) -> str:
    """Text in which brackets are brackets, no markup of Rich."""
    from rich.markup import escape

    return escape(text)


def warning(text: str) -> str:
    """A line that warns, in Rich's markup."""
    return f"[bold yellow]Warning:[/] {escape(text)}"


def listed(values: Iterable[object]) -> str | None:
    """(12, 64) -> "12,64"; nothing -> None."""
    return ",".join(map(str, values)) or None


def size(num_bytes: int) -> str:
    """1234567 -> "1.2 MB" (powers of 1,000, as safetensors and the Hub count)."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


class Shown:
    """A value that prints as its tables: whole by Rich, in few rows by `repr`, `print` and notebooks."""

    def shown(self, limit: int | None = None) -> Iterator[Table | str]:
        """What is printed: tables, and lines in Rich's markup.

        Args:
            limit: rows of a table; None: all.
        """
        raise NotImplementedError

    def __rich_console__(self, console: object, options: object) -> Iterator[RenderableType]:
        return drawn(self.shown())

    def __repr__(self) -> str:
        paper = _paper()
        paper.print(*drawn(self.shown(FEW)), sep="\n")
        return "\n".join(line.rstrip() for line in paper.export_text().splitlines())

    __str__ = __repr__

    def _repr_html_(self) -> str:
        paper = _paper()
        paper.print(*drawn(self.shown(FEW)), sep="\n")
        return paper.export_html(inline_styles=True, code_format='<pre style="white-space: pre">{code}</pre>')


def _paper() -> Console:
    """A console that keeps what is printed on it."""
    from rich.console import Console

    return Console(file=io.StringIO(), width=WIDTH, highlight=False, record=True, force_jupyter=False)


def drawn(parts: Iterable[Table | str]) -> Iterator[RenderableType]:
    """Tables and lines of markup, for Rich."""
    from rich.text import Text

    for part in parts:
        yield part.rich() if isinstance(part, Table) else Text.from_markup(part)
