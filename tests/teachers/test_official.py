"""The authors' files become traces as they are; whatever does not fit is put aside with its reason, never guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from laavit.registry import TEACHERS, UserError
from laavit.structures import Sample, Tile
from laavit.teachers import ExtractSettings, extract
from laavit.teachers.official import RECORDED, LaViT15kFeatures, find, grid
from laavit.traces.semantics import pool
from laavit.traces.store import TraceStore, verify

WIDTH, LOW, HIGH = 12, 4 * 784, 30 * 784
ABROAD = "/root/somewhere/else/data/features"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A data set's folder as the authors lay it out: five images, features of each."""
    for name in ("images", "features/vtop", "features/trajectories"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for number, size in enumerate([(112, 84), (300, 60), (56, 56), (90, 200), (140, 140)]):
        Image.new("RGB", size, (number * 40, 90, 120)).save(tmp_path / f"data/images/{number}.png")
        write(tmp_path, number, grid(size, 28, LOW, HIGH).cells, steps=1 + number % 3)
    return tmp_path


def write(root: Path, number: int, count: int, steps: int = 1, features: Any = None, **changes: Any) -> None:
    generator = torch.Generator().manual_seed(number)
    maps = torch.rand(steps, count, generator=generator) * 0.3 / count
    content = {
        "steps": [
            {
                "p_t": ((m - m.min()) / (m.max() - m.min())).tolist(),
                "p_topk_idx": [0],
                "raw_attention_scores": m.tolist(),
                **changes,
            }
            for m in maps
        ]
    }
    (root / f"data/features/trajectories/sample_{number:06d}_attention.json").write_text(json.dumps(content))
    states = torch.randn(count, WIDTH, generator=generator).bfloat16() if features is None else features
    torch.save(states, root / f"data/features/vtop/sample_{number:06d}_v_top_layer.pth")


def sample(root: Path, number: int, **meta: Any) -> Sample:
    paths = {
        "v_top_path": f"{ABROAD}/vtop/sample_{number:06d}_v_top_layer.pth",
        "attention_path": f"data/features/trajectories/sample_{number:06d}_attention.json",
    }
    image = root / f"data/images/{number}.png"
    return Sample(str(number), (image,), "What?", "blue", meta={**paths, "final_answer": "Blue", **meta})


def teacher(root: Path) -> LaViT15kFeatures:
    cls = TEACHERS.find("LaViT15kFeatures")
    return cls(str(root), path="tiny", width=WIDTH, min_pixels=LOW, max_pixels=HIGH)


def settings(**changes: Any) -> ExtractSettings:
    return ExtractSettings(**{**RECORDED, "batch_size": 2, "shard_size": 2, **changes})


def imported(root: Path, samples: list[Sample], name: str = "store", **changes: Any) -> TraceStore:
    return TraceStore(extract(teacher(root), samples, settings(**changes), root / name, {}))


@pytest.mark.parametrize("size", [(957, 882), (64, 48), (3000, 200), (28, 28), (2000, 1500)])
def test_the_grid_is_the_processor_s(size: tuple[int, int]) -> None:
    bounds = {"shortest_edge": 200_704, "longest_edge": 1_003_520}
    found = Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=bounds)(Image.new("RGB", size), return_tensors="pt")
    _, height, width = found["image_grid_thw"][0].tolist()
    assert grid(size, 28, 200_704, 1_003_520) == Tile(height // 2, width // 2)


def test_maps_steps_and_features_are_those_of_the_files(published: Path) -> None:
    store = imported(published, [sample(published, i) for i in range(5)])
    assert store.ids == tuple("01234") and not store.quarantined and verify(store.path) == {}
    assert store.header["imported"] and store.header["settings"]["layers"] == list(range(-8, 0))
    for number in range(5):
        trace = store.get(str(number))
        file = published / f"data/features/trajectories/sample_{number:06d}_attention.json"
        maps = [torch.tensor(step["raw_attention_scores"]) for step in json.loads(file.read_text())["steps"]]
        assert torch.equal(trace.gaze, maps[-1]) and trace.mass == pytest.approx(float(maps[-1].sum()))
        assert len(trace.steps) == (len(maps) if len(maps) > 1 else 0)
        assert all(torch.equal(step.gaze, m) for step, m in zip(trace.steps, maps, strict=False))
        states = torch.load(published / f"data/features/vtop/sample_{number:06d}_v_top_layer.pth").float()
        assert torch.equal(trace.semantics, pool(states, maps[-1], "gaze_top_k"))
        assert trace.answer == "Blue" and trace.tiles[0].cells == len(states)


@pytest.mark.parametrize("kind", ["full", "mean", "top_k_rows"])
def test_what_is_kept_of_the_features(published: Path, kind: str) -> None:
    trace = imported(published, [sample(published, 0)], semantics=kind).get("0")
    states = torch.load(published / "data/features/vtop/sample_000000_v_top_layer.pth").float()
    if kind == "mean":
        assert torch.equal(trace.semantics, states.mean(0))
    else:
        assert trace.semantic_tokens is not None
        assert torch.equal(trace.semantics, states[trace.semantic_tokens])
        assert len(trace.semantic_tokens) == (len(states) if kind == "full" else 8)


def unlink(root: Path) -> None:
    (root / "data/features/vtop/sample_000002_v_top_layer.pth").unlink()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (unlink, "features: there is no"),
    "other grid": (lambda root: write(root, 2, 6), r"grid: map of 6 tokens, where .* give 2 x 2 = 4"),
    "features of another grid": (lambda root: write(root, 2, 4, features=torch.ones(6, WIDTH)), "grid: features of 6"),
    "width": (lambda root: write(root, 2, 4, features=torch.ones(4, 3)), r"holds a tensor \(4, 3\)"),
    "nan": (lambda root: write(root, 2, 4, features=torch.full((4, WIDTH), torch.nan)), "not finite"),
    "no tensor": (lambda root: write(root, 2, 4, features={"x": 1}), "holds dict"),
    "pickled code": (lambda root: write(root, 2, 4, features=Path("x")), "does not read as a tensor"),
    "gradient": (lambda root: strip(root), "no raw_attention_scores .*grad_avg.*its p_t is no attention"),
    "no attention": (lambda root: write(root, 2, 4, raw_attention_scores=[9.0] * 4), "no share of attention .*36"),
    "negative": (lambda root: write(root, 2, 4, raw_attention_scores=[-0.1, 0.2, 0.1, 0.1]), "no share of attention"),
    "json": (lambda root: trajectory(root).write_text('{"steps": ['), "trajectory: .* does not read"),
    "no steps": (lambda root: trajectory(root).write_text('{"steps": []}'), "holds no steps"),
    "list": (lambda root: trajectory(root).write_text("[1]"), "does not read"),
    "truncated": (lambda root: truncate(root), "does not read as a tensor"),
}


