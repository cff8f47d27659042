"""One table, four formats: HTML for the page, Markdown for a README, LaTeX (booktabs) for a paper, CSV for programs."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from laavit.registry import UserError

#: What a cell says where nothing was measured.
EMPTY = "–"
#: file suffixes that a table is written for
FORMATS = (".html", ".md", ".tex", ".csv")
#: the columns of a CSV: one line a cell
CSV_COLUMNS = ("table", "row", "column", "text", "detail", "value", "low", "high", "source")

#: what LaTeX reads as its own; after these, signs outside of its fonts
_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\u00a0": "~",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "→": r"$\rightarrow$",
    "·": r"$\cdot$",
    "²": "$^2$",
    "α": r"$\alpha$",
    "γ": r"$\gamma$",
    "ε": r"$\epsilon$",
    "λ": r"$\lambda$",
    "σ": r"$\sigma$",
    "μ": r"$\mu$",
    "†": r"$\dagger$",
}


@dataclass(frozen=True)
class Cell:
    """One cell: the figure, its interval or the like in smaller type, and where it comes from.

    Args:
        source: a citation, or a records file and its digest; shown on hovering, and a column of the CSV.
        detail: its lines stay apart in HTML alone. best: set in bold. value, low, high: as numbers, for the CSV.
    """

    text: str
    detail: str = ""
    source: str = ""
    best: bool = False
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Table:
    """A table and the sentences below it. The first column names the row.

    Args:
        wide: the first columns that hold words, to the left; the others hold figures.
        name: in the CSV's first column; the title where it is empty.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    wide: int = 1
    name: str = ""

    def to_html(self) -> str:
        """A ``<table>`` in a frame that scrolls sideways where the screen is narrow."""
        head = "".join(
            f"<th scope='col'{self._words(i)}>{html.escape(column)}</th>" for i, column in enumerate(self.columns)
        )
        body = "".join(
            f"<tr>{''.join(self._cell_html(cell, i) for i, cell in enumerate(row))}</tr>" for row in self.rows
        )
        notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<h3>{html.escape(self.title)}</h3><div class='scroll' tabindex='0'><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>{notes}"
        )

    def to_markdown(self) -> str:
        """The same table for a README."""

        def text(cell: Cell) -> str:
            figure = f"**{cell.text}**" if cell.best else cell.text
            return f"{figure} {cell.detail}".strip().replace("|", "\\|").replace("\n", " ")

        rule = ["---"] * self.wide + ["---:"] * (len(self.columns) - self.wide)
        lines = [f"### {self.title}", "", _bar(self.columns), _bar(rule)]
        lines += [_bar(text(cell) for cell in row) for row in self.rows]
        lines += [part for note in self.notes for part in ("", note)]
        return "\n".join(lines) + "\n"

    def to_latex(self) -> str:
        """A ``table`` for ``\\usepackage{booktabs}``; the sources stand in comments."""

        def text(cell: Cell) -> str:
            figure = latex(cell.text)
            figure = rf"\textbf{{{figure}}}" if cell.best else figure
            return figure + (rf" {{\scriptsize {latex(' '.join(cell.detail.split()))}}}" if cell.detail else "")

        form = "l" * self.wide + "r" * (len(self.columns) - self.wide)
        lines = [r"\begin{table}[t]", r"\centering", rf"\caption{{{latex(self.title)}}}"]
        lines += [rf"\begin{{tabular}}{{{form}}}", r"\toprule"]
        lines += [" & ".join(latex(column) for column in self.columns) + r" \\", r"\midrule"]
        lines += [" & ".join(text(cell) for cell in row) + r" \\" for row in self.rows]
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\smallskip {{\footnotesize {latex(note)}\par}}" for note in self.notes]
        lines += [r"\end{table}"]
        return "\n".join([*lines, *(f"% source: {' '.join(one.split())}" for one in self.sources())]) + "\n"

    def to_csv(self) -> str:
        """One line a cell, words and numbers apart, each with its source."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for row in self.rows:
            label = " / ".join(cell.text for cell in row[: self.wide] if cell.text)
            for column, cell in list(zip(self.columns, row, strict=True))[self.wide :]:
                numbers = ["" if one is None else repr(one) for one in (cell.value, cell.low, cell.high)]
                writer.writerow(
                    [
                        self.name or self.title,
                        label,
                        column,
                        cell.text,
                        " ".join(cell.detail.split()),
                        *numbers,
                        cell.source,
                    ]
                )
        return text.getvalue()

    def sources(self) -> list[str]:
        """Where the figures come from, each source once, in order."""
        return list(dict.fromkeys(cell.source for row in self.rows for cell in row if cell.source))

    def _words(self, column: int) -> str:
        return " class='word'" if 0 < column < self.wide else ""

    def _cell_html(self, cell: Cell, column: int) -> str:
        tag = "th scope='row'" if column == 0 else f"td{self._words(column)}"
        title = f" title='{html.escape(cell.source, quote=True)}'" if cell.source else ""
        figure = html.escape(cell.text)
        if cell.best:
            figure = f"<strong>{figure}</strong>"
        detail = "".join(f"<small>{html.escape(line)}</small>" for line in cell.detail.splitlines())
        return f"<{tag}{title}>{figure}{detail}</{tag.split()[0]}>"


def latex(text: str) -> str:
    """Words as LaTeX sets them."""
    return re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found[0]], text)


def _bar(parts: Iterable[str]) -> str:
    return f"| {' | '.join(parts)} |"


def check_format(suffix: str) -> str:
    """A file suffix that tables can be written for.

    Raises:
        UserError: it is another one.
    """
    if suffix not in FORMATS:
        raise UserError(f"a report cannot be written as '{suffix}'; allowed: {', '.join(FORMATS)}")
    return suffix


def render(tables: Sequence[Table], suffix: str) -> str:
    """Several tables as one text of a format: '.md', '.tex' or '.csv' ('.html' gives the tables without a page).

    Raises:
        UserError: the suffix is none of these.
    """
    check_format(suffix)
    if suffix == ".csv":  # one head for all of them
        first, *others = (table.to_csv() for table in tables)
        return first + "".join(text.partition("\n")[2] for text in others)
    if suffix == ".tex":
        return "\n".join(table.to_latex() for table in tables)
    return "\n".join(table.to_markdown() if suffix == ".md" else table.to_html() for table in tables)
