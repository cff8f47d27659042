"""Rows by kind against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laavit.backbones.rows import ROW_KINDS, image_rows, positions, row_positions
from laavit.structures import Role, Sample


def test_kinds_of_rows_are_the_positions_they_name(lab: Any, samples: list[Sample]) -> None:
    model = lab.model({})
    batch = lab.batch(model, samples)
    for b in range(len(samples)):
        roles = batch.roles[b].tolist()
        latents = [i for i, role in enumerate(roles) if role == Role.LATENT]
        wanted = {
            "question": [i for i, role in enumerate(roles) if role == Role.QUESTION],
            "header": list(range(*batch.headers[b])),
            "latents": latents,
            "separator": [latents[-1] + 1],
            "answer": [i for i, role in enumerate(roles) if role == Role.ANSWER],
            "predicting": [i for i, label in enumerate(batch.labels[b].tolist()) if label >= 0],
        }
        assert set(wanted) == set(ROW_KINDS)
        for kind, expected in wanted.items():
            found = row_positions(batch, kind)[b].tolist()
            assert found[: len(expected)] == expected and set(found[len(expected) :]) <= {-1}
        # What predicts the answer is the separator and all of the answer but its end.
        assert wanted["predicting"] == wanted["answer"][:-1] and wanted["header"][-1] == latents[0] - 1


def test_without_latents_there_is_no_separator_row(lab: Any, samples: list[Sample]) -> None:
    model = lab.model({}, student=lab.student(0))
    batch = lab.batch(model, samples)
    assert row_positions(batch, "separator").shape == (3, 0) == row_positions(batch, "latents").shape


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 20)])
def test_positions_and_image_columns(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    roles = torch.where(torch.rand(shape) > 0.5, int(Role.IMAGE), int(Role.QUESTION))
    rows = torch.rand(shape[0], 3, shape[1])
    found = positions(roles == Role.IMAGE)
    columns, valid = image_rows(rows, roles)
    for b in range(shape[0]):
        expected = [i for i in range(shape[1]) if roles[b, i] == Role.IMAGE]
        assert found[b].tolist() == expected + [-1] * (found.shape[1] - len(expected))
        assert torch.equal(columns[b][:, valid[b]], rows[b][:, expected]) and not columns[b][:, ~valid[b]].any()
