"""``laavit plan cfg.py``: parameters, memory and storage of a recipe, without loading weights."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from laavit.commands.common import parse_recipe, recipe_parser
from laavit.engine.planning.machines import MACHINES, machine
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
    "exchanged": "gradients in exchange",
    "gathered": "gathered weights",
    "activations": "activations, highest",
    "peak": "peak of the step",
    "host": "host memory a process",
}
UNIT_OF = {"GB": 1e9, "MB": 1e6}


def parts_table(found: dict[str, Any]) -> Table:
    """Parameters by part."""
    title = f"{found['recipe']}: {found['student']['path']}"
    table = Table("part", "parameters", "trainable", title=title, box=box.SIMPLE_HEAD)
    for name, counts in found["parameters"].items():
        table.add_row(name, f"{counts['all']:,}", f"{counts['trainable']:,}")
    table.add_section()
    table.add_row("total", f"{found['total']['all']:,}", f"{found['total']['trainable']:,}")
    return table


def head_of(way: dict[str, Any], own: bool) -> str:
    """A column's head, which fits where five of them stand in 80 columns."""
    lines = way["name"].replace("checkpointing", "check-\npointing").split(" + ")
    return "\n+ ".join([lines[0] + " *" * own, *lines[1:]])


def ways_table(found: dict[str, Any]) -> Table:
    """Memory, FLOPs and time of one GPU, a column a way to run the recipe; a star at its own."""
    step, ways = found["step"], found["ways"]
    unit = "GB" if max(way["memory"]["peak"] for way in ways) >= UNIT_OF["GB"] / 10 else "MB"
    heads = [head_of(way, i == found["own"]) for i, way in enumerate(ways)]
    batch = f"{step['micro_batch']} samples of {step['sequence']} tokens ({step['image_tokens']} image) at once"
    if step["accumulate"] > 1:
        batch += f", {step['accumulate']} times a step"
    gpus = "the GPU" if step["gpus"] == 1 else f"one of {step['gpus']} GPUs"
    table = Table(f"{gpus}, {unit}", *heads, title=f"{batch}, {step['precision']}", box=box.SIMPLE_HEAD, padding=(0, 1))
    for key, label in PARTS.items():
        cells = [way["memory"][key] for way in ways]
        if any(cells):
            style = "bold" if key == "peak" else ""
            table.add_row(label, *(f"{cell / UNIT_OF[unit]:.2f}" if cell else "" for cell in cells), style=style)
    if found.get("memory") is not None:
        room = f"left of {found['memory'] / UNIT_OF[unit]:.4g} {unit}"
        table.add_row(room, *(f"{way['spare'] / UNIT_OF[unit]:.2f}" for way in ways))
        table.add_row("fits", *("yes" if way["fits"] else "no" for way in ways))
    table.add_section()
    for key, label in (("forward", "forward"), ("backward", "backward"), ("recompute", "computed again")):
        cells = [way["flops"][key] for way in ways]
        table.add_row(f"TFLOP {label}", *(f"{cell / 1e12:.4g}" if cell else "" for cell in cells))
    if found.get("assumed_share") is not None:
        times = [way["step_seconds"] for way in ways]
        table.add_row("seconds a step", *("" if each is None else f"{each:.3g}" for each in times))
        table.add_row("steps a second", *("" if each is None else f"{1 / each:.3g}" for each in times))
        table.add_row("time of the run", *("" if way["hours"] is None else duration(way["hours"]) for way in ways))
        table.add_row("MFU", *("" if way["mfu"] is None else f"{way['mfu']:.1%}" for way in ways))
    return table


def duration(hours: float) -> str:
    """Hours for people: minutes where they are few."""
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.2g} min"


