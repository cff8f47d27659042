"""Every bad input ends in quarantine with a reason, or in one clear error; the good ones are all there, in order."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from laavit.data.visual_cot import VisualCoT
from laavit.images import open_image
from laavit.registry import UserError

_spec = importlib.util.spec_from_file_location("corpus", Path(__file__).with_name("corpus.py"))
assert _spec is not None and _spec.loader is not None
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return corpus.write(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reader(written: Any) -> VisualCoT:
    return VisualCoT(written.annotations, written.root)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "cot").mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(tmp_path / "images" / "cot" / "a.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "cot" / "b.png")
    return tmp_path / "images"


def one_sentence(text: str) -> bool:
    return "\n" not in text and len(text) < 800


def test_it_is_large_enough() -> None:
    assert sum(map(len, (corpus.RECORDS, corpus.IMAGES, corpus.PIXELS, corpus.FILES))) >= 90


@pytest.mark.parametrize("case", corpus.RECORDS)
def test_a_bad_record_is_in_quarantine_and_its_neighbours_are_there(root: Path, case: str) -> None:
    record, reason = corpus.RECORDS[case]
    file = root.parent / "annotations.json"
    for text in (
        b"[" + b",".join(map(corpus.encoded, [corpus.four(-1), record, corpus.four(-2)])) + b"]",
        b"\n".join(map(corpus.encoded, [corpus.four(-1), record, corpus.four(-2)])),
    ):
        file.write_bytes(text)
        data = VisualCoT(file, root)
        assert [sample.id for sample in data] == ["-1", "-2"]
        (found,) = data.quarantined
        assert re.match(reason, found.reason) and one_sentence(found.reason), found.reason
        assert found.where in ("record 1", "line 2") and found.kind == found.reason.split(":")[0]


@pytest.mark.parametrize("case", corpus.FILES)
def test_a_broken_file_is_one_sentence(root: Path, case: str) -> None:
    content, message = corpus.FILES[case]
    file = root.parent / "annotations.json"
    file.write_bytes(content)
    for _ in range(2):  # the second time, too: nothing of the first attempt is kept
        with pytest.raises(UserError, match=message) as caught:
            VisualCoT(file, root)
        assert one_sentence(str(caught.value)) and "annotations.json" in str(caught.value)


@pytest.mark.parametrize("case", corpus.FORMS)
def test_every_form_of_a_file_holds_the_same(root: Path, case: str) -> None:
    file = root.parent / "annotations.csv"  # the content tells, not the suffix
    file.write_bytes(corpus.FORMS[case]())
    data = VisualCoT(file, root)
    file.write_bytes(corpus.FORMS["a list"]())
    assert list(data) == list(VisualCoT(file, root)) and data.ids == ("0", "1", "2", "3") and not data.quarantined


def test_the_good_ones_are_all_there_and_can_be_opened(written: Any, reader: VisualCoT) -> None:
    assert [id for id in reader.ids if id in written.good_ids] == list(written.good_ids)
    for id in written.good_ids:
        sample = reader.get(id)
        assert sample.question and sample.answer
        assert all(open_image(path).mode == "RGB" for path in sample.images)


def test_the_bad_ones_are_all_refused_with_their_reason(written: Any, reader: VisualCoT) -> None:
    reasons = {found.id: found.reason for found in reader.quarantined} | dict(reader.broken())
    for id in set(reader.ids) - set(written.good_ids) - set(reasons):
        with pytest.raises(UserError) as caught:  # what only the pixels tell
            [open_image(path) for path in reader.get(id).images]
        reasons[id] = str(caught.value)
    missed = {id: reasons.get(id) for id, why in written.bad_ids.items() if not re.search(why, reasons.get(id, ""))}
    assert not missed and set(written.good_ids).isdisjoint(set(reasons) - {"1", "2"})
    assert all(one_sentence(reason) for reason in reasons.values())
    whys = [found.reason for found in reader.quarantined if found.where in ("record 97", "record 98")]
    assert whys[0] == "duplicate: record 0 is the same" and "is another record with the id" in whys[1]


def test_nothing_outside_the_root_is_ever_opened(
    written: Any, reader: VisualCoT, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *a, **k: seen.append(file.name) or real(file, *a, **k))
    for id in reader.ids:
        try:
            sample = reader.get(id)
            [open_image(path) for path in sample.images]
        except UserError:
            continue
    assert len(seen) > 10 and all(Path(name).resolve().is_relative_to(written.root.resolve()) for name in seen)


def test_a_long_question_is_a_setting(root: Path) -> None:
    record, _ = corpus.RECORDS["question of 50,000 characters"]
    file = root.parent / "annotations.json"
    file.write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"no good record among 1.*50001 characters; allowed: 20000 \(max_characters\)"):
        VisualCoT(file, root)
    assert len(VisualCoT(file, root, max_characters=60_000)[0].question) == 50_001
