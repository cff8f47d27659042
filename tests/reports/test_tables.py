"""Tables: every figure follows from the records."""

from collections.abc import Callable
from pathlib import Path

import pytest

from laavit.evaluation.statistics import mcnemar, wilson
from laavit.reports.page import _headline
from laavit.reports.rows import Row, comparisons, groups, of_all, pairs, result_rows
from laavit.reports.runs import Evaluation, Record, Run, load_runs
from laavit.reports.table import EMPTY
from laavit.reports.tables import comparisons_table, flatten, p_text, recipe_table, results_table


def row(label: str, answers: dict[tuple[str, str], bool], latents: str = "on", kind: str | None = None) -> Row:
    records = tuple(Record(task, name, right, kind) for (task, name), right in answers.items())
    return Row(label, label.split(",")[0], (Evaluation("test", latents, "", records, f"{label}/records.jsonl", ""),))


def test_accuracy_and_interval_come_from_the_records(make_runs: Callable[[], list[Path]]) -> None:
    table = results_table(result_rows(load_runs(make_runs())))
    assert [cells[0].text for cells in table.rows] == ["base", "naive", "lavit", "lavit, latents off"]
    assert [column.split(" (")[0] for column in table.columns[1:]] == [
        "all questions",
        "colour",
        "shape",
        "relation",
        "depth",
    ]
    colour = table.rows[2][2]
    low, high = wilson(39, 60)
    assert (colour.text, colour.detail) == ("65.0", f"[{100 * low:.1f}, {100 * high:.1f}]")
    assert colour.source.startswith("39 of 60: lavit/eval/test/records.jsonl (SHA-256 ") and colour.best
    assert not table.rows[3][2].best


def test_a_pair_is_compared_on_the_questions_that_both_answered() -> None:
    first = row("a", {("t", str(i)): i < 12 for i in range(20)})
    # other order, two questions less, one that only this model saw, and the same id in another task
    second = row("b", {("t", str(i)): i < 15 for i in reversed(range(2, 20))} | {("t", "x"): True, ("u", "0"): True})
    (one,) = comparisons([first, second], iterations=500)
    assert (one.gain.n, one.gain.won, one.gain.lost) == (18, 3, 0)
    assert one.gain.mean == pytest.approx(3 / 18) and one.gain.low <= 3 / 18 <= one.gain.high
    assert one.gain.p == pytest.approx(mcnemar([True] * 3, [False] * 3)) == pytest.approx(0.25)


def test_nothing_is_compared_without_shared_questions() -> None:
    assert comparisons([row("a", {("t", "0"): True}), row("b", {("t", "1"): True})]) == []


def test_latents_off_is_compared_with_its_own_run_alone() -> None:
    answers = {("t", "0"): True}
    rows = [row("a", answers), row("b", answers), row("b, latents off", answers, latents="off")]
    assert [(x.label, y.label) for x, y in pairs(rows)] == [("b", "a"), ("b, latents off", "b")]


def test_many_runs_are_compared_with_the_first_two() -> None:
    rows = [row(name, {("t", "0"): True}) for name in "abcdef"]
    assert [y.label for x, y in pairs(rows) if x.label == "f"] == ["a", "b"]


def test_tasks_and_kinds_make_the_columns_and_a_missing_one_stays_empty() -> None:
    first = row("a", {("depth", "0"): True, ("iq", "0"): False})
    second = row("b", {("depth", "0"): False})
    assert [title for title, _, _ in groups(of_all([first, second]))] == ["all questions", "depth", "iq"]
    table = results_table([first, second])
    assert table.rows[1][3].text == EMPTY and not table.rows[1][3].best
    assert any("'all questions' has fewer than 2 questions for b" in note for note in table.notes)


def test_markdown_escapes_bars_and_marks_the_best() -> None:
    text = results_table([row("a|b", {("t", "0"): True}), row("c", {("t", "0"): False})]).to_markdown()
    assert "| a\\|b | **100.0** [20.7, 100.0] |" in text


def test_only_differing_keys_of_recipes_are_shown() -> None:
    def run(label: str, **recipe: object) -> Run:
        return Run(path=Path(label), label=label, recipe=recipe)

    table = recipe_table(
        [run("a", seed=1, latents=None, targets={}), run("b", seed=1, latents={"count": 4}, targets={"c": {"w": 0.3}})]
    )
    assert table is not None
    shown = [[cell.text for cell in cells] for cells in table.rows]
    assert shown == [["latents.count", EMPTY, "4"], ["targets.c.w", EMPTY, "0.3"]]
    assert recipe_table([run("a", seed=1), run("b", seed=1)]) is None
    assert flatten({"a": {"b": [1, 2]}, "c": "x"}) == {"a.b": "[1, 2]", "c": "x"}


def test_p_values_are_printed() -> None:
    assert [p_text(p) for p in (1.0, 0.0123, 0.00001)] == ["= 1.0000", "= 0.0123", "< 0.0001"]


def test_runs_of_one_seed_are_compared_with_each_other() -> None:
    """What a seed does to both rows cancels: the interval is narrow, however far the seeds lie apart."""
    base = [[i < right for i in range(100)] for right in (30, 60, 90)]
    better = [[i < right + 5 for i in range(100)] for right in (30, 60, 90)]

    def rows(label: str, answers: list[list[bool]], seeds: list[int | None]) -> Row:
        records = [tuple(Record("t", str(i), right) for i, right in enumerate(one)) for one in answers]
        found = [Evaluation("e", "on", "", own, "", "", seed=seed) for own, seed in zip(records, seeds)]
        return Row(label, label, tuple(found))

    naive = rows("naive", base, [0, 1, 2])
    (paired,) = comparisons([naive, rows("ours", better[::-1], [2, 1, 0])])
    (apart,) = comparisons([naive, rows("ours", better[::-1], [None] * 3)])
    (one,) = comparisons([naive, rows("ours", better[2:], [2])])
    assert paired.gain.mean == apart.gain.mean == pytest.approx(0.05)
    assert paired.gain.low > 0 and paired.gain.p < 0.05
    assert apart.gain.low < 0 and apart.gain.p > 0.5
    assert paired.gain.discordance == pytest.approx(0.05) and apart.gain.discordance > 0.2
    assert (one.gain.won, one.gain.lost) == (5, 0)  # with the one run that began alike, not with all three


def test_the_best_of_many_is_named_with_what_is_left_after_all_comparisons() -> None:
    rows = [row(f"r{i}", {("t", str(j)): j < 40 + (30 if i == 4 else i) for j in range(100)}) for i in range(8)]
    *said, last = _headline(rows, comparisons(rows))
    assert [one.split(" answers")[0] for one in said] == ["r4", "r4"] and "+30.0 points" in said[1]
    assert last.startswith(
        "r4 is the highest of 8 models, which flatters it; of the 13 differences below 2 hold at 5 %"
    )
    few = _headline(rows[:3], comparisons(rows[:3]))
    assert [one.split(" answers")[0] for one in few] == ["r2", "r2"]  # the last one given, against the others


def test_no_column_is_empty_where_models_have_several_seeds() -> None:
    one = {("t", str(j)): j < 50 for j in range(100)}
    seeds = [Row(name, name, row(name, one).evaluations * 2) for name in ("a", "b")]
    assert "only first right" not in comparisons_table(comparisons(seeds), 10).columns
    assert "only first right" in comparisons_table(comparisons([row("a", one), row("b", one)]), 10).columns
    assert "over 2 seeds" in results_table(seeds).notes[1] and "Wilson" not in results_table(seeds).notes[0]
