"""The perception gap (LaViT, Fig. 3): how differently teacher and student look and think, token by token of an answer.

Both models read the same answer (teacher-forced), and every token has, of each model, a map over the image tokens and a
state after the decoder's last norm. The teacher's map is carried to the student's grid, as in training (App. C.2),
both are renormalised, and compared by KL(teacher || student). Tokens are functional words, objects or attributes.

States of two widths have no cosine; the paper does not say what stands between its 5,120 and 2,048 numbers. Where the
widths agree the cosine distance is given as it is, which says something only of models with a common origin. What
needs neither is linear CKA (Kornblith et al., arXiv 1905.00414): whether two models find the same tokens alike. With
few tokens for their width plain CKA tends to 1, so its HSIC is the unbiased one (Nguyen et al., arXiv 2010.15327).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from laavit.backbones.rows import image_rows
from laavit.evaluation.analyses.intervals import Floats, bootstrap, interval, jackknife, ratio
from laavit.evaluation.gaze import NO_LOADING, Looker, asked_by, check_lookers, look, settings_of
from laavit.registry import UserError
from laavit.structures import Sample, Tile
from laavit.targets.losses import kl
from laavit.teachers import HFTeacher
from laavit.teachers.recording import asked, recording
from laavit.teachers.steps import step_maps
from laavit.traces.gaze import to_distribution
from laavit.traces.grids import resample
from laavit.traces.tagger import GROUPS, load_tagger

logger = logging.getLogger(__name__)

#: Fig. 3: KL of functional and attribute tokens; cosine distance over all groups, lowest and highest
PAPER = {"kl": {"functional": 1.11, "attribute": 1.39}, "cosine": [0.52, 0.55]}
#: tokens of a group that CKA compares with one another, spread evenly over all
MOST = 4_000
UNITS = ("token", "word")


@dataclass(frozen=True)
class Along:
    """What one model does along one answer, of T tokens or words.

    Args:
        texts, groups: T each. tiles: of its image tokens.
        maps: [T, N], mean attention of each token's rows. states: [T, D], after the decoder's last norm.
    """

    texts: tuple[str, ...]
    groups: tuple[str, ...]
    tiles: tuple[Tile, ...]
    maps: Tensor
    states: Tensor


@torch.no_grad()
def read_along(
    looker: Looker,
    samples: Sequence[Sample],
    unit: str = "token",
    rows: str = "predicting",
    tagger: str = "textblob",
    batch_size: int = 32,
    loading: Mapping[str, Any] = NO_LOADING,
) -> list[Along]:
    """Read the samples' answers along, one batched pass each; the rows are the answer's, of the looker's layers.

    Args:
        unit: 'token' or 'word'. rows: of the positions 'predicting' a token, or of its 'own' one.

    Raises:
        UserError: the model or the tagger cannot be loaded.
        SampleError: a sample cannot be read.
    """
    (layout,) = check_lookers([looker])
    settings = settings_of(replace(looker, rows=("answer",)), answer="gold", steps=unit, step_rows=rows, tagger=tagger)
    backbone = (teacher := HFTeacher(looker.folder, **loading)).backbone
    extractor = teacher.extractor(settings, layout)
    samples, found = asked_by(looker, samples), list[Along]()
    for start in track(range(0, len(samples), batch_size), f"{looker.name} along the answers", transient=True):
        encoded, answers = extractor.answered(
            [extractor.preparer(each) for each in samples[start : start + batch_size]]
        )
        wanted = asked(backbone, encoded, answers, settings, extractor.tagger)
        context = recording(backbone, settings, wanted.index)
        hidden = backbone.forward(wanted.batch, context)
        attended, valid = image_rows(context.mean_rows(), wanted.batch.roles)  # [B, R, N], [B, N]
        tokens = wanted.index[:, wanted.kinds :].clamp(min=0).to(hidden.device)
        states = hidden.gather(1, tokens[:, :, None].expand(-1, -1, hidden.shape[-1])).float()
        maps, states = (step_maps(each, wanted.steps).cpu() for each in (attended[:, wanted.kinds :], states))
        for place, (item, steps) in enumerate(zip(encoded, wanted.steps, strict=True)):
            count, own = len(steps.texts), valid[place].cpu()
            tiles = tuple(span.tile for span in item.spans)
            # copies: a view would keep the whole batch
            kept = (maps[place, :count][:, own].clone(), states[place, :count].clone())
            found.append(Along(steps.texts, steps.groups, tiles, *kept))
    return found


def gap(
    lookers: Sequence[Looker],
    samples: Sequence[Sample],
    answers: str = "teacher",
    unit: str = "token",
    rows: str = "predicting",
    tagger: str = "textblob",
    batch_size: int = 32,
    max_new_tokens: int = 64,
    loading: Mapping[str, Any] = NO_LOADING,
) -> dict[str, Any]:
    """The gap of every looker after the first from the first, the teacher.

    Args:
        answers: whose words are read: the 'teacher' answers greedily, or the 'gold' answers.

    Raises:
        UserError: fewer than two lookers, no sample, no tagger, or the models cut the answers differently.
    """
    if len(lookers) < 2:
        raise UserError("a gap needs a teacher and at least one student: TEACHER=FOLDER STUDENT=FOLDER ...")
    check_lookers(lookers)
    if not samples:
        raise UserError("there is no sample to read")
    load_tagger(tagger)  # its absence is told before a model is loaded
    first, *others = lookers
    if answers == "teacher":
        plain = replace(first, rows=("header", "answer"))
        said = look(plain, samples, batch_size, "own", max_new_tokens, loading)
        samples = [replace(sample, answer=trace.answer) for sample, trace in zip(samples, said, strict=True)]
    spoken = [sample for sample in samples if sample.answer.strip()]
    if not spoken:
        raise UserError(f"'{first.name}' answers none of the {len(samples)} questions with words")
    settings = (unit, rows, tagger, batch_size, loading)
    teacher = read_along(first, spoken, *settings)
    found = {each.name: compare(teacher, read_along(each, spoken, *settings), unit) for each in others}
    return tables(found) | {
        "n": len(spoken), "without_words": len(samples) - len(spoken), "teacher": first.name, "answers": answers,
        "unit": unit, "rows": rows, "tagger": tagger, "paper": PAPER,
    }  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """Every token of every answer, teacher beside student; T tokens in all.

    Args:
        sample: long [T], its sample. group: [T]. kl: [T]. cosine: [T], or None where widths differ.
        teacher, student: the states, [T, D_t] and [T, D_s].
    """

    sample: NDArray[np.int64]
    group: NDArray[np.str_]
    kl: Floats
    cosine: Floats | None
    teacher: Floats
    student: Floats


def compare(teacher: Sequence[Along], student: Sequence[Along], unit: str = "token") -> Compared:
    """Put two readings of the same answers side by side; answers that are cut differently are left out.

    Raises:
        UserError: tokens are compared and some answer's differ, no answer is cut alike, or a map has no mass.
    """
    pairs = [(i, t, s) for i, (t, s) in enumerate(zip(teacher, student, strict=True)) if t.texts == s.texts and t.texts]
    if len(pairs) < len(teacher):
        if unit == "token" or not pairs:
            raise UserError(
                "the models' tokenizers cut the answers differently, so that their tokens cannot be compared; "
                "allowed: --unit word, for models whose tokens end where words end"
            )
        logger.warning("%d answers are cut into other words by the two models and left out", len(teacher) - len(pairs))
    divergences = []
    for _, mine, yours in pairs:
        there = resample(mine.maps.double(), mine.tiles, yours.tiles)
        if not bool((there.sum(-1) > 0).all() and (yours.maps.sum(-1) > 0).all()):
            raise UserError(
                "a token's rows do not see the image at all; layers whose window ends before it say nothing"
            )
        divergences.append(kl(to_distribution(there), yours.maps.double()))
    first = torch.cat([mine.states for _, mine, _ in pairs]).double()
    second = torch.cat([yours.states for _, _, yours in pairs]).double()
    cosine = 1 - F.cosine_similarity(first, second, dim=-1) if first.shape[1] == second.shape[1] else None
    return Compared(
        np.concatenate([np.full(len(mine.texts), i) for i, mine, _ in pairs]),
        np.array([group for _, mine, _ in pairs for group in mine.groups]),
        torch.cat(divergences).numpy(),
        None if cosine is None else cosine.numpy(),
        first.numpy(),
        second.numpy(),
    )


def tables(found: Mapping[str, Compared]) -> dict[str, Any]:
    """Fig. 3's figures: for every student each group's means, contrasts of groups, and differences of students.

    Means are over tokens, intervals over samples. ``contrasts`` are a group minus functional tokens, ``differences`` a
    student minus the first student over the same tokens (None where they were cut differently).
    """
    students = {name: _student(each) for name, each in found.items()}
    (head, reference), *rest = found.items()
    differences = {}
    for name, each in rest:
        alike = each.kl.shape == reference.kl.shape and bool((each.sample == reference.sample).all())
        means = _means(each.kl - reference.kl, each.sample, each.group)[0] if alike else dict.fromkeys(("all", *GROUPS))
        differences[name] = {"from": head, "kl": means}
    return {"students": students, "differences": differences}


def _student(each: Compared) -> dict[str, Any]:
    counts = {name: int((each.group == name).sum()) for name in GROUPS}
    if lone := len(each.group) - sum(counts.values()):
        logger.warning("%d tokens are in no word that the tagger found: they count among all, in no group", lone)
    means, contrasts = _means(each.kl, each.sample, each.group)
    cosine = None if each.cosine is None else _means(each.cosine, each.sample, each.group)[0]
    groups = {"all": np.arange(len(each.group))} | {name: np.flatnonzero(each.group == name) for name in GROUPS}
    groups = {name: _thinned(rows) for name, rows in groups.items()}
    return {
        "tokens": {"all": len(each.group)} | counts,
        "kl": means,
        "kl_contrasts": contrasts,
        "cosine": cosine,
        "cka_distance": {
            name: jackknife(_cka(each, rows), each.sample[rows]) if len(rows) else None for name, rows in groups.items()
        },
        "widths": [each.teacher.shape[1], each.student.shape[1]],
    }


def _means(values: Floats, sample: NDArray[np.int64], group: NDArray[np.str_]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mean of all tokens and of each group; each later group minus the first."""
    _, place = np.unique(sample, return_inverse=True)
    member = np.stack([np.ones(len(values), dtype=bool), *(group == name for name in GROUPS)], axis=1)
    sums, counts = (np.zeros((int(place.max()) + 1, member.shape[1])) for _ in range(2))
    np.add.at(sums, place, member * values[:, None])
    np.add.at(counts, place, member)
    mean, draws = bootstrap(ratio(sums, counts), len(sums))
    names = ("all", *GROUPS)
    means = {name: interval(mean[i], draws[:, i]) for i, name in enumerate(names)}
    contrasts = {name: interval(mean[i] - mean[1], draws[:, i] - draws[:, 1]) for i, name in enumerate(names) if i > 1}
    return means, contrasts


