"""How a recipe is evaluated, for the commands that do it after training."""

from __future__ import annotations

from dataclasses import dataclass

from laavit.registry import SETTINGS


@SETTINGS.register_module(name="eval")
@dataclass(frozen=True)
class EvalSettings:
    """Which benchmarks answer for a recipe.

    Args:
        tasks: names of lmms-eval tasks, also those of ``eval/tasks``.
        data_root: folder of local copies of the data sets; None lets ``datasets`` find them.
        batch_size: questions a pass.
    """

    tasks: tuple[str, ...] = ()
    data_root: str | None = None
    batch_size: int = 16
