"""One evaluation: a model folder, some tasks, and what comes out: ``records.jsonl`` and ``summary.json``.

lmms-eval does the asking and the judging. Its response cache stays off: it keys on the model's *name*, so two
checkpoints of one folder would share their answers. Its seeds stay untouched: decoding is greedy, and a training run
that evaluates in between must find its random state where it left it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from loguru import logger as lmms_logger
from rich.console import Console

from laavit.evaluation.microlab_task import FOLDER_VARIABLE
from laavit.evaluation.records import make_records, summarise, weights_sha256, write_records
from laavit.files import write_json
from laavit.paths import project_data
from laavit.registry import UserError, nearest

lmms_logger.disable("lmms_eval")  # before the import, which warns about every optional package

import tenacity  # noqa: E402
from lmms_eval.api.task import Task  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

from laavit.evaluation.bridge import Laavit  # noqa: E402

lmms_logger.enable("lmms_eval")

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
        include_path: more folders of lmms-eval YAML.
        data_root: a folder of local copies of the data sets, so that nothing is fetched. A task's data are looked
            for in ``<data_root>/<task>``, then under its data set's own name (``<data_root>/BLINK`` or
            ``<data_root>/BLINK-Benchmark/BLINK``), then in ``data_root`` itself where that holds parquet files.

    Returns:
        The summary; None on every rank but the first.

    Raises:
        UserError: an unknown task, data or a model that cannot be loaded, or an argument that is not allowed.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} was given; allowed: whole numbers from 1, or none for all questions")
    started = time.perf_counter()
    console = Console(stderr=True)
    with quiet_lmms_eval():
        task_objects = load_tasks(tasks, include_path, data_root)
        model = Laavit(
            str(model_folder),
            batch_size=batch_size,
            latents=latents,
            device=device,
            dtype=dtype,
            system=system,
            intervention=intervention,
            **model_arguments,
        )
        model.console = console  # its bar is the one thing shown
        results = _answers(model, task_objects, task_manager(include_path), limit)
    if results is None:
        return None
    records = _records(results, model)
    summary = {
        "model": str(model_folder),
        "weights_sha256": weights_sha256(model_folder),
        "latents": model.latents,
        "intervention": intervention,
        "system": model.system,
        "limit": limit,
        "seconds": round(time.perf_counter() - started, 3),
        "lmms_eval": results["lmms_eval_version"],
        "tasks": summarise(records),
    }
    for name, entry in summary["tasks"].items():
        entry["metrics"] = _metrics(results["results"][name])
    write_records(Path(out) / "records.jsonl", records)
    write_json(Path(out) / "summary.json", summary)
    logger.info("%d answers in %.1f s -> %s", len(records), summary["seconds"], out)
    return summary


def _answers(model: Laavit, tasks: list[Task], manager: TaskManager, limit: int | None) -> dict[str, Any] | None:
    """lmms-eval's own results with every sample, nothing cached and no random state touched; None on other ranks."""
    return simple_evaluate(
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


@contextlib.contextmanager
def quiet_lmms_eval() -> Iterator[None]:
    """lmms-eval's logger off, and what it draws on stderr (bars of its own) kept for the debug log."""
    drawn = io.StringIO()
    lmms_logger.disable("lmms_eval")
    try:
        with contextlib.redirect_stderr(drawn):
            yield
    finally:
        lmms_logger.enable("lmms_eval")
        if text := drawn.getvalue().strip():
            logger.debug("lmms-eval wrote: %s", text)


@lru_cache(maxsize=4)
def _task_manager(folders: tuple[str, ...]) -> TaskManager:
    """lmms-eval's index of tasks, which takes seconds to build: one for each set of folders."""
    return TaskManager(include_path=list(folders), model_name="laavit")


def task_manager(include_path: str | Path | Sequence[str | Path] = ()) -> TaskManager:
    """The index over lmms-eval's tasks, ``eval/tasks`` and the folders of ``include_path``.

    Raises:
        UserError: a folder does not exist.
    """
    given = [include_path] if isinstance(include_path, str | Path) else list(include_path)
    for folder in given:
        if not Path(folder).is_dir():
            raise UserError(f"include_path '{folder}' is not a folder")
    return _task_manager((str(project_data("eval") / "tasks"), *map(str, given)))


def load_tasks(
    names: Sequence[str], include_path: str | Path | Sequence[str | Path] = (), data_root: str | Path | None = None
) -> list[Task]:
    """The tasks with their data, groups resolved to their members.

    Raises:
        UserError: no task is named, one is unknown, or its data are not to be had.
    """
    if isinstance(names, str):
        names = [name for name in names.split(",") if name]
    if not names:
        raise UserError("no task was named; for example: microlab_test")
    manager = task_manager(include_path)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise UserError(f"no task is called '{name}'; {_nearest_task(name, known)}")
    loaded: dict[str, Task] = {}
    for name in _leaves(manager, names):
        loaded[name] = _load_task(manager, name, None if data_root is None else Path(data_root))
    return list(loaded.values())


def _nearest_task(name: str, known: set[str]) -> str:
    """The nearest names, not all of lmms-eval's thousand."""
    alike = sorted(task for task in known if name in task or task in name)[:8]
    _, hint, rest = nearest(name, known).partition(" (did you mean")
    near = f"{hint.lstrip()}{rest}" if hint else ""
    return "; ".join(filter(None, [near, f"alike: {', '.join(alike)}" if alike else ""])) or (
        "`lmms-eval tasks list` prints all names"
    )


def _leaves(manager: TaskManager, names: Sequence[str]) -> Iterator[str]:
    """Single tasks in order: a tag's or a group's members in its place."""
    for name in names:
        entry = manager.task_index[name]
        if entry["type"] in ("task", "python_task"):
            yield name
        else:
            members = entry["task"] if entry["task"] != -1 else manager._get_config(name)["task"]
            yield from _leaves(manager, [member if isinstance(member, str) else member["task"] for member in members])


def _load_task(manager: TaskManager, name: str, data_root: Path | None) -> Task:
    config = manager._get_config(name)
    path, arguments = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    request: dict[str, Any] = {"task": name}
    if category := arguments.pop("category", None):
        # V*'s subsets hand their category to `load_dataset`, which knows no such argument
        request |= {"dataset_kwargs": arguments, "process_docs": partial(_only, category)}
    if data_root is not None:
        path = str(_local_data(name, path, data_root))
        # an override replaces dataset_kwargs as a whole, which also drops `token: True`: nothing is fetched
        request |= {"dataset_path": path, "dataset_kwargs": {}}
    elif name.startswith("microlab_") and not Path(path).is_dir():
        raise UserError(
            f"task '{name}' reads '{path}', which is not a folder; give --data-root or set {FOLDER_VARIABLE}"
        )
    try:
        loaded = manager.load_task_or_group([request], task_type="chat")
    except tenacity.RetryError as error:  # how lmms-eval wraps whatever `load_dataset` raised
        reason = str(error.last_attempt.exception()).strip().splitlines()[0]
        raise UserError(f"the data of task '{name}' could not be loaded from '{path}': {reason}") from error
    except KeyError as error:
        raise UserError(
            f"the data of task '{name}' in '{path}' have no {error}; a local copy needs the data set's own README.md "
            "where that names its splits"
        ) from error
    return loaded[name]


def _only(category: str, documents: Dataset) -> Dataset:
    return documents.filter(lambda value: value == category, input_columns="category")


def _local_data(task: str, dataset_path: str | None, root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"data_root '{root}' is not a folder")
    repository = Path(dataset_path or task)
    candidates = [root / task, root / repository.name]
    if not repository.is_absolute():
        candidates.append(root / repository)
    for folder in candidates:
        if folder.is_dir():
            return folder.resolve()
    if any(root.glob("*.parquet")):
        return root.resolve()
    looked = ", ".join(f"'{folder}'" for folder in dict.fromkeys(candidates))
    raise UserError(f"data_root '{root}' has no data for task '{task}'; looked for {looked} and parquet files in it")


def _records(results: dict[str, Any], model: Laavit) -> list[dict[str, Any]]:
    records = []
    for task, samples in results["samples"].items():
        metrics = [str(entry["metric"]) for entry in results["configs"][task]["metric_list"]]
        seconds = {doc_id: value for (name, doc_id), value in model.seconds.items() if name == task}
        written = {doc_id: value for (name, doc_id), value in model.written.items() if name == task}
        records += make_records(task, samples, metrics, seconds, written)
    return records


def _metrics(entry: dict[str, Any]) -> dict[str, float]:
    """The task's own aggregates, as lmms-eval reports them (each on its own scale)."""
    return {
        name.partition(",")[0]: value
        for name, value in entry.items()
        if isinstance(value, int | float) and "_stderr" not in name and name != "samples"
    }
