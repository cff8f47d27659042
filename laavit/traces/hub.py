"""Stores on the Hugging Face hub: pushed as a folder, read by ``hf://datasets/NAME/REPOSITORY``. The only network here.

A repository holds the store's own files and its card, nothing converted: what was pushed is what is read back.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from laavit.registry import UserError
from laavit.traces.card import CARD
from laavit.traces.shards import HEADER
from laavit.traces.store import TraceStore, verify

PREFIX = "hf://datasets/"
#: what belongs to a store
FILES = [HEADER, "shard-*.arrow", "shard-*.json", "verdicts/*.arrow", "verdicts/*.json", CARD]
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local_store(path: str) -> Path:
    """A store's folder: ``path`` itself, or, for ``hf://datasets/NAME/REPOSITORY[@REVISION]``, its copy in the cache.

    A repository is downloaded when it is named here and not cached yet; ``HF_HUB_OFFLINE=1`` allows the cache only.

    Raises:
        UserError: the address does not read, or the repository cannot be had.
    """
    if not path.startswith("hf://"):
        return Path(path)
    repository, at, revision = path.removeprefix(PREFIX).partition("@")
    if not path.startswith(PREFIX) or not _REPOSITORY.fullmatch(repository) or (at and not revision):
        raise UserError(f"'{path}' is no trace store's address; write {PREFIX}NAME/REPOSITORY or ...@REVISION")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(repository, repo_type="dataset", revision=revision or None, allow_patterns=FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"the trace store '{path}' cannot be downloaded: {why}") from error
    return Path(found)


def files_of(store: TraceStore) -> list[Path]:
    """The files of a store's folder that are pushed, relative to it."""
    found = {file.relative_to(store.path) for pattern in FILES for file in store.path.glob(pattern) if file.is_file()}
    return sorted(path for path in found if not path.name.startswith("."))


def push(store: TraceStore, repository: str, private: bool = True, api: Any = None) -> str:
    """Upload a verified store with its card to a dataset repository, made if it is not there; returns its address.

    Args:
        api: a ``huggingface_hub.HfApi``; None makes one, with the account that is logged in.

    Raises:
        UserError: the store has damages or no card, the repository's name does not read, or the hub refuses.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"'{repository}' is no repository; write NAME/REPOSITORY")
    if damages := verify(store.path):
        name, what = next(iter(damages.items()))
        raise UserError(f"the trace store '{store.path}' is not pushed: {name} {what}")
    if not (store.path / CARD).is_file():
        raise UserError(f"'{store.path}' has no {CARD}; write one with 'laavit traces card' and state the license")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi() if api is None else api
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=store.path,
            allow_patterns=[str(path) for path in files_of(store)],
            delete_patterns=["shard-*", "verdicts/*"],  # what an earlier push left must not mix with this store
            commit_message=f"laavit trace store, {len(store)} traces",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"the hub does not take '{repository}': {why}") from error
    return f"{PREFIX}{repository}"
