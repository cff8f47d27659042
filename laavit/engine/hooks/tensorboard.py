"""The logged figures for TensorBoard."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from laavit.engine.distributed import rank_and_world

logger = logging.getLogger("laavit.engine")


class TensorBoardHook(Hook):
    """Writes every figure of a logged step under ``train/<name>`` into ``tensorboard/``; process 0 only."""

    def before_train(self, runner: Any) -> None:
        """Open, hiding what a killed run logged after the step that is resumed."""
        self.writer = None
        if rank_and_world()[0] == 0:
            # Imported here: it costs two seconds that other uses of the engine need not pay.
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(Path(runner.work_dir) / "tensorboard", purge_step=runner.iter + 1)

    def after_log(self, runner: Any, record: dict[str, Any]) -> None:
        """One scalar a figure."""
        if self.writer is None:
            return
        try:
            for name, value in record.items():
                if name != "iter" and value is not None:
                    self.writer.add_scalar(f"train/{name}", value, record["iter"])
        except OSError as error:  # raised here by its writing thread; the run itself can go on, log.jsonl has it all
            logger.warning("step %d: TensorBoard is switched off: %s", record["iter"], error)
            self.writer = None

    def close(self, runner: Any) -> None:
        """Flush and close."""
        writer, self.writer = getattr(self, "writer", None), None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                logger.warning("TensorBoard's last figures are lost: %s", error)
