"""The SLURM script of docs/training.md, run with stand-ins that note what they are started with."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from torch.distributed.run import get_args_parser

from laavit.recipe import load_recipe

ROOT = Path(__file__).parents[3]


def test_the_slurm_script_starts_what_it_should(tmp_path: Path) -> None:
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    script = re.search(r"^```sh\n(#!/bin/bash\n.*?)^```", text, re.M | re.S)
    assert script is not None
    for name, body in (("srun", 'exec "$@"'), ("torchrun", 'printf "%s\\n" "$@"'), ("scontrol", "printf 'n7\\nn8\\n'")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "5"}
    given["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-eu", "-c", script[1]], env=given, capture_output=True, text=True, check=True)
    options = get_args_parser().parse_args(done.stdout.splitlines())
    assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "8", "n7:29500")
    assert options.module and options.training_script == "laavit.cli"
    command, path, *flags = options.training_script_args
    assert command == "train" and flags.pop() == "--resume"
    recipe = load_recipe(ROOT / path, flags)
    assert recipe.build("strategy").replicate == 2