def trajectory(root: Path) -> Path:
    return root / "data/features/trajectories/sample_000002_attention.json"


def strip(root: Path) -> None:
    trajectory(root).write_text(json.dumps({"steps": [{"p_t": [0.0, 1, 0, 0], "method": "grad_avg"}]}))


def truncate(root: Path) -> None:
    file = root / "data/features/vtop/sample_000002_v_top_layer.pth"
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_put_aside(published: Path, name: str) -> None:
    breaking, reason = BROKEN[name]
    breaking(published)
    store = imported(published, [sample(published, i) for i in range(5)])
    assert store.ids == tuple("0134") and list(store.quarantined) == ["2"]
    with pytest.raises(UserError, match=reason):
        raise UserError(store.quarantined["2"])


def test_nothing_outside_the_root_is_opened(published: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.pth"
    torch.save(torch.ones(4, WIDTH), outside)
    link = published / "data/features/vtop/link.pth"
    link.symlink_to(outside)
    cases = [(f"../{outside.parent.name}/secret.pth", "leads upwards"), ("data/features/vtop/link.pth", "leads out of")]
    cases += [(str(outside), "there is no"), ("", "has no 'v_top"), (None, "has no 'v_top"), ("a\0b", "has no 'v_top")]
    for name, message in cases:
        with pytest.raises(UserError, match=message):
            find(sample(published, 0, v_top_path=name), "v_top_path", published)
    windows = sample(published, 0, v_top_path=r"D:\x\vtop\sample_000001_v_top_layer.pth")
    assert find(windows, "v_top_path", published / "data/features").name == "sample_000001_v_top_layer.pth"


def test_mistakes_are_said_before_the_first_sample(published: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        LaViT15kFeatures(str(published / "none"))
    with pytest.raises(UserError, match="no range"):
        LaViT15kFeatures(str(published), min_pixels=9, max_pixels=8)
    others = ({"normalisation": "minmax"}, {"blind": "teacher"}, {"logits": 4})
    for changes in ({"layers": None}, {"rows": ("answer",)}, *others):
        with pytest.raises(UserError, match=rf"extract\.{next(iter(changes))}: the published features"):
            teacher(published).extractor(settings(**changes))
    two = replace(sample(published, 0), images=(published / "data/images/0.png",) * 2)
    with pytest.raises(UserError, match="one image a sample"):
        teacher(published).extractor(settings()).preparer(two)
