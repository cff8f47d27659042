"""LoRA (arXiv 2106.09685) through peft: low-rank adapters in the decoder's linear layers, latent rows beside them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laavit.backbones.base import Backbone
from laavit.backbones.loading import check_shapes
from laavit.files import read_object, write_json
from laavit.recipe import zoo_path
from laavit.registry import UserError, nearest
from laavit.students.freezing import owners, parameters_of, tables

#: peft's own files, what else was trained in full, and which weights all of it belongs to
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TRAINED, BASE = "trained.safetensors", "base.json"
#: parts that ``targets`` names as a whole
TARGETS = ("decoder", "vision", "tower", "projector")


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of low rank: W x + scale * B A x, of which A and B learn.

    Args:
        rank: of A and B.
        alpha: scale = alpha / rank; with ``rslora`` alpha / sqrt(rank) (arXiv 2312.03732).
        dropout: of an adapter's input, in training.
        targets: which linear layers get adapters: all those of parts ('decoder', 'vision', 'tower', 'projector'), or
            those of the decoder in whose name a regular expression is found ('q_proj', 'layers\\.[0-3]\\.').
        dora: learn direction and magnitude of the weights apart (arXiv 2402.09353).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: str | Sequence[str] = "decoder"
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank: got {self.rank}; allowed: 1 or more")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha: got {self.alpha:g}; allowed: a positive number")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: got {self.dropout:g}; allowed: from 0 up to 1, without 1")
        if not self.names:
            raise UserError("lora.targets: got none; without adapters leave lora out (None)")

    @property
    def names(self) -> tuple[str, ...]:
        """The targets, one or several."""
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that get adapters."""
        return tuple(dict.fromkeys(name if name in TARGETS else "decoder" for name in self.names))


def linear_layers(settings: LoraSettings, backbone: Backbone) -> list[str]:
    """Names of the layers that get adapters, in the model's order.

    Raises:
        UserError: a target is no part and fits no linear layer of the decoder, or a part has none.
    """

    def inside(part: str) -> dict[nn.Module, None]:
        own, others = (
            {m: None for owner in found if isinstance(owner, nn.Module) for m in owner.modules()}
            for found in owners(part, backbone)
        )
        return {m: None for m in own if isinstance(m, nn.Linear) and m not in others}

    names = {module: name for name, module in backbone.model.named_modules()}
    chosen: set[str] = set()
    for target in settings.names:
        part = target if target in TARGETS else "decoder"
        found = [names[module] for module in inside(part)]
        if target not in TARGETS:
            try:
                found = [name for name in found if re.search(target, name)]
            except re.error as error:
                raise UserError(f"lora.targets: '{target}' is no part and no regular expression ({error})") from None
        if not found:
            what = "has no linear layer" if target in TARGETS else "fits no linear layer of the decoder"
            raise UserError(f"lora.targets: '{target}' {what}; parts {nearest(target, TARGETS)}")
        chosen.update(found)
    return [name for name in names.values() if name in chosen]


