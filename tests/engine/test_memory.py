import os
import signal

import pytest
import torch

from laavit.engine import TrainingStopped, latest_checkpoint, memory
from laavit.engine.memory import is_out_of_memory, levers
from laavit.registry import UserError


class Greedy:
    """A model that asks for too much at a step."""

    @staticmethod
    def of(lab, error, at):
        class Model(lab.FakeModel):
            def forward(self, batch, mode="loss"):
                if self.steps[-1] == at:
                    raise error
                return super().forward(batch, mode)

        return Model()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_step_that_asks_for_too_much_ends_in_a_sentence_with_levers(lab, tmp_path, error):
    with pytest.raises(TrainingStopped) as told:
        lab.run(tmp_path, model=Greedy.of(lab, error, 5))
    sentence = str(told.value)
    assert sentence.startswith("step 5: out of memory (") and "\n" not in sentence
    assert "train.gradient_checkpointing=True" in sentence and "train.accumulate=2" in sentence
    assert "iter_000004" in sentence and latest_checkpoint(tmp_path).name == "iter_000004"


def test_other_errors_stay_what_they_are(lab, tmp_path):
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        lab.run(tmp_path, model=Greedy.of(lab, RuntimeError("shapes do not fit"), 1))
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and not is_out_of_memory(ValueError("CUBLAS"))


def test_a_killed_data_worker_is_told_as_one(lab, tmp_path):
    error = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    with pytest.raises(TrainingStopped, match=r"lower train.workers or train.prefetch"):
        lab.run(tmp_path, model=Greedy.of(lab, error, 1))


@pytest.mark.parametrize("how, said", [("kill", "killed by signal: Killed"), ("leave", "exit code 3")])
def test_a_data_worker_that_ends_is_told_with_the_last_checkpoint(lab, tmp_path, how, said):
    """As torch really tells it."""

    class Data(lab.FakeData):
        ending = False

        def __getitem__(self, index):
            if self.ending:
                os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else os._exit(3)
            return super().__getitem__(index)

    lab.run(tmp_path, steps=4)
    data = Data()
    data.ending = True
    with pytest.raises(TrainingStopped, match=rf"step 4: DataLoader worker .*{said}; .*lower.*iter_000004"):
        lab.run(tmp_path, data=data, workers=1, steps=8, resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_loaded_is_told_in_a_sentence(lab, tmp_path, workers):
    """An image that went away in the middle of a run."""

    class Data(lab.FakeData):
        def __getitem__(self, index):
            raise UserError("the image 'a.png' cannot be read: it: does not exist")

    lab.run(tmp_path, steps=4)
    with pytest.raises(TrainingStopped) as told:
        lab.run(tmp_path, data=Data(), workers=workers, steps=8, resume=True)
    sentence = str(told.value)
    assert sentence.startswith("step 4: the image 'a.png' cannot be read: it: does not exist; ")
    assert sentence.endswith("iter_000004") and "\n" not in sentence
    lab.run(tmp_path, steps=8, resume=True)


def test_levers_that_are_pulled_already_are_left_out(lab):
    given = lab.settings(batch_size=4, accumulate=4, gradient_checkpointing=True, shared_prefix=True, grouped=True)
    found = " ".join(levers(given, world=1))
    assert "gradient_checkpointing" not in found and "accumulate" not in found and "shared_prefix" not in found
    assert "strategy=fsdp2 (" not in found and "offload" in found
    found = " ".join(levers(lab.settings(batch_size=16, grouped=True), world=4))
    assert "gradient_checkpointing" in found and "train.accumulate=2 " in found and "shared_prefix" in found
    assert "strategy=fsdp2 (" in found


def test_what_each_lever_frees_is_said_where_the_recipe_can_be_planned(lab, tmp_path, monkeypatch):
    plan = [("strategy=fsdp2", 30 * 2**30), ("train.accumulate=2", 2**30)]
    monkeypatch.setattr(memory, "freed", lambda file, world: plan)
    sentence = memory.cures(tmp_path / "recipe.json", lab.settings())
    assert sentence.startswith("on each GPU strategy=fsdp2 frees about 30 GiB; train.accumulate=2 frees about 1 GiB; ")


def test_a_runs_own_recipe_is_planned(trained):
    found = memory.freed(trained / "recipe.json", 1)
    assert "train.gradient_checkpointing=True" in dict(found) and all(size > 0 for _, size in found)
    assert [size for _, size in found] == sorted((size for _, size in found), reverse=True)
