"""Every family, on a tiny random model of its own class with its own processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import FAMILY_NAMES, tiny

from laavit.backbones import Backbone


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model's folder, written once a session."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_family_opens(family: str, family_folder: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(family_folder(family)), dtype="float64")
    assert backbone.family.decoder(backbone.model).config._attn_implementation == "laavit"
