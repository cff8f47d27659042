"""``tools/export.py RUN OUT``: a run's student as a stock Hugging Face folder."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from laavit.commands.common import Parser, checkpoint_of, run_recipe
from laavit.files import TEMPORARY
from laavit.latents import NO_LATENTS, SEPARATOR, latent_tokens
from laavit.paths import EXPORT_CARD
from laavit.recipe import Recipe, zoo_path
from laavit.registry import UserError

logger = logging.getLogger(__name__)

#: a checkpoint's files that are no part of a model
OWN = {"heads.safetensors", "optimizer.safetensors", "state.json", "random.safetensors"}
OWN |= {"adapter_model.safetensors", "adapter_config.json", "trained.safetensors", "base.json"}
#: how adapters that are exported apart are used
APART = """# Adapters for {path}

Trained on weights with the SHA-256 {weights_sha256} (over all tensors by name, as laavit counts it).

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{place}")
{resize}model = PeftModel.from_pretrained(base, "THIS FOLDER")
processor = AutoProcessor.from_pretrained("THIS FOLDER")  # its chat template writes the latent tokens
```
"""


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


def export_run(run: Path, out: Path, checkpoint: Path | None = None, adapters: str = "merged") -> Path:
    """Write ``out``: weights, tokenizer, processor, chat template, and ``laavit.json``.

    Args:
        adapters: of a run with LoRA: 'merged' into the weights, or 'apart', a folder for peft without the base.

    Raises:
        UserError: the run or the checkpoint is not complete, ``out`` exists and is no export, or no adapters are there
            to be kept apart.
    """
    from laavit.engine.checkpoint import is_sharded

    recipe = run_recipe(run)
    source = (checkpoint or checkpoint_of(run)).resolve()  # checkpoints/best is a link
    sharded = is_sharded(source)  # refuses what is no complete checkpoint
    if out.exists() and any(out.iterdir()) and not (out / EXPORT_CARD).is_file():
        raise UserError(f"'{out}' exists and is no export of laavit; name another folder")
    if not sharded:
        return _export(run, recipe, source, out, adapters, source.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=TEMPORARY) as folder:
        whole = _consolidated(recipe, source, Path(folder))
        return _export(run, recipe, whole, out, adapters, source.name)


def _consolidated(recipe: Recipe, checkpoint: Path, folder: Path) -> Path:
    """Put together the student of a sharded checkpoint: what it learned there, the rest as it was before training."""
    import torch

    from laavit.engine.resuming import check_frozen, load_learned
    from laavit.engine.sharded import MODEL

    student = recipe.build("student")
    student.setup(recipe.build("latents") if recipe.has("latents") else None, torch.Generator())
    learned = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    load_learned(student.state_dict(), checkpoint, f"{MODEL}student.", learned)
    check_frozen(student, checkpoint)
    student.save(folder)
    return folder


def _export(run: Path, recipe: Recipe, source: Path, out: Path, adapters: str, step: str) -> Path:
    """The export of a consolidated checkpoint."""
    from laavit.students.lora import base_of

    if adapters == "apart" and not base_of(source):
        raise UserError(f"--adapters apart: '{run}' was trained without adapters (student.lora)")
    if adapters == "apart" and "path" not in recipe.arguments("student"):
        raise UserError("--adapters apart: the base was composed for the run and is no folder; export them merged")
    layout = recipe.build("latents").layout if recipe.has("latents") else NO_LATENTS
    latents = layout.most
    prompt = recipe.build("prompt")
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=lambda _, names: OWN & set(names))
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
        "step": step,
    }
    if base_of(source):
        card |= _write_adapted(recipe, source, temporary, adapters)
    (temporary / EXPORT_CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return out


def _write_adapted(recipe: Recipe, source: Path, out: Path, adapters: str) -> dict[str, Any]:
    """Put a checkpoint of adapters into ``out``, merged with their base or apart; returns what the card says of it.

    Raises:
        UserError: the base is another one now; or, apart, it is nothing that stock transformers opens.
    """
    import torch

    from laavit.students.lora import base_of

    base = base_of(source)
    known = _rows(base["path"]) if adapters == "apart" else 0  # refused before any weights are read
    student = recipe.build("student")
    student.setup(recipe.build("latents") if recipe.has("latents") else None, torch.Generator())
    student.load(source)
    if adapters == "merged":
        student.merge()
        student.model.save_pretrained(out)
        return {"merged_into": base}
    student.adapters.save_apart(out)
    rows = student.model.get_input_embeddings().weight.shape[0]
    resize = f"base.resize_token_embeddings({rows}, mean_resizing=False)\n" if rows > known else ""
    (out / "README.md").write_text(APART.format(place=zoo_path(base["path"]), resize=resize, **base), encoding="utf-8")
    return {"base": base, "embedding_rows": rows}


def _rows(path: str) -> int:
    """Rows of a base's embeddings."""
    from transformers import AutoConfig

    from laavit.backbones.loading import reading

    with reading(path, "base of adapters") as place:
        return int(AutoConfig.from_pretrained(place).get_text_config().vocab_size)


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
    parser.add_argument(
        "--adapters",
        choices=("merged", "apart"),
        default="merged",
        help="of a run with LoRA: merged into the weights (default), or apart, as a folder for peft",
    )
    options = parser.parse_args(list(argv))
    out = options.out or options.run / ("export" if options.adapters == "merged" else "adapters")
    logger.info("exported to %s", export_run(options.run, out, options.checkpoint, options.adapters))
    return 0