class Adapters:
    """A backbone with adapters in it; its language model's own weights do not learn any more.

    What learns: the adapters, the rows of the latents' tokens in the embeddings (and in an untied head), and what of
    tower and projector is not frozen and gets no adapters.

    Args:
        backbone: its model is changed in place, and keeps its classes, names of modules, ``generate`` and attention.
        tokens: ids of the latents and their separator.
        generator: draws the seed of the adapters' first values.
        path, sha256: of the base's weights, for checkpoints.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: LoraSettings,
        tokens: Sequence[int],
        generator: torch.Generator,
        path: str,
        sha256: str | None,
    ) -> None:
        model, self.path, self.sha256 = backbone.model, path, sha256
        still = {
            id(p) for part in ("decoder", "embeddings", "head", *settings.parts) for p in parameters_of(part, backbone)
        }
        #: names in the base of its parameters that learn in full
        self.full = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in still]
        where = {id(p): name for name, p in model.named_parameters()}
        rows = {where[id(table)].removesuffix(".weight"): list(tokens) for table in tables(backbone).values()}
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=linear_layers(settings, backbone),
            use_rslora=settings.rslora,
            use_dora=settings.dora,
            trainable_token_indices=rows if tokens else None,
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is being changed
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            self.peft: Any = get_peft_model(model, config)  # type: ignore[arg-type]
        for parameter in self.trained.values():
            parameter.requires_grad_(True)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The base's parameters that learn in full, by its names; looked up, since fsdp2 puts others in their place."""
        found = dict(self.peft.get_base_model().named_parameters())
        return {name: found[name] for name in self.full}

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' own parameters, latent rows included."""
        trained = {id(p) for p in self.trained.values()}
        return [p for p in self.peft.parameters() if p.requires_grad and id(p) not in trained]

    def state(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Adapters and latent rows under peft's names.

        Args:
            weights: the model's ``state_dict`` of another moment; its own where it is left out.
        """
        own = None if weights is None else {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        return get_peft_model_state_dict(self.peft, own, save_embedding_layers=False)

    def config(self) -> LoraConfig:
        """peft's configuration as it is kept on disk."""
        config: LoraConfig = copy.deepcopy(self.peft.peft_config["default"])
        config.inference_mode, config.base_model_name_or_path = True, zoo_path(self.path)
        config.target_modules = sorted(config.target_modules or ())  # a set's order is another one in every process
        return config

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write adapters and whatever else learned; the base is named by path and hash.

        Args:
            weights: as ``state`` takes them.
        """
        save_file(_on_cpu(self.state(weights)), folder / ADAPTER, metadata={"format": "pt"})
        self.config().save_pretrained(str(folder))
        if self.trained:
            trained = self.trained if weights is None else {name: weights[name] for name in self.trained}
            save_file(_on_cpu(trained), folder / TRAINED)
        self.save_base(folder)

    def save_base(self, folder: Path) -> None:
        """Write which base these adapters belong to."""
        write_json(folder / BASE, {"path": self.path, "weights_sha256": self.sha256})

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote.

        Raises:
            UserError: it belongs to another base, or holds other parameters than this model.
        """
        base = base_of(folder)
        if base["weights_sha256"] != self.sha256:
            raise UserError(
                f"the adapters in {folder} belong to the base '{base['path']}' with other weights (sha256 "
                f"{base['weights_sha256'][:12]}...) than those of '{self.path}' ({str(self.sha256)[:12]}...)"
            )
        try:
            state = load_file(folder / ADAPTER)
            trained = load_file(folder / TRAINED) if (folder / TRAINED).is_file() else {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"the adapters in {folder} cannot be read: {error}") from None
        check_shapes(folder, {**self.state(), **self.trained}, {**state, **trained})
        set_peft_model_state_dict(self.peft, state)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(trained[name])

    def save_apart(self, folder: Path) -> None:
        """Write a folder that stock ``peft.PeftModel.from_pretrained(base, folder)`` loads, with all that learned.

        Raises:
            UserError: something learned that peft can keep in no adapter.
        """
        whole = whole_modules(self.peft.get_base_model(), self.trained)
        save_file(
            _on_cpu({**self.state(), **{f"base_model.model.{name}": p for name, p in self.trained.items()}}),
            folder / ADAPTER,
            metadata={"format": "pt"},
        )
        config = self.config()
        config.modules_to_save = whole or None
        config.save_pretrained(str(folder))

    def merge(self) -> None:
        """Add the adapters to the base's weights and put the rows into their tables: a plain model again."""
        self.peft.merge_and_unload()


def whole_modules(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> list[str]:
    """The outermost modules all of whose parameters are among those trained; together they hold them all.

    Raises:
        UserError: a trained parameter stands in a module beside others that were not.
    """
    found: list[str] = []
    left = {id(p): name for name, p in trained.items()}
    for name, module in model.named_modules():
        own = [id(p) for p in module.parameters()]
        if own and all(key in left for key in own):
            found.append(name)
            for key in own:
                del left[key]
    if left:
        names = ", ".join(sorted(left.values())[:3])
        raise UserError(
            f"adapters apart: {names} learned in full, and peft keeps whole modules only; export them merged, or "
            "freeze the projector"
        )
    return found


def base_of(folder: Path) -> dict[str, Any]:
    """Path and hash of the weights that a folder's adapters belong to; {} where it holds whole weights."""
    return read_object(folder / BASE)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
