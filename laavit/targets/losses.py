"""How far a student's states or maps are from what they are led to: pure functions, one table a kind.

Shapes: ``A`` anchors (latents that are compared), ``R`` recorded rows, ``N`` image tokens. Sums and means over anchors,
rows and samples are the caller's, except for InfoNCE, whose negatives are the other samples of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from laavit.registry import UserError


def cosine(predicted: Tensor, wanted: Tensor) -> Tensor:
    """1 - cos(p, w) (LaViT, Eq. 6): [..., D] -> [...]."""
    return 1.0 - F.cosine_similarity(predicted, wanted, dim=-1)


def mse(predicted: Tensor, wanted: Tensor) -> Tensor:
    """The mean over D of (p - w)^2 (LVR, arXiv 2509.24251): [..., D] -> [...]."""
    return (predicted - wanted).square().mean(-1)


def smooth_l1(predicted: Tensor, wanted: Tensor) -> Tensor:
    """The mean over D of d^2 / 2 where d = |p - w| < 1, of d - 1/2 elsewhere (Huber): [..., D] -> [...]."""
    return F.smooth_l1_loss(predicted, wanted.expand_as(predicted), reduction="none").mean(-1)


def info_nce(predicted: Tensor, wanted: Tensor, temperature: float, real: Tensor | None = None) -> Tensor:
    """InfoNCE (arXiv 1807.03748): -log softmax over the batch of cos(p_b, w_b') / temperature, at b' = b.

    The negatives of an anchor are what the same anchor of the other samples of this process's batch is led to. Samples
    of one image are each other's (false) negatives: keep ``train.grouped`` off.

    Args:
        predicted: [B, A, D]. wanted: [B, A, D] or [B, 1, D].
        real: bool [B, A], which of ``wanted`` are no padding (negatives of nobody); None is all.

    Returns: [B, A].

    Raises:
        UserError: one sample alone has no negative, and its loss would be zero whatever is predicted.
    """
    count = predicted.shape[0]
    if count < 2:
        raise UserError("the loss 'info_nce' takes its negatives from the batch: train.batch_size is at least 2")
    given, other = F.normalize(predicted, dim=-1), F.normalize(wanted.expand_as(predicted), dim=-1)
    scores = torch.einsum("bad,cad->bac", given, other) / temperature
    places = torch.arange(count, device=scores.device)
    if real is not None:
        scores = scores.masked_fill(~(real.T | (places[:, None, None] == places)), -torch.inf)
    own = places[:, None].expand(count, scores.shape[1])
    return F.cross_entropy(scores.flatten(0, 1), own.flatten(), reduction="none").view_as(own)


#: name -> [..., D], [..., D] -> [...]; 'info_nce' stands apart, since it compares with a batch
STATE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "mse": mse, "smooth_l1": smooth_l1}


def _share(student: Tensor) -> Tensor:
    """Rows as distributions over the image tokens, never zero, so that logarithms and their gradients are finite."""
    return _positive_share(student).clamp(min=torch.finfo(student.dtype).tiny)


def _positive_share(student: Tensor) -> Tensor:
    """Rows over their sum; one that looks at no image token at all (attention can underflow) is even over them."""
    positive = student.clamp(min=torch.finfo(student.dtype).tiny)
    return positive / positive.sum(-1, keepdim=True)


def kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(A_traj || A_student) (LaViT, Eq. 7): [..., N] -> [...]. 0 log 0 is 0.

    Args:
        target: sums to 1 over N. student: attention to the image tokens, renormalised here (as in all of these).
    """
    return (torch.xlogy(target, target) - target * _positive_share(student).log()).sum(-1)


def reverse_kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(A_student || A_traj): [..., N] -> [...]; the target is positive wherever the student may look."""
    share, real = _share(student), target > 0
    logs = torch.where(real, target, torch.ones_like(target)).log()
    return (share * (share.log() - logs)).masked_fill(~real, 0.0).sum(-1)


def js(target: Tensor, student: Tensor) -> Tensor:
    """Jensen-Shannon divergence, (KL(t || m) + KL(s || m)) / 2, m = (t + s) / 2, at most ln 2: [..., N] -> [...]."""
    share = _share(student)
    logs = ((target + share) / 2).log()
    return (torch.xlogy(target, target) - target * logs + share * (share.log() - logs)).sum(-1) / 2


def squared(target: Tensor, student: Tensor) -> Tensor:
    """The sum over N of (A_traj - A_student)^2: [..., N] -> [...]."""
    return (target - _share(student)).square().sum(-1)


#: name -> target [..., N], student [..., N] -> [...]
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "mse": squared,
}


def over_rows(divergence: Tensor, valid: Tensor, per_row_mean: bool = False) -> Tensor:
    """The mean over the batch of the sum over a sample's rows (Eq. 7), or of their mean: [B, R], bool [B, R] -> scalar.

    Rows are those of attention, or latents. A sample without a valid one counts with zero.
    """
    summed = divergence.masked_fill(~valid, 0.0).sum(-1)
    if per_row_mean:
        summed = summed / valid.sum(-1).clamp(min=1)
    return summed.mean()
