"""Which rows, layers and heads of a teacher look inside the boxes: measured on samples that have them, then chosen.

How well a teacher's gaze is localised decides whether aligning a student with it can help at all, and it differs from
layer to layer and from head to head. All of Eq. 2's averages are sums of one mass a (sample, kind of row, layer, head),
so every selection's in-box share ``sum inside / sum over all image tokens`` is known from one pass, exactly.

What is chosen on some samples must be reported on others: the best of many is always too good on the samples that it
was the best on.

Shapes: ``B`` samples, ``T`` kinds of rows, ``L`` layers, ``H`` heads, ``R`` recorded rows, ``N`` image tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laavit.attention import AttentionContext
from laavit.registry import UserError
from laavit.traces.gaze import top_k

Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Choice:
    """A selection of attention rows.

    Args:
        name: how it came about. rows: kinds of rows.
        layers: layers whose heads are all averaged, counted from 0; None where ``heads`` says which.
        heads: pairs (layer, head), counted from 0; None for all heads of ``layers``.
    """

    name: str
    rows: tuple[str, ...]
    layers: tuple[int, ...] | None
    heads: tuple[tuple[int, int], ...] | None = None

    def member(self, kinds: Sequence[str], layers: int, heads: int) -> Tensor:
        """Which cells belong to it: bool [T, L, H]."""
        member = torch.zeros(len(kinds), layers, heads, dtype=torch.bool)
        rows = torch.tensor([kinds.index(kind) for kind in self.rows])[:, None]
        if self.heads is None:
            member[rows, torch.tensor(self.layers)] = True
        else:
            layer, head = torch.tensor(self.heads).unbind(1)
            member[rows, layer, head] = True
        return member


@dataclass(frozen=True)
class Cells:
    """Attention masses of some samples, float64.

    Args:
        kinds: of rows. inside, total: [B, T, L, H], mass inside the boxes and on the image, summed over the rows.
        top: [B, T, L, H], the in-box share after Top-K. rows: [B, T], how many rows there are.
        chance: [B], the boxes' share of the image tokens: the in-box share of an even gaze.
    """

    kinds: tuple[str, ...]
    inside: Tensor
    total: Tensor
    top: Tensor
    rows: Tensor
    chance: Tensor

    @staticmethod
    def joined(parts: Sequence[Cells]) -> Cells:
        """Several batches as one."""
        names = ("inside", "total", "top", "rows", "chance")
        return Cells(parts[0].kinds, *(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def share(self, choice: Choice) -> Tensor:
        """In-box share of the averaged map, [B]."""
        member = choice.member(self.kinds, *self.inside.shape[2:]).to(self.inside.dtype)
        inside, total = ((mass * member).sum((1, 2, 3)) for mass in (self.inside, self.total))
        return _ratio(inside, total)


class BoxProbe(AttentionContext):
    """Measures the rows of a forward pass where they arise: what is kept of a layer is a few figures a head.

    Args:
        rows: kind of row -> positions, long [B, R_kind], -1 pads.
        image: positions of the image tokens, long [B, N], -1 pads. inside: [B, N], the share of each in the boxes.
        k: of Top-K. choices: selections whose averaged maps are wanted, too.
    """

    def __init__(
        self, rows: Mapping[str, Tensor], image: Tensor, inside: Tensor, k: int, choices: Sequence[Choice] = ()
    ) -> None:
        super().__init__(rows=torch.cat(list(rows.values()), 1), heads="each")
        self.kinds, self.k = tuple(rows), k
        self.real = [(index >= 0).double() for index in rows.values()]
        self.widths = [index.shape[1] for index in rows.values()]
        self.image, self.valid = image.clamp(min=0), (image >= 0).double()
        self.inside = inside.double() * self.valid
        self.choices = tuple(choices)
        self.maps = torch.zeros(len(choices), *image.shape, dtype=torch.float64, device=image.device)
        self._layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def record(self, layer: int, weights: Tensor) -> None:
        """Reduce a layer's rows [B, H, R, S]."""
        batch, heads, count, _ = weights.shape
        picked = weights.gather(3, self.image[:, None, None].expand(batch, heads, count, -1))
        found = []
        for kind, part, real in zip(self.kinds, picked.split(self.widths, 2), self.real, strict=True):
            scores = (part.double() * real[:, None, :, None]).sum(2) * self.valid[:, None]  # [B, H, N]
            inside, best = self.inside[:, None], top_k(scores, self.k)
            found.append(((scores * inside).sum(-1), scores.sum(-1), _ratio((best * inside).sum(-1), best.sum(-1))))
            for index, choice in enumerate(self.choices):
                own = [h for h in range(heads) if choice.heads is None or (layer, h) in choice.heads]
                if kind in choice.rows and (choice.layers is None or layer in choice.layers) and own:
                    self.maps[index] += scores[:, own].sum(1)
        self._layers[layer] = tuple(torch.stack(each, 1).cpu() for each in zip(*found, strict=True))  # type: ignore[assignment]

    def cells(self) -> Cells:
        """The masses of the pass."""
        if not self._layers:
            raise RuntimeError("no attention rows were measured: the decoder does not run the 'laavit' implementation")
        layers = [self._layers[number] for number in sorted(self._layers)]
        inside, total, top = (torch.stack(each, 2) for each in zip(*layers, strict=True))
        rows = torch.stack([real.sum(1) for real in self.real], 1)
        chance = self.inside.sum(1) / self.valid.sum(1)
        return Cells(self.kinds, inside, total, top, rows.cpu(), chance.cpu())

    def shares(self) -> Tensor:
        """In-box share of every choice's map, raw and after Top-K: [C, 2, B]."""
        best = top_k(self.maps, self.k)
        raw, top = (_ratio((maps * self.inside).sum(-1), maps.sum(-1)) for maps in (self.maps, best))
        return torch.stack([raw, top], 1).cpu()


