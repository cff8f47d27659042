"""What the runner asks of a strategy: is it fit for this run, what does mmengine run, what are the whole weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laavit.engine.kernels import compile_blocks
from laavit.registry import STRATEGIES, UserError

if TYPE_CHECKING:
    from laavit.engine.settings import TrainSettings


class Strategy(ABC):
    """How a model is spread over the processes of a run.

    Every process builds the whole model (with ``hands_out`` processes but the first may build its shapes alone);
    ``wrap`` is called once, after weights are loaded and before the optimizer is made, since it may put other
    parameters in the place of the model's own.
    """

    #: bf16 is autocast's business; False: what ``wrap`` gives computes in it by itself
    autocasts = True
    #: joins the other processes even where there are none
    always_joins = False
    #: whether processes hold shares of the weights, which none can use alone
    shares_weights = False
    #: whether ``spread`` gives a model that is shapes alone the weights that process 0 has read
    hands_out = False

    def check(self, settings: TrainSettings, device: torch.device, world_size: int) -> None:  # noqa: B027
        """Called before anything is written.

        Raises:
            UserError: this strategy does not fit the run.
        """

    def wrap(self, model: Any, settings: TrainSettings, device: torch.device) -> nn.Module:
        """What mmengine's Runner runs: a model on its device, checkpointed and compiled as settings say."""
        if settings.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if settings.compile:
            compile_blocks(model, settings.gradient_checkpointing)
        return self.spread(model, settings, device)

    @abstractmethod
    def spread(self, model: Any, settings: TrainSettings, device: torch.device) -> nn.Module:
        """Put a model on its device and spread it; the result has ``train_step(data, optim_wrapper)``."""

    def unwrapped(self, wrapped: nn.Module) -> Any:
        """The model inside what ``wrap`` gave, with its own names of parameters."""
        return wrapped

    def full_state(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The model's whole ``state_dict`` on the CPU, tied tensors as one; called by all processes together.

        Returns:
            In process 0 the tensors, in the others an empty dict; None where every process holds the model whole and
            its own ``state_dict`` will do.
        """
        return None


def strategy_for(given: Strategy | None, world_size: int) -> Strategy:
    """The strategy of a run: the recipe's; without one 'single' for one process, and 'ddp' for several."""
    if given is not None:
        return given
    made: Strategy = STRATEGIES.find("DDP" if world_size > 1 else "Single")()
    return made


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Switch on non-re-entrant checkpointing in every outermost transformers model inside ``model``, block by block.

    Re-entrant checkpointing would cut the gradient of whatever is recorded inside, our attention rows among it.

    Raises:
        UserError: there is none that supports it.
    """
    from transformers import PreTrainedModel

    done: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or any(name.startswith(f"{outer}.") or not outer for outer in done):
            continue
        if module.supports_gradient_checkpointing:
            # transformers is renaming the method: take the new name where it is there
            enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            # It makes the input embeddings, a tower's among them, require gradients, as re-entrant checkpointing alone
            # needs it: a frozen tower would be run through again, and all the way back, for nothing.
            module.disable_input_require_grads()
            done.append(name)
    if not done:
        raise UserError("train.gradient_checkpointing: no part of the model supports it; set it to False")
