"""Controls break what they should (which target a sample gets) and keep what they should (shape, entropy, norm)."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laavit.backbones import PromptSettings
from laavit.data.aligned import AlignedDataset
from laavit.registry import UserError
from laavit.structures import Box, Sample
from laavit.targets import BoxTarget, ConceptTarget, Target, TrajectoryTarget
from laavit.targets.controls import derangement, partners, shuffled_cells
from laavit.traces.gaze import entropy
from laavit.traces.store import TraceStore, TraceWriter


def test_a_derangement_has_no_fixed_point_and_leaves_nobody_out() -> None:
    for seed in range(20):
        keys, groups = [0, 0, 0, 1, 2, 3, 4, 4, 5, 5], [1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
        found = derangement(keys, groups, seed).tolist()
        assert sorted(found) == list(range(10))
        assert all(keys[i] != keys[j] and groups[i] == groups[j] for i, j in enumerate(found))
    assert len({tuple(derangement(range(10), [0] * 10, seed).tolist()) for seed in range(20)}) > 15  # the seed decides
    assert derangement(range(10), [0] * 10, 3).tolist() == derangement(range(10), [0] * 10, 3).tolist()


def test_which_partners() -> None:
    images = [("a",), ("a",), ("b",), ("c",), ("a", "b"), ("b", "a")]
    for seed in range(20):
        shuffled, wrong = (partners(control, images, seed).tolist() for control in ("shuffled", "wrong_image"))
        assert all(i != j and len(images[i]) == len(images[j]) for i, j in enumerate(shuffled))
        assert all(images[i] != images[j] and len(images[i]) == len(images[j]) for i, j in enumerate(wrong))
    assert any(
        images[i] == images[j] for s in range(20) for i, j in enumerate(partners("shuffled", images, s).tolist())
    )
    assert partners("random", images, 0).tolist() == list(range(6))
    with pytest.raises(UserError, match=r"control: 'shuffled': .* of 1 samples with one number of images 1 stand"):
        partners("shuffled", [("a",), ("b",), ("a", "b")], 0)
    with pytest.raises(UserError, match=r"control: 'wrong_image': .* of 3 samples with one number of images 2 stand"):
        partners("wrong_image", [("a",), ("a",), ("b",)], 0)


def test_404_120_samples_take_a_few_seconds() -> None:
    began = time.perf_counter()
    images = [(str(place // 3),) for place in range(404_120)]
    found = partners("wrong_image", images, 0)
    assert time.perf_counter() - began < 15 and Counter(found.tolist()).most_common(1)[0][1] == 1


@pytest.fixture(scope="module")
def project(lab: Any, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Six samples, two an image; their traces; a builder of sequences."""
    folder = tmp_path_factory.mktemp("controls") / "store"
    pictures = dict.fromkeys(path for each in samples for path in each.images)
    many = [
        replace(samples[n], id="abcdef"[2 * m + n], images=(path,)) for m, path in enumerate(pictures) for n in range(2)
    ]
    many = [replace(each, boxes=(Box(0.1 * n, 0.1, 0.1 * n + 0.3, 0.4 + 0.1 * n),)) for n, each in enumerate(many)]
    with TraceWriter(folder, {"width": lab.width, "settings": {}}) as writer:
        writer.extend([replace(lab.trace(each), gaze=lab.trace(each).gaze.float()) for each in many])
    return many, TraceStore(folder), lab.student().builder(PromptSettings(system="You look."))


def prepared(project: tuple, target: Target) -> list[dict[str, torch.Tensor]]:
    many, store, builder = project
    target.setup(32, 3, 4, store.header)
    dataset = AlignedDataset(many, builder, {"t": target}, store)
    return [dataset[i][1]["t"] for i in range(len(many))]


@pytest.mark.parametrize("control", ["shuffled", "wrong_image"])
def test_another_sample_s_gaze_and_semantics(project: tuple, control: str) -> None:
    """Exactly the partner's, on this sample's tiles; the set of targets is that of the data set."""
    many, store, builder = project
    partner = partners(control, [each.images for each in many], 0).tolist()
    own, given = prepared(project, ConceptTarget()), prepared(project, ConceptTarget(control=control))
    assert all(torch.equal(given[i]["semantics"], own[j]["semantics"]) for i, j in enumerate(partner))
    assert not any(torch.equal(a["semantics"], b["semantics"]) for a, b in zip(own, given, strict=True))
    true = prepared(project, TrajectoryTarget())
    maps = prepared(project, TrajectoryTarget(control=control))
    for i, j in enumerate(partner):
        encoded = builder.encode(many[i], many[i].answer)
        expected = TrajectoryTarget().prepare(encoded, store.get(many[j].id))["gaze"]
        assert torch.equal(maps[i]["gaze"], expected) and expected.shape == true[i]["gaze"].shape
        assert not torch.equal(maps[i]["gaze"], true[i]["gaze"])


