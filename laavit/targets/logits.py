"""Logits distillation (Hinton et al., arXiv 1503.02531): the answer's tokens as the teacher would have weighed them.

A trace holds the k most probable tokens S of the teacher at every token of the gold answer, read along it. All other
tokens are one more bucket on both sides, the rest, so that both sides are distributions over k + 1 outcomes. With p the
teacher's and q the student's softmax over their whole vocabulary:

    p_rest = 1 - sum_{v in S} p_v,    q_rest = 1 - sum_{v in S} q_v
    p^T_v = p_v^(1/T) / sum_{u in S + rest} p_u^(1/T),    q^T_v alike
    L = T^2 * mean over answer tokens of D(p^T || q^T)

Where S is the whole vocabulary the rest is empty, and p^T is softmax(z / T): Hinton's loss. Where it is not, T = 1
still compares true probabilities, while another T takes the rest for a single token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laavit.backbones.chat import IGNORED
from laavit.backbones.rows import emits
from laavit.registry import TARGETS, UserError, nearest
from laavit.structures import Encoded, StudentOutput, Trace
from laavit.targets.base import Target
from laavit.targets.controls import shuffled_cells
from laavit.targets.losses import DIVERGENCES

#: direction -> the divergence of (teacher, student)
DIRECTIONS = {"forward": "kl", "reverse": "reverse_kl", "js": "js"}
CONTROLS = ("none", "random")
#: a rest below this cannot be told from the rounding of float32 log-probabilities
ROUNDING = 1e-6


def teacher_shares(logprobs: Tensor, known: Tensor, temperature: float, least: float = 0.0) -> Tensor:
    """p^T over the kept tokens and the rest: [M, k] -> float64 [M, k + 1].

    Args:
        known: bool [M, k], which of the tokens the student has; the others count to the rest.
        least: what a rest that rounding hides is taken for.
    """
    kept = logprobs.double().masked_fill(~known, -torch.inf)
    rest = 1 - kept.exp().sum(-1, keepdim=True)
    rest = rest.masked_fill(rest < ROUNDING, least).log()
    return (torch.cat([kept, rest], -1) / temperature).softmax(-1)


def student_shares(logits: Tensor, ids: Tensor, known: Tensor, temperature: float) -> Tensor:
    """q^T over the kept tokens and the rest: logits [M, V], ids [M, k] -> [M, k + 1]."""
    least = torch.finfo(logits.dtype).min  # in place of -inf, whose gradient is no number where all tokens are kept
    # A token that the student does not have stands where one is that it has: nothing is taken from the rest twice.
    place = ids.where(known, ids.gather(-1, known.byte().argmax(-1, keepdim=True))).clamp(max=logits.shape[-1] - 1)
    kept = logits.gather(-1, place).masked_fill(~known, least)
    rest = logits.scatter(-1, place, least).logsumexp(-1, keepdim=True)
    return (torch.cat([kept, rest], -1) / temperature).softmax(-1)


@TARGETS.register_module()
class LogitsTarget(Target):
    """T^2 * D(teacher || student) over the teacher's k most probable tokens and the rest, a mean over answer tokens.

    Teacher and student need one tokenizer. Latents are not needed; nothing is learned beside the student.

    Args:
        weight: its share in the total loss, beside L_ntp's 1.
        temperature: T, on both sides; the loss is scaled by T^2, so that gradients keep their size.
        direction: 'forward', KL(teacher || student); 'reverse', KL(student || teacher); 'js', Jensen-Shannon.
        store: a trace store of its own, where the run's traces hold no logits.
        control: 'random' (the kept probabilities in an order drawn for each token) or 'none'. seed: fixes that order.
    """

    needs_logits = True

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        direction: str = "forward",
        store: str | None = None,
        control: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__(weight)
        if not temperature > 0:
            raise UserError(f"temperature is above 0, got {temperature}")
        if direction not in DIRECTIONS:
            raise UserError(f"direction: got '{direction}'; {nearest(direction, DIRECTIONS)}")
        if control not in CONTROLS:
            raise UserError(
                f"control: got '{control}'; another sample's logits belong to another answer's tokens, and even shares "
                f"need no teacher; {nearest(control, CONTROLS)}"
            )
        self.temperature, self.direction = temperature, direction
        self.store, self.control, self.seed = store, control, seed

    def setup(self, width: int, depth: int, latents: int, header: Mapping[str, Any]) -> None:
        if "settings" not in header:
            raise UserError("the logits target needs traces: give traces.path (tools/extract.py makes them)")
        if not header["settings"].get("logits"):
            raise UserError("these traces hold no answer logits; extract with extract.logits (for example 32)")

    def prepare(self, encoded: Encoded, trace: Trace | None) -> dict[str, Tensor]:
        """``ids`` [M, k], ``logprobs`` [M, k], ``tokens`` [M], and ``present``, bool [M].

        Raises:
            UserError: the answer's tokens are others for the student than they were for the teacher.
        """
        assert trace is not None and trace.logits is not None, "setup refuses traces without answer logits"
        given = trace.logits
        own = encoded.labels[(encoded.labels != IGNORED) & ~emits(encoded.roles)]  # latents that it writes are no words
        if not torch.equal(own, given.tokens):
            raise UserError(
                f"the answer of sample '{trace.sample_id}' is the tokens {own.tolist()} for the student and "
                f"{given.tokens.tolist()} for the teacher: logits can be distilled between models of one tokenizer and "
                "one chat markup alone, along the answer that the traces were made with"
            )
        logprobs = given.logprobs
        if self.control == "random":
            names = (f"{trace.sample_id}:{token}" for token in range(len(logprobs)))
            logprobs = torch.stack([shuffled_cells(row, self.seed, name) for row, name in zip(logprobs, names)])
        return {
            "ids": given.ids,
            "logprobs": logprobs,
            "tokens": given.tokens,
            "present": torch.ones(len(given.tokens), dtype=torch.bool),
        }

    def count(self, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        """The answers' tokens."""
        return prepared["present"].sum()

    def forward(self, output: StudentOutput, roles: Tensor, prepared: Mapping[str, Tensor]) -> Tensor:
        present = prepared["present"]  # the answers' tokens, sample by sample, as the student's logits stand
        if not torch.equal(output.labels, prepared["tokens"][present]):
            raise ValueError("the labels of the batch are not the tokens that the logits target prepared")
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        ids = prepared["ids"][present]
        known = ids < logits.shape[-1]
        # KL(student || teacher) has no value where the teacher has nothing, and other tokens must cost something.
        least = ROUNDING if self.direction == "reverse" and ids.shape[-1] < logits.shape[-1] else 0.0
        teacher = teacher_shares(prepared["logprobs"][present], known, self.temperature, least).to(logits.dtype)
        student = student_shares(logits, ids, known, self.temperature)
        return self.temperature**2 * DIVERGENCES[DIRECTIONS[self.direction]](teacher, student).mean()
