"""How long training waits for its checkpoints, written at once and in the background, in one run.

    python tools/bench/checkpoint.py --megabytes 256 --out checkpoint.json

A stack of linear layers trains through the library's own engine; a checkpoint holds its weights and AdamW's two moments
(three times ``--megabytes``). What a step waits is its time over the median of the steps that write nothing. The ways
take turns; ratios are taken turn by turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import write_results

FORMATS = ("consolidated", "sharded")
WIDTH, EVERY = 1024, 8


def build(layers: int) -> Any:
    """A model of ``layers`` matrices of 4 MiB."""
    import torch
    from mmengine.model import BaseModel
    from safetensors.torch import save_file

    class Stack(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])

        def set_step(self, step: int) -> None:
            """No gate."""

        def trainable_parameters(self) -> Any:
            return self.named_parameters()

        def forward(self, x: Any, mode: str = "loss") -> dict[str, Any]:
            return {"loss": self.layers(x).square().mean()}

        def save_checkpoint(self, folder: Path, state: Any = None) -> None:
            save_file(dict(self.state_dict() if state is None else state), folder / "model.safetensors")

        def save_processor(self, folder: Path) -> None:
            """None."""

        def saved_bytes(self) -> int:
            return sum(4 * p.numel() for p in self.parameters())

    torch.manual_seed(0)
    return Stack()


def waits(layers: int, rows: int, checkpoints: int, kind: str, background: bool, device: str) -> tuple[float, float]:
    """Mean seconds that a step with a checkpoint takes longer, the last one left out, and the median of the others."""
    import torch
    from mmengine.hooks import Hook

    from laavit.engine import TrainSettings, train

    class Clock(Hook):
        priority = "LOWEST"  # after the checkpoint's

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            self.begin = time.perf_counter()

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            if runner.optim_wrapper.device.type == "cuda":
                torch.cuda.synchronize()
            steps.append(time.perf_counter() - self.begin)

    steps: list[float] = []
    settings = TrainSettings(
        steps=EVERY * (checkpoints + 1), batch_size=rows, checkpoint_every=EVERY, checkpoint_format=kind, keep_last=1,
        checkpoint_async=background, log_every=10**6, tensorboard=False, device=device, lr=1e-6,
    )  # fmt: skip
    data = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        train(
            build(layers),
            data,
            lambda rows: {"x": torch.stack(rows)},
            settings,
            folder,
            {"title": "bench"},
            hooks=[Clock()],
        )
    writing = steps[EVERY - 1 : -1 : EVERY]
    plain = statistics.median(seconds for place, seconds in enumerate(steps, 1) if place % EVERY)
    return statistics.mean(writing) - plain, plain


def main() -> int:
    """Measure and print a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="of weights; a checkpoint has three times as many")
    parser.add_argument("--rows", type=int, default=256, help="samples of a batch: what a step has to do")
    parser.add_argument("--checkpoints", type=int, default=2, help="of a run, beside the last")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("checkpoint.json"))
    options = parser.parse_args()
    if min(options.megabytes // 4, options.rows, options.checkpoints, options.repeats) < 1:
        parser.error("--megabytes is at least 4; --rows, --checkpoints and --repeats are at least 1")
    found: list[dict[str, Any]] = []
    for _ in range(options.repeats):
        for kind in FORMATS:
            given = (options.megabytes // 4, options.rows, options.checkpoints, kind)
            (at_once, step), (behind, _) = (waits(*given, background, options.device) for background in (False, True))
            found.append({"format": kind, "step": step, "at once": at_once, "in the background": behind})
    print(f"{'format':<14}{'a step':>10}{'waits, at once':>18}{'in the background':>20}{'ratio':>8}")
    for kind in FORMATS:
        rows = [row for row in found if row["format"] == kind]
        step, at_once, behind = (
            statistics.median(r[k] for r in rows) for k in ("step", "at once", "in the background")
        )
        ratio = statistics.median(r["at once"] / max(r["in the background"], 1e-4) for r in rows)
        print(f"{kind:<14}{step:>9.3f}s{at_once:>17.3f}s{behind:>19.3f}s{ratio:>7.1f}x")
    write_results(options.out, vars(options) | {"out": str(options.out)}, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
