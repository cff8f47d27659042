"""In-box mass by rows, layers and heads: against whole maps, and what is chosen from figures that are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from laavit.backbones import Backbone, PromptSettings, collate
from laavit.backbones.rows import positions, row_positions
from laavit.registry import UserError
from laavit.structures import Role, Sample
from laavit.traces.calibrate import BoxProbe, Cells, Choice, best, choose, interval, settings_of
from laavit.traces.grids import sample_mask

KINDS = ("question", "header", "answer")


def cells_of(shares: Mapping[tuple[int, int, int], float], samples: int = 20, noise: float = 0.02) -> Cells:
    """Masses of 3 kinds x 4 layers x 2 heads, 0.2 in the boxes but where (kind, layer, head) says otherwise."""
    generator = torch.Generator().manual_seed(0)
    total = torch.ones(samples, 3, 4, 2, dtype=torch.float64)
    inside = torch.full_like(total, 0.2)
    for (kind, layer, head), share in shares.items():
        inside[:, kind, layer, head] = share
    inside += noise * torch.randn(inside.shape, generator=generator, dtype=torch.float64)
    return Cells(KINDS, inside, total, inside, torch.ones(samples, 3), torch.full((samples,), 0.2))


def everywhere(
    kinds: list[int], layers: list[int], heads: list[int], share: float
) -> dict[tuple[int, int, int], float]:
    return {(kind, layer, head): share for kind in kinds for layer in layers for head in heads}


def test_the_rows_and_layers_that_look_are_found() -> None:
    cells = cells_of(everywhere([1, 2], [2, 3], [0, 1], 0.9))
    rows, layers, heads = choose(cells)
    assert rows.rows == ("header", "answer") and rows.layers == (0, 1, 2, 3) and rows.heads is None
    assert (layers.rows, layers.layers, layers.heads) == (("header", "answer"), (2, 3), None)
    assert heads.layers is None and set(heads.heads or ()) == {(2, 0), (2, 1), (3, 0), (3, 1)}
    # what is as good and averages as much wins over what is narrower; the two that are equal here are the same cells
    assert best([rows, layers], cells) == layers
    assert float(cells.share(layers).mean()) == pytest.approx(0.9, abs=0.02)


def test_single_heads_win_only_where_they_look_clearly_more() -> None:
    cells = cells_of(everywhere([0, 1, 2], [1], [1], 0.8))
    stages = choose(cells)
    assert stages[2].heads == ((1, 1),)
    assert best(stages, cells) == stages[2]
    flat = cells_of({})
    stages = choose(flat)
    chosen = best(stages, flat)
    assert chosen.heads is None and len(chosen.rows) * len(chosen.layers or ()) >= 6  # noise moves hardly anything


def test_without_attention_or_samples_nothing_is_chosen() -> None:
    empty = Cells(KINDS, *(torch.zeros(0, 3, 4, 2),) * 3, torch.zeros(0, 3), torch.zeros(0))
    blind = Cells(KINDS, *(torch.zeros(5, 3, 4, 2),) * 3, torch.ones(5, 3), torch.full((5,), 0.2))
    for cells in (empty, blind):
        with pytest.raises(UserError, match="no sample with boxes"):
            choose(cells)


def test_intervals() -> None:
    values = torch.tensor([0.1, 0.3, 0.5, torch.nan], dtype=torch.float64)
    mean, low, high = interval(values)
    assert mean == pytest.approx(0.3) and high - mean == pytest.approx(1.96 * 0.2 / 3**0.5)
    assert low == pytest.approx(2 * mean - high)
    assert all(value != value for value in interval(values[3:]))


def test_settings_are_written_from_the_end_where_they_reach_it() -> None:
    assert settings_of(Choice("x", ("header",), (1, 2)), 3) == {"rows": ("header",), "layers": (-2, -1)}
    assert settings_of(Choice("x", ("header",), (0, 1)), 3) == {"rows": ("header",), "layers": (0, 1)}
    assert settings_of(Choice("x", ("header",), (0, 1, 2)), 3) == {"rows": ("header",)}
    assert settings_of(Choice("x", ("header",), None, ((0, 1),)), 3)["heads"] == ((0, 1),)


@torch.no_grad()
def test_masses_equal_those_of_whole_maps(tiny_folder: Path, samples: list[Sample]) -> None:
    backbone = Backbone.load(str(tiny_folder), dtype="float64")
    builder = backbone.builder(PromptSettings())
    items = [builder.encode(sample, sample.answer) for sample in samples]
    batch = collate(items, backbone.family, backbone.tokenizer.pad_token_id)
    masks = [
        sample_mask(s.boxes, [span.tile for span in i.spans]).double() for s, i in zip(samples, items, strict=True)
    ]
    image = positions(batch.roles == Role.IMAGE)
    inside = torch.zeros(image.shape)
    for row, mask in enumerate(masks):
        inside[row, : len(mask)] = mask
    rows = {kind: row_positions(batch, kind) for kind in KINDS}
    choices = [
        Choice("a", ("question", "answer"), (0, 2)),
        Choice("b", ("header",), None, ((1, 3), (2, 0), (2, 1))),
    ]
    probe = BoxProbe(rows, image, inside, 3, choices)
    backbone.forward(batch, probe)
    cells, shares = probe.cells(), probe.shares()
    twin = AutoModelForImageTextToText.from_pretrained(
        tiny_folder, dtype=torch.float64, attn_implementation={"text_config": "plain", "vision_config": "sdpa"}
    )
    for n, (item, mask) in enumerate(zip(items, masks, strict=True)):
        out = twin.model(
            item.input_ids[None], position_ids=item.position_ids[:, None], output_attentions=True, **item.vision
        )
        own = torch.cat([span.positions() for span in item.spans])
        maps = torch.stack([layer[0] for layer in out.attentions])  # [L, H, S, S]
        assert float(cells.chance[n]) == pytest.approx(float(mask.mean()))
        at = {kind: [int(p) for p in rows[kind][n] if p >= 0] for kind in KINDS}
        for t, kind in enumerate(KINDS):
            assert int(cells.rows[n, t]) == len(at[kind])
            for layer in range(3):
                for head in range(4):
                    scores = sum(maps[layer, head, i][own] for i in at[kind])
                    best_three = sorted(range(len(own)), key=lambda j: -float(scores[j]))[:3]
                    top = sum(scores[j] * mask[j] for j in best_three) / sum(scores[j] for j in best_three)
                    assert float(cells.inside[n, t, layer, head]) == pytest.approx(float((scores * mask).sum()))
                    assert float(cells.total[n, t, layer, head]) == pytest.approx(float(scores.sum()))
                    assert float(cells.top[n, t, layer, head]) == pytest.approx(float(top))
        for choice, found in zip(choices, shares, strict=True):
            pairs = choice.heads or [(layer, head) for layer in choice.layers or () for head in range(4)]
            scores = sum(maps[layer, head, i][own] for layer, head in pairs for kind in choice.rows for i in at[kind])
            assert isinstance(scores, Tensor)
            assert float(found[0, n]) == pytest.approx(float((scores * mask).sum() / scores.sum()))
            assert float(cells.share(choice)[n]) == pytest.approx(float(found[0, n]))
