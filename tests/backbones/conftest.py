"""Every family's tiny model, written and opened once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from families import tiny

from laavit.backbones import Backbone


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder; treat as read-only."""
    return cache(lambda family: tiny(family, tmp_path_factory.mktemp("families") / family))


@pytest.fixture(scope="session")
def open_family(folder_of: Callable[[str], Path]) -> Callable[[str], Backbone]:
    """A family's backbone in float64 and eval mode; treat as read-only."""

    @cache
    def opened(family: str) -> Backbone:
        backbone = Backbone.load(str(folder_of(family)), dtype="float64")
        backbone.model.eval().requires_grad_(False)
        return backbone

    return opened
