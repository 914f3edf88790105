"""Tables for terminals: where one is narrow, columns stand in several tables below each other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

FRAME = 3  # a column's border and spaces
LONGEST = 28  # of a line's name, which goes on below; more where there is room


@dataclass(frozen=True)
class FoldedTable:
    """A table of which no figure is ever cut.

    Attributes:
        title: Above it.
        titles: Of the columns; the first is that of lines' names, which stand in every part.
        rows: Their cells, names first.
        bold: Which rows stand out.
        sections: Rows above which there is a rule.
        main: The column that stands out, if one does.
        caption: Below it.
    """

    title: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: Collection[int] = ()
    sections: Collection[int] = ()
    main: int | None = None
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        places = range(1, len(self.titles))
        widths = [self._width(i, self.titles[i].splitlines()) for i in places]
        longest = min(max(LONGEST, options.max_width // 4), options.max_width // 2)
        name = min(self._width(0, [self.titles[0]]), longest)
        if name + sum(widths) + FRAME * len(self.titles) + 1 > options.max_width:
            widths = [self._width(i, self.titles[i].split()) for i in places]  # titles wrap
        title: str | None = self.title or None
        for part in self._parts(widths, options.max_width - name - FRAME - 1):
            above = None if title is None else Text(title)
            shown = Table(title=above, title_style="bold", title_justify="left")
            shown.add_column(Text(self.titles[0]), width=name, overflow="fold")
            for i in part:
                style = "bold" if i == self.main else ""
                head = Text(self.titles[i])
                shown.add_column(head, justify="right", width=widths[i - 1], style=style)
            for number, row in enumerate(self.rows):
                if number in self.sections:
                    shown.add_section()
                style = "bold" if number in self.bold else ""
                shown.add_row(*(Text(row[i]) for i in (0, *part)), style=style)
            yield shown
            title = None
        if self.caption:
            yield Text(self.caption, style="italic")

    def _width(self, i: int, of_title: Sequence[str]) -> int:
        return max(map(cell_len, [*of_title, *(row[i] for row in self.rows)]), default=0)

    @staticmethod
    def _parts(widths: Sequence[int], room: int) -> Iterator[list[int]]:
        """Yield the columns beside the names of each table, one at least."""
        part: list[int] = []
        used = 0
        for i, width in enumerate(widths, 1):
            if part and used + width + FRAME > room:
                yield part
                part, used = [], 0
            part.append(i)
            used += width + FRAME
        if part:
            yield part
