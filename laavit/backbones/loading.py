"""How weights and processors are read: dtype, placement over devices, quantisation, bounds of an image's area."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from laavit.attention import IMPLEMENTATION
from laavit.backbones.families import family_class
from laavit.flex_attention import FLEX
from laavit.recipe import zoo_path
from laavit.registry import UserError, nearest

#: the decoder's attention functions that know gates and record rows
ATTENTIONS = (IMPLEMENTATION, FLEX)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
#: ways to spread a model over devices that transformers works out by itself
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
#: a name -> arguments of transformers' ``BitsAndBytesConfig`` (8 bit: arXiv 2208.07339; 4 bit: NF4 of arXiv 2305.14314)
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def check_attention_name(attention: str) -> None:
    """Raises: UserError: a decoder's attention function knows no gates and records no rows."""
    if attention in ATTENTIONS:
        return
    if attention.startswith("flash_attention"):
        raise UserError(
            f"attention: '{attention}' can neither add a gate's bias to scores nor give the rows that targets read; "
            "'laavit' runs PyTorch's own flash kernels wherever no bias is due"
        )
    raise UserError(f"attention: got '{attention}'; {nearest(attention, ATTENTIONS)}")


_SHAPES_ALONE: ContextVar[bool] = ContextVar("shapes_alone", default=False)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """While this is open, models are built on the meta device, and no file of weights is read: their values come later.

    (laavit/engine/strategies/handing.py; models that are put together of parts are read all the same.)
    """
    before = _SHAPES_ALONE.set(True)
    try:
        yield
    finally:
        _SHAPES_ALONE.reset(before)


def dtype_of(name: str) -> torch.dtype:
    """A dtype by name; a ``UserError`` names the nearest."""
    if name not in DTYPES:
        raise UserError(f"no dtype is called '{name}'; {nearest(name, DTYPES)}")
    return DTYPES[name]


def bound_pixels(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set the least and the greatest area, in pixels, that images are scaled to; None keeps the processor's own.

    Raises:
        UserError: a bound is not positive, they contradict each other, or this processor scales by another rule.
    """
    if min_pixels is None and max_pixels is None:
        return
    size = dict(image_processor.size)
    if not size.get("shortest_edge") or not size.get("longest_edge"):
        raise UserError(f"min_pixels, max_pixels: {type(image_processor).__name__} does not scale images by their area")
    # Qwen's processors keep areas under the names of edges.
    least = size["shortest_edge"] if min_pixels is None else min_pixels
    most = size["longest_edge"] if max_pixels is None else max_pixels
    if not 0 < least <= most:
        raise UserError(f"min_pixels, max_pixels: got {least} and {most}; allowed: 0 < min_pixels <= max_pixels")
    image_processor.size = type(image_processor.size)(shortest_edge=least, longest_edge=most)


def check_map(device_map: str | Mapping[str, Any] | None) -> None:
    """Raises: UserError: transformers spreads a model over devices in no way of that name."""
    if isinstance(device_map, str) and device_map not in MAPS:
        raise UserError(f"device_map: got '{device_map}'; {nearest(device_map, MAPS)}; or module -> device")


def quantization_config(spec: str | Mapping[str, Any] | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """A name of ``QUANTIZATIONS``, or arguments of ``BitsAndBytesConfig``, as transformers wants it; None is none.

    Args:
        dtype: of the arithmetic with 4-bit weights, where the arguments name none.

    Raises:
        UserError: no such name or argument, or bitsandbytes is not installed.
    """
    if spec is None:
        return None
    if isinstance(spec, str):
        if spec not in QUANTIZATIONS:
            raise UserError(f"no quantization is called '{spec}'; {nearest(spec, QUANTIZATIONS)}")
        spec = QUANTIZATIONS[spec]
    allowed = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for name in spec:
        if name not in allowed:
            raise UserError(f"quantization: transformers' BitsAndBytesConfig has no '{name}'; {nearest(name, allowed)}")
    if find_spec("bitsandbytes") is None:
        raise UserError("quantization needs bitsandbytes, which is not installed: pip install bitsandbytes")
    try:
        return BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": dtype, **spec})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"quantization: {error}") from None


@contextmanager
def reading(path: str, what: str = "vision-language model") -> Iterator[str]:
    """Says where ``what`` cannot be read, and why, in one sentence; gives the place that a ``zoo:`` stands for.

    Raises:
        UserError: whatever transformers and the hub raise for what is missing, damaged, unknown or not installed.
    """
    try:
        yield zoo_path(path)
    except (UserError, OSError, ValueError, ImportError, HfHubHTTPError) as error:
        why = " ".join(str(error).split()) if isinstance(error, ImportError) else str(error).strip().splitlines()[0]
        raise UserError(f"no {what} can be read from '{path}': {why}") from None


def read_processor(path: str, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """A model's processor, its bounds set; refuses a family that laavit does not know. See ``Backbone.load``."""
    with reading(path) as place:
        family_class(AutoConfig.from_pretrained(place).model_type)
        processor = AutoProcessor.from_pretrained(place)
    bound_pixels(processor.image_processor, min_pixels, max_pixels)
    return processor


def read_model(
    path: str,
    dtype: torch.dtype,
    device: str,
    attention: str = IMPLEMENTATION,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> Any:
    """A model from a folder, a hub name or ``zoo:NAME``; see ``Backbone.load``.

    Raises:
        UserError: none can be read there, or not in this way.
    """
    arguments: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        arguments["quantization_config"] = quantization
        device_map = {"": device} if device_map is None else device_map  # quantised weights cannot be moved later
    if device_map is not None:
        arguments["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    arguments["attn_implementation"] = {"text_config": attention, "vision_config": "sdpa"}
    shapes = _SHAPES_ALONE.get() and device_map is None
    with reading(path) as place:
        if shapes:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(place), **arguments).eval()
        else:
            model = AutoModelForImageTextToText.from_pretrained(place, **arguments)
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # grouped matrix products of experts know no float64
    return model if shapes or device_map is not None else model.to(device)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, under their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def check_shapes(folder: Path, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises: UserError: names or shapes of a checkpoint's tensors are not those of the model."""
    shapes, found = ({name: t.shape for name, t in tensors.items()} for tensors in (own, given))
    if shapes != found:
        names = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
        raise UserError(f"the checkpoint {folder} holds another model: {', '.join(names[:3])} differ")
