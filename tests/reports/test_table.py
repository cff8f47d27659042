"""One table in four formats."""

import csv
import io

import pytest

from laavit.registry import UserError
from laavit.reports.table import CSV_COLUMNS, Cell, Table, latex, render

TABLE = Table(
    "A & B",
    ["model", "params", "all_100 %"],
    [[Cell("x|y", source="s"), Cell("3B"), Cell("67.3", "[61.8, 72.4]", "202 of 300: r", True, 0.673, 0.618, 0.724)]],
    ["γ < 1 – a note."],
    wide=2,
    name="t",
)


def test_latex_is_booktabs_and_escaped() -> None:
    text = TABLE.to_latex()
    for wanted in (
        r"\begin{tabular}{llr}",
        r"\toprule",
        r"model & params & all\_100 \% \\",
        r"x|y & 3B & \textbf{67.3} {\scriptsize [61.8, 72.4]} \\",
        r"\caption{A \& B}",
        r"$\gamma$ < 1 -- a note.",
        "% source: 202 of 300: r",
    ):
        assert wanted in text, wanted
    assert latex("\\~^{#$") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}\{\#\$"
    assert latex("−1 × ±2\u00a0…") == r"$-$1 $\times$ $\pm$2~\ldots{}"


def test_csv_has_a_line_a_cell_with_numbers_and_its_source() -> None:
    (line,) = csv.DictReader(io.StringIO(TABLE.to_csv()))
    assert tuple(line) == CSV_COLUMNS
    assert (line["table"], line["row"], line["column"]) == ("t", "x|y / 3B", "all_100 %")
    assert (line["text"], line["value"], line["low"], line["source"]) == ("67.3", "0.673", "0.618", "202 of 300: r")


def test_markdown_and_html_keep_words_to_the_left() -> None:
    assert "| --- | --- | ---: |" in TABLE.to_markdown() and "x\\|y" in TABLE.to_markdown()
    page = TABLE.to_html()
    assert "<td class='word'>3B</td>" in page and "title='202 of 300: r'><strong>67.3</strong>" in page


def test_several_tables_are_one_text() -> None:
    assert render([TABLE, TABLE], ".csv").count("table,row") == 1 and render([TABLE, TABLE], ".csv").count("67.3,") == 2
    assert render([TABLE, TABLE], ".tex").count(r"\end{table}") == 2
    with pytest.raises(UserError, match=r"'.pdf'; allowed: .html, .md, .tex, .csv"):
        render([TABLE], ".pdf")
