"""One evaluation: a model folder, some tasks, and what comes out: ``records.jsonl`` and ``summary.json``.

lmms-eval does the asking and the judging. Its response cache stays off: it keys on the model's *name*, so two
checkpoints of one folder would share their answers. Its seeds stay untouched: decoding is greedy, and a training run
that evaluates in between must find its random state where it left it.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from laavit.custom import import_custom
from laavit.evaluation.bridge import Laavit
from laavit.evaluation.interventions.suite import Suite, check
from laavit.evaluation.journal import drop
from laavit.evaluation.lmms import Task, TaskManager, quiet_lmms_eval, simple_evaluate
from laavit.evaluation.records import ID_COLUMNS, make_records, summarise, weights_sha256, write_records
from laavit.evaluation.tasks import load_tasks, task_manager
from laavit.files import write_json
from laavit.registry import UserError

logger = logging.getLogger(__name__)


def evaluate(
    model_folder: str | Path,
    tasks: Sequence[str],
    out: str | Path,
    batch_size: int = 16,
    latents: str | int = "on",
    limit: int | None = None,
    include_path: str | Path | Sequence[str | Path] = (),
    data_root: str | Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    system: str | None = None,
    intervention: str | Mapping[str, Any] | None = None,
    protocol: str = "lmms",
    interventions: Sequence[str] = (),
    intervention_limit: int | None = None,
    fresh: bool = False,
    **model_arguments: Any,
) -> dict[str, Any] | None:
    """Ask the model every question of the tasks and store the records and their summary under ``out``.

    Args:
        model_folder: an export, any Hugging Face vision-language folder, or a hub name.
        tasks: names of lmms-eval's tasks and groups, the project's own (``eval/tasks``) and those of ``include_path``.
        out: the folder for ``records.jsonl`` and ``summary.json``; both are replaced atomically.
        batch_size, device, dtype, system, intervention, model_arguments: see ``laavit.evaluation.bridge.Laavit``.
        latents: 'on', 'off', or how many stand in the prompt; see ``Laavit``.
        limit: at most so many questions a task, from the first; None asks all.
        interventions: names of interventions, or of sets of them ('standard'), that are done one after another with
            the same model and tasks, beside the evaluation (docs/interventions.md).
        intervention_limit: at most so many questions a task for these.
        fresh: ask every question, also those that an unfinished evaluation in ``out`` has answers to; by default these
            are taken over (laavit/evaluation/journal.py). The journal goes once records and summary stand: they hold
            all of it, and the next evaluation of the folder is a new one.
        include_path: more folders of lmms-eval YAML.
        protocol: 'lmms' (lmms-eval's own task code) or 'paper' (``eval/README.md``).
        data_root: a folder of local copies of the data sets, so that nothing is fetched. A task's data are looked
            for in ``<data_root>/<task>``, then under its data set's own name (``<data_root>/BLINK`` or
            ``<data_root>/BLINK-Benchmark/BLINK``), then in ``data_root`` itself where that holds parquet files.

    Returns: the summary; None on every rank but the first.

    Raises:
        UserError: an unknown task, data or a model that cannot be loaded, or an argument that is not allowed.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} was given; allowed: whole numbers from 1, or none for all questions")
    import_custom(model_arguments.get("imports", ()), Path(), "imports")  # which may register interventions
    suite = Suite.of(interventions, limit, intervention_limit) if interventions else None
    started, console = time.perf_counter(), Console(stderr=True)
    with quiet_lmms_eval():
        task_objects = load_tasks(tasks, include_path, data_root, protocol)
        model = Laavit(
            str(model_folder), batch_size=batch_size, latents=latents, device=device, dtype=dtype, system=system,
            intervention=intervention, **model_arguments,
        )  # fmt: skip
        model.console = console  # its bar is the one thing shown
        check(model, task_objects)
        if suite is not None:
            suite.ready(model, task_objects)
    model.open_journal(out, protocol, fresh=fresh)
    with quiet_lmms_eval():
        results = _answers(model, task_objects, task_manager(include_path, tasks), limit)
    journal, model.journal = model.journal, None  # what is asked under interventions is another evaluation
    ask = partial(_asked, model, task_objects, task_manager(include_path, tasks))
    if results is None:
        if suite is not None:
            suite.run(model, task_objects, None, ask, Path(out))
        return None
    records = _records(results, model)
    about: dict[str, Any] = {"model": str(model_folder), "protocol": protocol, "limit": limit}
    about |= {"intervention": intervention, "weights_sha256": weights_sha256(model_folder)}
    about |= {"resumed": len(journal or ()), "seconds": round(time.perf_counter() - started, 3)}
    summary = about | _settings(model) | _figures(results, records)
    _write(Path(out), records, summary, len(journal or ()) == len(records))
    logger.info("%d answers in %.1f s -> %s", len(records), summary["seconds"], out)
    if suite is not None:
        suite.run(model, task_objects, records, ask, Path(out))
    drop(out)
    return summary


