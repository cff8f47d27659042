"""Samples that are not trained on: what a run says of them, and that it trains as if it did not look."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import launch

from laavit.backbones import collate
from laavit.backbones.rows import image_rows
from laavit.cli import run as cli
from laavit.engine.bad_batch import BadBatch, read_bad_batches, write_bad_batch
from laavit.engine.probe import IN_BOX, InBoxShare, Probe, in_box_share
from laavit.gates import ConstantGate
from laavit.registry import UserError
from laavit.targets import ConceptTarget, TrajectoryTarget
from laavit.targets.base import stack
from laavit.traces.grids import sample_mask


def watched(lab, model, samples):
    """A probe of a model over samples, in batches of two."""
    items = lab.encode(model, samples)
    share = in_box_share(model.named_targets, model.student.latents, model.student.backbone.depth)

    def collate(some):
        batch = lab.batch(model, [], items=some)
        batch.targets[IN_BOX] = stack([share.prepare(item, None) for item in some])
        return {"batch": batch}

    return Probe(items, collate, 2, {**model.named_targets, IN_BOX: share})


def test_figures_are_those_of_eval_mode_over_all_samples_however_batched(lab, samples):
    model = lab.model(gate=ConstantGate(1e-6))  # closed while it trains, open where it is looked at
    sums = watched(lab, model, samples).look(model, model, torch.device("cpu"), "fp32")
    found = {name: float(total / count) for name, (total, count) in sums.items()}
    assert set(found) == {"ntp", "concept", "trajectory", IN_BOX} and set(model.targets) == {"concept", "trajectory"}
    assert model.training
    model.eval()
    with torch.no_grad():
        whole = model(lab.batch(model, samples), mode="loss")
    for name in ("ntp", "concept", "trajectory"):
        assert found[name] == pytest.approx(float(whole[name]), rel=1e-9)
    assert int(sums[IN_BOX][1]) == 3
    assert found["ntp"] != pytest.approx(float(model.train()(lab.batch(model, samples))["ntp"]))


@pytest.mark.parametrize(("count", "world", "least"), [(5, 2, 1), (3, 4, 1), (7, 2, 2), (4, 1, 2), (5, 1, 2)])
def test_every_process_has_as_many_batches_and_every_sample_counts_once(monkeypatch, count, world, least):
    target = ConceptTarget()
    target.min_batch = least
    found = []
    for rank in range(world):
        monkeypatch.setattr("laavit.engine.probe.rank_and_world", lambda rank=rank: (rank, world))
        found.append(Probe(range(count), list, 2 * world, {"concept": target}).batches())
    assert len({len(batches) for batches in found}) == 1
    assert all(len(batch) >= least for batches in found for batch, _ in batches)
    counted = sorted(place for batches in found for batch, weight in batches if weight for place in batch)
    # what is left over is less than the target can speak of
    assert counted == list(range(count)) if least == 1 else len(counted) == len(set(counted)) >= count - world


def test_fewer_samples_than_a_target_needs_are_refused():
    target = ConceptTarget()
    target.min_batch = 2
    with pytest.raises(UserError, match="1 samples, and a target of this recipe needs 2"):
        Probe([0], list, 2, {"concept": target}).batches()


def test_the_share_in_boxes_is_worked_out_by_hand(lab, samples):
    """Over each latent's row, layers averaged first, then latents, then samples."""
    model = lab.model({"trajectory": TrajectoryTarget(layers=(-2, -1))}).eval()
    batch = lab.batch(model, samples)
    share = in_box_share(model.named_targets, 4, model.student.backbone.depth)
    assert share.rows == ("latents",) and share.layers == (-2, -1)
    prepared = stack([share.prepare(item, None) for item in lab.encode(model, samples)])
    with torch.no_grad():
        output = model.observe(batch)
        found = float(share(output, batch.roles, prepared))
        rows = image_rows(torch.stack([output.rows[1], output.rows[2]]).mean(0), batch.roles)[0]
    by_hand = []
    for place, sample in enumerate(samples):
        mask = sample_mask(sample.boxes, [span.tile for span in batch.spans[place]], torch.float64)
        own = rows[place, :, : len(mask)]
        by_hand.append(float(((own * mask).sum(-1) / own.sum(-1)).mean()))
    assert found == pytest.approx(np.mean(by_hand), rel=1e-5) and 0 < found < 1


def test_a_sample_without_boxes_counts_for_nothing(lab, samples):
    model = lab.model({}, student=lab.student())
    share = InBoxShare(("latents",), None, model.student.backbone.depth)
    plain = replace(samples[0], boxes=())
    items = lab.encode(model, [plain, samples[1]])
    model.targets = torch.nn.ModuleDict({IN_BOX: share})
    with torch.no_grad():
        batch = lab.batch(model, [], items=items)
        both = model.eval()(batch, mode="loss")[IN_BOX]
        alone = model(lab.batch(model, [], items=items[1:]), mode="loss")[IN_BOX]
    assert int(share.count(batch.roles, batch.targets[IN_BOX])) == 1
    assert float(both) == pytest.approx(float(alone), rel=1e-6)


def test_nothing_is_left_changed(lab, samples):
    model = lab.model({"concept": ConceptTarget()})
    model.student.eval()  # whatever modes were, they are again
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    class Noisy(Probe):
        def batches(self):
            torch.rand(3), random.random(), np.random.rand()
            return super().batches()

    probe = watched(lab, model, samples)
    noisy = Noisy(probe.dataset, probe.collate, 2, probe.targets)
    noisy.look(model, model, torch.device("cpu"), "fp32")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture(scope="module")
