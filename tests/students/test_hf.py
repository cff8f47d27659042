"""Students: latents' rows, what is frozen, and vocabularies with too few spare rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from laavit.backbones import PromptSettings
from laavit.latents import LearnedLatents, latent_tokens
from laavit.recipe import Recipe, cards, parse_overrides
from laavit.registry import UserError
from laavit.structures import Role, Sample
from laavit.students import HFStudent


@pytest.mark.parametrize("count", [1, 4, 8, 16])
def test_an_embedding_without_spare_rows_grows(
    lab: Any, samples: list[Sample], tmp_path: Path, write_tiny: Any, count: int
) -> None:
    folder = write_tiny(tmp_path / "full", spare=0)
    student = lab.student(count, folder=folder)
    rows = student.model.get_input_embeddings().weight.shape[0]
    assert rows == len(student.backbone.tokenizer) == student.model.config.get_text_config().vocab_size
    model = lab.model(student=student)
    batch = lab.batch(model, samples)
    model(batch)["loss"].backward()
    assert (batch.roles == Role.LATENT).sum(1).tolist() == [count] * 3
    model.save_checkpoint(tmp_path)
    fresh = lab.model(student=lab.student(count, folder=folder))
    fresh.load_checkpoint(tmp_path)
    assert torch.equal(fresh.student.model.get_input_embeddings().weight, student.model.get_input_embeddings().weight)


def test_spare_rows_are_used_first(lab: Any) -> None:
    plain, student = HFStudent(str(lab.folder)), lab.student(4, dtype="float32", noise=0.0)
    before, after = (s.model.get_input_embeddings().weight for s in (plain, student))
    ids = student.backbone.tokenizer.convert_tokens_to_ids(latent_tokens(4))
    assert before.shape == after.shape and min(ids) == len(plain.backbone.tokenizer)
    same = torch.ones(len(after), dtype=torch.bool).index_fill_(0, torch.tensor(ids), False)
    assert torch.equal(before[same], after[same])
    known = before[: len(plain.backbone.tokenizer)].mean(0)
    torch.testing.assert_close(after[ids], known.expand(5, -1))


@pytest.mark.parametrize("init", ["mean", "random", "<|im_end|>"])
def test_initial_rows(lab: Any, init: str) -> None:
    one, two = (lab.student(4, dtype="float32", init=init, noise=0.1) for _ in range(2))
    ids = one.backbone.tokenizer.convert_tokens_to_ids(latent_tokens(4))
    rows = one.model.get_input_embeddings().weight[ids].detach()
    assert torch.equal(rows, two.model.get_input_embeddings().weight[ids])  # the same seed, the same rows
    assert len({tuple(row.tolist()) for row in rows}) == 5  # noise tells them apart
    if init == "<|im_end|>":
        exact = lab.student(4, dtype="float32", init=init, noise=0.0).model.get_input_embeddings().weight
        source = one.backbone.tokenizer.convert_tokens_to_ids(init)
        assert torch.equal(exact[ids], exact[source].expand(5, -1))


@pytest.mark.parametrize("name", cards("latents"))
def test_latents_by_name_train(lab: Any, samples: list[Sample], name: str) -> None:
    """Every name of registry/latents: a finite step whose gradient reaches the separator's row and some latent."""
    student = HFStudent(str(lab.folder), "float64")
    latents = Recipe({"latents": name}).build("latents")
    student.setup(latents, torch.Generator().manual_seed(3))
    model = lab.model(student=student)
    losses = model(lab.batch(model, samples[:2]))
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert ("emit" in losses) == latents.layout.emitted
    rows = student.model.get_input_embeddings().weight.grad[student.builder(PromptSettings()).latent_ids]
    assert rows[-1].abs().sum() > 0 and (latents.layout.feedback or rows[0].abs().sum() > 0)


@pytest.mark.parametrize(("given", "least", "most"), [("6", 6, 6), ("[2, 8]", 2, 8), ((2, 8), 2, 8), ([3, 3], 3, 3)])
def test_counts_are_read_from_recipes_and_command_lines(given: Any, least: int, most: int) -> None:
    parsed = parse_overrides(["--latents.count", given])["latents.count"] if isinstance(given, str) else given
    layout = Recipe({"latents": {"name": "learned", "count": parsed}}).build("latents").layout
    assert (layout.least, layout.most, layout.varies) == (least, most, least < most)
    counts = [layout.count_of(f"sample {i}") for i in range(400)]
    assert set(counts) == set(range(least, most + 1))
    assert counts == [layout.count_of(f"sample {i}") for i in range(400)]


@pytest.mark.parametrize("given", [[8, 2], [0, 4], 0, [1, 2, 3], True, "many"])
def test_counts_that_are_none(given: Any) -> None:
    with pytest.raises(UserError, match="latents"):
        Recipe({"latents": {"name": "learned", "count": given}}).build("latents")


def test_bad_initial_rows_are_named(lab: Any) -> None:
    with pytest.raises(UserError, match="tokens; give 'mean', 'random' or one token's text"):
        lab.student(4, init="you are helpful")
    with pytest.raises(UserError, match="at least 1, got 0"):
        LearnedLatents(0)
    with pytest.raises(UserError, match="emit_weight: got 2, and these latents are not emitted"):
        LearnedLatents(4, emit_weight=2)
    with pytest.raises(UserError, match="not negative"):
        LearnedLatents(4, noise=-1.0)


def test_latents_are_added_once(lab: Any, tmp_path: Path) -> None:
    """A student that was trained with latents starts from their trained rows."""
    lab.student(4).backbone.save(tmp_path)
    again = HFStudent(str(tmp_path), "float64")
    before = again.model.get_input_embeddings().weight.detach().clone()
    again.setup(LearnedLatents(4), torch.Generator())
    assert torch.equal(again.model.get_input_embeddings().weight, before) and again.latents == 4
    again.setup(LearnedLatents(6), torch.Generator())  # two more
    ids = again.backbone.tokenizer.convert_tokens_to_ids(latent_tokens(6))
    assert len(set(ids)) == 7 and None not in ids


def test_latent_rows_of_a_table_frozen_by_an_expression_learn_too(lab: Any) -> None:
    student = lab.student(4, freeze=("vision", "embed_tokens"))
    assert student.model.get_input_embeddings().weight.requires_grad
    assert not lab.student(0, freeze=("vision", "embed_tokens")).model.get_input_embeddings().weight.requires_grad


def test_a_name_to_freeze_that_fits_nothing(lab: Any) -> None:
    with pytest.raises(UserError, match=r"freeze: 'layers\\.9\\.' fits no parameter.*vision"):
        lab.student(freeze=(r"layers\.9\.",))
    lab.student(freeze=("vision", "head"))  # the tied head has no parameter of its own
    with pytest.raises(UserError, match=r"freeze: .*regular expression"):
        lab.student(freeze=("layers(",))
