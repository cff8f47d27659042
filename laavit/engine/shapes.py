"""Models as shapes: built from configurations alone, run without storage, with every byte they would hold counted.

PyTorch's fake tensors carry shape, type and autograd history but no data. Integers (token ids, roles, masks) stay real,
so that the library's own forward pass runs unchanged; ``Meter`` counts what is alive after every operation.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig
from transformers.initialization import no_init_weights

from laavit.backbones.base import Backbone, dtype_of
from laavit.backbones.configs import published, published_names
from laavit.backbones.families import family_class
from laavit.engine.flops import flop_counter
from laavit.model import LaViT
from laavit.recipe import zoo_path
from laavit.registry import UserError, nearest
from laavit.students.freezing import parameters_of

#: model types whose image is one grid, its size chosen by area
BY_AREA = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
#: least and greatest area in pixels where no processor tells: Qwen2-VL's own least, and the paper's greatest
AREA = (56 * 56, 1_003_520)
#: parts of a student that are counted apart; what stands between tower and decoder counts with the tower that holds it
PARTS = ("vision", "projector", "embeddings", "head", "decoder")


@dataclass(frozen=True)
class Blueprint:
    """What is known of a model without its weights.

    Args:
        config: its configuration. source: where that is from.
        tokens: size of its tokenizer (the embedding may have more rows). min_pixels, max_pixels: its processor's own
            bounds, where it scales images by their area.
        processor: the real processor, where the folder holds one. model: the model as shapes, where it was put
            together of parts.
    """

    config: PreTrainedConfig
    source: str
    tokens: int
    min_pixels: int
    max_pixels: int
    processor: Any = None
    model: nn.Module | None = None

    @property
    def by_area(self) -> bool:
        """Whether its images are one grid each whose size is chosen by area, so that no processor is needed."""
        return self.config.model_type in BY_AREA


def blueprint(path: str) -> Blueprint:
    """The blueprint of a hub name with a kept configuration, of a local folder, or of what the hub's cache holds.

    Raises:
        UserError: it is none of these, laavit does not know the family, or images are cut up as a processor says that
            is not there.
    """
    known, place = published(path), zoo_path(path)
    if known is not None:
        config, data = known
        return Blueprint(config, data["source"], data["tokens"], data["min_pixels"], data["max_pixels"])
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise UserError(f"the folder '{path}' holds no config.json")
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{path}' is no local folder with a config.json that reads ({str(error).splitlines()[0]}), it was not "
            f"fetched before, and its configuration is not kept here; {nearest(path, published_names())}"
        ) from None
    family_class(config.model_type)
    if getattr(config.get_text_config(), "num_experts", 0):
        raise UserError(
            f"'{path}' is a mixture of experts, and which of them a token meets is known only when it runs: no plan"
        )
    try:
        processor = AutoProcessor.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError):  # a folder with a configuration alone
        if config.model_type not in BY_AREA:
            raise UserError(
                f"how a '{config.model_type}' cuts images up depends on its processor, and '{path}' has only a "
                "configuration: put the processor's and the tokenizer's files beside it"
            ) from None
        return Blueprint(config, place, config.get_text_config().vocab_size, *AREA)
    size = processor.image_processor.size if config.model_type in BY_AREA else {}
    bounds = int(size.get("shortest_edge", 0)), int(size.get("longest_edge", 0))
    return Blueprint(config, place, len(processor.tokenizer), *bounds, processor)


class CountedTokenizer:
    """A tokenizer of which only the size is known; new tokens get the next ids.

    Args:
        size: number of tokens it starts with.
    """

    pad_token_id = 0
    unk_token_id = None

    def __init__(self, size: int) -> None:
        self._size, self._new = size, dict[str, int]()

    def __len__(self) -> int:
        return self._size + len(self._new)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._new)

    def add_tokens(self, tokens: Sequence[str], special_tokens: bool = False) -> int:
        for token in tokens:
            self._new.setdefault(token, len(self))
        return len(tokens)

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        return [self._new[token] for token in tokens]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Any text counts as one known token (``latents.init`` may name one)."""
        return [0]


@dataclass
class CountedProcessor:
    """Stands for a processor whose tokenizer alone is asked."""

    tokenizer: CountedTokenizer
    image_token: str = ""


