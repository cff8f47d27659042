"""What a worker prints beside its messages stops nobody."""

from __future__ import annotations

import io
import queue
from types import SimpleNamespace
from typing import Any

from laavit.sweeps.local import Worker


def test_lines_that_are_no_messages_are_passed_over() -> None:
    worker: Any = Worker.__new__(Worker)
    worker.number = 3
    lines = 'Setting ds_accelerator to cpu\n{"cell": "a-s0", "event": "done"}\n{"cell": "a-s1", "ev'
    worker.process = SimpleNamespace(stdout=io.StringIO(lines))
    messages: queue.Queue[tuple[int, Any]] = queue.Queue()
    worker._listen(messages)
    assert [messages.get_nowait() for _ in range(messages.qsize())] == [
        (3, {"cell": "a-s0", "event": "done"}),
        (3, None),
    ]
