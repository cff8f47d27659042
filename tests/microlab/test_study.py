"""The micro-lab's README shows what the records of its study say, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from laavit.commands.study import INTERVENED, SWEEPS, effects_of, placed, rendered
from laavit.paths import project_data
from laavit.sweeps.record import read_rows

ZOO = Path(project_data("model_zoo")) / "microlab"
RECORDS = sorted(file for file in (ZOO / "study").glob("*.json") if file.stem in SWEEPS)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_the_readme_shows_its_record(record: Path) -> None:
    readme = (ZOO / "README.md").read_text(encoding="utf-8")
    assert placed(readme, record.stem, rendered(record)) == readme
    assert record.with_suffix(".png").is_file()
    arms = {row.arm for row in read_rows(record)[1]}
    assert {*SWEEPS[record.stem], *INTERVENED.get(record.stem, ())} <= arms
    assert all(effects_of(record, arm).is_file() for arm in INTERVENED.get(record.stem, ()))


def test_there_are_records() -> None:
    assert {"table3"} <= {record.stem for record in RECORDS}
