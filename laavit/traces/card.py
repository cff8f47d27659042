"""A store's dataset card: README.md with the front matter by which ``datasets`` and the hub read the folder.

The card is made from the store alone, so that it never says more than what is there. A licence is a decision of whoever
shares the traces (the images' and the teacher's terms reach into them): the card leaves a place for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from laavit.files import write_text
from laavit.traces.funnel import filter_names, funnel
from laavit.traces.judging import settings_of
from laavit.traces.schema import storage
from laavit.traces.store import TraceStore
from laavit.traces.summary import settings_lines

CARD = "README.md"
LICENCE = "other"

COLUMNS = {
    "sample_id": "the sample's id in the data set",
    "answer": "the teacher's own greedy answer",
    "blind_answer": "the answer given without the image; null where nothing was asked",
    "mass": "share of the recorded attention that falls on image tokens at all",
    "tiles": "height, width and image of each grid of image tokens, one after another",
    "regions": "x1, y1, x2, y2 of each tile on its image; empty where every tile is a whole image",
    "gaze_values": "the aggregate map over the image tokens, all tiles in order; its strongest tokens where sparse",
    "gaze_indices": "the tokens of gaze_values; empty where the map is whole",
    "semantics": "V_sem: one vector, or one for each of semantic_tokens, one after another",
    "semantic_tokens": "the image tokens whose states semantics holds; empty where they are pooled",
    "step_texts, step_groups": "the steps of the trajectory and their groups (functional, object, attribute)",
    "step_values, step_indices": "the steps' maps, one after another, as gaze_values and gaze_indices",
}
LOGITS = {
    "answer_tokens": "the gold answer in the teacher's tokenizer, its end included",
    "logit_ids, logprobs": "the most probable tokens at each of answer_tokens, one token after another, and their "
    "log-probabilities",
}


def front_matter(store: TraceStore, name: str) -> str:
    """The YAML that says which files are rows: the traces, and each filter's verdicts as a configuration."""
    configs: list[dict[str, Any]] = [{"config_name": "default", "data_files": "shard-*.arrow", "default": True}]
    configs += [
        {"config_name": f"verdicts-{column}", "data_files": f"verdicts/{column}.arrow"}
        for column in sorted(store.verdicts())
    ]
    content = {
        "pretty_name": name,
        "license": LICENCE,
        "task_categories": ["visual-question-answering"],
        "tags": ["laavit", "attention", "distillation"],
        "size_categories": [_size(len(store))],
        "configs": configs,
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _size(count: int) -> str:
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((label for bound, label in bounds if count < bound), "1M<n<10M")


def card_text(store: TraceStore, name: str | None = None) -> str:
    """The whole README.md of a store."""
    name = name or f"{store.path.resolve().name}: a teacher's traces"
    head = store.header
    parts = [
        f"---\n{front_matter(store, name)}---\n",
        f"# {name}\n",
        f"What `{head.get('teacher', 'a teacher')}` answered and where it looked: {len(store)} traces, "
        f"{store.bytes_per_sample():.0f} bytes each, written by [laavit](https://arxiv.org/abs/2601.10129) "
        f"{head.get('laavit', '')}. The images, questions and ground-truth answers are not in it; `sample_id` names "
        "them in the data set.\n",
        "License: to be stated by whoever shares this (the terms of the images, of the data set and of the teacher "
        "apply).\n",
        _filters(store),
        _aside(store),
        "## Columns\n\n" + _table(("column", "what"), (COLUMNS | (LOGITS if storage(head)[2] else {})).items()),
        f"Maps: {_maps(head)}. Semantics: {_semantics(head)}.\n",
        "## How to read it\n\n```python\nfrom laavit.traces.store import TraceStore\n\n"
        "store = TraceStore(\"FOLDER\")  # or laavit.traces.hub.local_store('hf://datasets/NAME/REPOSITORY')\n"
        "trace = store[0]  # trace.answer, trace.gaze [N], trace.semantics [D], trace.steps, trace.verdicts\n```\n\n"
        'or, without laavit, `datasets.load_dataset("FOLDER")`; verdicts are the configurations `verdicts-FILTER`.\n',
        f"## How it was made\n\nDigest `{store.digest(list(store.verdicts()))}`.\n\n"
        + _table(("setting", "value"), [(key, f"`{value}`") for key, value in settings_lines(head)]),
    ]
    return "\n".join(part for part in parts if part)


def _filters(store: TraceStore) -> str:
    names = filter_names(list(store.verdicts()))
    if not names:
        return "## Filters\n\nNone was run.\n"
    found = funnel(store, names)
    rows = []
    for stage in found.stages:
        made = {key: value for key, value in settings_of(store, stage.name).items() if value is not None}
        kind = str(made.pop("type", ""))
        settings = ", ".join([kind] * bool(kind) + [f"{key}={value}" for key, value in made.items()])
        alone, together = (f"{n} ({100 * n / max(found.traces, 1):.1f} %)" for n in (stage.alone, stage.together))
        rows.append((stage.name, alone, together, settings))
    table = _table(("filter", "pass it", "pass it and those above", "settings"), rows)
    return f"## Filters\n\nVerdicts are columns; no trace was deleted ({found.traces} traces).\n\n{table}"


def _aside(store: TraceStore) -> str:
    count = len(store.quarantined)
    return f"Put aside, with reasons in `shard-*.json`: {count}.\n" if count else ""


def _maps(head: Mapping[str, Any]) -> str:
    settings, k = head.get("settings", {}), head.get("gaze_top_k")
    scale = {"none": "attention as it is (Eq. 2)"}.get(settings.get("normalisation", "none"), "see the settings")
    return f"{'whole' if k is None else f'the {k} strongest tokens'}, {scale}"


def _semantics(head: Mapping[str, Any]) -> str:
    dtype = head.get("semantics_dtype", "float32")
    stored = f"{dtype} bits in uint16" if dtype == "bfloat16" else dtype
    return f"{head.get('settings', {}).get('semantics', 'as the settings say')}, {stored}"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_card(store: TraceStore, name: str | None = None) -> Path:
    """Write a store's README.md; one that is there is replaced."""
    path = store.path / CARD
    write_text(path, card_text(store, name))
    return path
