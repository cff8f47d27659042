"""Answer logits in a store: back as they were, at the documented size, and what does not fit is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from laavit.registry import UserError
from laavit.structures import AnswerLogits, Trace
from laavit.traces.checking import problems
from laavit.traces.store import TraceStore, TraceWriter


def with_logits(plain: Trace, number: int, tokens: int, k: int) -> Trace:
    generator = torch.Generator().manual_seed(number)
    logprobs, ids = torch.randn(tokens, 1000, generator=generator).log_softmax(-1).topk(k)
    return replace(plain, logits=AnswerLogits(torch.arange(tokens) + 40_000, ids, logprobs))


def test_answer_logits_come_back_as_they_were(traces: Callable[..., Trace], tmp_path: Path) -> None:
    header = {"teacher": "tiny", "settings": {"logits": 6}}
    given = [with_logits(traces(number), number, number + 1, 6) for number in range(20)]
    with TraceWriter(tmp_path / "store", header, shard_size=8) as writer:
        writer.extend(given)
    for one, two in zip(given, TraceStore(tmp_path / "store"), strict=True):
        for name in ("tokens", "ids", "logprobs"):
            assert two.answer == one.answer
            first, second = getattr(one.logits, name), getattr(two.logits, name)
            assert torch.equal(first, second) and first.dtype == second.dtype
    assert problems(tmp_path / "store") == {}


def test_answer_logits_take_the_bytes_that_are_documented(traces: Callable[..., Trace], tmp_path: Path) -> None:
    sizes = {}
    for k in (0, 5):
        with TraceWriter(tmp_path / str(k), {"settings": {"logits": k}} if k else {}, shard_size=64) as writer:
            for number in range(64):
                trace = replace(with_logits(traces(0), 0, 7, 5), sample_id=f"s{number:03d}")
                writer.append(trace if k else replace(trace, logits=None))
        sizes[k] = TraceStore(tmp_path / str(k)).bytes_per_sample()
    assert sizes[5] - sizes[0] == pytest.approx(12 + 7 * (4 + 8 * 5), abs=16)  # and a shard's framing, a 64th each


@pytest.mark.parametrize(
    ("logits", "made", "message"),
    [
        (4, None, "'s1' has no answer logits; the store keeps 4 a token"),
        (0, (3, 4), "'s1' has some answer logits; the store keeps 0 a token"),
        (4, (3, 5), r"answer logits of shape \(3, 5\) for ids \(3, 5\) and 3 answer tokens; the store keeps 4"),
    ],
)
def test_answer_logits_that_do_not_fit_their_store_are_refused(
    traces: Callable[..., Trace], tmp_path: Path, logits: int, made: tuple[int, int] | None, message: str
) -> None:
    trace = with_logits(traces(1), 1, *made) if made else traces(1)
    with (
        pytest.raises(UserError, match=message),
        TraceWriter(tmp_path / "store", {"settings": {"logits": logits}}) as writer,
    ):
        writer.append(trace)


def test_answer_logits_that_are_not_finite_or_not_counted_are_refused(
    traces: Callable[..., Trace], tmp_path: Path
) -> None:
    trace = with_logits(traces(1), 1, 3, 4)
    assert trace.logits is not None
    broken = replace(trace, logits=replace(trace.logits, logprobs=torch.full((3, 4), -torch.inf)))
    with (
        pytest.raises(UserError, match="has answer logits that are not finite"),
        TraceWriter(tmp_path / "store", {"settings": {"logits": 4}}) as writer,
    ):
        writer.append(broken)
    for value in (-1, True, "4", 2.0):
        with pytest.raises(UserError, match=r"settings\.logits is a whole number"):
            TraceWriter(tmp_path / "other", {"settings": {"logits": value}})
