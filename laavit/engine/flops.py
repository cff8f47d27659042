"""FLOPs of a training step, counted on shapes by PyTorch's own counter: matrix products and attention, a multiply-add
as two.

What is counted is what the model has to do, forward and backward: nothing that checkpointing computes again, and
attention over whole S x S maps, as "model FLOPs utilisation" is commonly given (PaLM, arXiv 2204.02311, appendix B).
Of fused attention PyTorch counts five products on the way back, since none keeps its scores. The backward pass of what
is frozen, and has nothing that learns before it, is left out, since it is not run.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from laavit.backbones.chat import IGNORED
from laavit.recipe import Recipe
from laavit.structures import Batch, Role

if TYPE_CHECKING:
    from laavit.backbones.base import Backbone
    from laavit.model import LaViT

#: lengths at which a decoder is counted; two give the two coefficients of its count exactly
LENGTHS = (64, 128)


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


#: the CPU's fused attention, which PyTorch's counter does not list
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, the CPU's attention included."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


@dataclass(frozen=True)
class BatchShape:
    """What a step reads, as far as its FLOPs depend on it.

    Args:
        passes: (positions read, positions they may look at) of each sequence, or part of one: (S, S) for a sequence
            read at once; with a shared beginning of P positions (P, P) once and (S - P, S) a sample.
        labels: positions whose logits are worked out, of all sequences together.
        image_tokens: tokens whose features the vision tower works out; 0 where they are cached.
    """

    passes: Sequence[tuple[int, int]]
    labels: int = 0
    image_tokens: int = 0

    @classmethod
    def of(cls, batch: Batch) -> BatchShape:
        """The shape of a batch, padding left out."""
        columns = torch.arange(batch.roles.shape[1], device=batch.roles.device)
        used = (((batch.roles != Role.OTHER) * columns).amax(1) + 1).tolist()  # what follows is padding or markup
        begun, passes = [0] * len(used), list[tuple[int, int]]()
        spans = batch.spans
        if batch.shared is not None:
            stops = batch.shared.stops.tolist()
            passes = [(stop, stop) for stop in stops]
            begun = [stops[owner] for owner in batch.shared.owners.tolist()]
            spans = [batch.spans[first] for first in batch.shared.first.tolist()]
        passes += [(stop - start, stop) for start, stop in zip(begun, used, strict=True)]
        tokens = 0 if batch.features is not None else sum(span.tile.cells for row in spans for span in row)
        return cls(passes, int((batch.labels != IGNORED).sum()), tokens)


class StepFlops:
    """FLOPs of any step of a model: exact for decoder and head; the tower is taken to cost the same for every token.

    Rows that targets record, and their heads, are left out: some thousandths.

    Args:
        position: a position read by the decoder. pair: a position looked at by another. logit: a label's logits.
        image_token: a token of the vision tower.
    """

    def __init__(self, position: float, pair: float, logit: float, image_token: float = 0.0) -> None:
        self.position, self.pair, self.logit, self.image_token = position, pair, logit, image_token

    @classmethod
    def of(cls, model: LaViT, vision: Mapping[str, Tensor] | None = None) -> StepFlops:
        """Count a model of any strategy, wrapped or not; its weights are not touched.

        Args:
            vision: the vision tensors of a batch (``Batch.vision``), of any size; None leaves the tower out.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        backbone = shape_copy(model, mode).student.backbone
        short, long = (decoder_flops(backbone, mode, length) for length in LENGTHS)
        pair = (long / LENGTHS[1] - short / LENGTHS[0]) / (LENGTHS[1] - LENGTHS[0])
        return cls(
            short / LENGTHS[0] - pair * LENGTHS[0],
            pair,
            head_flops(backbone, mode),
            tower_flops(backbone, vision) if vision else 0.0,
        )

    def __call__(self, shape: BatchShape) -> float:
        read, looked = sum(new for new, _ in shape.passes), sum(new * seen for new, seen in shape.passes)
        decoder = self.position * read + self.pair * looked
        return decoder + self.logit * shape.labels + self.image_token * shape.image_tokens


