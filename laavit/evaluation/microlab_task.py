"""The functions behind eval/tasks/microlab/*.yaml: the micro-lab's questions as lmms-eval tasks.

A document has the columns ``id``, ``image``, ``question``, ``answer``, ``kind`` (and ``boxes``, not used here). The
folder of parquet files is, in this order: what ``--data-root`` says, the environment variable ``LAAVIT_MICROLAB``, the
demo's own ``runs/demo/data/eval``.
"""

from __future__ import annotations

import os
import re
from typing import Any

FOLDER_VARIABLE = "LAAVIT_MICROLAB"
DEMO_FOLDER = "runs/demo/data/eval"


def __getattr__(name: str) -> Any:
    # `dataset_path: !function laavit.evaluation.microlab_task.FOLDER` reads this attribute when a task is loaded, so
    # that a changed environment counts; a YAML file by itself cannot read one
    if name == "FOLDER":
        return os.environ.get(FOLDER_VARIABLE, DEMO_FOLDER)
    raise AttributeError(name)


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation around it: ' Red.' and 'red' are one answer, 'not red' is another."""
    return re.sub(r"\s+", " ", text.lower()).strip(" \t\n.,;:!?\"'`()[]")


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The scene, as a list of one RGB image."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question as it is asked in training: nothing before or after it."""
    return doc["question"]


def doc_to_messages(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> list[dict]:
    """One user turn, the image before the question."""
    content = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc_to_text(doc)}]}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """``exact_match``: 1 where the normalised answer is the normalised gold answer."""
    return {"exact_match": float(normalise(results[0]) == normalise(doc["answer"]))}
