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


def verdict(found: dict[str, Any], memory: int) -> dict[str, Any]:
    """Whether the recipe fits into the memory of one GPU, as it is and with the other choice of checkpointing."""
    own = "checkpointed" if found["step"]["checkpointing"] else "plain"
    fits = {name: entry["peak"] <= memory for name, entry in found["training"].items()}
    step, entry = found["step"], found["training"][own]
    advice = ""
    if not fits[own]:
        fixed = entry["weights"] + entry["gradients"] + entry["optimizer"] + entry["buckets"]
        if fixed >= memory:
            advice = "weights, gradients and AdamW's states alone are larger: freeze more or take a smaller student"
        elif own == "plain" and fits["checkpointed"]:
            advice = "train.gradient_checkpointing=True fits"
        else:
            room, one = memory - fixed, entry["activations"] / step["micro_batch"]
            total = step["micro_batch"] * step["accumulate"]
            options = [n for n in range(1, total + 1) if total % n == 0 and total // n * one <= room]
            if options:
                advice = f"about train.accumulate={options[0]} would fit"
            else:
                advice = "not even one sample at a time fits: lower student.max_pixels or take more memory"
    return {"memory": memory, "fits": fits[own], "as": own, "advice": advice}


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


def show(found: dict[str, Any], console: Console) -> None:
    """The plan as tables."""
    parts = Table(
        "part", "parameters", "trainable", title=f"{found['recipe']}: {found['student']['path']}", title_justify="left"
    )
    for name, counts in found["parameters"].items():
        parts.add_row(name, f"{counts['all']:,}", f"{counts['trainable']:,}")
    parts.add_section()
    parts.add_row("total", f"{found['total']['all']:,}", f"{found['total']['trainable']:,}")
    step = found["step"]
    own = "checkpointed" if step["checkpointing"] else "plain"
    samples = f"{step['micro_batch']} samples of {step['sequence']} tokens ({step['image_tokens']} image)"
    title = f"memory of one GPU, {samples}, {step['precision']}"
    memory = Table("part", "with checkpointing", "without", title=title, title_justify="left")
    labels = {"weights": "weights", "gradients": "gradients", "optimizer": "AdamW states", "buckets": "DDP buckets"}
    labels |= {"activations": "activations, at their peak", "peak": "peak of the step"}
    for key, label in labels.items():
        cells = [found["training"][name][key] for name in ("checkpointed", "plain")]
        if any(cells):
            memory.add_row(label, *(gigabytes(cell) for cell in cells), style="bold" if key == "peak" else "")
    for table in (parts, memory):
        for column in table.columns[1:]:
            column.justify = "right"
        for column in table.columns:
            column.no_wrap = True
        console.print(table)
    own_text = "with" if own == "checkpointed" else "without"
    console.print(f"this recipe runs {own_text} checkpointing; logits at the labels alone: {gigabytes(step['logits'])}")
    latents = found["latents"]
    console.print(
        f"losses: {', '.join(step['losses'])}; latents: {latents['count']}, "
        f"embedding rows: {latents['embedding_rows']:,}"
    )
    for line in (gate_line(found["gate"]), teacher_line(found["teacher"], found["extraction"])):
        if line:
            console.print(line)
    if step["without_gradient"]:
        console.print(f"trainable, but no loss reaches them: {', '.join(step['without_gradient'][:5])}")
    if "verdict" in found:
        judged = found["verdict"]
        text = "fits" if judged["fits"] else f"does not fit: {judged['advice']}"
        console.print(f"{gigabytes(judged['memory'])} a GPU: {text}", style="bold")
    console.print("assumed: " + "; ".join(found["assumptions"]))


def main(argv: Sequence[str]) -> int:
    """The command."""
    parser = recipe_parser(
        "plan", "Parameters and memory of a recipe, from configurations alone: no weights, no network."
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="processes that share the batch, each with all weights (DDP)"
    )
    parser.add_argument("--memory", help="of one GPU, for example 80GB: says whether the recipe fits")
    parser.add_argument(
        "--text", type=int, default=128, help="tokens of system prompt, question and chat markup a sample"
    )
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")
    options, recipe = parse_recipe(parser, argv)
    if recipe is None:
        return 0
    memory = memory_size(options.memory) if options.memory is not None else None
    from laavit.engine.plan import Load, make_plan  # transformers is slow to import

    load = Load(options.text, options.answer, options.gpus)
    with Console(stderr=True).status("running the recipe's shapes"):
        found = make_plan(recipe, load)
    if memory is not None:
        found["verdict"] = verdict(found, memory)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        show(found, Console())
    return 0
