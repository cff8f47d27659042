"""Checkpoints that every process writes its share of."""

import pytest
import torch
from processes import launch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from laavit.engine import latest_checkpoint
from laavit.engine.checkpoint import is_complete, is_sharded, read_state
from laavit.engine.distributed import process_group
from laavit.engine.sharded import SHARDS, files_of, read_shards, stored_shapes, write_shards
from laavit.engine.strategies import FSDP2
from laavit.registry import UserError

SHARDED = {"checkpoint_format": "sharded"}
QUIET = {"dropout": 0, "python_noise": False}


def test_tensors_are_shared_out_over_files_of_a_size():
    tensors = {name: torch.zeros(size) for name, size in {"a": 3, "b": 2, "c": 9, "d": 1}.items()}
    assert files_of(tensors, limit=5 * 4) == {"a": 1, "b": 1, "c": 2, "d": 3}


def test_a_sharded_checkpoint_is_complete_and_holds_nothing_pickled(lab, tmp_path):
    made = lab.run(tmp_path, **SHARDED)
    middle = tmp_path / "checkpoints" / "iter_000008"
    assert is_sharded(middle) and not is_sharded(made.last)  # the last is one that export reads
    names = sorted(str(path.relative_to(middle)) for path in middle.rglob("*") if path.is_file())
    shard = "shards/shard-00001-model-00001-of-00001.safetensors"
    assert names == ["processor.json", "random.safetensors", shard, "state.json"]
    stored = stored_shapes(middle / SHARDS)
    weights = {f"model.student.{layer}.{kind}" for layer in ("first", "second") for kind in ("weight", "bias")}
    assert {name for name in stored if name.startswith("model.")} == weights  # what is frozen is not repeated
    assert stored["model.student.first.weight"] == stored["optimizer.student.first.weight/exp_avg_sq"] == (16, 4)
    state = read_state(middle)
    assert (state["recipe"], state["data"]["step"], state["world_size"]) == ({"title": "fake"}, 8, 1)


def test_resumed_from_shards_it_ends_with_the_same_bits(lab, tmp_path):
    whole, cut = lab.run(tmp_path / "whole"), lab.run(tmp_path / "cut", **SHARDED)
    assert lab.bits(cut.last) == lab.bits(whole.last)
    weights = cut.last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    again = lab.run(tmp_path / "cut", resume=True, **SHARDED)
    assert again.model.steps == [8, 9, 10, 11]
    assert lab.bits(again.last) == lab.bits(whole.last)


def test_a_cut_off_shard_is_passed_over(lab, tmp_path):
    lab.run(tmp_path, steps=8, checkpoint_every=2, keep_last=0, **SHARDED)
    for step in (8, 6):
        file = max((tmp_path / "checkpoints" / f"iter_00000{step}").rglob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1])
    assert latest_checkpoint(tmp_path).name == "iter_000004"


def test_another_model_is_told_by_parameter(lab, tmp_path):
    lab.run(tmp_path, steps=8, **SHARDED)
    (tmp_path / "checkpoints" / "iter_000008" / "state.json").unlink()
    model = lab.FakeModel()
    model.student.second = torch.nn.Linear(16, 3)
    with pytest.raises(UserError, match=r"'student.second.bias' is \(2,\) there and \(3,\) in the model"):
        lab.run(tmp_path, model=model, resume=True)
    model = lab.FakeModel()
    model.student.third = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"'student.third.bias' is only in the model"):
        lab.run(tmp_path, model=model, resume=True)
    model = lab.FakeModel()
    model.student.second.bias.requires_grad_(False)
    with pytest.raises(UserError, match=r"'student.second.bias' is only in the checkpoint"):
        lab.run(tmp_path, model=model, resume=True)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["sharded", "consolidated"])
