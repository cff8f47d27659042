import json

import pytest
import torch
from processes import launch
from safetensors.torch import load_file

from laavit.engine import latest_checkpoint
from laavit.engine.distributed import pick_device, process_group
from laavit.registry import UserError


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(lab, tmp_path, accumulate):
    quiet = {"dropout": 0, "python_noise": False}
    one = lab.run(tmp_path / "one", model=lab.FakeModel(**quiet), log_every=1)

    def work(rank):
        lab.run(tmp_path / "two", model=lab.FakeModel(**quiet), accumulate=accumulate, log_every=1)

    assert launch(work) == [0, 0]
    ours, theirs = (load_file(latest_checkpoint(tmp_path / n) / "model.safetensors") for n in ("one", "two"))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-6)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    assert one.last.name == latest_checkpoint(tmp_path / "two").name


def test_two_processes_resume_to_the_same_bits_and_stop_together(lab, tmp_path):
    def whole(rank):
        lab.run(tmp_path / "whole")

    def cut(rank):
        # poisoned samples stop both processes, whichever meets one first
        lab.run(tmp_path / "cut", data=lab.FakeData(poison=poison))

    def resumed(rank):
        lab.run(tmp_path / "cut", resume=True)

    from laavit.engine.sampler import BatchSampler

    poison = BatchSampler(24, None, batch_size=4, steps=12, seed=0).batch(5)[3][0]  # in process 1's share
    assert launch(whole) == [0, 0]
    assert launch(cut) == [1, 1]
    assert latest_checkpoint(tmp_path / "cut").name == "iter_000004"
    assert launch(resumed) == [0, 0]
    assert lab.bits(latest_checkpoint(tmp_path / "cut")) == lab.bits(latest_checkpoint(tmp_path / "whole"))
    state = load_file(latest_checkpoint(tmp_path / "whole") / "random.safetensors")
    assert not torch.equal(state["torch"][0], state["torch"][1])  # each process draws its own dropout


def test_devices_are_checked():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="allowed: auto, cpu, cuda"):
        pick_device("tpu9")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match="shows 0 GPUs"):
            pick_device("cuda")


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_tensors_in_main_memory_can_be_exchanged_with_gpus_too(monkeypatch, device, backend):
    given = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **more: given.append(name))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with process_group(torch.device(device), always=True):
        assert given == [backend]