def run_line(run: dict[str, Any]) -> str:
    """What a run leaves on the disk, in a sentence."""
    text = (
        f"disk: a checkpoint ({run['format']}) takes {gigabytes(run['checkpoint'])}, at most "
        f"{gigabytes(run['checkpoints'])} at once ({run['kept']} kept)"
    )
    kept = {"traces": run["traces"], "image features (traces.vision_cache)": run["features"]}
    found = [f"{name} {gigabytes(size)}" for name, size in kept.items() if size is not None]
    if not found:
        return text
    return f"{text}; of {run['samples']:,} samples, as many as the run reads: {', '.join(found)}"


def advice_lines(found: dict[str, Any]) -> list[str]:
    """Which way is proposed, and what else frees memory."""
    lines = []
    if found.get("proposed") is not None:
        chosen = found["proposed"]
        lines.append(f"proposed: {chosen['name'] or 'none'}: {chosen['why']}")
        if chosen["settings"]:
            lines.append(f"  {chosen['settings']}")
    if found["levers"]:
        lines.append("what frees memory on a GPU, each by itself:")
        lines += [f"  {gigabytes(size)}: {what}" for what, size in found["levers"]]
    return lines


def show(found: dict[str, Any], console: Console) -> None:
    """The plan as tables."""
    for table in (parts_table(found), ways_table(found)):
        table.title_justify = "left"
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)
    step, latents = found["step"], found["latents"]
    console.print("* as the recipe has it. Parts are highest at different moments: the peak may be below their sum.")
    console.print(f"logits exist at the labels alone: {gigabytes(step['logits'])}")
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
    title = f"one sample a process, {done['way']}"
    table = Table(f"process 0 of {done['world']}", "found", "planned", title=title, box=box.SIMPLE_HEAD)
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
    parser.add_argument("--gpus", type=int, default=1, help="processes that share the batch, one a GPU (default 1)")
    parser.add_argument(
        "--memory",
        help="of one GPU, for example 80GB (10^9 bytes each) or 79.1GiB (2^30): says which ways to run the recipe fit; "
        "goes before what --gpu says",
    )
    parser.add_argument("--gpu", help=f"its name: its memory, and how long a run in bf16 takes; {', '.join(MACHINES)}")
    parser.add_argument(
        "--mfu",
        type=float,
        help="with --gpu: the assumed share of its peak arithmetic that is reached, above 0, to 1 (default 0.4)",
    )
    parser.add_argument(
        "--text",
        type=int,
        default=128,
        help="tokens of system prompt, question and chat markup a sample (default 128)",
    )
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer (default 16)")
    parser.add_argument(
        "--questions", type=int, default=1, help="samples about one image, with train.grouped (default 1)"
    )
    parser.add_argument("--image", help="width x height of an image, for example 1024x768; else the largest allowed")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="shard the model over --gpus processes by fsdp2, with the recipe's arguments of it, and run a whole step, "
        "one sample each, on shapes: what process 0 stores, beside the plan",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")
    options, recipe = parse_recipe(parser, argv)
    if recipe is None:
        return 0
    memory = memory_size(options.memory) if options.memory is not None else None
    image = picture_size(options.image) if options.image is not None else None
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise UserError(f"--mfu: got {options.mfu}; allowed: above 0, to 1")
    if options.mfu is not None and options.gpu is None:
        raise UserError("--mfu is a share of what a GPU can do: say which by --gpu")
    if options.dry_run and (options.memory or options.gpu):
        raise UserError("--dry-run compares what a process stores with the plan; leave --memory and --gpu to the plan")
    share = 0.4 if options.mfu is None else options.mfu
    from laavit.engine.plan import Load, levers, make_plan, timed  # transformers is slow to import

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
        found = timed(make_plan(recipe, load), gpu, share, memory)
    if found["assumed_share"] is not None:
        said = f"the arithmetic reaches {share:.0%} of {options.gpu}'s peak (--mfu), what is computed again too"
        found["assumptions"].append(f"{said}, and exchange between GPUs and data hide behind it")
    elif gpu is not None:
        found["assumptions"].append("no times: the peaks known here are of bf16, and train.precision is fp32")
    found["levers"] = levers(found)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        show(found, Console())
    return 0
