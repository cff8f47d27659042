"""``tools/export.py RUN OUT``: a run's student as a stock Hugging Face folder."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laavit.commands.common import Parser, checkpoint_of, run_recipe
from laavit.latents import NO_LATENTS, SEPARATOR, latent_tokens
from laavit.paths import EXPORT_CARD
from laavit.registry import UserError

logger = logging.getLogger(__name__)


def exported_template(template: str, system: str, latents: int) -> str:
    """A chat template that supplies the system prompt of the training where a chat brings none, and writes the latents.

    Both are added around the family's own template, so that any family's works.
    """
    before = ""
    if system:
        message = [{"role": "system", "content": [{"type": "text", "text": system}]}]
        before = (
            "{% if messages[0]['role'] != 'system' %}{% set messages = "
            + json.dumps(message, ensure_ascii=False)
            + " + messages %}{% endif %}"
        )
    written = "".join(latent_tokens(latents))
    after = "{% if add_generation_prompt %}" + written + "{% endif %}" if written else ""
    return before + template + after


def export_run(run: Path, out: Path, checkpoint: Path | None = None) -> Path:
    """Write ``out``: weights, tokenizer, processor, chat template, and ``laavit.json``.

    Raises:
        UserError: the run or the checkpoint is not complete, or ``out`` exists and is no export.
    """
    from laavit.engine.checkpoint import read_state

    recipe = run_recipe(run)
    source = checkpoint or checkpoint_of(run)
    read_state(source)  # refuses what is no complete checkpoint
    if out.exists() and any(out.iterdir()) and not (out / EXPORT_CARD).is_file():
        raise UserError(f"'{out}' exists and is no export of laavit; name another folder")
    layout = recipe.build("latents").layout if recipe.has("latents") else NO_LATENTS
    latents = layout.most
    prompt = recipe.build("prompt")
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    own = {"heads.safetensors", "optimizer.safetensors", "state.json", "random.safetensors"}
    shutil.copytree(source, temporary, ignore=lambda _, names: own & set(names))
    written = 0 if layout.emitted else latents
    _write_template(temporary, exported_template(_template(source), prompt.system, written))
    card: dict[str, Any] = {
        "latents": latents,
        "layout": asdict(layout),
        "separator": SEPARATOR if latents else None,
        "system": prompt.system,
        "order": prompt.order,
        "suffix": prompt.suffix,
        "recipe": recipe.config["title"],
        "recipe_sha256": recipe.digest(),
        "step": source.name,
    }
    (temporary / EXPORT_CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return out


def _template(folder: Path) -> str:
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")


def _write_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(prog="export", description="Write a run's student as a stock Hugging Face folder.")
    parser.add_argument("run", type=Path, help="run folder of tools/train.py")
    parser.add_argument("out", type=Path, nargs="?", help="where to; default RUN/export")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder; default the newest")
    options = parser.parse_args(list(argv))
    logger.info("exported to %s", export_run(options.run, options.out or options.run / "export", options.checkpoint))
    return 0
