import os
import signal
import time

import pytest
from processes import child, ended

from laavit.engine.lock import only_run
from laavit.registry import UserError


def test_a_folder_in_which_another_process_trains_is_refused_until_that_ends(lab, tmp_path):
    taken = tmp_path / "taken"

    def train_for_long():
        with only_run(tmp_path / "run"):
            taken.touch()
            time.sleep(60)

    pid = child(train_for_long)
    while not taken.exists():
        time.sleep(0.01)
    left = tmp_path / "run" / "checkpoints" / ".tmp-iter_000004"
    left.mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(UserError, match="another process is training in"):
            lab.run(tmp_path / "run", resume=resume)
    assert left.is_dir()  # what the other one is writing
    os.kill(pid, signal.SIGKILL)
    assert ended([pid]) == [-signal.SIGKILL]
    assert lab.run(tmp_path / "run", resume=True).last.name == "iter_000012"


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), only_run(tmp_path / "file"):
        pass
