"""``laavit plan cfg.py``: parameters, memory and storage of a recipe, without loading weights."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from laavit.commands.common import parse_recipe, recipe_parser
from laavit.registry import UserError

UNITS = {"GB": 10**9, "GIB": 2**30}


def memory_size(text: str) -> int:
    """``80GB`` or ``79.1GiB`` in bytes; a number without a unit is GB.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or (match[2] or "GB").upper() not in UNITS or float(match[1]) == 0:
        raise UserError(f"--memory: got '{text}'; allowed: a positive number with GB or GiB, for example 80GB")
    return int(float(match[1]) * UNITS[(match[2] or "GB").upper()])


def picture_size(text: str) -> tuple[int, int]:
    """``1024x768`` as width and height in pixels.

    Raises:
        UserError: it is something else.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if match is None:
        raise UserError(f"--image: got '{text}'; allowed: width x height in pixels, for example 1024x768")
    return int(match[1]), int(match[2])


def gigabytes(size: float) -> str:
    """Bytes for people, in decimal units."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def gate_line(gate: dict[str, Any] | None) -> str:
    """The ends of the gate's schedule in a sentence."""
    if gate is None:
        return ""
    opens = "never fully open" if gate["open_from"] is None else f"open from step {gate['open_from']}"
    ends = f"γ = {gate['gamma_first']:g} at the first step, {gate['gamma_last']:g} at the last"
    return f"gate: {gate['type']} on {', '.join(gate['paths'])}, {ends}, {opens}"


def teacher_line(path: str | None, found: dict[str, Any] | None) -> str:
    """What the extraction needs, in a sentence."""
    if found is None:
        return ""
    sizes = {name: gigabytes(found[name]) for name in ("weights", "activations", "key-value cache")}
    return (
        f"teacher {path}: weights {sizes['weights']}, recording pass {sizes['activations']}, key-value cache "
        f"{sizes['key-value cache']}; a trace takes {found['trace'] / 1000:.1f} kB ({found['image_tokens']} tokens of "
        "gaze and the pooled semantics)"
    )


#: a row of the table of ways -> its label
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW states",
    "exchanged": "gradients on their way",
    "gathered": "gathered weights",
    "activations": "activations, at their peak",
    "peak": "peak of the step",
    "host": "in the host's memory",
}


def parts_table(found: dict[str, Any]) -> Table:
    """Parameters by part."""
    title = f"{found['recipe']}: {found['student']['path']}"
    table = Table("part", "parameters", "trainable", title=title)
    for name, counts in found["parameters"].items():
        table.add_row(name, f"{counts['all']:,}", f"{counts['trainable']:,}")
    table.add_section()
    table.add_row("total", f"{found['total']['all']:,}", f"{found['total']['trainable']:,}")
    return table


def ways_table(found: dict[str, Any]) -> Table:
    """Memory, FLOPs and time of one GPU, a column a way to run the recipe; a star at its own."""
    step, ways = found["step"], found["ways"]
    heads = [way["name"].replace(" + ", "\n+ ") + (" *" if i == found["own"] else "") for i, way in enumerate(ways)]
    samples = f"{step['micro_batch']} samples of {step['sequence']} tokens ({step['image_tokens']} image) at once"
    table = Table(f"one of {step['gpus']} GPUs", *heads, title=f"{samples}, {step['precision']}")
    for key, label in PARTS.items():
        cells = [way["memory"][key] for way in ways]
        if any(cells):
            style = "bold" if key == "peak" else ""
            table.add_row(label, *(gigabytes(cell) if cell else "" for cell in cells), style=style)
    if found.get("memory") is not None:
        spare = [f"{'fits, spare' if way['fits'] else 'too much by'} {gigabytes(abs(way['spare']))}" for way in ways]
        table.add_row(f"of {gigabytes(found['memory'])}", *spare)
    table.add_section()
    for key, label in (("forward", "forward"), ("backward", "backward"), ("recompute", "computed again")):
        cells = [way["flops"][key] for way in ways]
        table.add_row(f"TFLOP a step, {label}", *(f"{cell / 1e12:.4g}" if cell else "" for cell in cells))
    if found.get("assumed_share") is not None:
        times = [way["step_seconds"] for way in ways]
        table.add_row("seconds a step", *("" if each is None else f"{each:.3g}" for each in times))
        table.add_row("steps a second", *("" if each is None else f"{1 / each:.3g}" for each in times))
        table.add_row("hours of the run", *("" if way["hours"] is None else f"{way['hours']:.3g}" for way in ways))
        table.add_row("MFU", *("" if way["mfu"] is None else f"{way['mfu']:.1%}" for way in ways))
    return table


def run_line(run: dict[str, Any]) -> str:
    """What a run leaves on the disk, in a sentence."""
    text = (
        f"disk: a checkpoint ({run['format']}) takes {gigabytes(run['checkpoint'])}, at most "
        f"{gigabytes(run['checkpoints'])} at once ({run['kept']} are kept)"
    )
    if run["traces"] is None:
        return text
    return f"{text}; traces of {run['samples']:,} samples, as many as the run reads, {gigabytes(run['traces'])}"


