"""The benchmarks known by name (``eval/benchmarks.yaml``): where their questions are and which figures they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import yaml

from laavit.paths import project_data
from laavit.registry import UserError, nearest

#: How a benchmark is asked and judged: the paper's way as far as it is known, or lmms-eval's own task code.
PROTOCOLS = ("lmms", "paper")


@dataclass(frozen=True)
class Benchmark:
    """One entry of ``eval/benchmarks.yaml``, whose head says what each field means."""

    name: str
    title: str
    repository: str
    split: str | None
    questions: int
    source: str
    include: Sequence[str] = ()
    files: str | None = None
    config: str | None = None
    column: str | None = None
    megabytes: int | None = None
    lmms: str | None = None
    kind: str | None = None
    groups: Mapping[str, str | Sequence[str] | Mapping[str, Any]] = field(default_factory=dict)
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    members: Sequence[str] = ()
    licence: str | None = None

    @property
    def folder(self) -> str:
        """Where a local copy lies under the data root."""
        return self.repository.rpartition("/")[2]

    @property
    def patterns(self) -> Sequence[str]:
        """The files of its repository that are fetched, as patterns of fnmatch."""
        return [self.files] if self.files else self.include

    def task(self, protocol: str) -> str:
        """The lmms-eval task that asks this benchmark under a protocol."""
        return f"paper_{self.name}" if protocol == "paper" else self.lmms or self.name

    def groups_of(self, document: Mapping[str, Any]) -> dict[str, str]:
        """What a question's record keeps for the figures: group -> its member of it.

        Raises:
            UserError: the question lacks a column.
        """
        found = {}
        try:
            for name, spec in self.groups.items():
                if isinstance(spec, Mapping):
                    found[name] = str((int(document[spec["column"]]) - int(spec["first"])) // int(spec["size"]))
                else:
                    columns = [spec] if isinstance(spec, str) else spec
                    found[name] = "_".join(str(document[column]) for column in columns)
        except KeyError as error:
            raise UserError(
                f"the data of '{self.name}' have no column {error}; it has: {', '.join(document)}"
            ) from error
        return found


@lru_cache(maxsize=1)
def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name, in the file's order."""
    entries = yaml.safe_load((project_data("eval") / "benchmarks.yaml").read_text(encoding="utf-8"))
    return {name: Benchmark(name=name, **entry) for name, entry in entries.items()}


def benchmark(name: str) -> Benchmark:
    """One benchmark.

    Raises:
        UserError: none has this name.
    """
    if name not in benchmarks():
        raise UserError(f"no benchmark is called '{name}'; {nearest(name, benchmarks())}")
    return benchmarks()[name]
