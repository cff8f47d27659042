import pytest
import torch

from laavit.engine import TrainingStopped, latest_checkpoint
from laavit.engine.sampler import BatchSampler


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_stops_before_the_step_and_names_step_and_samples(lab, tmp_path, accumulate):
    order = BatchSampler(24, None, batch_size=4, steps=12, seed=0)
    poison = order.batch(5)[0][0]  # met first in step 5
    model, kept = lab.FakeModel(), {}

    def keep(step):
        kept.update({n: p.detach().clone() for n, p in model.named_parameters()})

    model.set_step = lambda step: (keep(step), model.steps.append(step))
    with pytest.raises(TrainingStopped) as error:
        lab.run(tmp_path, model=model, data=lab.FakeData(poison=poison), accumulate=accumulate)
    sentence = str(error.value)
    assert sentence.startswith("step 5: the loss is nan")
    assert f"s{poison}" in sentence and "iter_000004" in sentence and "\n" not in sentence
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
    assert latest_checkpoint(tmp_path).name == "iter_000004"


def test_a_gradient_that_is_not_finite_stops_too(lab, tmp_path):
    model = lab.FakeModel()
    model.student.second.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(
        TrainingStopped, match=r"step 0: the gradient's norm is (inf|nan) \(loss .*last checkpoint: none yet"
    ):
        lab.run(tmp_path, model=model)


def test_a_loss_without_gradient_is_told(lab, tmp_path, monkeypatch):
    def forward(self, batch, mode="loss"):
        return {"loss": torch.ones((), requires_grad=True) * batch.x.mean()}

    monkeypatch.setattr(lab.FakeModel, "forward", forward)
    with pytest.raises(TrainingStopped, match="no gradient"):
        lab.run(tmp_path)
