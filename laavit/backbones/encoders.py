"""Image encoders of timm and open_clip by name, from the hub's cache, a local file, or random: one way to open each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn

from laavit.recipe import zoo_path
from laavit.registry import UserError


def near(name: str, allowed: Iterable[str]) -> str:
    """The sentence part that names the nearest few: the libraries know a thousand."""
    return "near: " + (", ".join(difflib.get_close_matches(name, list(allowed), n=3, cutoff=0.4)) or "none")


def local_weights(weights: str, key: str) -> str:
    """The path of a local file of weights, ``zoo:`` resolved.

    Args:
        key: the recipe's key, for the message.

    Raises:
        UserError: the file is not there or of another format.
    """
    path = Path(zoo_path(weights))
    if path.suffix != ".safetensors":
        raise UserError(f"{key}: got '{weights}'; a .safetensors file is read, and no other format")
    if not path.is_file():
        raise UserError(f"{key}: there is no file '{weights}'")
    return str(path)


def timm_model(name: str, weights: str | None, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """A vision transformer of timm without a head.

    Args:
        name: timm's name of it, with the tag of its weights. weights: a local .safetensors file, or None.
        pretrained: read the named weights from the hub; False, without a file, leaves them random.
        arguments: further ones of ``timm.create_model``.

    Raises:
        UserError: timm has no such model, it does not take an argument, or its weights cannot be read.
    """
    import timm  # takes two seconds, which nothing else should wait for

    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"timm has no model '{name}'; {near(name, timm.list_models(pretrained=True))}")
    overlay = {"file": weights, "custom_load": False} if weights else None
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained or weights is not None, pretrained_cfg_overlay=overlay, num_classes=0,
            **arguments,
        )  # fmt: skip
    except TypeError as error:
        raise UserError(f"timm's {name} is no plain vision transformer, or has no such option: {error}") from None
    except (OSError, HfHubHTTPError, SafetensorError, RuntimeError) as error:
        where = f"'{weights}'" if weights else "the hub"
        raise UserError(f"timm's {name} cannot be read from {where}: {str(error).splitlines()[0]}") from None
    return model


def open_clip_model(
    name: str, weights: str | None, tag: str | None, size: int | None, options: Mapping[str, Any] | None
) -> nn.Module:
    """A CLIP model of open_clip; its text tower is built, too, and can be let go with it.

    Args:
        name: open_clip's name of it. weights: a local .safetensors file of the whole model, or None.
        tag: the name of the weights to read from the hub; None, without a file, leaves them random.
        size: pixels of a side; None is the model's own. options: further parts of its configuration.

    Raises:
        UserError: open_clip has no such model or weights, or they cannot be read.
    """
    import open_clip  # it imports timm, which takes two seconds that nothing else should wait for

    if name not in open_clip.list_models():
        raise UserError(f"open_clip has no model '{name}'; {near(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None and tag is not None and tag not in tags:
        raise UserError(f"open_clip has no weights '{tag}' of {name}; {near(tag, tags)}")
    given = dict(options or {})
    if size is not None and "vision_cfg" in given:  # open_clip lets its given parts win over a forced size
        given["vision_cfg"] = {**given["vision_cfg"], "image_size": size}
    source = weights or tag
    try:
        model: nn.Module = open_clip.create_model(
            name, pretrained=source, force_image_size=size, require_pretrained=source is not None,
            pretrained_text=False, **given,
        )  # fmt: skip
    except (OSError, HfHubHTTPError, SafetensorError, RuntimeError, TypeError, AssertionError) as error:
        where = f"'{weights}'" if weights else "the hub"
        raise UserError(f"open_clip's {name} cannot be read from {where}: {str(error).splitlines()[0]}") from None
    return model
