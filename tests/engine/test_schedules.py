import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from laavit.engine import TrainSettings
from laavit.engine.schedules import ClosedFormLR, schedule_factor


@pytest.mark.parametrize(
    ("kind", "step", "want"),
    [
        *(("linear", t, f) for t, f in [(0, 0), (5, 0.5), (10, 1), (55, 0.5), (99, 1 / 90), (100, 0), (5000, 0)]),
        *(("cosine", t, f) for t, f in [(0, 0), (10, 1), (55, 0.5), (32, 0.5 + 0.5 * math.cos(math.pi * 22 / 90))]),
        *(("cosine", t, f) for t, f in [(100, 0), (5000, 0)]),
        *(("constant", t, f) for t, f in [(0, 0), (5, 0.5), (10, 1), (99, 1), (5000, 1)]),
    ],
)
def test_closed_form(kind, step, want):
    assert schedule_factor(step, 100, 10, kind) == pytest.approx(want, abs=1e-12)


def test_edges_without_warmup_or_without_decay():
    assert schedule_factor(0, 100, 0, "linear") == 1
    assert schedule_factor(0, 1, 1, "linear") == 0
    assert schedule_factor(9, 10, 10, "cosine") == pytest.approx(0.9)
    assert schedule_factor(10, 10, 10, "cosine") == 0


@pytest.mark.parametrize(
    ("kind", "theirs"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_equals_hugging_face_over_a_whole_run_and_the_scheduler_resumes_anywhere(kind, theirs):
    made = TrainSettings(steps=37, warmup_ratio=0.1, lr=0.3, schedule=kind)

    def optimizer():
        return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=made.lr)

    ours, reference, resumed = optimizer(), optimizer(), optimizer()
    schedule, other, third = ClosedFormLR(ours, made), theirs(reference, 4, 37), ClosedFormLR(resumed, made)
    for step in range(37):
        assert ours.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], abs=1e-12)
        third.load_state_dict(schedule.state_dict())
        assert resumed.param_groups[0]["lr"] == ours.param_groups[0]["lr"]
        assert schedule.state_dict() == {"last_step": step}
        for part in (ours, reference, resumed):
            part.step()
        for part in (schedule, other, third):
            part.step()


def test_warmup_is_rounded_up_as_hugging_face_does():
    assert TrainSettings().warmup_steps == 30
    assert TrainSettings(steps=101).warmup_steps == 4
