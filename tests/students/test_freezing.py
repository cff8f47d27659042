"""Parts by name, in every family: one training step moves exactly what is not frozen."""

from __future__ import annotations

import re
from typing import Any

import pytest
from families import FAMILY_NAMES
from families.names import patterns

from laavit.latents import latent_tokens
from laavit.registry import UserError

#: parameters that no loss reaches even where everything learns
LAST = r"model\.vision_tower\.(encoder\.layers\.2|post_layernorm)\."  # their features are those of the layer before
UNREACHED = {"llava_onevision": r"model\.vision_tower\.post_layernorm\.", "llava": LAST, "llava_next": LAST}


@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("vision",),
        ("tower",),
        ("projector",),
        ("embeddings",),
        ("head",),
        ("decoder",),
        ("vision", "projector", "head"),
    ],
    ids=lambda frozen: "+".join(frozen) or "full",
)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_step_moves_what_is_not_frozen(workshop: Any, family: str, frozen: tuple[str, ...]) -> None:
    student = workshop.student(family, freeze=frozen)
    names = dict(student.model.named_parameters())
    ids = student.backbone.tokenizer.convert_tokens_to_ids(latent_tokens(3))
    still = [patterns(family)[part] for part in frozen if part not in ("embeddings", "head")]
    still += [UNREACHED[family]] if family in UNREACHED else []
    wanted = {name for name in names if not any(re.match(pattern, name) for pattern in still)}
    moved = workshop.moved(student)
    assert set(moved) == wanted
    for part in ("embeddings", "head"):
        (table,) = (name for name in names if re.match(patterns(family)[part], name))
        if part in frozen:  # the rows of latents and separator alone
            assert moved[table].tolist() == ids
        else:
            assert len(moved[table]) == len(names[table])  # weight decay alone moves the others


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_parameter_belongs_to_one_part(workshop: Any, family: str) -> None:
    """What the names in this file cover, so that none of them is left out unseen."""
    found = {n: [p for p, pat in patterns(family).items() if p != "vision" and re.match(pat, n)] for n, _ in
             workshop.student(family).model.named_parameters()}  # fmt: skip
    assert {name: parts for name, parts in found.items() if len(parts) != 1} == {}


def test_without_latents_frozen_tables_stand_still(workshop: Any) -> None:
    student = workshop.student("qwen2_5_vl", latents=0, freeze=("vision", "embeddings", "head"))
    decoder = re.compile(patterns("qwen2_5_vl")["decoder"])
    assert all(decoder.match(name) for name in workshop.moved(student))


def test_a_tied_head_freezes_with_the_embeddings_alone(lab: Any) -> None:
    head, table = (lab.student(freeze=(part,)).model.get_input_embeddings().weight for part in ("head", "embeddings"))
    assert not hasattr(head, "few_rows") and head.requires_grad
    assert table.few_rows and table.requires_grad


def test_expressions_freeze_parameters(workshop: Any) -> None:
    moved = workshop.moved(workshop.student("smolvlm", freeze=("vision", r"text_model\.layers\.[01]\.", "q_proj")))
    layers = {name.split(".")[3] for name in moved if "text_model.layers" in name}
    assert layers == {"2"} and not any("q_proj" in name for name in moved)


def test_a_name_that_fits_nothing_is_named(workshop: Any) -> None:
    with pytest.raises(UserError, match=r"freeze: 'decodr' fits no parameter .*did you mean 'decoder'"):
        workshop.student("internvl", freeze=("decodr",))
    with pytest.raises(UserError, match=r"freeze: 'layers\(' is neither a part nor a regular expression"):
        workshop.student("internvl", freeze=("layers(",))


def test_what_learns_is_told_by_part(workshop: Any) -> None:
    """``traces.vision_cache`` asks this: it keeps what an open projector would change."""
    default = {family: workshop.student(family) for family in ("qwen3_vl", "smolvlm")}
    assert {family: student.learns("projector") for family, student in default.items()} == {
        "qwen3_vl": False,
        "smolvlm": True,
    }
    assert not any(student.learns("vision") for student in default.values())
    adapted = workshop.student(
        "smolvlm", freeze=("vision", "projector"), lora={"rank": 2, "targets": ["decoder", "tower"]}
    )
    assert adapted.learns("vision") and not adapted.learns("projector")
