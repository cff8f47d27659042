"""A model small enough to train in milliseconds, with what makes resuming hard: dropout, momentum, a gate."""

import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

from laavit.engine import TrainSettings, train


@dataclass
class FakeSample:
    id: str
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class FakeBatch:
    x: torch.Tensor
    y: torch.Tensor
    samples: list


class FakeData(Dataset):
    """24 samples of a linear map; two samples a group."""

    def __init__(self, length=24, poison=None):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(length, 4, generator=generator)
        self.y = self.x @ torch.randn(4, 2, generator=generator)
        self.groups = [index // 2 for index in range(length)]
        if poison is not None:
            self.y[poison] = float("nan")

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return FakeSample(f"s{index}", self.x[index], self.y[index])


def collate(samples):
    return {"batch": FakeBatch(torch.stack([s.x for s in samples]), torch.stack([s.y for s in samples]), samples)}


class FakeStudent(nn.Module):
    """As a Hugging Face model, it has an ``init_weights`` that mmengine must not call."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.second = nn.Linear(16, 2)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def init_weights(self):
        raise AssertionError("pre-trained weights would be drawn anew")


class FakeModel(BaseModel):
    def __init__(self, dropout=0.2, python_noise=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.student = FakeStudent()
        self.dropout, self.python_noise = dropout, python_noise
        self.steps, self.dtypes = [], []

    def set_step(self, step):
        self.steps.append(step)

    def forward(self, batch, mode="loss"):
        assert mode == "loss"
        hidden = torch.nn.functional.dropout(torch.tanh(self.student.first(batch.x)), self.dropout, self.training)
        if self.python_noise:  # draws from the other generators as well
            hidden = hidden + 0.01 * (random.gauss(0, 1) + float(np.random.standard_normal()))
        out = self.student.second(hidden)
        self.dtypes.append(out.dtype)
        ntp = (out.float() - batch.y).square().mean()
        gamma = torch.tensor(min(1.0, self.steps[-1] / 10))
        return {"loss": ntp * (1 + gamma), "ntp": ntp, "gamma": gamma}

    def trainable_parameters(self):
        return [(n, p) for n, p in self.named_parameters() if p.requires_grad]

    def save_checkpoint(self, folder, state=None):
        weights = self.state_dict() if state is None else state
        save_file({n: t.cpu() for n, t in weights.items()}, Path(folder) / "model.safetensors")

    def save_processor(self, folder):
        (Path(folder) / "processor.json").write_text("{}")

    def saved_bytes(self):
        return sum(4 * p.numel() for p in self.parameters())

    def load_checkpoint(self, folder):
        self.load_state_dict(load_file(Path(folder) / "model.safetensors"))


def settings(**changes):
    given = {
        "steps": 12,
        "batch_size": 4,
        "lr": 1e-2,
        "checkpoint_every": 4,
        "log_every": 2,
        "threads": 1,
        "device": "cpu",
        "disk_retry_s": 0,
    }
    return TrainSettings(**{**given, "tensorboard": False, "weight_decay": 0.1, **changes})


def run(work_dir, model=None, data=None, resume=False, hooks=(), strategy=None, **changes):
    model = model or FakeModel()
    made = settings(**changes)
    told = {"title": "fake"}, {"data": "abc"}
    last = train(model, data or FakeData(), collate, made, work_dir, *told, resume, hooks, strategy)
    return SimpleNamespace(last=last, model=model)


def bits(checkpoint):
    """Every byte that matters: weights, optimizer, generators."""
    names = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
    return {name: (checkpoint / name).read_bytes() for name in names}


@pytest.fixture
def lab():
    names = (FakeModel, FakeData, FakeSample, collate, settings, run, bits)
    return SimpleNamespace(**{n.__name__: n for n in names})
