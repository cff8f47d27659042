"""``laavit traces calibrate``: half chooses, half reports, and the proposal is a recipe's line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laavit.commands import calibrate as command
from laavit.commands.calibrate import boxed_samples, halves
from laavit.recipe import load_recipe
from laavit.registry import UserError
from laavit.structures import Box, Sample
from laavit.teachers import HFTeacher


def sample(name: str, image: str, boxed: bool = True) -> Sample:
    return Sample(name, (Path(image),), "?", "x", (Box(0, 0, 0.5, 0.5),) if boxed else ())


def test_only_boxed_samples_are_drawn_and_images_stay_on_one_side() -> None:
    data = [sample(str(n), f"{n // 3}.png", boxed=n % 2 == 0) for n in range(60)]
    drawn = boxed_samples(data, 12, seed=1)
    assert len(drawn) == 12 and all(s.boxes for s in drawn) and len({s.id for s in drawn}) == 12
    assert [s.id for s in boxed_samples(data, 12, seed=1)] == [s.id for s in drawn]
    assert [s.id for s in boxed_samples(data, 12, seed=2)] != [s.id for s in drawn]
    assert len(boxed_samples(data, 1000, seed=1)) == 30
    first, second = halves(drawn)
    assert len(first) + len(second) == 12 and abs(len(first) - len(second)) <= 3
    assert not {s.images for s in first} & {s.images for s in second}
    with pytest.raises(UserError, match="needs samples with boxes, and 3 of 6"):
        boxed_samples(data[:6], 12, seed=1)
    with pytest.raises(UserError, match="two images or more"):
        halves([sample(str(n), "same.png") for n in range(5)])


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path, pictures: list[Path]) -> Path:
    """Eight records on three images, each with a box; one image is broken."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths = [*map(str, pictures), "broken.png"]
    for path in pictures:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    records = [
        {
            "dataset": "tiny", "split": "train", "question_id": n, "image": [Path(paths[n % 4]).name],
            "bboxes": [[0.1, 0.1, 0.6, 0.7]],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat colour is the shape?"},
                {"from": "gpt", "value": "<answer>blue</answer>"},
            ],
        }
        for n in range(12)
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    file = tmp_path / "cfg.py"
    file.write_text(
        f"teacher = dict(name='hf', path={str(tiny_folder)!r})\n"
        f"data = dict(type='VisualCoT', annotations={str(tmp_path / 'data.json')!r}, root={str(tmp_path)!r})\n"
        "student = 'qwen2_5_vl_3b'\n"
        "extract = dict(rows=('header', 'answer'), layers='last 2', max_new_tokens=3, batch_size=2)\n"
    )
    return file


def test_the_report(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.calibrate_main([str(recipe), "--samples", "12", "--out", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["samples"]["chose"] + found["samples"]["reported"] == 9  # the broken image's three are put aside
    assert [choice["name"] for choice in found["choices"]] == ["present", "rows", "layers", "heads"]
    assert found["choices"][0]["settings"] == {"rows": ["header", "answer"], "layers": [-2, -1]}
    assert all(0 <= choice["in_box"][0] <= 1 for choice in found["choices"]) and 0 < found["chance"][0] < 1
    assert len(found["cells"]) == 4 * 3 * (1 + 4)
    assert command.calibrate_main([str(recipe), "--samples", "12", "--out", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == found
    line = printed[printed.index("extract = dict(") :].strip()
    before = load_recipe(recipe).build("extract").card()
    recipe.write_text(recipe.read_text() + line + "\n")  # it can be pasted as it is, and changes nothing else
    after = load_recipe(recipe).build("extract").card()
    proposed = found["proposal"]["settings"]
    assert after == before | {key: proposed.get(key) for key in ("rows", "layers", "heads")}


def test_the_present_choice_is_what_the_extraction_stores(recipe: Path) -> None:
    """The in-box share that calibration reports is the one of the traces that its settings write."""
    from laavit.commands.calibrate import measure
    from laavit.traces.calibrate import Choice
    from laavit.traces.grids import in_box_mass, sample_mask

    opened = load_recipe(recipe)
    extractor = opened.build("teacher").extractor(opened.build("extract"))
    samples = [s for s in opened.build("data") if s.images[0].name != "broken.png"]
    _, shares = measure(extractor, samples, 8, "", [Choice("present", ("header", "answer"), (1, 2))])
    traces = [t for n in range(0, 9, 2) for t in extractor([extractor.preparer(s) for s in samples[n : n + 2]])]
    for trace, sample, share in zip(traces, samples, shares[0, 0], strict=True):
        mask = sample_mask(sample.boxes, trace.tiles)
        assert float(in_box_mass(trace.gaze, mask)) == pytest.approx(float(share), rel=1e-4)


def test_what_it_cannot_do(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--samples: at least 4"):
        command.calibrate_main([str(recipe), "--samples", "1"])
    monkeypatch.setattr(HFTeacher, "extractor", lambda self, settings: object())
    with pytest.raises(UserError, match="has no rows of words to calibrate"):
        command.calibrate_main([str(recipe)])