def advice_lines(found: dict[str, Any]) -> list[str]:
    """Which way is proposed, and what else frees memory."""
    lines = []
    if found.get("proposed") is not None:
        chosen = found["proposed"]
        lines.append(f"proposed: {chosen['name'] or 'none'}: {chosen['why']}")
        if chosen["settings"]:
            lines.append(f"  {chosen['settings']}")
    if found["levers"]:
        lines.append("what frees memory: " + "; ".join(f"{what} {gigabytes(size)}" for what, size in found["levers"]))
    return lines


def show(found: dict[str, Any], console: Console) -> None:
    """The plan as tables."""
    for table in (parts_table(found), ways_table(found)):
        table.title_justify = "left"
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)
    step, latents = found["step"], found["latents"]
    console.print(f"* as the recipe has it; logits at the labels alone: {gigabytes(step['logits'])}")
    console.print(
        f"losses: {', '.join(step['losses'])}; latents: {latents['count']}, "
        f"embedding rows: {latents['embedding_rows']:,}"
    )
    for line in (gate_line(found["gate"]), teacher_line(found["teacher"], found["extraction"]), run_line(found["run"])):
        if line:
            console.print(line)
    if step["without_gradient"]:
        console.print(f"trainable, but no loss reaches them: {', '.join(step['without_gradient'][:5])}")
    for line in advice_lines(found):
        console.print(line, style="bold" if line.startswith("proposed") else "", highlight=False)
    console.print("assumed: " + "; ".join(found["assumptions"]))


def show_dry_run(done: dict[str, Any], console: Console) -> None:
    """What a dry run found, beside the plan."""
    table = Table(f"process 0 of {done['world']}", "stored", "planned", title="fsdp2, one sample a process")
    for key in ("weights", "gradients", "optimizer", "peak"):
        label = PARTS[key] if key != "peak" else "peak of the step (planned: an upper bound)"
        table.add_row(label, gigabytes(done[key]), gigabytes(done["planned"][key]))
    table.title_justify = "left"
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    blocks = ", ".join(f"{count} x {name}" for name, count in done["blocks"].items())
    console.print(f"gathered by themselves: {blocks}; all else for the whole step")
    console.print(f"forward, backward and optimizer ran; losses: {', '.join(done['losses'])}")
    if done["without_gradient"]:
        console.print(f"trainable, but no loss reaches them: {', '.join(done['without_gradient'][:5])}")


def main(argv: Sequence[str]) -> int:
    """The command."""
    parser = recipe_parser(
        "plan", "Parameters, memory, FLOPs and time of a recipe, from configurations alone: no weights, no network."
    )
    parser.add_argument("--gpus", type=int, default=1, help="processes that share the batch")
    parser.add_argument("--memory", help="of one GPU, for example 80GB: says which ways to run the recipe fit")
    parser.add_argument("--gpu", help="its name, for example h100: its memory, and how long the run takes")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the GPU's peak arithmetic that is assumed to be reached"
    )
    parser.add_argument(
        "--text", type=int, default=128, help="tokens of system prompt, question and chat markup a sample"
    )
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--questions", type=int, default=1, help="samples about one image, with train.grouped")
    parser.add_argument("--image", help="width x height of an image, for example 1024x768; else the largest allowed")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="shard the model over --gpus processes by fsdp2 and run a whole step, one sample each, on shapes",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")
    options, recipe = parse_recipe(parser, argv)
    if recipe is None:
        return 0
    memory = memory_size(options.memory) if options.memory is not None else None
    image = picture_size(options.image) if options.image is not None else None
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu: got {options.mfu}; allowed: above 0, to 1")
    from laavit.engine.plan import Load, levers, make_plan, timed  # transformers is slow to import
    from laavit.engine.planning.machines import machine

    gpu = machine(options.gpu) if options.gpu is not None else None
    load = Load(options.text, options.answer, options.gpus, options.questions, image)
    if options.dry_run:
        from laavit.engine.planning.dry_run import dry_run

        with Console(stderr=True).status(f"a step of {options.gpus} processes on shapes"):
            done = dry_run(recipe, load)
        if options.json:
            sys.stdout.write(json.dumps(done, indent=2) + "\n")
        else:
            show_dry_run(done, Console())
        return 0
    with Console(stderr=True).status("running the recipe's shapes"):
        found = timed(make_plan(recipe, load), gpu, options.mfu, memory)
    if gpu is not None:
        said = f"the arithmetic reaches {options.mfu:.0%} of {options.gpu}'s peak (--mfu), what is computed again too"
        found["assumptions"].append(f"{said}, and exchange between GPUs and data hide behind it")
    found["levers"] = levers(found)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        show(found, Console())
    return 0
