"""Which parts of a recipe fit together, told from the recipe alone: before any weights are read, with the reason.

``check`` builds the cheap parts (latents, gate, targets: their constructors take a recipe's arguments only) and asks
every rule of ``RULES``. Rules read what parts say of themselves (``Target.needs_latents``, ``Target.rows``,
``Family.takes_features``, ...), never their class, so that parts of a user's own take part. What hangs on sizes is
asked of the targets' own ``setup``, with the sizes that are at hand (``Parts``). A rule refuses what cannot train, or
would train without effect; what needs the data or the weights is refused where these are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from laavit.backbones.base import Backbone
from laavit.backbones.families import family_class
from laavit.backbones.loading import read_processor
from laavit.backbones.vision_cache import check_frozen
from laavit.flex_attention import FLEX
from laavit.latents import check_attention
from laavit.recipe import Recipe, zoo_path
from laavit.recipe_parts import Parts
from laavit.registry import UserError
from laavit.students.lora import LoraSettings
from laavit.traces.judging import check as check_filters
from laavit.traces.shards import read_header

logger = logging.getLogger(__name__)

#: a gate's path -> the kinds of rows (``laavit.backbones.rows``) that look along it and along no other
LOOKING = {
    "answer->image": {"separator", "answer"},
    "question->image": {"question", "header"},
    "latent->image": {"latents"},
}
#: stands for the depth of a decoder whose configuration is not at hand
DEEP = 10_000


def parts_are_known(parts: Parts) -> None:
    """A model whose configuration is at hand is of a family that laavit knows."""
    for key in ("student", "teacher"):
        config: PreTrainedConfig | None = getattr(parts, key)
        if config is not None:
            try:
                family_class(config.model_type)
            except UserError as error:
                raise UserError(f"{key}.path: {error}") from None


def adapters_learn(parts: Parts) -> None:
    """LoRA's adapters do not sit in a part that the recipe freezes."""
    given = parts.recipe.arguments("student")
    if not given.get("lora"):
        return
    frozen = set(given["freeze"])
    both = set(LoraSettings(**given["lora"]).parts) & (frozen | {"tower"} if "vision" in frozen else frozen)
    if both:
        raise UserError(
            f"student.freeze: '{min(both)}' does not learn, and student.lora puts adapters that learn into it; leave "
            "it out of student.freeze (where there are adapters the weights themselves do not learn)"
        )


def halves_are_cast(parts: Parts) -> None:
    """Weights in 16 bits do not learn, and carry what learns in float32 beside them under autocast alone."""
    given = parts.recipe.arguments("student")
    kind = given.get("dtype")
    if kind not in ("bfloat16", "float16"):
        return
    if "lora" in given and not given["lora"]:
        raise UserError(
            f"student.dtype: {kind} weights cannot learn, small updates would be rounded away; take 'float32' with "
            "train.precision='bf16', or adapters (student.lora)"
        )
    if parts.train.precision != "bf16":
        raise UserError(
            f"student.dtype: {kind} weights beside adapters and heads in float32 need autocast: train.precision='bf16'"
        )


def flex_has_a_gpu(parts: Parts) -> None:
    """FlexAttention has no backward pass on the CPU."""
    if parts.recipe.arguments("student").get("attention") == FLEX and parts.train.device == "cpu":
        raise UserError(
            f"student.attention: '{FLEX}' trains on a GPU alone, and train.device is 'cpu'; take 'laavit' there"
        )


def attention_keeps_keys(parts: Parts) -> None:
    """Latents that are fed back, and samples that share their beginning, are read in several passes."""
    attention = parts.recipe.arguments("student").get("attention")
    if attention is not None:
        try:
            check_attention(parts.layout, attention, parts.train.shared_prefix)
        except UserError as error:
            raise UserError(f"student.{error}") from None


def processes_read_alike(parts: Parts) -> None:
    """Processes that hold shares of the weights gather them together, pass by pass."""
    sharded = parts.recipe.has("strategy") and parts.recipe.config["strategy"]["type"] == "FSDP2"
    if sharded and parts.layout.feedback and parts.layout.varies:
        raise UserError(
            "latents.count: fed-back latents are read one pass each, and with strategy 'fsdp2' every process must read "
            "as many; give one number, or take strategy 'ddp'"
        )


