"""Local copies of the benchmarks: which files of which repository, where they lie, and how they are fetched.

A copy lies in ``<root>/<owner>/<name>``, which is where ``--data-root`` looks, and where lmms-eval's own command finds
it when it is run in ``<root>``.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from laavit.evaluation.benchmarks import benchmark, benchmarks
from laavit.registry import UserError


@dataclass(frozen=True)
class Download:
    """What is fetched from one repository: ``patterns`` of its files into ``folder``, for the benchmarks ``titles``."""

    repository: str
    patterns: tuple[str, ...]
    folder: Path
    titles: tuple[str, ...]
    licence: str | None

    @property
    def command(self) -> str:
        """The command that does it."""
        words = ["hf", "download", self.repository, "--repo-type", "dataset"]
        for pattern in self.patterns:
            words += ["--include", pattern]
        return shlex.join([*words, "--local-dir", str(self.folder)])

    def run(self) -> None:
        """Fetch it; what is there already is not fetched again.

        Raises:
            UserError: the hub cannot be reached, is switched off, or does not have it.
        """
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"HF_HUB_OFFLINE is set, so '{self.repository}' is not fetched; unset it and try again")
        try:
            snapshot_download(
                self.repository, repo_type="dataset", local_dir=self.folder, allow_patterns=list(self.patterns)
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:  # refused, not reached, no space
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"'{self.repository}' could not be fetched from the hub: {reason}") from error


def downloads(names: Sequence[str], root: Path) -> list[Download]:
    """One download a repository for these benchmarks, all of them where none is named; cards (README.md) come along.

    Raises:
        UserError: no benchmark has such a name.
    """
    chosen = [benchmark(name) for name in names or benchmarks()]
    found = []
    for repository in dict.fromkeys(entry.repository for entry in chosen):
        own = [entry for entry in chosen if entry.repository == repository]
        asked = list(dict.fromkeys(pattern for entry in own for pattern in entry.patterns))
        # "*/val-*" covers "Jigsaw/val-*": the hub's patterns are those of fnmatch
        kept = [one for one in asked if not any(other != one and fnmatch(one, other) for other in asked)]
        titles = tuple(entry.title for entry in own)
        found.append(Download(repository, ("README.md", *kept), Path(root) / repository, titles, own[0].licence))
    return found
