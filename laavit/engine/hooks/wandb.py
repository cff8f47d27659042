"""The logged figures for Weights & Biases, where it is installed and asked for."""

from __future__ import annotations

import uuid
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from laavit.engine.distributed import rank_and_world
from laavit.files import read_object, write_json
from laavit.registry import UserError

FILE = "wandb.json"


def check_wandb(project: str | None) -> None:
    """Refuse a project where the package is missing, before any work.

    Raises:
        UserError: see above.
    """
    if project is not None and find_spec("wandb") is None:
        raise UserError(
            f"train.wandb: got the project '{project}', and the package wandb is not installed: pip install wandb, or "
            "leave train.wandb out (log.jsonl and tensorboard/ hold the same figures)"
        )


class WandbHook(Hook):
    """Writes every figure of a logged step to a run of a W&B project; process 0 only.

    A resumed run goes on in the same W&B run, whose id stands in ``wandb.json``. W&B's own variables decide the rest:
    with ``WANDB_MODE=offline`` nothing leaves the machine and ``wandb sync RUN/wandb/...`` sends it later.

    mmengine's backend does not serve: it drops the step, and closes by a function that W&B no longer has.

    Args:
        project: its name.
    """

    def __init__(self, project: str) -> None:
        check_wandb(project)
        self.project = project
        self.run: Any = None

    def before_train(self, runner: Any) -> None:
        """Open the run, or the one that is resumed."""
        if rank_and_world()[0]:
            return
        work_dir = Path(runner.work_dir)
        known = read_object(work_dir / FILE) if runner.iter else {}
        name = str(known.get("id") or uuid.uuid4().hex[:12])
        write_json(work_dir / FILE, {"project": self.project, "id": name})
        given: dict[str, Any] = {"project": self.project, "name": work_dir.name, "id": name, "resume": "allow"}
        given |= {"config": read_object(work_dir / "recipe.json"), "dir": str(work_dir)}
        wandb = import_module("wandb")
        try:
            self.run = wandb.init(**given)
        except wandb.Error as error:
            raise UserError(
                f"train.wandb: Weights & Biases could not be opened ({' '.join(str(error).split())}); "
                "WANDB_MODE=offline needs no account, and nothing leaves the machine"
            ) from None

    def after_log(self, runner: Any, record: dict[str, Any]) -> None:
        """All figures of a step at once."""
        if self.run is not None:
            figures = {name: value for name, value in record.items() if name != "iter" and value is not None}
            self.run.log(figures, step=record["iter"])

    def close(self, runner: Any) -> None:
        """Send what is left."""
        run, self.run = self.run, None
        if run is not None:
            run.finish()