def settings_have_an_effect(parts: Parts) -> None:
    """No setting is given that another one leaves without effect."""
    train = parts.train
    if train.cache_vision and parts.traces.vision_cache is not None:
        raise UserError(
            "train.cache_vision: traces.vision_cache hands all image features over already; set train.cache_vision=0"
        )
    if train.shared_prefix and parts.prompt.order == "question_first":
        raise UserError(
            "train.shared_prefix: with prompt.order 'question_first' samples begin with their questions, and share "
            "nothing; set it to False"
        )
    if train.shared_prefix and not train.grouped:
        logger.warning(
            "train.shared_prefix: without train.grouped questions about one image meet in a micro-batch by chance alone"
        )


def latents_are_there(parts: Parts) -> None:
    """What reads or gates latents has some."""
    if parts.layout.most:
        return
    for name, target in parts.targets.items():
        if target.needs_latents:
            instead = "; without latents align the rows 'header' and 'answer'" if target.rows else ""
            raise UserError(
                f"targets.{name}: it reads the latents, and this recipe has no latents; name some, for example "
                f"latents='learned', or leave the target out{instead}"
            )
    for gate in parts.gate.parts().values() if parts.gate is not None else ():
        if "latent->image" in gate.paths:
            raise UserError(
                "gate: the path latent->image is the latents', and this recipe has none; leave the path out"
            )


def gate_fits(parts: Parts) -> None:
    """A gate is between 0 and 1 when the run begins and when it ends, on layers that the student has."""
    for gate in parts.gate.parts().values() if parts.gate is not None else ():
        for step in (0, parts.train.steps - 1):
            try:
                gate.bias(step)
            except UserError as error:
                raise UserError(f"gate: {error}") from None
        if hasattr(gate, "warmup") and (end := gate.gamma(parts.train.steps)) < 1.0:
            logger.warning("gate: gamma is still %.3g when the run ends, and inference has no gate", end)
        if parts.student is not None:
            try:
                gate.layers_of(parts.student.get_text_config().num_hidden_layers)
            except UserError as error:
                raise UserError(f"gate.{error}") from None


def question_sees_the_image(parts: Parts) -> None:
    """In a causal decoder a question that stands before the image cannot look at it."""
    if parts.prompt.order != "question_first":
        return
    for name, target in parts.targets.items():
        if "question" in target.rows:
            raise UserError(
                f"targets.{name}: with prompt.order 'question_first' the question stands before the image and cannot "
                "look at it; align 'header', 'answer' or the latents"
            )
    if parts.gate is not None and all(gate.paths == ("question->image",) for gate in parts.gate.parts().values()):
        logger.warning(
            "gate: with prompt.order 'question_first' the question stands before the image and cannot look at it "
            "anyway; the path question->image closes the chat markup after the image, and no more"
        )


def rows_are_not_closed(parts: Parts) -> None:
    """Attention that a gate forbids throughout the run cannot follow anything."""
    if parts.gate is None:
        return
    steps = range(parts.train.steps)
    shut = [gate for gate in parts.gate.parts().values() if all(gate.gamma(step) == 0.0 for step in steps)]
    depth = parts.student.get_text_config().num_hidden_layers if parts.student is not None else DEEP
    for name, target in parts.targets.items():
        for gate in shut:
            layers = gate.layers_of(depth)
            closed = set().union(*(LOOKING[path] for path in gate.paths))
            if parts.layout.most and "answer->image" in gate.paths:
                closed.add("predicting")  # the separator and the answer; without latents the header's last token, too
            hit = sorted(closed & set(target.rows))
            if hit and (layers is None or set(target.own_layers(depth)) <= layers):
                raise UserError(
                    f"targets.{name}: it aligns the attention of the rows '{hit[0]}', and the gate keeps them from the "
                    "image throughout the run; choose a gate that opens, or other rows"
                )


def traces_are_named(parts: Parts) -> None:
    """Who needs traces says where they are."""
    if parts.traces.path is not None:
        return
    if parts.traces.select:
        raise UserError(f"traces.select: it names {', '.join(parts.traces.select)}, but traces.path is not given")
    for name, target in parts.targets.items():
        if target.needs_trace and target.store is None:
            raise UserError(
                f"targets.{name}: it needs a teacher's traces; give traces.path (tools/extract.py makes them), or a "
                "store of its own where it takes one"
            )


def boxes_are_there(parts: Parts) -> None:
    """Who needs boxes has data with boxes."""
    has_boxes = getattr(parts.kind("data"), "has_boxes", None)
    if has_boxes is None or has_boxes(parts.recipe.arguments("data")):
        return
    for name, target in parts.targets.items():
        if target.needs_boxes:
            raise UserError(f"targets.{name}: it needs boxes, and the data have none (data.columns names no 'boxes')")