def fake_mode() -> FakeTensorMode:
    """A mode for tensors without storage that may meet real ones (masks and ids) in one operation."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def shaped_backbone(plan: Blueprint, dtype: str, attention: str, mode: FakeTensorMode, new_tokens: int = 0) -> Backbone:
    """The blueprint's model out of fake tensors, with room in its embedding for ``new_tokens`` more tokens."""
    with mode, no_init_weights():
        model: Any = plan.model
        if model is None:
            model = AutoModelForImageTextToText.from_config(
                copy.deepcopy(plan.config),
                dtype=dtype_of(dtype),
                attn_implementation={"text_config": attention, "vision_config": "sdpa"},
            )
            model.tie_weights()
        if plan.tokens + new_tokens > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(plan.tokens + new_tokens, mean_resizing=False)
    return Backbone(model, plan.processor or CountedProcessor(CountedTokenizer(plan.tokens)))


def as_shapes(model: nn.Module, mode: FakeTensorMode) -> None:
    """Make the parameters that are real (peft makes adapters no other way) as shapeless as the model they are in."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, FakeTensor):
                setattr(module, name, nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad))


def parameters_by_part(model: LaViT) -> dict[str, dict[str, int]]:
    """Part -> {'all', 'trainable'}: numbers of parameters; tied ones count once, with the embeddings."""
    adapters = model.student.adapters
    owned = {"adapters": adapters.parameters() if adapters else [], "target heads": list(model.targets.parameters())}
    owned |= {part: parameters_of(part, model.student.backbone) for part in PARTS}
    found, seen = dict[str, dict[str, int]](), set[int]()
    for part, parameters in owned.items():
        own = [p for p in parameters if id(p) not in seen]
        seen.update(map(id, own))
        found[part] = {"all": _size(own), "trainable": _size(p for p in own if p.requires_grad)}
    return {part: found[part] for part in (*PARTS, "adapters", "target heads") if found[part]["all"]}


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def bytes_of(tensors: Any) -> int:
    """Bytes of distinct tensors."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


class Exchange(Protocol):
    """What becomes of gradients that a ``Meter`` books apart."""

    def arrived(self, parameter: Tensor, live: int) -> None:
        """A parameter's gradient is there. live: bytes of everything else."""

    def look(self, live: int) -> None:
        """So many bytes are alive besides gradients."""


class Meter(TorchDispatchMode):
    """Counts the bytes alive after every operation inside it, and its FLOPs; what existed before is not counted.

    Boolean indexing, whose result's shape depends on the mask's values, is done by counting the real mask.

    Attributes:
        live: bytes alive now. peak: their highest so far. apart: bytes of gradients (``watch``), part of ``live``.
        peak_apart: the highest of ``live`` less the gradients. flops: by PyTorch's own formulas.
        exchanges: who is told of each gradient that is there, and after every operation of ``live`` less the gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.apart = self.peak_apart = self.flops = 0
        self._formulas = flop_counter().flop_registry
        self.exchanges: Sequence[Exchange] = ()
        self._seen: set[int] = set()

    def watch(self, parameters: Sequence[nn.Parameter], exchanges: Sequence[Exchange] = ()) -> None:
        """Book the gradients of these parameters apart from everything else."""
        self.exchanges = exchanges

        def booked(parameter: Tensor) -> None:
            if parameter.grad is not None and id(parameter) not in done:
                done.add(id(parameter))
                self.apart += bytes_of([parameter.grad])
            for exchange in self.exchanges:
                exchange.arrived(parameter, self.live - self.apart)

        done: set[int] = set()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(booked)

    def ignore(self, tensors: Any) -> None:
        """Do not count these tensors: they existed before."""
        self._seen.update(t.untyped_storage()._cdata for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _counted(args[0], args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        self.peak_apart = max(self.peak_apart, self.live - self.apart)
        for exchange in self.exchanges:
            exchange.look(self.live - self.apart)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _counted(source: Tensor, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Index tensors in which each real boolean mask on a fake tensor is replaced by integers of its count."""
    if not isinstance(source, FakeTensor):
        return list(indices)
    replaced: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            replaced.append(index)
        else:
            replaced.extend(torch.zeros(1, dtype=torch.long).expand(int(index.sum())) for _ in range(index.ndim))
    return replaced
