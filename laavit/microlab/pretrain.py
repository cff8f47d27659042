"""Train the micro-lab's tiny teacher or student from nothing, by a recipe.

    python -m laavit.microlab.pretrain model_zoo/microlab/teacher.py --out model_zoo/microlab/teacher

The vision tower first (dense labels, or another tiny model's tower as it is), then frozen; then the decoder on
questions of all kinds. With ``grounding`` the
teacher's gaze is taught where the boxes are: KL(boxes || row) on the rows of the assistant's header and the answer,
averaged over heads and the named layers. A model trained on answers alone looks at the right place a quarter of the
time, and there is then little to distil; the shipped teacher's gaze is therefore a premise, not a finding.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from laavit.attention import IMPLEMENTATION, AttentionContext
from laavit.microlab.dataset import SPLIT_SEEDS
from laavit.microlab.packing import IGNORED, Packed, Packer, Part
from laavit.microlab.questions import HOP_KINDS, QUESTION_KINDS, has_hops
from laavit.microlab.scenes import make_scene
from laavit.microlab.shipping import ship
from laavit.microlab.tiny import Sizes, build_model, build_processor, build_tokenizer
from laavit.microlab.vision import cache_features, warm_start
from laavit.recipe import zoo_path
from laavit.registry import UserError, nearest

# By name, since the module is also run as a script.
logger = logging.getLogger("laavit.microlab.pretrain")

#: tokens of a packed question, its answer included; those of several hops are longer
SLOT, LONG_SLOT = 16, 24


@dataclass(frozen=True)
class VisionSettings:
    """The tower's warm start: optimizer steps, scenes a step, peak learning rate, seed of the scenes.

    Args:
        path: a tiny model's folder whose tower is taken as it is, and nothing is trained.
    """

    steps: int = 500
    batch_size: int = 32
    lr: float = 2e-3
    scene_seed: int = 1
    path: str | None = None


@dataclass(frozen=True)
class AnswerSettings:
    """The decoder's training.

    Args:
        scenes: how many; their features are cached (18 kB each at width 128). scene_seed: disjoint from every split.
        steps, batch_size, lr: optimizer steps, scenes (all questions of each) a step, peak rate. Warm-up over 100
            steps, then constant, then down to 0 over the last ``decay`` of the steps.
        grounding: weight of the gaze loss, 0 for none. layers: whose rows it sees, negative ones from the end.
    """

    scenes: int = 18000
    scene_seed: int = 10
    steps: int = 1200
    batch_size: int = 24
    lr: float = 2e-3
    decay: float = 0.3
    grounding: float = 0.0
    layers: tuple[int, ...] = (-2, -1)


@dataclass(frozen=True)
class PretrainRecipe:
    """What a recipe under model_zoo/microlab/ says.

    Args:
        validation: how many scenes, the first of the validation split. kinds: of the questions; None for the usual six.
    """

    name: str
    seed: int = 0
    system: str = ""
    validation: int = 150
    kinds: tuple[str, ...] | None = None
    sizes: Sizes = field(default_factory=Sizes)
    vision: VisionSettings = field(default_factory=VisionSettings)
    answers: AnswerSettings = field(default_factory=AnswerSettings)

    def __post_init__(self) -> None:
        known = [*QUESTION_KINDS, *HOP_KINDS]
        for kind in self.kinds or ():
            if kind not in known:
                raise UserError(f"kinds: no kind of question is called '{kind}'; {nearest(kind, known)}")

    def plain(self) -> dict[str, Any]:
        """As plain data, without what is left open (None)."""
        return asdict(self, dict_factory=lambda items: {key: value for key, value in items if value is not None})


def load_pretrain_recipe(path: str | Path, seed: int | None = None, tower: str | None = None) -> PretrainRecipe:
    """Read a recipe (plain data) and check its keys.

    Args:
        seed, tower: in place of the recipe's ``seed`` and ``vision.path``.

    Raises:
        UserError: no such file, or a key that is not known.
    """
    file = Path(zoo_path(str(path)))
    if not file.is_file():
        raise UserError(f"the recipe '{path}' does not exist")
    plain = Config.fromfile(str(file)).to_dict()
    if tower is not None:
        plain["vision"] = {**plain.get("vision", {}), "path": tower}
    sections = {"sizes": Sizes, "vision": VisionSettings, "answers": AnswerSettings}
    built: dict[str, Any] = {}
    for key, value in plain.items():
        built[key] = _build(key, sections[key], value) if key in sections else value
    if seed is not None:
        built["seed"] = seed
    return _build("recipe", PretrainRecipe, built)


def _build(key: str, cls: Any, values: dict[str, Any]) -> Any:
    known = cls.__dataclass_fields__
    for name in values:
        if name not in known:
            raise UserError(f"{key}: there is no '{name}'; {nearest(name, known)}")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return cls(**plain)
    except TypeError as error:
        raise UserError(f"{key}: {error}") from None


def grounding_loss(gaze: Tensor, boxes: Tensor) -> Tensor:
    """KL(boxes || gaze), mean over everything: gaze [B, Q, G, N], boxes [B, Q, N], both distributions over N."""
    target = boxes[:, :, None]
    log_gaze = gaze.clamp(min=torch.finfo(gaze.dtype).tiny).log()
    return (torch.xlogy(target, target) - target * log_gaze).sum(-1).mean()


@torch.no_grad()
def evaluate(model: Any, packer: Packer, features: Tensor, packed: Packed, chunk: int = 50) -> dict[str, Any]:
    """Greedy accuracy of the first answer token, and the gaze's mass inside the boxes.

    Returns: ``accuracy`` by kind and ``mean``; ``in_box``: {"question" | "header" | "answer": [one share a layer]}.
    """
    hits, inside = [], []
    slots = torch.arange(len(packer.prefix), packer.length)
    for start in range(0, len(packed), chunk):
        part = packed[start : start + chunk]
        context = AttentionContext(rows=slots.expand(len(part), -1))
        hidden = packer.hidden(model, features[start : start + chunk], part, context)
        asked = hidden.gather(1, part.first[:, :, None].expand(-1, -1, hidden.shape[-1]))
        hits.append(model.lm_head(asked).argmax(-1) == part.answers)
        mask = (part.boxes > 0)[:, :, None]
        layers = [packer.gaze(rows, packer.width) for _, rows in sorted(context.recorded.items())]
        inside.append(torch.stack([(gaze * mask).sum(-1) for gaze in layers], -1))  # [B, Q, T, L]
    right, mass, parts = torch.cat(hits).float(), torch.cat(inside), packed.parts
    accuracy = dict(zip(packer.kinds, (round(x, 4) for x in right.mean(0).tolist()), strict=True))
    in_box = {
        kind.name.lower(): [round(x, 3) for x in mass[parts == kind].mean(0).tolist()]
        for kind in (Part.QUESTION, Part.HEADER, Part.ANSWER)
    }
    return {"accuracy": accuracy, "mean": round(float(right.mean()), 4), "in_box": in_box}


def train_answers(
    model: Any, packer: Packer, features: Tensor, packed: Packed, settings: AnswerSettings, seed: int, check: Any = None
) -> None:
    """Train the decoder on packed questions with the tower frozen; ``check(step)`` is called every 250 steps."""
    model.model.visual.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)
    depth = model.config.text_config.num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for step in track(range(settings.steps), "answers"):
        down = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / 100, down)
        if len(order) < settings.batch_size:
            order = torch.randperm(len(packed), generator=generator)
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        part = packed[chosen]
        context = None
        if settings.grounding:
            context = AttentionContext(rows=part.gaze_rows.flatten(1), layers=settings.layers, num_layers=depth)
        hidden = packer.hidden(model, features[chosen], part, context)
        asked = part.labels != IGNORED
        loss = F.cross_entropy(model.lm_head(hidden[asked]), part.labels[asked])
        if context is not None:
            gaze = packer.gaze(context.mean_rows(), part.gaze_rows.shape[-1])
            loss = loss + settings.grounding * grounding_loss(gaze, part.boxes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if check is not None and (step % 250 == 249 or step == settings.steps - 1):
            check(step + 1, loss.item())


def take_tower(model: Any, path: str) -> None:
    """Give a model the vision tower of another one, weights bit for bit.

    Raises:
        UserError: there is no such folder, or its tower is of another shape.
    """
    folder = Path(zoo_path(path))
    if not (folder / "config.json").is_file():
        raise UserError(f"vision.path: '{path}' holds no model")
    other = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    try:
        model.model.visual.load_state_dict(other.model.visual.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"vision.path: the tower of '{path}' does not fit these sizes: {str(error).splitlines()[1].strip()}"
        ) from None


def pretrain(recipe: PretrainRecipe) -> tuple[Any, Any, dict[str, Any]]:
    """Build and train a model: -> (model, processor, figures)."""
    started = time.monotonic()
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model = build_model(recipe.sizes, tokenizer, recipe.seed)
    model.set_attn_implementation({"text_config": IMPLEMENTATION, "vision_config": "sdpa"})
    tower: dict[str, float] = {}
    if recipe.vision.path is not None:
        take_tower(model, recipe.vision.path)
    else:
        warming = {key: value for key, value in asdict(recipe.vision).items() if key != "path"}
        tower = warm_start(model, processor, **warming)
    model.eval()
    settings, kinds = recipe.answers, list(recipe.kinds or QUESTION_KINDS)
    hops = has_hops(kinds)
    scenes = [make_scene(settings.scene_seed, index, hops) for index in range(settings.scenes)]
    held_out = [make_scene(SPLIT_SEEDS["val"], index, hops) for index in range(recipe.validation)]
    packer = Packer(processor, kinds, LONG_SLOT if hops else SLOT, recipe.system)
    features, checked = (cache_features(model, processor, some) for some in (scenes, held_out))
    packed, questions = packer.pack(scenes), packer.pack(held_out)
    history = []

    def check(step: int, loss: float) -> None:
        found = {"step": step, "loss": round(loss, 4), **evaluate(model, packer, checked, questions)}
        history.append(found)
        logger.info("%d s: %s", time.monotonic() - started, json.dumps(found))

    train_answers(model, packer, features, packed, settings, recipe.seed, check)
    model.requires_grad_(True)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
        "vision": {name: round(value, 3) for name, value in tower.items()},
        "validation": history[-1],
        "history": history,
    }
    return model, processor, figures


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m laavit.microlab.pretrain", description="train a tiny model")
    parser.add_argument("recipe", help="model_zoo/microlab/teacher.py or student.py")
    parser.add_argument("--out", required=True, help="the Hugging Face folder to write (replaced)")
    parser.add_argument("--seed", type=int, help="of the weights and of the data's order, instead of the recipe's")
    parser.add_argument(
        "--tower",
        metavar="FOLDER",
        help="take this tiny model's vision tower as it is, for example zoo:microlab/student",
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("laavit").setLevel(logging.INFO)
    try:
        recipe = load_pretrain_recipe(arguments.recipe, arguments.seed, arguments.tower)
        torch.set_num_threads(arguments.threads)
        model, processor, figures = pretrain(recipe)
        ship(Path(arguments.out), model, processor, recipe.plain(), figures)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