def batch_is_large_enough(parts: Parts) -> None:
    """Who compares the samples of a micro-batch with each other has several."""
    train = parts.train
    size = train.batch_size // train.accumulate
    for name, target in parts.targets.items():
        if train.tokens and target.min_batch > 1:
            raise UserError(f"targets.{name}: it compares a micro-batch's samples; train.tokens leaves open how many")
        if size < target.min_batch and not train.grouped:
            raise UserError(
                f"targets.{name}: it compares {target.min_batch} or more samples of a micro-batch with each other, and "
                f"train.batch_size {train.batch_size} / train.accumulate {train.accumulate} leaves {size}"
            )


def teacher_gives_it(parts: Parts) -> None:
    """The teacher has what the extraction reads off it, and the filters what they judge; where traces are not there."""
    if not parts.recipe.has("teacher"):
        return
    check_settings = getattr(parts.kind("teacher"), "check_settings", None)
    if check_settings is not None:
        check_settings(parts.extract)
    if parts.teacher is not None:
        text = parts.teacher.get_text_config()
        depth, layer = text.num_hidden_layers, parts.extract.semantics_layer
        parts.extract.pairs(depth, text.num_attention_heads)
        parts.extract.depths(depth)
        if not -depth <= layer < depth:
            raise UserError(f"extract.semantics_layer: got {layer}; allowed: {-depth} to {depth - 1} (-1 is the last)")
    path = parts.traces.path
    if path is None or path.startswith("hf://") or read_header(Path(path)) is not None:
        return
    header = parts.header(None)
    assert header is not None, "there is a teacher"
    names = parts.recipe.config["filters"]
    check_filters({name: parts.recipe.build(f"filters.{name}") for name in names}, header)


def targets_fit(parts: Parts) -> None:
    """What targets themselves say of the student's and the traces' sizes and settings, as far as these are known."""
    text = parts.student.get_text_config() if parts.student is not None else None
    width, depth = (text.hidden_size, text.num_hidden_layers) if text is not None else (1, DEEP)
    for name, target in parts.targets.items():
        header = parts.header(target.store) if target.needs_trace else {}
        if header is None:
            continue
        with torch.random.fork_rng(devices=[]):
            try:
                target.setup(width, depth, parts.layout.most, header)
            except UserError as error:
                raise UserError(f"targets.{name}: {error}") from None


def cached_features_stay_true(parts: Parts) -> None:
    """Image features are kept of a family that takes them back, and of a tower and a projector that do not learn."""
    if parts.traces.vision_cache is None or parts.student is None:
        return
    family = family_class(parts.student.model_type)
    if not family.takes_features:
        raise UserError(f"traces.vision_cache: the family {family.__name__} takes no cached image features")
    given, shapes = parts.recipe.arguments("student"), getattr(parts.kind("student"), "of", None)
    path = str(given["path"])
    if shapes is None or not Path(zoo_path(path)).is_dir():  # its processor may be nowhere yet
        return
    if given.get("lora") and {"vision", "tower", "projector"} & set(LoraSettings(**given["lora"]).parts):
        raise UserError("traces.vision_cache: its features are fixed, and student.lora changes what makes them")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(parts.student)
    student = shapes(Backbone(model, read_processor(path)), path, given.get("freeze", ()))
    try:
        student.setup(None, torch.Generator())
        check_frozen(student.backbone)
    except UserError as error:
        raise UserError(f"traces.vision_cache: {error} (student.freeze)") from None


#: in this order: what comes first is said first
RULES: tuple[Callable[[Parts], None], ...] = (
    parts_are_known,
    adapters_learn,
    halves_are_cast,
    flex_has_a_gpu,
    attention_keeps_keys,
    processes_read_alike,
    settings_have_an_effect,
    latents_are_there,
    gate_fits,
    question_sees_the_image,
    rows_are_not_closed,
    traces_are_named,
    boxes_are_there,
    batch_is_large_enough,
    teacher_gives_it,
    targets_fit,
    cached_features_stay_true,
)


def check(recipe: Recipe) -> None:
    """Refuse a recipe whose parts do not fit one another, before any weights are read.

    Raises:
        UserError: it starts with the recipe's key, and says what does not fit what.
    """
    parts = Parts.of(recipe)
    for rule in RULES:
        rule(parts)
