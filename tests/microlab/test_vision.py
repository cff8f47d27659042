from __future__ import annotations

from typing import Any

import torch

from laavit.microlab.scenes import Scene, Shape, make_scene
from laavit.microlab.vision import CLASSES, cache_features, image_features, token_labels, warm_start


def test_labels_name_what_stands_in_the_tokens_cell() -> None:
    shapes = (Shape(1, "green", "triangle", "large", "dark"), Shape(8, "red", "circle", "small", "light"))
    labels = {name: grid.view(6, 6) for name, grid in token_labels(Scene(shapes, (1, 0), 0.0, (0, 0))).items()}
    assert set(labels) == set(CLASSES)
    assert (labels["colour"][:2, 2:4] == 2).all() and (labels["colour"][4:, 4:] == 1).all()
    assert labels["colour"].count_nonzero() == labels["mark"].count_nonzero() == 8
    assert (labels["mark"][4:, 4:] == 1).all() and (labels["mark"][:2, 2:4] == 2).all()
    assert (labels["form"][0, 2], labels["size"][0, 2], labels["tone"][0, 2]) == (3, 2, 1)
    assert labels["row"][:, 0].tolist() == labels["column"][0].tolist() == [0, 0, 1, 1, 2, 2]


def test_cached_features_are_those_of_one_picture_at_a_time(model: Any, processor: Any) -> None:
    scenes = [make_scene(5, index) for index in range(5)]
    cached = cache_features(model, processor, scenes, chunk=2)
    alone = torch.cat([image_features(model, processor, [scene]).detach() for scene in scenes])
    assert cached.shape == (5, 36, 48)
    torch.testing.assert_close(cached, alone, rtol=0, atol=1e-5)


def test_a_warm_start_learns(model: Any, processor: Any) -> None:
    decoder = {name: p.clone() for name, p in model.model.language_model.named_parameters()}
    accuracy = warm_start(model, processor, steps=100, batch_size=8, lr=4e-3)
    assert accuracy["colour"] > 0.4  # 1/6 is chance
    assert accuracy["tone"] > 0.6  # 1/2 is chance
    assert all(torch.equal(p, decoder[name]) for name, p in model.model.language_model.named_parameters())