def _settings(model: Laavit) -> dict[str, Any]:
    """What answers depend on beside weights and questions."""
    images = model.processor.image_processor
    return {
        "latents": model.latents,
        "system": model.system,
        "batch_size": model.batch_size,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": str(model.model.config._attn_implementation),
        "image_size": dict(getattr(images, "size", None) or {}),
    }


def _figures(results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tasks' figures: ours from the records, and lmms-eval's own."""
    tasks = summarise(records)
    for name, entry in tasks.items():
        entry["metrics"] = _metrics(results["results"][name])
    return {"lmms_eval": results["lmms_eval_version"], "tasks": tasks}


def _write(out: Path, records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], same: bool) -> None:
    """``same``: every answer was there already, so that this evaluation was stopped amidst its interventions."""
    try:
        # what interventions did to former answers is no finding about these
        if not same:
            shutil.rmtree(out / "interventions", ignore_errors=True)
        (out / "interventions.json").unlink(missing_ok=True)
        write_records(out / "records.jsonl", records)
        write_json(out / "summary.json", summary)
    except OSError as error:
        raise UserError(
            f"the records in '{out}' cannot be written: {error.strerror}; the answers are kept there, and the same "
            "command goes on from them"
        ) from error


def _answers(model: Laavit, tasks: list[Task], manager: TaskManager, limit: int | None) -> dict[str, Any] | None:
    """lmms-eval's own results with every sample, nothing cached and no random state touched; None on other ranks."""
    results: dict[str, Any] | None = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        use_cache=None,
        bootstrap_iters=0,
        log_samples=True,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        process_docs_parallel=1,
        # the command line's default: answers are judged without decoding the images a second time
        cli_args=argparse.Namespace(process_with_media=False),
    )
    model.gather()
    return results


def _asked(
    model: Laavit, tasks: list[Task], manager: TaskManager, limit: int | None
) -> list[tuple[tuple[str, int], dict[str, Any]]] | None:
    """The questions asked again, as the model is now: (task, document's number) and record; None on other ranks."""
    model.written.clear()
    with quiet_lmms_eval():
        results = _answers(model, tasks, manager, limit)
    if results is None:
        return None
    samples = results["samples"].items()
    keys = [(task, number) for task, found in samples for number in sorted(sample["doc_id"] for sample in found)]
    return list(zip(keys, _records(results, model), strict=True))


def _records(results: dict[str, Any], model: Laavit) -> list[dict[str, Any]]:
    records = []
    for task, samples in results["samples"].items():
        metrics = [str(entry["metric"]) for entry in results["configs"][task]["metric_list"]]
        seconds = {doc_id: value for (name, doc_id), value in model.seconds.items() if name == task}
        written = {doc_id: value for (name, doc_id), value in model.written.items() if name == task}
        splits = results["configs"][task]
        documents = model.task_dict[task][splits.get("test_split") or splits["validation_split"]]
        named = [name for name in ID_COLUMNS if name in documents.column_names]
        whole = list(documents.select_columns(named)) if named else None
        records += make_records(task, samples, metrics, seconds, written, whole)
    return records


def _metrics(entry: dict[str, Any]) -> dict[str, float]:
    """The task's own aggregates, as lmms-eval reports them (each on its own scale)."""
    return {
        name.partition(",")[0]: value
        for name, value in entry.items()
        if isinstance(value, int | float) and "_stderr" not in name and name != "samples"
    }
