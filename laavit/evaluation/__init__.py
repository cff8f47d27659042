"""Evaluation: the lmms-eval bridge, runs over tasks, records, and statistics on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laavit.evaluation.settings import EvalSettings

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["EvalSettings", "manifest"]


def manifest() -> ModelManifest:
    """What lmms-eval's entry-point group ``lmms_eval.models`` asks for: the model name ``laavit`` and its class.

    lmms-eval calls this while it imports itself, so nothing heavier than its registry is imported here: importing the
    bridge at that moment would be a circle, and lmms-eval would drop the model with a warning.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="laavit", chat_class_path="laavit.evaluation.bridge.Laavit")
