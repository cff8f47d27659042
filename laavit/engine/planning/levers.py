"""Which change frees how much memory of a GPU: what is said when a run does not fit, or has run out of memory."""

from __future__ import annotations

from typing import Any


def levers(found: dict[str, Any]) -> list[tuple[str, int]]:
    """What to change in the recipe, and the bytes that it frees on one GPU, the most first.

    Each is counted alone, against the recipe as it is; two together free less than their sum.

    Args:
        found: of ``laavit.engine.plan.make_plan``.
    """
    rows = {row["name"]: row["memory"] for row in found["ways"]}
    own, step = found["ways"][found["own"]], found["step"]
    strategy, memory = own["strategy"], own["memory"]
    options: list[tuple[str, int]] = []

    def instead(name: str, what: str) -> None:
        if name in rows:
            options.append((what, memory["peak"] - rows[name]["peak"]))

    suffix = " + checkpointing" * own["checkpointing"]
    if not own["checkpointing"]:
        instead(f"{strategy} + checkpointing", "train.gradient_checkpointing=True")
    if strategy != "fsdp2":
        instead(f"fsdp2{suffix}", "strategy=fsdp2")
    if not own["offload"]:
        parts = ("weights", "gradients", "optimizer")
        if strategy == "fsdp2":
            options.append(("strategy.offload=cpu", sum(memory[part] for part in parts)))
        else:
            instead("fsdp2 + checkpointing + offload", "strategy=fsdp2, strategy.offload=cpu and checkpointing")
    if step["units"] % 2 == 0:  # else a batch would not divide
        less = memory["activations"] // 2
        if found["accumulate"] == 1 and strategy == "fsdp2" and not own["reduce_every"]:
            less -= found["trainable_bytes"]  # whole gradients are held between the micro-batches
        options.append((f"train.accumulate={2 * found['accumulate']}", less))
    if found["shared_prefix"]:
        options.append(("train.shared_prefix=True with train.grouped=True", found["shared_prefix"]))
    if found["vision_learns"]:
        states = sum(memory[part] for part in ("gradients", "optimizer")) * found["vision_share"]
        options.append(("student.freeze=[vision]", int(states) + found["vision_held"]))
    return sorted((each for each in options if each[1] > 0), key=lambda each: -each[1])
