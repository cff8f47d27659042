from itertools import islice

import pytest

from laavit.engine import BatchSampler
from laavit.registry import UserError


def sampler(length=10, groups=None, **changes):
    return BatchSampler(length, groups, **{"batch_size": 4, "steps": 20, "seed": 3, **changes})


def flat(batch):
    return [index for unit in batch for index in unit]


def test_every_epoch_sees_every_sample_once_and_batches_straddle_epochs():
    order = [index for step in range(20) for index in flat(sampler().batch(step))]
    epochs = [order[start : start + 10] for start in range(0, 80, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_a_step_is_a_pure_function_of_seed_and_step():
    steps = list(sampler())
    backwards = sampler()
    assert [flat(backwards.batch(step)) for step in reversed(range(20))] == steps[::-1]
    assert steps != list(sampler(seed=4))


def test_the_order_is_frozen():
    # A change of these numbers would make every earlier run impossible to resume or repeat.
    assert flat(sampler().batch(0) + sampler().batch(7)) == [9, 1, 0, 8, 4, 2, 3, 2]


def test_starting_later_skips_without_replaying():
    late = sampler(start=13)
    assert list(late) == list(sampler())[13:]
    assert len(late) == 7
    calls = []
    late._permutation = lambda *args: calls.append(args[1]) or list(range(10))
    next(iter(late))
    assert set(calls) == {5}  # positions 52-55 only


def test_groups_stay_together_and_count_as_one():
    groups = ["b", "a", "b", "c", "a", "b"]
    made = sampler(6, groups, batch_size=3, steps=3)
    for batch in made:
        keys = [groups[index] for index in batch]
        assert len(batch) == 6
        assert len(set(keys)) == 3
        for key in set(keys):
            assert keys.count(key) == groups.count(key)


def test_micro_batches_and_processes_share_out_the_same_global_batch():
    whole = [flat(sampler(batch_size=8).batch(step)) for step in range(5)]
    for accumulate, world in ((1, 2), (2, 1), (2, 2), (4, 2)):
        parts = [sampler(batch_size=8, accumulate=accumulate, rank=rank, world_size=world) for rank in range(world)]
        for step in range(5):
            shared = [part.micro_batch(step, m) for m in range(accumulate) for part in parts]
            assert [index for piece in shared for index in piece] == whole[step]
        assert list(islice(parts[0], accumulate)) == [parts[0].micro_batch(0, m) for m in range(accumulate)]
        assert len(parts[0]) == 20 * accumulate


def test_a_batch_larger_than_the_data_wraps_around():
    batch = flat(sampler(3, batch_size=8).batch(0))
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


def test_the_fingerprint_tells_data_apart():
    prints = {sampler().fingerprint, sampler(11).fingerprint, sampler(10, list("aabbccddee")).fingerprint}
    assert len(prints) == 3
    assert sampler(seed=9, batch_size=2).fingerprint in prints


def test_a_mistake_is_told_in_one_sentence():
    with pytest.raises(UserError, match=r"batch_size: got 6.*multiples of 4"):
        sampler(batch_size=6, accumulate=2, world_size=2)
    with pytest.raises(UserError, match="empty"):
        sampler(0)
    with pytest.raises(UserError, match="10 samples but 2 group keys"):
        sampler(10, ["a", "b"])
