"""Latents masked: "w/o latent tokens" of LaViT's Table 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laavit.evaluation.interventions.base import Intervention
from laavit.registry import INTERVENTIONS, UserError

if TYPE_CHECKING:
    from laavit.evaluation.generation import Answerer


@INTERVENTIONS.register_module()
class MaskLatents(Intervention):
    """Cuts the latents out of attention, everything else where it was: "w/o latent tokens" of LaViT's Table 3.

    Positions are those of the unmasked prompt: left to itself ``generate`` counts positions along the attention mask
    (Qwen2.5-VL's ``get_rope_index`` drops masked tokens altogether), which would move the separator and the answer K
    steps towards the image. The hook asked here is the one ``generate`` itself asks, so any family is served; given
    ``position_ids``, ``generate`` goes on from their last column.

    A model that writes its latents itself is kept from writing them; that is the bridge's part.
    """

    on = "latents"

    def lacks(self, model: Answerer, columns: Mapping[str, Sequence[str]]) -> str | None:
        return None if model.latent_ids else "the model has no latents"

    def __call__(self, model: Any, inputs: Mapping[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
        """The inputs of the ablated prompt.

        Args:
            model: a Hugging Face model with ``generate``.
            inputs: the processor's output, with ``input_ids`` and ``attention_mask`` [B, S].
            ids: the latents' token ids.

        Returns:
            ``inputs`` with a new ``attention_mask`` [B, S] and explicit ``position_ids`` [B, S] or [4, B, S].

        Raises:
            UserError: a prompt has no latent to mask.
        """
        tokens = inputs["input_ids"]
        latents = torch.isin(tokens, torch.tensor(list(ids), dtype=tokens.dtype, device=tokens.device))
        if not bool(latents.any(dim=1).all()):
            raise UserError(
                "latents=off was asked for, but the chat template writes no latent tokens into the prompt: "
                "allowed are exports made by tools/export.py with latents"
            )
        positions = model._prepare_position_ids_for_generation(tokens, dict(inputs))
        return {**inputs, "attention_mask": inputs["attention_mask"].masked_fill(latents, 0), "position_ids": positions}
