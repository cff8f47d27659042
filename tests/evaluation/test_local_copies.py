"""Local copies are told apart, though their folders have one name and their cards are alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from laavit.evaluation.tasks import load_tasks
from laavit.microlab.dataset import DatasetSettings, write_dataset


def test_two_folders_of_one_name_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, scenes in (("one", 1), ("two", 2)):
        write_dataset(tmp_path / name, DatasetSettings(train=1, val=1, test=scenes))
    roots = [tmp_path / name / "eval" for name in ("one", "two", "one")]
    assert [len(load_tasks("microlab_test", data_root=root)[0].eval_docs) for root in roots] == [6, 12, 6]
    monkeypatch.setenv("LAAVIT_MICROLAB", str(roots[1]))
    assert len(load_tasks("microlab_test")[0].eval_docs) == 12
    shutil.rmtree(tmp_path / "two")
    write_dataset(tmp_path / "two", DatasetSettings(train=1, val=1, test=3))  # written anew in the same place
    assert len(load_tasks("microlab_test", data_root=roots[1])[0].eval_docs) == 18
