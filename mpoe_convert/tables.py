"""Tables as plain values, drawn in a terminal, in a notebook or in a model card.

A plan or a report says what is shown of it (`Shown.shown`); this module draws that, as wide as the paper is:
a table that is too wide loses its frame, then breaks cells at blanks, then becomes a list. Rich is imported
when something is drawn, so that the values stay cheap.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

Cell = str | int | None
Value = TypeVar("Value")

# Characters of a line where there is no terminal: in `repr` and in notebooks.
WIDTH = 120
# Rows of a table in `repr`.
FEW = 5
# What a frame takes: of the table, and of each of its columns. Without a frame columns stand apart.
_FRAME, _FRAME_OF_COLUMN, _GAP = 1, 3, 2
# Blanks before what continues a broken cell of the first column.
_HANG = "  "
# Ranges of layers in one row.
_RUNS = 4


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

    def short(self) -> Table:
        """Merge rows that differ in one number of their dotted names alone; names lose what all start with.

        The names are in the first column: "a.h.0.mlp.up", "a.h.1.mlp.up" -> "h.0-1 mlp.up"; the "a" is in
        the title.
        """
        header = self.headers[0]
        merged = merge_names([(str(row[header]), tuple(row.items())[1:]) for row in self.rows])
        prefix = shared_prefix([name for name, _ in merged])
        rows = tuple({header: name[len(prefix) :], **dict(cells)} for name, cells in merged)
        within = f" of {prefix[:-1]}" if prefix else ""
        each = f", numbers per {header}" if len(rows) < len(self.rows) else ""
        return replace(self, title=f"{self.title}{within}{each}", rows=rows)

    def rich(self) -> RenderableType:
        return _Drawing(self)


class _Drawing:
    """A table for Rich. No line is wider than the paper, and no word is broken unless it alone is wider."""

    def __init__(self, table: Table):
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width, columns = options.max_width, self._columns()
        natural = [max(map(len, column)) for column in columns]
        least = [max(_least(cell, "" if k else _HANG) for cell in column) for k, column in enumerate(columns)]
        gaps = _GAP * (len(columns) - 1)
        if sum(natural) + _FRAME + _FRAME_OF_COLUMN * len(columns) <= width:
            yield self._framed()
        elif sum(least) + gaps <= width:
            yield from self._lines(_shrunk(natural, least, width - gaps), width)
        else:
            yield from self._list(width)

    def _columns(self) -> list[list[str]]:
        cells = self.table.cells()
        return [[header, *(row[k] for row in cells)] for k, header in enumerate(self.table.headers)]

    def _framed(self) -> RenderableType:
        from rich import table

        asked = self.table
        made = table.Table(title=asked.title, title_justify="left", title_style="bold")
        for header in asked.headers:
            justify = "left" if header in asked.left else "right"
            made.add_column(escape(header), justify=justify, no_wrap=True)
        for number, cells in enumerate(asked.cells()):
            made.add_row(*map(escape, cells), style="bold" if number == asked.bold else None)
        if asked.footer:
            made.caption, made.caption_justify = asked.footer, "left"
        return made

    def _lines(self, widths: list[int], width: int) -> Iterator[RenderableType]:
        """Without a frame; cells are broken at blanks."""
        from rich.text import Text

        table = self.table
        yield from self._text(table.title, width, "bold")
        yield from self._row(table.headers, widths, "bold")
        yield Text("  ".join("─" * each for each in widths))
        for number, cells in enumerate(table.cells()):
            yield from self._row(cells, widths, "bold" if number == table.bold else "")
        yield from self._text(table.footer, width, "italic")

    def _row(self, cells: Sequence[str], widths: list[int], style: str) -> Iterator[RenderableType]:
        from rich.text import Text

        first, *others = zip(cells, widths, strict=True)
        pieces = [_broken(*first, hang=_HANG), *(_broken(*each) for each in others)]
        for k in range(max(map(len, pieces))):
            line = []
            for header, width, found in zip(self.table.headers, widths, pieces, strict=True):
                piece = found[k] if k < len(found) else ""
                line.append(piece.ljust(width) if header in self.table.left else piece.rjust(width))
            yield Text("  ".join(line).rstrip(), style=style)

    def _list(self, width: int) -> Iterator[RenderableType]:
        """A paragraph per row: its first cell, then the others after their headers."""
        first, *headers = self.table.headers
        yield from self._text(self.table.title, width, "bold")
        for number, (name, *cells) in enumerate(self.table.cells()):
            style = "bold" if number == self.table.bold else ""
            yield from self._text(" ".join(filter(None, (first, name))), width, style)
            for header, cell in zip(headers, cells, strict=True):
                yield from self._text(f"{header}: {cell}" if header else cell, width, style, indent="  ")
        yield from self._text(self.table.footer, width, "italic")

    def _text(self, text: str, width: int, style: str = "", indent: str = "") -> Iterator[RenderableType]:
        from rich.text import Text

        for line in _broken(text, width - len(indent)) if text else ():
            yield Text(indent + line, style=style)


def _least(text: str, hang: str) -> int:
    """The width that text needs, if it is broken at blanks and continued behind `hang`."""
    return max((len(word) + (len(hang) if k else 0) for k, word in enumerate(text.split())), default=0)


def _broken(text: str, width: int, hang: str = "") -> list[str]:
    """Lines of at most `width` characters: broken at blanks; words that are wider, behind a separator."""
    if len(text) <= width:
        return [text]
    lines = [""]
    for word in text.split():
        for piece, follows in _pieces(word, width - len(hang)):
            gap = "" if follows or not lines[-1] else " "
            if len(lines[-1]) + len(gap) + len(piece) <= width:
                lines[-1] += gap + piece
            else:
                lines.append(hang + piece)
    return lines


def _pieces(word: str, width: int) -> Iterator[tuple[str, bool]]:
    """(piece, whether it belongs to the one before it) of a word; of one that fits, itself."""
    if len(word) <= width:
        yield word, False
        return
    parts = [part for each in re.findall(r"[^./,_-]*[./,_-]?", word) for part in textwrap.wrap(each, width)]
    for number, part in enumerate(parts):
        yield part, number > 0


def _shrunk(natural: list[int], least: list[int], room: int) -> list[int]:
    """Widths of columns that fit into the room: the widest that can give way does so first."""
    widths = list(natural)
    while sum(widths) > room:
        k = max((k for k in range(len(widths)) if widths[k] > least[k]), key=lambda k: widths[k])
        widths[k] -= 1
    return widths


def merge_names(rows: Sequence[tuple[str, Value]]) -> list[tuple[str, Value]]:
    """Merge rows (dotted name, value) of equal values whose names differ in one number alone.

    That is the number that takes most values, of a layer: "h.0.mlp.up", "h.1.mlp.up", "h.3.mlp.up" ->
    "h.0-1,3 mlp.up". A merged row stands where its first one stood.
    """
    split = [_numbered(name) for name, _ in rows]
    seen: dict[str, list[set[int]]] = {}
    for pattern, numbers in split:
        counts = seen.setdefault(pattern, [set() for _ in numbers])
        for values, number in zip(counts, numbers, strict=True):
            values.add(number)
    groups: dict[tuple, list[int]] = {}
    for (pattern, numbers), (_, value) in zip(split, rows, strict=True):
        counts = seen[pattern]
        k = max(range(len(counts)), key=lambda k: len(counts[k]), default=None)
        if k is None:
            groups.setdefault((pattern, (), None, value), [])
        else:
            others = (*numbers[:k], None, *numbers[k + 1 :])
            groups.setdefault((pattern, others, k, value), []).append(numbers[k])
    return [
        (_joined(pattern, others, text), value)
        for (pattern, others, _, value), found in groups.items()
        for text in _in_pieces(ranges(found))
    ]


def _in_pieces(text: str) -> list[str]:
    """ "0-2,5,7,9,11-12" -> ["0-2,5,7,9", "11-12"]: longer lists of layers are hard to read."""
    runs = text.split(",")
    return [",".join(runs[k : k + _RUNS]) for k in range(0, len(runs), _RUNS)]


def _numbered(name: str) -> tuple[str, tuple[int, ...]]:
    """ "h.10.mlp.up" -> ("h.{}.mlp.up", (10,))."""
    parts = name.split(".")
    pattern = ".".join("{}" if part.isdecimal() else part for part in parts)
    return pattern, tuple(int(part) for part in parts if part.isdecimal())


def _joined(pattern: str, others: tuple[int | None, ...], found: str) -> str:
    """The name back from its pattern; a blank follows the number that was merged."""
    numbers = iter(others)
    parts = []
    for part in pattern.split("."):
        number = next(numbers) if part == "{}" else None
        merged = part == "{}" and number is None
        text = found if merged else str(number) if part == "{}" else part
        parts.append(f"{text} " if merged else f"{text}.")
    return "".join(parts)[:-1]


def short_paths(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all share; Hub ids, which share one part at most, stay whole."""
    split = [path.split("/") for path in paths]
    shared = commonprefix([parts[:-1] for parts in split])
    return ["/".join(parts[len(shared) :]) for parts in split] if len(shared) > 1 else list(paths)


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def shared_prefix(names: Sequence[str]) -> str:
    """The dotted start that all names share, with its last dot: ("a.h.0 mlp", "a.h.1 mlp") -> "a.".

    It ends before the list of layers, here "h"; nothing if they share none.
    """
    return "".join(f"{part}." for part in commonprefix([_above_layers(name) for name in names]))


