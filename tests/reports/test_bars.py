"""Interventions and analyses on the page, from hand-written files."""

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from laavit.reports import build_page
from laavit.reports.bars import effect_panels, effects_table

EFFECT = {"n": 240, "p": 0.02, "delta": [-0.1, -0.15, -0.05], "accuracy": [0.6, 0.54, 0.66]}
CONTENT = {
    "n": 240,
    "reference": {"accuracy": [0.7125, 0.65, 0.77]},
    "effects": {
        "blank_image": EFFECT
        | {"on": "image", "changed": [0.8, 0.75, 0.85], "kl": [2.5, 2.2, 2.8], "latent_shift": None},
        "zero_latents": EFFECT | {"on": "latents", "changed": [0.1, 0.06, 0.14], "kl": None, "latent_shift": None},
        "mean_latents": EFFECT
        | {"on": "latents", "changed": [0.2, 0.1, 0.3], "p": 0.03, "kl": [0.125, 0.1, 0.15], "latent_shift": None},
    },
    "skipped": {"box_only": "no question has boxes"},
    "collapse": {"pairwise_cosine": [0.91, 0.9, 0.92], "effective_rank": [1.35, 1.3, 1.4], "latents": 4},
}  # fmt: skip


def test_the_table_behind_the_bars() -> None:
    table = effects_table(CONTENT, "lavit/eval/test/interventions.json")
    assert [row[0].text for row in table.rows] == ["zero latents", "mean latents", "blank image"]
    changed = table.rows[0][2]
    assert (changed.text, changed.detail, changed.value) == ("10.0", "[6.0, 14.0]", 0.1)
    assert table.rows[0][3].text == "-10.0" and table.rows[0][5].text == "–" and table.rows[2][5].text == "2.500"
    assert [row[4].text for row in table.rows] == ["0.0600", "0.0600", "0.0600"]  # 3 · .02, then never below it
    said = " ".join(table.notes)
    assert "71.2 % [65.0, 77.0]" in said and "cosine of 0.910" in said and "effective rank of 1.35" in said
    assert all(cell.source for row in table.rows for cell in row)


def test_a_panel_for_each_measure_that_was_taken() -> None:
    panels = effect_panels(CONTENT)
    assert [panel.title.partition(",")[0] for panel in panels] == [
        "answers that changed",
        "change of accuracy",
        "KL of the answer's distribution",
    ]
    assert panels[0].svg.count("zero latents") == 1 and "var(--c1)" in panels[0].svg and "var(--c2)" in panels[0].svg
    assert "var(--c2)" in panels[2].svg  # mean_latents has a KL, zero_latents has none


def test_the_page_shows_them_and_says_what_was_left_out(make_runs: Callable[[], list[Path]], tmp_path: Path) -> None:
    runs = make_runs()
    absent = build_page(runs, tmp_path / "none.html").read_text(encoding="utf-8")
    assert "No run holds an interventions.json" in absent and "id='analyses'" not in absent
    (runs[2] / "eval" / "test" / "interventions.json").write_text(json.dumps(CONTENT))
    (runs[2] / "analysis").mkdir()
    (runs[2] / "analysis" / "focus.json").write_text(json.dumps({"n": 3}))
    Image.new("RGB", (8, 8)).save(runs[2] / "analysis" / "focus.png")
    page = build_page(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "id='interventions'" in page and "box_only: no question has boxes" in page
    assert "data:image/png;base64," in page and "lavit/analysis/focus.json" in page
    for opening in ("Do not conclude from a long bar alone", "Do not conclude cause", "Do not compare total losses"):
        assert opening in page


def test_seeds_share_a_row_and_a_colour(make_runs: Callable[[], list[Path]], tmp_path: Path) -> None:
    base, naive, lavit = make_runs()
    page = build_page([base, f"both={naive},{lavit}"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "both − base" in page and "(both: 2)" in page and "2 seeds, 240 questions each" in page
    assert page.count("></i>both</li>") == 1  # one legend entry for two curves
