"""``tools/eval.py RUN_OR_FOLDER --tasks ...``: answers, records and a summary with intervals."""

from __future__ import annotations

import logging
import os
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laavit.commands.common import Parser
from laavit.commands.export import export_run
from laavit.evaluation.benchmarks import PROTOCOLS
from laavit.recipe import apply_overrides, parse_overrides, zoo_path
from laavit.registry import UserError

logger = logging.getLogger(__name__)


def model_folder(model: str) -> tuple[str, Path]:
    """What to evaluate, and where its results go: a run is exported first, a folder or hub name is taken as it is.

    Raises:
        UserError: a run, and several processes that would export it at once.
    """
    place = Path(zoo_path(model))
    if (place / "recipe.json").is_file():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"'{place}' is a run, which several processes would export at once; give its export")
        return str(export_run(place, place / "export")), place / "eval"
    return str(place) if place.is_dir() else model, Path("runs") / Path(model).name / "eval"


def intervention_of(name: str | None, words: Sequence[str]) -> dict[str, Any] | None:
    """The intervention of a command line; ``words`` are what is left of it: ``--intervention.ARGUMENT VALUE``.

    Raises:
        UserError: a word is neither a flag of the command nor an argument of the intervention.
    """
    overrides = parse_overrides(words)
    for key in overrides:
        if name is None or not key.startswith("intervention."):
            raise UserError(f"eval: unrecognized arguments: --{key} (--help lists what is allowed)")
    return apply_overrides({"intervention": name}, overrides)["intervention"] if name else None


def latents_word(text: str) -> str:
    """Raises: ArgumentTypeError: neither on nor off nor a number."""
    if text not in ("on", "off") and not text.isdigit():
        raise ArgumentTypeError(f"got '{text}'; allowed: on, off, or how many")
    return text


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(
        prog="eval",
        description="Evaluate a run, an export, or any vision-language model through lmms-eval.",
        epilog="An intervention's arguments are flags: --intervention NAME --intervention.ARGUMENT VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="run folder, Hugging Face folder, hub name, or zoo:NAME")
    parser.add_argument("--tasks", required=True, nargs="+", help="lmms-eval tasks, also those of eval/tasks")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="lmms", help="prompts and judging (eval/README.md)")
    parser.add_argument("--data-root", type=Path, help="local copies of the data sets, nothing is fetched")
    parser.add_argument("--include-path", type=Path, nargs="*", default=[], help="more folders of lmms-eval YAML")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--latents", type=latents_word, default="on", help="on, off (masked; emitted ones forbidden), or how many"
    )
    parser.add_argument("--intervention", help="changes what the model is given: a name (laavit list) or a class")
    parser.add_argument("--interventions", nargs="+", default=[], help="done as well: 'standard', or names")
    parser.add_argument("--intervention-limit", type=int, help="at most so many questions a task for --interventions")
    parser.add_argument("--import", dest="imports", nargs="*", default=[], help=".py files or modules of your own")
    for name, end in (("--min-pixels", "least"), ("--max-pixels", "most")):
        parser.add_argument(name, type=int, help=f"an image is shown at {end} this large; default: the model's own")
    parser.add_argument("--limit", type=int, help="at most so many questions a task")
    parser.add_argument("--fresh", action="store_true", help="ask again what an unfinished evaluation has answered")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument(
        "--out",
        type=Path,
        help="default RUN/eval/<tasks>[-paper]-latents-<on|off|N>[-<intervention>[-...]]",
    )
    options, overrides = parser.parse_known_args(list(argv))
    intervention = intervention_of(options.intervention, overrides)
    from laavit.evaluation.bridge import leave
    from laavit.evaluation.run import evaluate

    folder, results = model_folder(options.model)
    tasks = [name for word in options.tasks for name in word.split(",") if name]
    arguments = [f"{key}={value}" for key, value in sorted((intervention or {}).items()) if key != "name"]
    protocol = None if options.protocol == "lmms" else options.protocol
    words = ["+".join(tasks), protocol, "latents", options.latents, options.intervention, *arguments]
    name = "-".join(filter(None, words)).replace("/", "_")
    summary = evaluate(
        folder, tasks, options.out or results / name, options.batch_size, options.latents, options.limit,
        options.include_path, options.data_root, options.device, options.dtype, intervention=intervention,
        protocol=options.protocol, imports=options.imports, fresh=options.fresh,
        interventions=options.interventions, intervention_limit=options.intervention_limit,
        min_pixels=options.min_pixels, max_pixels=options.max_pixels,
    )  # fmt: skip
    leave()
    for task, entry in (summary or {}).get("tasks", {}).items():
        logger.info("%s: %.3f [%.3f, %.3f], n = %d", task, entry["accuracy"], entry["low"], entry["high"], entry["n"])
    return 0