_counted: weakref.WeakKeyDictionary[nn.Module, StepFlops] = weakref.WeakKeyDictionary()


def step_flops(model_or_recipe: LaViT | Recipe, batch_shape: BatchShape | Batch) -> float:
    """FLOPs of one forward and backward pass over a batch.

    Args:
        model_or_recipe: counted once, then kept; of a recipe the model is built without weights. Whoever asks for many
            batches of a recipe builds its ``StepFlops`` himself.
        batch_shape: a batch brings the pixels on which the tower is counted the first time; with a shape alone it is
            left out of a model that no batch was counted for.
    """
    batch = batch_shape if isinstance(batch_shape, Batch) else None
    shape = batch_shape if isinstance(batch_shape, BatchShape) else BatchShape.of(batch_shape)
    model = model_or_recipe
    if isinstance(model, Recipe):
        from laavit.engine.plan import shape_models  # which counts by this module itself

        model = shape_models(model).model
    vision = batch.vision if batch is not None and batch.features is None else None
    known = _counted.get(model)
    if known is None or (vision and not known.image_token):
        known = _counted[model] = StepFlops.of(model, vision)
    return known(shape)


def shape_copy(model: nn.Module, mode: FakeTensorMode) -> Any:
    """A model's copy without weights, wrappers and hooks: not sharded, and computing nothing twice."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        with mode:  # the shape of a sharded parameter is that of the whole
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    for module in reversed(list(model.modules())):  # children before their parents
        if isinstance(module, CheckpointWrapper):
            memo[id(module)] = memo[id(module._checkpoint_wrapped_module)]
            continue
        # fully_shard puts a class of its own before a module's, which refuses to be copied.
        kind: Any = next(k for k in type(module).__mro__ if not issubclass(k, FSDPModule))
        bare = kind.__new__(kind)
        memo[id(module)] = bare
        state = {
            name: type(value)() if name.endswith("_hooks") else value
            for name, value in vars(module).items()
            # what fully_shard keeps in a module, and the methods that it wraps
            if not name.startswith("__composable_api") and not (callable(value) and hasattr(kind, name))
        }
        for switch in ("gradient_checkpointing", "_output_capturing_hooks_installed"):  # the latter's hooks are gone
            if switch in state:
                state[switch] = False
        backbone = state.get("backbone")
        if backbone is not None:
            memo[id(backbone.processor)] = backbone.processor  # large, and only asked
        bare.__dict__.update(copy.deepcopy(state, memo))
    return memo[id(model)]


def decoder_flops(backbone: Backbone, mode: FakeTensorMode, length: int) -> int:
    """A sequence of ``length`` positions through the decoder and back."""
    decoder = backbone.family.decoder(backbone.model)
    table = backbone.model.get_input_embeddings().weight  # type: ignore[union-attr, operator]
    with mode:
        embeddings = torch.empty(1, length, backbone.width, dtype=table.dtype, device=table.device)
    embeddings.requires_grad_(table.requires_grad)
    with flop_counter() as counter:
        hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        if hidden.requires_grad:
            hidden.sum().backward()
    return int(counter.get_total_flops())


def head_flops(backbone: Backbone, mode: FakeTensorMode) -> int:
    """The logits of one position, and back."""
    head: Any = backbone.model.get_output_embeddings()  # type: ignore[operator]
    with mode:
        hidden = torch.empty(1, backbone.width, dtype=head.weight.dtype, device=head.weight.device)
    hidden.requires_grad_()
    with flop_counter() as counter:
        head(hidden).sum().backward()
    return int(counter.get_total_flops())


def tower_flops(backbone: Backbone, vision: Mapping[str, Tensor]) -> float:
    """A token of the vision tower: a batch's images through it and the projector, and back as far as these learn."""
    with flop_counter() as counter:
        features = backbone.family.image_features(backbone.model, vision)
        loss = torch.stack([part.sum() for part in features]).sum()
        if loss.requires_grad:
            loss.backward()
    return float(counter.get_total_flops()) / sum(len(part) for part in features)
