"""Tables as data: what is shipped, and what the loader refuses."""

from pathlib import Path

import pytest

from laavit.registry import UserError
from laavit.reports.spec import countable, load_sheet, sheet_names

GOOD = """
title: T
source: A paper, Table 1
columns:
  - {name: MMVP, task: mmvp, n: 300}
  - {name: IQ, task: blink_iq_test}
rows:
  - {name: a, label: A, paper: ["67.33", ~], recipe: lavit}
  - {name: b, label: B, paper: ["50.0", "30.67"], latents: off, marks: {IQ: odd}}
reference: a
"""


def load(tmp_path: Path, text: str) -> object:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    return load_sheet(tmp_path / "mine.yaml")


def test_the_shipped_tables_hold_the_paper_s_figures() -> None:
    assert {"table1", "table3", "tableA2", "microlab"} <= set(sheet_names()) and "lavit_sft_15k" not in sheet_names()
    first, third, last = (load_sheet(name) for name in ("table1", "table3", "tableA2"))
    assert [len(sheet.rows) for sheet in (first, third, last)] == [11, 6, 15]
    assert [column.n for column in first.columns] == [300, 115, 124, 150, 134, 143, 1500]
    assert list(first.line("lavit").paper.values()) == ["67.33", "82.61", "78.23", "32.0", "45.52", "81.82", "54.07"]
    assert first.line("r1_onevision").paper == {"MMVP": "67.0", "MMStar": "52.1"}
    masked = third.line("no_latents")
    assert masked.latents == "off" and set(masked.marks) == {"RelRefl", "Spatial"} and masked.paper["IQ"] == "25.33"
    assert list(last.line("k8_600").paper.values()) == ["63.33", "22.67", "30.60", "84.62"]
    assert last.line("k4_1000").paper["MMVP"] == first.line("lavit").paper["MMVP"]
    assert all("arXiv 2601.10129" in sheet.source for sheet in (first, third, last))


def test_which_printed_figures_no_count_gives() -> None:
    """By hand: 83 / 115 = 72.17, 84 / 115 = 73.04; 108 / 134 = 80.60, 109 / 134 = 81.34; 116 / 143 = 81.12."""
    assert not countable("72.5", 115) and not countable("81.12", 134) and countable("81.12", 143)
    assert countable("67.33", 300) and countable("62.33", 300) and not countable("62.33", 150)
    assert countable("75", 124) and countable("100.0", 7) and countable("0", 7)
    odd = {
        (sheet.name, line.name, column.name)
        for sheet in map(load_sheet, ("table1", "table3", "tableA2"))
        for line in sheet.rows
        for column in sheet.columns
        if column.name in line.paper and not countable(line.paper[column.name], column.n)
    }
    assert odd == {
        ("table1", "gpt_4o", "V* attr"),
        ("table1", "lvr", "V* attr"),
        ("table3", "no_latents", "RelRefl"),
        ("table3", "no_latents", "Spatial"),
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: mmvp", "task: mmpv", r"unknown task 'mmpv'.*did you mean 'mmvp'"),
        ("name: b", "name: a", "two rows called 'a'"),
        ("name: IQ", "name: MMVP", "two columns called 'MMVP'"),
        ("source: A paper, Table 1", "", "row 'a' has printed figures and no source"),
        ("n: 300", "n: 301", "n = 301; 'mmvp' has 300 questions"),
        ("n: 300", "score: pairs", r"score 'pairs'; allowed: micro, pair"),
        ("n: 300", "skore: pair", r"unknown key 'skore'.*did you mean 'score'"),
        ('["67.33", ~]', '["67.33"]', "1 printed figures for 2 columns"),
        ('"30.67"', '"30.67*"', "printed figure '30.67\\*'"),
        ("marks: {IQ: odd}", "marks: {QI: odd}", "marks 'QI', where nothing is printed"),
        ("reference: a", "reference: c", "no row 'c'"),
        ("label: B, ", "", "lacks 'label'"),
        ("n: 300", "image: '[('", "no regular expression"),
        ("n: 300", "image: 'x'", "has no group"),
        ("columns:", "columns: 3\nother:", "unknown key 'other'"),
        ("title: T", "title: [", "is not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert load(tmp_path, GOOD)
    assert old in GOOD
    with pytest.raises(UserError, match=message):
        load(tmp_path, GOOD.replace(old, new, 1))


def test_an_unknown_table_is_told_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allowed: microlab, table1, table3, tableA2"):
        load_sheet("table4")
    with pytest.raises(UserError, match="is no table"):
        load(tmp_path, "- a")
