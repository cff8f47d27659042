"""The benchmarks' tasks with their data: lmms-eval's index of tasks, groups resolved, local copies found."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import tenacity
from datasets import Dataset
from datasets.config import HF_DATASETS_CACHE

from laavit.evaluation.benchmarks import PROTOCOLS, benchmarks
from laavit.evaluation.lmms import Task, TaskManager
from laavit.evaluation.microlab_task import FOLDER_VARIABLE
from laavit.paths import project_data
from laavit.registry import UserError, nearest

logger = logging.getLogger(__name__)


@lru_cache(maxsize=4)
def _task_manager(folders: tuple[str, ...], everything: bool) -> TaskManager:
    """lmms-eval's index of tasks, which takes seconds to build: one for each set of folders."""
    return TaskManager(include_path=list(folders), include_defaults=everything, model_name="laavit")


def task_manager(include_path: str | Path | Sequence[str | Path] = (), names: str | Sequence[str] = ()) -> TaskManager:
    """The index over lmms-eval's tasks, ``eval/tasks`` and the folders of ``include_path``.

    Args:
        names: what will be asked of it; where all of that stands in those folders, lmms-eval's own thousand files are
            not read.

    Raises:
        UserError: a folder does not exist.
    """
    given = [include_path] if isinstance(include_path, str | Path) else list(include_path)
    for folder in given:
        if not Path(folder).is_dir():
            raise UserError(f"include_path '{folder}' is not a folder")
    folders = (str(project_data("eval") / "tasks"), *map(str, given))
    own = _task_manager(folders, False)
    asked = names.split(",") if isinstance(names, str) else list(names)
    if asked and all(own.task_index.get(name, {}).get("type") == "task" for name in asked):
        return own
    return _task_manager(folders, True)


def load_tasks(
    names: Sequence[str],
    include_path: str | Path | Sequence[str | Path] = (),
    data_root: str | Path | None = None,
    protocol: str = "lmms",
) -> list[Task]:
    """The tasks with their data, groups resolved to their members; each bears the name it was asked for by.

    Args:
        names: benchmarks of ``eval/benchmarks.yaml``, or any of lmms-eval's tasks and groups.
        include_path: more folders of lmms-eval YAML. data_root: a folder of local copies (``eval/README.md``).
        protocol: 'lmms' or 'paper'; the latter is there for benchmarks alone.

    Raises:
        UserError: no task is named, one is unknown or has no such protocol, or its data are not to be had.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol={protocol} was given; {nearest(protocol, PROTOCOLS)}")
    if isinstance(names, str):
        names = [name for name in names.split(",") if name]
    if not names:
        raise UserError("no task was named; for example: microlab_test")
    manager = task_manager(include_path, names)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise UserError(f"no task is called '{name}'; {near_tasks(name, known)}")
    leaves = list(dict.fromkeys(_leaves(manager, names)))
    if strangers := [name for name in leaves if protocol == "paper" and name not in benchmarks()]:
        raise UserError(f"task '{strangers[0]}' has no protocol 'paper'; {nearest(strangers[0], benchmarks())}")
    root = None if data_root is None else Path(data_root)
    return [_load_task(manager, name, root, protocol) for name in leaves]


def near_tasks(name: str, known: set[str]) -> str:
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


def _load_task(manager: TaskManager, name: str, data_root: Path | None, protocol: str) -> Task:
    asked = benchmarks()[name].task(protocol) if name in benchmarks() else name
    config = manager._get_config(asked)
    path, arguments = config.get("dataset_path"), dict(config.get("dataset_kwargs") or {})
    request: dict[str, Any] = {"task": asked}
    if name in benchmarks() and arguments.pop("token", None):
        request |= {"dataset_kwargs": arguments}  # `token: True` refuses who is not logged in; these data are public
    if category := arguments.pop("category", None):
        # V*'s subsets hand their category to `load_dataset`, which knows no such argument
        request |= {"dataset_kwargs": arguments, "process_docs": partial(_only, category)}
    if data_root is not None:
        path = str(_local_data(name, path, data_root))
        # an override replaces dataset_kwargs as a whole, which also drops `token: True`: nothing is fetched
        request |= {"dataset_path": path, "dataset_kwargs": _own_cache(Path(path))} | _files(name, Path(path))
    elif name.startswith("microlab_") and Path(path).is_dir():
        request |= {"dataset_kwargs": _own_cache(Path(path))}
    elif name.startswith("microlab_"):
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
    task = loaded[asked]
    if name in benchmarks():
        _warn_of_another_number(name, len(task.test_docs()), data_root)
    task.config.task = name  # results and records bear the benchmark's name under either protocol
    return task


def _own_cache(folder: Path) -> dict[str, Any]:
    """A local copy's own place in the cache of `datasets`, which tells two folders of one name and card not apart."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    state = repr([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files])
    root = os.environ.get("LMMS_EVAL_DATASETS_CACHE") or HF_DATASETS_CACHE
    return {"cache_dir": str(Path(root) / f"local-{hashlib.sha256(state.encode()).hexdigest()[:16]}")}


def _files(name: str, folder: Path) -> dict[str, Any]:
    """How a part of a repository is read without its card, which is of no use to `datasets` where other parts lack."""
    entry = benchmarks().get(name)
    found = sorted(map(str, folder.glob(entry.files))) if entry and entry.files else []
    if entry is None or not found:
        return {}
    return {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": {entry.split: found}}}


def _warn_of_another_number(name: str, found: int, data_root: Path | None) -> None:
    """A copy that lacks files may still load: CV-Bench's two halves are one configuration."""
    if found != (published := benchmarks()[name].questions):
        where = "on the hub" if data_root is None else f"in '{data_root}'"
        logger.warning("%s has %d questions %s; %d are published", name, found, where, published)


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
