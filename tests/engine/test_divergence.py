import json
import logging

import pytest

from laavit.engine import TrainingStopped
from laavit.engine.hooks.divergence import FACTOR, LEAST, PATIENCE, Watch


def seen(values):
    """The places at which a watch speaks."""
    watch = Watch()
    return [place for place, value in enumerate(values) if watch.see(value)]


def test_a_watch_speaks_once_when_a_loss_stays_far_above_its_median():
    calm = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert seen([*calm, *[10.0] * (PATIENCE + 3)]) == [len(calm) + PATIENCE - 1]
    assert seen([*calm, *[10.0] * (PATIENCE - 1), 0.5, *[10.0] * (PATIENCE - 1)]) == []  # not in a row
    assert seen([*calm, *[FACTOR * 0.7] * 20]) == []  # at the threshold, not above it


def test_a_loss_that_has_become_small_may_be_noisy():
    """Far above the median, but where the run began."""
    calm = [1.0] * LEAST + [0.01] * 40
    assert seen([*calm, *[0.9] * 20]) == []
    assert seen([*calm, *[1.1] * 20]) == [len(calm) + PATIENCE - 1]


def test_what_is_far_above_does_not_lift_the_median():
    watch = Watch()
    for value in [1.0] * 10 + [50.0] * 30:
        watch.see(value)
    assert watch.median == 1.0 and watch.above == 30


def exploding(lab, after):
    """A model whose targets run away from it: a large learning rate in effect, without a NaN."""

    class Exploding(lab.FakeModel):
        def forward(self, batch, mode="loss"):
            out = super().forward(batch, mode)
            factor = 100.0 if self.steps[-1] >= after else 1.0
            return {**out, "ntp": out["ntp"] * factor}

    return Exploding(dropout=0, python_noise=False)


def test_a_diverging_run_is_told_once_or_stopped(lab, tmp_path, caplog):
    given = {"steps": 30, "log_every": 1, "checkpoint_every": 10}
    with caplog.at_level(logging.WARNING, logger="laavit.engine"):
        lab.run(tmp_path / "warn", model=exploding(lab, 12), **given)
    told = [record.getMessage() for record in caplog.records if "diverges" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith(f"step {12 + PATIENCE}: ") and "ntp is " in told[0]
    with pytest.raises(TrainingStopped, match=f"step {12 + PATIENCE}: training diverges: ntp is"):
        lab.run(tmp_path / "stop", model=exploding(lab, 12), on_divergence="stop", **given)
    last = json.loads((tmp_path / "stop" / "log.jsonl").read_text().splitlines()[-1])
    assert last["iter"] == 12 + PATIENCE


def test_a_resumed_run_remembers_what_its_losses_were(lab, tmp_path):
    given = {"steps": 30, "log_every": 1, "checkpoint_every": 14}
    with pytest.raises(TrainingStopped):
        lab.run(tmp_path, model=exploding(lab, 12), on_divergence="stop", **given)
    # From step 14 on the median is that of the first 12: without it the loss would be found constant.
    with pytest.raises(TrainingStopped, match=f"step {12 + PATIENCE}: training diverges"):
        lab.run(tmp_path, model=exploding(lab, 12), on_divergence="stop", resume=True, **given)
