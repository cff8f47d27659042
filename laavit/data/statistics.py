"""What a data set holds, in figures: texts, boxes, images, and the same figures of the paper's set beside them.

The paper (LaViT, arXiv 2601.10129) gives counts by source set (Table A3) and statistics over samples (Table A4) of its
14,567 samples; both are data in ``eval/tables/lavit_sft_15k.yaml``.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from rich.console import Console
from rich.progress import Progress

from laavit.data.parsing import PIXELS
from laavit.data.records import RecordReader
from laavit.images import image_size, open_image
from laavit.paths import project_data
from laavit.registry import UserError, nearest

LOOKS = ("none", "header", "full")
#: Areas, as shares of the image, below and above which a box is counted as odd.
TINY, WHOLE = 0.001, 0.95
#: Paths that a worker process is given at a time.
CHUNK = 64
#: Reasons shown of each kind.
SHOWN = 3


@dataclass(frozen=True)
class Tokens:
    """How a student's processor makes visual tokens of an image (Table A1; the Qwen-VL families' rule).

    Args:
        patch: pixels a side of a patch. merge: patches a side of a token.
        min_pixels, max_pixels: images are scaled to lie between.
    """

    patch: int = 14
    merge: int = 2
    min_pixels: int = 200_704
    max_pixels: int = 1_003_520

    def count(self, sizes: np.ndarray) -> np.ndarray:
        """Tokens of images [..., (width, height)]; 0 where the family takes no image of that shape."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        factor = self.patch * self.merge
        shapes, back = np.unique(sizes, axis=0, return_inverse=True)
        counts = []
        for width, height in shapes.tolist():
            try:
                resized = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
                counts.append(resized[0] * resized[1] // factor**2)
            except ValueError:  # longer than 200 times its other side
                counts.append(0)
        return np.array(counts, dtype=np.int64)[back.reshape(-1)]


def look(reader: RecordReader, paths: Sequence[str], full: bool) -> list[tuple[int, int] | str]:
    """(width, height) of images by their path below the root, or what is wrong with them."""
    found: list[tuple[int, int] | str] = []
    for path in paths:
        try:
            file = reader.locate(path, path)
            found.append(open_image(file).size if full else image_size(file))
        except UserError as error:
            found.append(str(error).removeprefix(f"{path}: "))
    return found


def look_at_all(reader: RecordReader, paths: Sequence[str], full: bool, workers: int) -> list[tuple[int, int] | str]:
    """The same for many images, in worker processes (0: in this one), with a bar."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    found: list[tuple[int, int] | str] = []
    with Progress(console=Console(stderr=True), transient=True) as bar, ExitStack() as stack:
        done: Iterable[list[tuple[int, int] | str]] = (look(reader, chunk, full) for chunk in chunks)
        if workers:
            # fresh processes: a fork would copy this one's threads, and their locks, at any moment
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(workers, context, _remember, (reader,)))
            done = pool.map(partial(_look, full=full), chunks)
        for some in bar.track(done, total=len(chunks), description="images"):
            found += some
    return found


_READER: list[RecordReader] = []  # of a worker process: sent once, not with every chunk


def _remember(reader: RecordReader) -> None:
    _READER[:] = [reader]


def _look(paths: Sequence[str], full: bool) -> list[tuple[int, int] | str]:
    return look(_READER[0], paths, full)


def describe(reader: RecordReader, images: str = "header", workers: int = 0, tokens: Tokens | None = None) -> dict:
    """Everything that ``laavit data check`` reports, as plain data.

    Args:
        images: 'none' leaves the image files alone, 'header' reads their size, 'full' decodes every pixel.
        workers: processes that look at images; 0 is this one. tokens: how visual tokens are counted.

    Raises:
        UserError: ``images`` is none of these.
    """
    if images not in LOOKS:
        raise UserError(f"images: got '{images}'; {nearest(images, LOOKS)}")
    table = reader.table("images", "question", "answer", "corners", "places", "unit", "source")
    paths = pc.list_flatten(table["images"])
    report: dict[str, Any] = {
        "records": reader.read,
        "samples": len(reader),
        "quarantined": _quarantined(reader),
        "sources": _sources(table["source"].to_pylist()),
        "statistics": _texts(table),
        "images": {"looked": images, "files": pc.count_distinct(paths).as_py()},
    }
    sizes = None
    if images != "none":
        distinct = pc.unique(paths)
        seen = look_at_all(reader, distinct.to_pylist(), images == "full", workers)
        broken = {path: why for path, why in zip(distinct.to_pylist(), seen, strict=True) if isinstance(why, str)}
        known = np.array([(0, 0) if isinstance(one, str) else one for one in seen], dtype=np.int64).reshape(-1, 2)
        sizes = known[pc.index_in(paths, value_set=distinct).to_numpy()]
        report["images"] |= {"broken": len(broken), "reasons": _shown(broken.values())}
        report["images"]["samples_affected"] = _affected(table["images"], sizes)
        report["statistics"] |= _sizes(sizes, tokens or Tokens())
    report["boxes"] = _boxes(table, sizes)
    report["paper"] = paper()
    return report


def paper() -> dict[str, Any]:
    """The paper's figures: total, sources, statistics."""
    text = (project_data("eval") / "tables" / "lavit_sft_15k.yaml").read_text(encoding="utf-8")
    figures: dict[str, Any] = yaml.safe_load(text)["paper"]
    return figures


def _quarantined(reader: RecordReader) -> dict[str, Any]:
    kinds: dict[str, list[str]] = {}
    for found in reader.quarantined:
        kinds.setdefault(found.kind, []).append(f"{found.where}: {found.reason.partition(': ')[2]}")
    return {
        kind: {"records": len(reasons), "first": reasons[:SHOWN]}
        for kind, reasons in sorted(kinds.items(), key=lambda item: -len(item[1]))
    }


def _sources(names: list[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _shown(reasons: Iterable[str]) -> list[str]:
    return list(islice(reasons, SHOWN))


def _texts(table: pa.Table) -> dict[str, float]:
    """Words of questions and answers; mean over samples, and the longest."""
    figures: dict[str, float] = {}
    for name in ("question", "answer"):
        words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(table[name])))
        figures[f"{name}_words"] = pc.mean(words).as_py()
        figures[f"{name}_words_max"] = pc.max(words).as_py()
    return figures


def _sizes(sizes: np.ndarray, tokens: Tokens) -> dict[str, float]:
    """Mean sides and visual tokens of an image, over the samples' images that can be read; sizes [M, 2], 0 unread."""
    good = sizes[sizes[:, 0] > 0]
    if not len(good):
        return {}
    width, height = good.mean(0).tolist()
    return {"image_width": width, "image_height": height, "visual_tokens": float(tokens.count(good).mean())}


def _owners(lists: pa.ChunkedArray) -> np.ndarray:
    """The row that each item of a column of lists belongs to."""
    return pc.list_parent_indices(lists.combine_chunks()).to_numpy()


def _affected(images: pa.ChunkedArray, sizes: np.ndarray) -> int:
    """Samples that have a broken image."""
    return len(np.unique(_owners(images)[sizes[:, 0] == 0]))


def _boxes(table: pa.Table, sizes: np.ndarray | None) -> dict[str, int]:
    """Counts of boxes by what is odd about them; pixel boxes count only where sizes [M, 2] of the images are known."""
    corners = pc.list_flatten(table["corners"]).to_numpy().reshape(-1, 4)
    lengths = pc.list_value_length(table["corners"]).to_numpy() // 4
    rows = np.repeat(np.arange(len(lengths)), lengths)
    pixels = pc.equal(table["unit"], PIXELS).to_numpy()[rows]
    counts = {
        "boxes": len(corners),
        "samples_without": int((lengths == 0).sum()),
        "samples_with_several": int((lengths > 1).sum()),
        "in_pixels": int(pixels.sum()),
    }
    shares = corners.astype(np.float64)
    if sizes is not None and pixels.any():
        starts = np.concatenate([[0], np.cumsum(pc.list_value_length(table["images"]).to_numpy())])
        own = sizes[starts[rows] + pc.list_flatten(table["places"]).to_numpy()].astype(np.float64)
        own[own[:, 0] == 0] = np.nan
        shares = np.where(pixels[:, None], corners / np.tile(own, 2), corners)
    elif pixels.any():
        shares[pixels] = np.nan
    inside = np.clip(shares, 0, 1)
    area = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
    with np.errstate(invalid="ignore"):
        return counts | {
            "reach_past_the_image": int(((shares < 0) | (shares > 1)).any(1).sum()),
            "without_area_inside": int((area <= 0).sum()),
            f"smaller_than_{TINY:.1%}": int(((area > 0) & (area < TINY)).sum()),
            f"larger_than_{WHOLE:.0%}": int((area > WHOLE).sum()),
        }


def beside_paper(report: Mapping[str, Any]) -> list[tuple[str, int, float, int | None, float | None]]:
    """(source, samples, share, the paper's samples, the paper's share), in the paper's order, others after."""
    ours, theirs = report["sources"], report["paper"]["sources"]
    total, paper_total = max(report["samples"], 1), report["paper"]["total"]
    rows: list[tuple[str, int, float, int | None, float | None]] = []
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        count, published = ours.get(name, 0), theirs.get(name)
        share = published / paper_total if published is not None else None
        rows.append((name, count, count / total, published, share))
    return rows