def others(project):
    """Held-out annotations in the project's form, their images beside the others, and traces of them."""
    folder = project.parent
    records = json.loads((folder / "data.json").read_text())
    for record in records:
        record["question_id"] += 1000
    (folder / "held_out.json").write_text(json.dumps(records[:3]))
    words = ["--data.annotations", str(folder / "held_out.json"), "--traces.path", str(folder / "held_out_traces")]
    assert cli("extract", [str(project), *words]) == 0
    return folder / "held_out.json", folder / "held_out_traces"


def test_a_run_with_a_probe_trains_to_the_same_bits(project, trained, others, tmp_path):
    annotations, traces = others
    words = ["--train.probe_every", "2", "--train.probe_annotations", str(annotations)]
    work = ["--work-dir", str(tmp_path / "run")]
    assert cli("train", [str(project), *words, "--train.probe_traces", str(traces), *work]) == 0
    for name in ("model.safetensors", "heads.safetensors", "optimizer.safetensors", "random.safetensors"):
        own, plain = (run / "checkpoints" / "iter_000003" / name for run in (tmp_path / "run", trained))
        assert own.read_bytes() == plain.read_bytes(), name
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines if "probe/ntp" in line] == [2, 3]
    for line in lines[1:]:
        assert line["probe/ntp"] > 0 and 0 < line["probe/in_box"] < 1
        assert line["probe/trajectory"] > 0 and line["probe/concept"] > 0
    assert all(line["tokens_per_second"] > 0 and line["target_grad/trajectory"] > 0 for line in lines)
    assert all(line["grad_norm/new_rows"] > 0 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_log_what_one_does(project, others, tmp_path, strategy):
    """Three held-out samples for two processes; with fsdp2 the weights are shares of them."""
    words = ["--train.probe_every", "2", "--train.probe_annotations", str(others[0]), "--train.log_every", "1"]

    def work(rank):
        given = [*words, "--strategy", strategy, "--work-dir", str(tmp_path / "two")]
        assert cli("train", [str(project), *given]) == 0

    assert launch(work) == [0, 0]
    assert cli("train", [str(project), *words, "--work-dir", str(tmp_path / "one")]) == 0
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert set(a) == set(b)
        same = [name for name in a if name.startswith(("grad_norm", "probe/", "ntp", "loss"))]
        assert {name: b[name] for name in same} == pytest.approx({name: a[name] for name in same}, rel=1e-4)


def test_without_traces_the_targets_that_need_them_are_left_out(project, others, tmp_path, caplog):
    words = ["--train.probe_every", "3", "--train.probe_annotations", str(others[0]), "--train.steps", "3"]
    assert cli("train", [str(project), *words, "--work-dir", str(tmp_path / "run")]) == 0
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {name for name in last if name.startswith("probe/")} == {"probe/ntp", "probe/in_box"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "say which by train.probe_split"),
        (["--train.probe_split", "train"], "6 of 6 probe samples are trained on"),
    ],
)
def test_samples_that_are_trained_on_are_refused(project, tmp_path, capsys, words, told):
    given = ["--train.probe_every", "1", *words, "--work-dir", str(tmp_path / "run")]
    assert cli("train", [str(project), *given]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_kept_batch_of_a_real_model_is_replayed_by_the_command(project, tmp_path, capsys, caplog, monkeypatch):
    """A step's loss is made infinite; with --replay the same command finds it finite and of equal value."""
    from laavit.model import LaViT

    run, forward = tmp_path / "run", LaViT.forward

    def burst(self, batch, mode="loss", **given):
        outputs = forward(self, batch, mode, **given)
        seen.append({name: float(value.detach()) for name, value in outputs.items()})
        factor = float("inf") if self.step == 2 else 1.0
        return {**outputs, "loss": outputs["loss"] * factor}

    seen = []
    monkeypatch.setattr(LaViT, "forward", burst)
    assert cli("train", [str(project), "--work-dir", str(run)]) == 2
    assert "step 2: the loss is inf" in capsys.readouterr().err
    monkeypatch.undo()
    folder = run / "bad_batches" / "step_000002"
    with caplog.at_level("INFO", logger="laavit.engine"):
        assert cli("train", [str(project), "--replay", str(folder)]) == 0
    [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("process 0: ")]
    assert f"ntp {seen[-1]['ntp']:.6g}" in line and f"trajectory {seen[-1]['trajectory']:.6g}" in line
    assert "all finite with these weights" in line
    shutil.rmtree(folder)
    assert cli("train", [str(project), "--replay", str(folder)]) == 2


@pytest.mark.parametrize(("share", "packed"), [(True, False), (False, True)])
def test_a_kept_batch_comes_back_with_all_of_its_parts(lab, samples, tmp_path, share, packed):
    model = lab.model()
    items = lab.encode(model, [*samples, replace(samples[0], id="again")])
    backbone = model.student.backbone
    batch = collate(items, backbone.family, backbone.tokenizer.pad_token_id, share, packed)
    batch.targets = lab.batch(model, samples, items=items).targets
    kept = BadBatch({"step": 0}, [{"batch": batch}], {"torch": torch.get_rng_state()})
    write_bad_batch(tmp_path, 0, kept)
    back = read_bad_batches(tmp_path)[0].batches[0]["batch"]
    assert type(back) is type(batch) and back.samples == batch.samples and back.spans == batch.spans
    assert type(back.shared) is type(batch.shared) and type(back.packing) is type(batch.packing)
    for name, value in model(batch).items():
        assert torch.equal(model(back)[name], value), name