def test_another_number_of_processes_goes_on(lab, tmp_path, before, after, kind):
    whole = lab.run(tmp_path / "whole", model=lab.FakeModel(**QUIET))

    def first(rank):
        given = {"steps": 12, "checkpoint_format": kind, "keep_last": 0}
        lab.run(tmp_path / "cut", model=lab.FakeModel(**QUIET), **given)

    def then(rank):
        again = lab.run(tmp_path / "cut", model=lab.FakeModel(**QUIET), resume=True, checkpoint_format=kind)
        assert again.model.steps == [8, 9, 10, 11]

    assert launch(first, before) == [0] * before
    last = tmp_path / "cut" / "checkpoints" / "iter_000012"
    uninterrupted = lab.bits(last)
    assert is_sharded(last.with_name("iter_000008")) == (kind == "sharded")
    (last / "state.json").unlink()
    assert launch(then, after) == [0] * after
    assert (lab.bits(last) == uninterrupted) == (before == after)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (last, whole.last))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_sharded_tensors_of_four_are_read_by_any_number(lab, tmp_path):
    """Five rows and one row on four processes: two resp. three of them hold nothing."""
    wanted = {"rows": torch.arange(10.0).reshape(5, 2), "one": torch.tensor([7.0]), "step": torch.tensor(3.0)}

    def shared(tensors, world):
        mesh = init_device_mesh("cpu", (world,))
        cut = {
            name: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for name, t in tensors.items() if t.ndim
        }
        return {**tensors, **cut}

    def write(rank):
        with process_group(torch.device("cpu")):
            write_shards(tmp_path, shared(wanted, 4))

    def read(rank):
        with process_group(torch.device("cpu")):
            empty = shared({name: torch.zeros_like(t) for name, t in wanted.items()}, 2)
            read_shards(tmp_path, empty)
            for name, tensor in empty.items():
                full = tensor.full_tensor() if wanted[name].ndim else tensor
                assert torch.equal(full, wanted[name])

    assert launch(write, 4) == [0] * 4
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    read_shards(tmp_path, found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert launch(read, 2) == [0] * 2
    with pytest.raises(UserError, match="cannot be read"):
        read_shards(tmp_path, {"none": torch.zeros(2)})


def test_every_process_writes_its_share(lab, tmp_path):
    def work(rank):
        lab.run(tmp_path, steps=8, **SHARDED)

    assert launch(work, 2) == [0, 0]
    folder = tmp_path / "checkpoints" / "iter_000004"
    assert is_complete(folder)
    held = [set(load_file(file)) for file in sorted((folder / SHARDS).iterdir())]
    assert len(held) == 2 and not held[0] & held[1]


@pytest.mark.parametrize("kind", ["sharded", "consolidated"])
@pytest.mark.parametrize("after", [4, 1])
def test_fsdp2_goes_on_with_another_number_of_processes(lab, tmp_path, kind, after):
    """Biases of two numbers on four processes: some hold nothing. Consolidated, its folder is one like any other's."""
    whole = lab.run(tmp_path / "whole", model=lab.FakeModel(**QUIET))
    given = {"checkpoint_format": kind, "keep_last": 0}

    def first(rank):
        lab.run(tmp_path / "cut", model=lab.FakeModel(**QUIET), strategy=FSDP2(), checkpoint_async=True, **given)

    def then(rank):
        given_strategy = FSDP2() if after > 1 else None
        lab.run(tmp_path / "cut", model=lab.FakeModel(**QUIET), resume=True, strategy=given_strategy, **given)

    last = tmp_path / "cut" / "checkpoints" / "iter_000012"
    assert launch(first, 2) == [0] * 2
    before = load_file(last / "model.safetensors"), load_file(last / "optimizer.safetensors")
    (last / "state.json").unlink()
    assert launch(then, after) == [0] * after
    again = load_file(last / "model.safetensors"), load_file(last / "optimizer.safetensors")
    own = load_file(whole.last / "model.safetensors"), load_file(whole.last / "optimizer.safetensors")
    for found in (before, again):
        for ours, theirs in zip(found, own):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
