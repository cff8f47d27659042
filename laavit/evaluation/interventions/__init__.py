"""Interventions: what a model is given, or what its latents hold, is changed, and its answers are asked for again."""

from __future__ import annotations

from laavit.evaluation.interventions.base import Chat, Intervention, Question, Questions, adapted
from laavit.evaluation.interventions.boxes import MaskedImage, OracleLatents
from laavit.evaluation.interventions.images import BlankImage, ShuffledImage, SwappedImage
from laavit.evaluation.interventions.latents import (
    FirstLatent,
    LatentIntervention,
    MeanLatent,
    NoisedLatents,
    SwappedLatents,
    ZeroedLatents,
)
from laavit.evaluation.interventions.masking import MaskLatents
from laavit.evaluation.interventions.states import latent_ids

__all__ = [
    "BlankImage",
    "Chat",
    "FirstLatent",
    "Intervention",
    "LatentIntervention",
    "MaskLatents",
    "MaskedImage",
    "MeanLatent",
    "NoisedLatents",
    "OracleLatents",
    "Question",
    "Questions",
    "ShuffledImage",
    "SwappedImage",
    "SwappedLatents",
    "ZeroedLatents",
    "adapted",
    "latent_ids",
]
