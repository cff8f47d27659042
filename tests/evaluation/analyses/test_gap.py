"""The perception gap: hand-worked KL, cosine and groups; what is read is what one unbatched pass gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny

from laavit.backbones import PromptSettings, collate
from laavit.evaluation.analyses.gap import Along, Compared, compare, gap, read_along, tables
from laavit.evaluation.gaze import Looker, look
from laavit.registry import UserError
from laavit.structures import Sample, Tile
from laavit.teachers import HFTeacher


def along(maps: list[list[float]], states: list[list[float]], tiles: Tile, *texts: str) -> Along:
    groups = tuple({"red": "attribute", "box": "object"}.get(text, "functional") for text in texts)
    return Along(texts, groups, (tiles,), torch.tensor(maps), torch.tensor(states))


def test_kl_and_cosine_by_hand() -> None:
    """KL((1/4, 3/4) || (1/2, 1/2)) = 1/4 ln 1/2 + 3/4 ln 3/2; states at a right angle, and the same but for scale."""
    teacher = along([[1, 3], [2, 2]], [[1, 0], [1, 1]], Tile(1, 2), "red", "box")
    student = along([[0.2, 0.2], [4, 4]], [[0, 1], [3, 3]], Tile(1, 2), "red", "box")
    found = compare([teacher], [student])
    assert found.kl.dtype == np.float64
    assert found.kl == pytest.approx([math.log(0.5) / 4 + 0.75 * math.log(1.5), 0])
    assert found.cosine == pytest.approx([1, 0]) and found.group.tolist() == ["attribute", "object"]


def test_the_teachers_map_is_carried_to_the_students_grid() -> None:
    """Four cells to two: bilinear with a widened filter, weights (3, 3, 1) / 7 on the left: (7/14, ...) by hand."""
    teacher = along([[1.0, 1.0, 1.0, 5.0]], [[1.0]], Tile(1, 4), "red")
    student = along([[1.0, 1.0]], [[1.0, 2.0]], Tile(1, 2), "red")
    found = compare([teacher], [student])
    left, right = (3 + 3 + 1) / 7, (1 + 3 + 3 * 5) / 7
    shares = np.array([left, right]) / (left + right)
    assert found.kl == pytest.approx([float((shares * np.log(2 * shares)).sum())])
    assert found.cosine is None  # widths 1 and 2


def test_groups_contrasts_and_students_by_hand() -> None:
    """Means are over tokens: sample 0 has one attribute of 2, sample 1 two of 5; functional ones are 1."""
    states = np.random.default_rng(0).normal(size=(6, 3))
    first = Compared(
        np.array([0, 0, 1, 1, 1, 1]),
        np.array(["functional", "attribute", "functional", "attribute", "attribute", ""]),
        np.array([1.0, 2, 1, 5, 5, 7]),
        np.array([0.5] * 6),
        states,
        2 * states,
    )
    second = Compared(first.sample, first.group, first.kl - 1, None, states, states[:, :2])
    found = tables({"one": first, "two": second})
    one, two = found["students"].values()
    assert one["tokens"] == {"all": 6, "functional": 2, "object": 0, "attribute": 3}
    assert one["kl"]["attribute"] == pytest.approx([4.0, 2.0, 5.0])  # only sample 0, only sample 1
    assert one["kl"]["functional"] == [1, 1, 1] and one["kl"]["object"] is None
    assert one["kl"]["all"][0] == 3.5 and one["kl_contrasts"]["attribute"] == pytest.approx([3, 1, 4])
    assert one["cosine"]["all"] == pytest.approx([0.5] * 3) and two["cosine"] is None and two["widths"] == [3, 2]
    assert set(one["cka_distance"].values()) == {None}  # without a sample too few tokens are left
    assert found["differences"]["two"]["kl"]["all"] == pytest.approx([-1, -1, -1])


def test_answers_that_are_cut_differently(caplog: pytest.LogCaptureFixture) -> None:
    both = along([[1, 1], [1, 1]], [[1], [1]], Tile(1, 2), "a", "b")
    one = along([[1, 1]], [[1]], Tile(1, 2), "ab")
    with pytest.raises(UserError, match="--unit word"):
        compare([both, both], [one, both])
    found = compare([both, both], [one, both], "word")
    assert found.sample.tolist() == [1, 1] and "1 answers" in caplog.text
    with pytest.raises(UserError, match="cut the answers differently"):
        compare([both], [one], "word")
    blind = along([[0, 0], [1, 1]], [[1], [1]], Tile(1, 2), "a", "b")
    with pytest.raises(UserError, match="do not see the image"):
        compare([both], [blind])


@pytest.mark.parametrize("rows", ["predicting", "own"])
def test_what_is_read_along_is_what_one_sample_alone_gives(boxed: list[Sample], tiny_folder: Path, rows: str) -> None:
    found = read_along(Looker("m", str(tiny_folder), layers=(-2, -1)), boxed, rows=rows, batch_size=3)
    backbone = HFTeacher(str(tiny_folder)).backbone
    builder = backbone.builder(PromptSettings(system=""))
    for sample, each in zip(boxed, found, strict=True):
        item = builder.encode(sample, sample.answer)
        hidden = backbone.forward(collate([item], backbone.family, backbone.tokenizer.pad_token_id))[0]
        asked = (item.labels >= 0).nonzero().flatten()[:-1] + (rows == "own")  # without the end of the turn
        assert "".join(each.texts).replace(" ", "") == sample.answer.replace(" ", "")
        assert len(each.texts) == len(asked) == len(each.groups)
        torch.testing.assert_close(each.states, hidden[asked], rtol=1e-4, atol=1e-4)
        assert each.maps.shape == (len(asked), sum(tile.cells for tile in each.tiles))
    words = read_along(Looker("m", str(tiny_folder)), boxed, unit="word", rows=rows)
    assert words[3].texts == ("the", "red", "shape") and words[3].groups == ("functional", "attribute", "object")


def test_maps_are_the_rows_of_eager_attention(boxed: list[Sample], tiny_folder: Path) -> None:
    (found,) = read_along(Looker("m", str(tiny_folder)), boxed[:1])
    backbone = HFTeacher(str(tiny_folder)).backbone
    item = backbone.builder(PromptSettings(system="")).encode(boxed[0], boxed[0].answer)
    batch = collate([item], backbone.family, backbone.tokenizer.pad_token_id)
    model = backbone.model
    model.set_attn_implementation("eager")
    output = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, output_attentions=True,
        **backbone.family.inputs(batch.vision, None), **backbone.family.text_inputs(batch.input_ids),
    )  # fmt: skip
    attention = torch.stack(output.attentions).mean((0, 2))[0]  # [S, S], over layers and heads
    asked = (item.labels >= 0).nonzero().flatten()[:-1]
    torch.testing.assert_close(found.maps, attention[asked][:, item.roles == 1], rtol=1e-4, atol=1e-6)


def test_a_model_has_no_gap_from_itself(boxed: list[Sample], tiny_folder: Path) -> None:
    lookers = [Looker(name, str(tiny_folder)) for name in ("t", "s")]
    found = gap(lookers, boxed, answers="gold", batch_size=2)
    student = found["students"]["s"]
    assert student["kl"]["all"] == pytest.approx([0] * 3, abs=1e-6) and found["n"] == 4 and found["teacher"] == "t"
    assert student["cosine"]["all"] == pytest.approx([0] * 3, abs=1e-6)
    assert student["cka_distance"]["all"] == pytest.approx([0] * 3, abs=1e-9)


def test_both_read_the_teachers_own_answers(
    boxed: list[Sample], tiny_folder: Path, tmp_path: Path, write_tiny: Callable[..., Path]
) -> None:
    other = write_tiny(tmp_path / "other", layers=2, seed=1)
    lookers = [Looker("t", str(tiny_folder)), Looker("s", str(other))]
    found = gap(lookers, boxed, max_new_tokens=3, unit="token")
    said = [trace.answer for trace in look(lookers[0], boxed, answer="own", max_new_tokens=3)]
    assert found["answers"] == "teacher" and found["n"] == sum(bool(answer.strip()) for answer in said)
    read = read_along(lookers[1], [Sample(s.id, s.images, s.question, a) for s, a in zip(boxed, said)])
    assert found["students"]["s"]["tokens"]["all"] == sum(len(each.texts) for each in read)
    assert found["students"]["s"]["kl"]["all"][0] > 0.01


def test_families_with_other_tiles_and_tokenizers_are_compared_by_words(
    boxed: list[Sample], tiny_folder: Path, tmp_path: Path
) -> None:
    """A student that cuts its images up, beside a teacher that does not."""
    lookers = [Looker("t", str(tiny_folder)), Looker("s", str(tiny("internvl", tmp_path)))]
    found = gap(lookers, boxed, answers="gold", unit="word")
    assert found["students"]["s"]["tokens"]["all"] == 7 and found["students"]["s"]["kl"]["all"][1] > 0


@pytest.mark.parametrize(
    ("lookers", "samples", "message"),
    [
        ([Looker("t", "nowhere")], 1, "at least one student"),
        ([Looker("t", "nowhere"), Looker("t", "nowhere")], 1, "two lookers are called 't'"),
        ([Looker("t", "nowhere"), Looker("s", "nowhere")], 0, "no sample"),
        ([Looker("t", "nowhere"), Looker("s", "nowhere", ("latents",))], 1, "has no latents"),
        ([Looker("t", "nowhere"), Looker("s", "nowhere", ("anwser",))], 1, "no kind of row is called 'anwser'"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    boxed: list[Sample], lookers: list[Looker], samples: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        gap(lookers, boxed[:samples])
    with pytest.raises(UserError, match="no tagger is called 'brill'"):
        gap([Looker("t", "nowhere"), Looker("s", "nowhere")], boxed, tagger="brill")