def _thinned(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows if len(rows) <= MOST else rows[np.linspace(0, len(rows) - 1, MOST).round().astype(np.int64)]


def _cka(each: Compared, rows: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], float]:
    """1 - CKA of chosen rows, the Gram matrices made once."""
    grams = [part[rows] @ part[rows].T for part in (each.teacher, each.student)]
    return lambda kept: 1 - cka(*(gram[np.ix_(kept, kept)] for gram in grams))


def cka(first: Floats, second: Floats) -> float:
    """Linear CKA of two Gram matrices [n, n] with the unbiased HSIC; NaN below four rows or where one is constant."""
    if len(first) < 4:
        return math.nan
    both, mine, yours = (_hsic(*pair) for pair in ((first, second), (first, first), (second, second)))
    scale = math.sqrt(max(mine, 0.0) * max(yours, 0.0))
    tiny = 1e-12 * math.sqrt(float((first**2).mean()) * float((second**2).mean()))
    return both / scale if scale > tiny else math.nan


def _hsic(first: Floats, second: Floats) -> float:
    """The unbiased estimator (Song et al. 2012, Eq. 5) of two Gram matrices [n, n], n >= 4."""
    n = len(first)
    a, b = (gram - np.diag(np.diag(gram)) for gram in (first, second))
    rows_a, rows_b = a.sum(1), b.sum(1)
    crossed = rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2))
    return float(((a * b).sum() + crossed - 2 / (n - 2) * (rows_a @ rows_b)) / (n * (n - 3)))