def interval(values: Tensor) -> Interval:
    """Mean and its normal 95 % interval over samples, mean +- 1.96 standard errors; samples without mass left out."""
    values = values[torch.isfinite(values)]
    if not len(values):
        return math.nan, math.nan, math.nan
    mean = float(values.mean())
    half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, mean - half, mean + half


def choose(cells: Cells) -> list[Choice]:
    """The best kinds of rows, then with a window of layers, then with single heads; each the broadest that is good.

    Of all candidates of a stage, those that are not significantly worse than the best (paired differences, 95 %) are as
    good; the one that averages most is taken, since it is the steadiest. ``best`` picks one of the three the same way.

    Raises:
        UserError: no sample, or none that looks at the image at all.
    """
    if not len(cells.chance) or not bool(cells.total.sum() > 0):
        raise UserError("there is no sample with boxes and attention on its image to choose by")
    depth = cells.inside.shape[2]
    subsets = [
        tuple(itertools.compress(cells.kinds, chosen)) for chosen in itertools.product((0, 1), repeat=len(cells.kinds))
    ][1:]
    every = tuple(range(depth))
    rows = _broadest([Choice("rows", subset, every) for subset in subsets], cells)
    windows = [tuple(range(a, b)) for a in range(depth) for b in range(a + 1, depth + 1)]
    layers = _broadest([Choice("layers", subset, window) for subset in subsets for window in windows], cells)
    return [rows, layers, _heads(layers.rows, cells)]


def best(choices: Sequence[Choice], cells: Cells) -> Choice:
    """The broadest of the choices that are not significantly worse than the best."""
    return _broadest(choices, cells)


def _heads(rows: tuple[str, ...], cells: Cells) -> Choice:
    """The heads that look most inside the boxes, taken in order of their own share while the average stays good."""
    which = [cells.kinds.index(kind) for kind in rows]
    own = _ratio(cells.inside[:, which].sum(1), cells.total[:, which].sum(1)).nanmean(0)  # [L, H]
    order = [divmod(int(i), own.shape[1]) for i in own.flatten().nan_to_num(-1).argsort(descending=True, stable=True)]
    sizes = range(1, min(len(order), 64) + 1)
    return _broadest([Choice("heads", rows, None, tuple(sorted(order[:size]))) for size in sizes], cells)


def _broadest(choices: Sequence[Choice], cells: Cells) -> Choice:
    whole = all(choice.heads is None for choice in choices)
    # Where no choice takes heads apart, they are summed first: a deep teacher has thousands of windows of layers.
    masses = [mass.sum(3, keepdim=True) if whole else mass for mass in (cells.inside, cells.total)]
    shape = masses[0].shape[2:]
    members = torch.stack([choice.member(cells.kinds, *shape).flatten() for choice in choices]).to(masses[0].dtype)
    inside, total = (mass.flatten(1) @ members.T for mass in masses)  # [B, C]
    shares = _ratio(inside, total).nan_to_num(0.0).T  # what never looks at the image finds nothing
    top = int(shares.mean(1).argmax())
    behind = shares[top] - shares
    error = 1.96 * behind.std(1, correction=0) / math.sqrt(shares.shape[1])
    good, sizes = (behind.mean(1) <= error).tolist(), members.sum(1).tolist()
    means = shares.mean(1).tolist()
    return choices[max(range(len(choices)), key=lambda i: (good[i], sizes[i], means[i]))]


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, NaN where there is no whole."""
    return torch.where(whole > 0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny), torch.nan)


def settings_of(choice: Choice, depth: int) -> dict[str, object]:
    """The choice as arguments of ``extract``: rows, and layers or heads where they are not all."""
    found: dict[str, object] = {"rows": choice.rows}
    if choice.heads is not None:
        found["heads"] = choice.heads
    elif choice.layers is not None and len(choice.layers) < depth:
        # Negative where they reach the end: 'the last layers' is what carries over to a deeper teacher.
        last = choice.layers == tuple(range(choice.layers[0], depth))
        found["layers"] = tuple(layer - depth if last else layer for layer in choice.layers)
    return found
