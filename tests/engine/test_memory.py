import pytest
import torch

from laavit.engine import TrainingStopped, latest_checkpoint, memory
from laavit.engine.memory import is_out_of_memory, levers

GIB = 2**30
PLAN = {
    "training": {
        "plain": {"weights": 8 * GIB, "gradients": 8 * GIB, "optimizer": 16 * GIB, "buckets": 8 * GIB,
                  "activations": 20 * GIB, "peak": 60 * GIB},
        "checkpointed": {"weights": 8 * GIB, "gradients": 8 * GIB, "optimizer": 16 * GIB, "buckets": 8 * GIB,
                         "activations": 6 * GIB, "peak": 46 * GIB},
    },
    "parameters": {"vision": {"all": GIB, "trainable": GIB // 2}},
}  # fmt: skip


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


def test_what_each_lever_frees_is_read_off_the_plan(lab):
    found = levers(PLAN, lab.settings(batch_size=16, grouped=True), world=4)
    assert found["train.gradient_checkpointing=True"] == 14 * GIB
    assert found["train.accumulate=2 (half the samples at once)"] == 10 * GIB
    assert found["strategy=fsdp2 (4 processes share weights and optimizer)"] == 30 * GIB  # 3/4 of 8 + 8 + 16 + 8
    assert found["student.freeze=('vision',)"] == 6 * GIB  # half a Gi of parameters, 12 bytes each
    assert found["train.shared_prefix=True (an image is read once for all of its questions)"] is None
    assert any("offload" in lever for lever in found)


def test_levers_that_are_pulled_already_are_left_out(lab):
    given = lab.settings(batch_size=4, accumulate=4, gradient_checkpointing=True, shared_prefix=True, grouped=True)
    frozen = {**PLAN, "parameters": {"vision": {"all": GIB, "trainable": 0}}}
    found = " ".join(levers(frozen, given, world=1))
    assert "gradient_checkpointing" not in found and "accumulate" not in found and "shared_prefix" not in found
    assert "strategy=fsdp2" not in found and "freeze" not in found
    half = levers(PLAN, lab.settings(batch_size=4, gradient_checkpointing=True), world=1)
    assert half["train.accumulate=2 (half the samples at once)"] == 3 * GIB  # of the checkpointed step's


def test_the_strongest_lever_comes_first_with_its_figure(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "planned", lambda file, world: PLAN)
    sentence = memory.cures(tmp_path / "recipe.json", lab.settings())
    assert sentence.startswith("on each GPU strategy.offload=cpu of fsdp2 (weights and optimizer in main memory) frees")
    assert "train.gradient_checkpointing=True frees about 14 GiB" in sentence
    assert sentence.index("offload") < sentence.index("gradient_checkpointing") < sentence.index("accumulate=2")