def _above_layers(name: str) -> list[str]:
    parts = name.split(".")
    numbered = (k for k, part in enumerate(parts) if part[:1].isdecimal())
    return parts[: max(next(numbered, len(parts)) - 1, 0)]


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


def listed_ranks(ranks: Sequence[int], by_expert: bool) -> str | None:
    """(12, 64) -> "12,64"; of experts with ranks of their own, (64, 4, 8) -> "4 to 64"."""
    return f"{min(ranks)} to {max(ranks)}" if by_expert and len(ranks) > 1 else listed(ranks)


def duration(seconds: float) -> str:
    """4000 -> "1 h 7 min", 75 -> "1 min 15 s", 7.25 -> "7.2 s"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"


# So many experts' bonds are listed one by one.
_MANY = 8


def listed_bonds(term: Mapping[str, Any]) -> str | None:
    """The bonds of a term: "12,64", or, where experts differ in size, one's after the other: "1,4/1,8".

    Of more than `_MANY` experts with one bond each the lowest and the highest: "4 to 64".
    """
    each = term.get("by_expert", {}).get("bonds")
    if each and len(each) > _MANY and len(each[0]) == 1:
        return listed_ranks([bond for (bond,) in each], by_expert=True)
    return "/".join(filter(None, map(listed, each))) if each else listed(term["bonds"])


def size(num_bytes: int) -> str:
    """1234567 -> "1.2 MB" (powers of 1,000, as safetensors and the Hub count)."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if round(value, 1) < 1000:
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
