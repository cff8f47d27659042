"""Parts of one plan merge to the bytes of a single run; other stores of equal settings merge sample by sample."""

import shutil
from dataclasses import replace

import pytest

from laavit.registry import UserError
from laavit.traces import shards
from laavit.traces.merge import merge
from laavit.traces.store import TraceStore, TraceWriter, verify


def split(store, folder, holding):
    """A part of a plan: the store's header and some of its shards."""
    folder.mkdir()
    shutil.copy(store.path / "header.json", folder)
    for index in holding:
        shards.copy_shard(store.path, folder, index)
    return folder


@pytest.fixture
def whole(write):
    return write("whole", range(18), quarantined=[5, 9])


@pytest.mark.parametrize("parts", [[[0, 2, 4], [1, 3]], [[3, 4], [0], [1, 2]], [[0, 1, 2], [2, 3, 4]]])
def test_parts_of_a_plan_give_the_bytes_of_one_run(whole, tmp_path, contents, parts):
    folders = [split(whole, tmp_path / f"part{i}", holding) for i, holding in enumerate(parts)]
    done = merge(tmp_path / "out", folders)
    assert contents(tmp_path / "out") == contents(whole.path)
    assert done.traces == 16 and done.missing == () and done.dropped == (3 if sum(map(len, parts)) > 5 else 0)
    assert verify(tmp_path / "out") == {}


def test_parts_may_have_read_the_data_at_other_places(write, tmp_path):
    first = write("a", range(6), data={"annotations": "/a.json", "annotations_sha256": "x", "limit": 6})
    other = write("b", range(6), data={"annotations": "/b/c.json", "annotations_sha256": "x", "limit": 6})
    folders = [split(first, tmp_path / "p1", [0]), split(other, tmp_path / "p2", [1])]
    assert merge(tmp_path / "out", folders).traces == 6
    third = write("c", range(6), data={"annotations": "/a.json", "annotations_sha256": "y", "limit": 6})
    with pytest.raises(UserError, match=r"'data\.annotations_sha256' is 'x' in the first"):
        merge(tmp_path / "out2", [first.path, third.path])


def test_a_damaged_shard_of_one_part_is_taken_from_another(whole, tmp_path, contents):
    first, second = split(whole, tmp_path / "a", [0, 1, 2, 3, 4]), split(whole, tmp_path / "b", [2])
    (first / "shard-00002.arrow").write_bytes(b"x")
    merge(tmp_path / "out", [first, second])
    assert contents(tmp_path / "out") == contents(whole.path)


def test_missing_shards_are_refused_or_left_to_the_extraction(whole, tmp_path):
    folders = [split(whole, tmp_path / "a", [0, 1]), split(whole, tmp_path / "b", [4])]
    with pytest.raises(UserError, match=r"no part holds 2 of the 5 shards \(shard-00002.arrow first\).*--partial"):
        merge(tmp_path / "out", folders)
    assert not (tmp_path / "out").exists()
    assert merge(tmp_path / "out", folders, partial=True).missing == (2, 3)
    assert len(TraceStore(tmp_path / "out", complete=False)) == 9


def test_a_shard_that_differs_is_refused(write, whole, tmp_path, traces):
    other = split(whole, tmp_path / "other", [0, 1, 2, 3, 4])
    with TraceWriter(tmp_path / "changed", whole.header, 4) as writer:
        for number in range(18):
            if number in (5, 9):
                writer.quarantine(f"s{number}", "broken image")
            else:
                writer.append(replace(traces(number), answer="another" if number == 6 else traces(number).answer))
    shards.copy_shard(tmp_path / "changed", other, 1)
    with pytest.raises(UserError, match=r"shard-00001.arrow is another one in '.*whole' and in '.*other'"):
        merge(tmp_path / "out", [whole.path, other])


def test_headers_that_differ_are_named(write, tmp_path):
    write("a", [0, 1], teacher="big")
    write("b", [2, 3], settings={"rows": ["question"]})
    with pytest.raises(UserError, match=r"other settings: .*'settings.rows' is \['answer'\] in the first and"):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="'teacher' is 'big' in the first and 'tiny' in the second"):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])


def test_other_samples_are_appended_and_equal_duplicates_dropped(write, tmp_path, contents):
    write("a", [0, 1, 2], quarantined=[2])
    write("b", [1, 2, 3, 4], quarantined=[4])
    done = merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    assert (done.traces, done.dropped) == (4, 1)
    store = TraceStore(tmp_path / "out")
    assert store.ids == ("s0", "s1", "s2", "s3") and store.quarantined == {"s4": "broken image"}
    assert verify(store.path) == {}


def test_a_duplicate_that_differs_is_refused(write, tmp_path, traces):
    store = write("a", [0, 1])
    with TraceWriter(tmp_path / "b", store.header, 4) as writer:
        writer.extend([replace(traces(1), mass=0.5), traces(2)])
    with pytest.raises(UserError, match="the trace of 's1' is another one in"):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])


def test_verdicts_are_carried_where_they_are_complete(write, tmp_path):
    for name, numbers in (("a", [0, 1]), ("b", [2, 3])):
        store = write(name, numbers)
        store.write_verdicts("correctness", dict.fromkeys(store.ids, True), dict.fromkeys(store.ids, 1.0))
        if name == "a":
            store.write_verdicts("alignment", dict.fromkeys(store.ids, True), dict.fromkeys(store.ids, float("nan")))
    merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    assert TraceStore(tmp_path / "out").verdicts() == {"correctness": dict.fromkeys(["s0", "s1", "s2", "s3"], True)}


def test_the_place_must_be_free(write, tmp_path):
    store = write("a", [0])
    with pytest.raises(UserError, match="not an empty folder"):
        merge(store.path, [store.path, store.path])
    with pytest.raises(UserError, match="no trace store at"):
        merge(tmp_path / "out", [store.path, tmp_path / "none"])