def test_another_sample_s_boxes(project: tuple) -> None:
    many = project[0]
    partner = partners("shuffled", [each.images for each in many], 0).tolist()
    maps, builder = prepared(project, BoxTarget(control="shuffled")), project[2]
    for i, j in enumerate(partner):
        encoded = builder.encode(replace(many[i], boxes=many[j].boxes), many[i].answer)
        assert torch.equal(maps[i]["gaze"], BoxTarget().prepare(encoded, None)["gaze"])


@pytest.mark.parametrize("target", [TrajectoryTarget, BoxTarget])
def test_a_random_map_has_the_values_and_the_entropy_of_the_true_one(project: tuple, target: Any) -> None:
    true, drawn = prepared(project, target()), prepared(project, target(control="random"))
    for a, b in zip(true, drawn, strict=True):
        assert torch.equal(a["gaze"].sort().values, b["gaze"].sort().values)
        torch.testing.assert_close(entropy(a["gaze"]), entropy(b["gaze"]))
    assert (
        sum(not torch.equal(a["gaze"], b["gaze"]) for a, b in zip(true, drawn, strict=True)) >= 5
    )  # of six cells or more
    again, other = prepared(project, target(control="random")), prepared(project, target(control="random", seed=1))
    assert all(torch.equal(a["gaze"], b["gaze"]) for a, b in zip(drawn, again, strict=True))
    assert sum(not torch.equal(a["gaze"], b["gaze"]) for a, b in zip(drawn, other, strict=True)) >= 5


def test_random_places_say_nothing_of_the_sample() -> None:
    """Over many samples of one map the mean is flat: within five standard errors of uniform everywhere."""
    one = torch.zeros(20).index_fill_(0, torch.tensor([3, 4]), 0.5)
    mean = torch.stack([shuffled_cells(one, 0, str(i)) for i in range(4000)]).mean(0)
    assert (mean - 1 / 20).abs().max() < 5 * 0.5 * (0.1 * 0.9 / 4000) ** 0.5


def test_random_semantics_keep_their_values(project: tuple) -> None:
    true, drawn = prepared(project, ConceptTarget()), prepared(project, ConceptTarget(control="random"))
    orders = []
    for a, b in zip(true, drawn, strict=True):
        assert torch.equal(a["semantics"].sort().values, b["semantics"].sort().values)
        torch.testing.assert_close(a["semantics"].norm(), b["semantics"].norm())
        orders.append(tuple(a["semantics"].argsort()[b["semantics"].argsort().argsort()].tolist()))
    assert len(set(orders)) == len(orders)  # no fixed rotation of the space, which a head could learn


def test_a_uniform_map_needs_no_traces(project: tuple) -> None:
    many, _, builder = project
    target = TrajectoryTarget(control="uniform")
    target.setup(32, 3, 4, {})
    dataset = AlignedDataset(many, builder, {"t": target}, None)
    gaze = dataset[0][1]["t"]["gaze"]
    assert gaze.sum() == pytest.approx(1) and (gaze == 1 / len(gaze)).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrajectoryTarget(control="shuffle"), "did you mean 'shuffled'"),
        (lambda: ConceptTarget(control="uniform"), "only a map can be uniform"),
        (lambda: TrajectoryTarget(control="uniform", steps="steps"), "a uniform map has no steps"),
    ],
)
def test_controls_that_do_not_apply_are_named(build: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_a_data_set_too_uniform_is_named(project: tuple) -> None:
    many, store, builder = project
    target = TrajectoryTarget(control="wrong_image")
    with pytest.raises(UserError, match=r"targets\.t: control: 'wrong_image': .* of 2 samples"):
        AlignedDataset(many[:2], builder, {"t": target}, store)


def test_a_store_of_its_own(project: tuple, lab: Any, tmp_path: Path) -> None:
    """Semantics of another teacher beside the run's gaze, each sample's trace required before the first step."""
    many, store, builder = project
    with TraceWriter(tmp_path / "static", {"width": 7, "static": "cls"}) as writer:
        writer.extend([replace(lab.trace(each), semantics=torch.full((7,), float(i))) for i, each in enumerate(many)])
    targets = {"gaze": TrajectoryTarget(), "patches": ConceptTarget(static=True, store=str(tmp_path / "static"))}
    dataset = AlignedDataset(many, builder, targets, store)
    assert dataset.stores["gaze"] is store and dataset.stores["patches"].header["static"] == "cls"
    assert (dataset[4][1]["patches"]["semantics"] == torch.full((7,), 4.0)).all()
    alone = AlignedDataset(many, builder, {"patches": targets["patches"]}, None)  # no shared store is needed
    assert (alone[2][1]["patches"]["semantics"] == 2).all()
    more = [*many, replace(many[0], id="z")]
    with pytest.raises(UserError, match=r"static' lacks the traces of 1 samples: 'z'"):
        AlignedDataset(more, builder, {"patches": targets["patches"]}, None)
    with pytest.raises(UserError, match="there is no trace store at"):
        AlignedDataset(many, builder, {"c": ConceptTarget(store=str(tmp_path / "nothing"))}, store)
