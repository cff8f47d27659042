"""The doors: overrides, printed recipes, help, and every mistake as exit code 2 with one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from laavit.cli import main, run
from laavit.traces.store import TraceStore

Capture = pytest.CaptureFixture[str]


def refused(command: str, words: Sequence[object], capsys: Capture) -> str:
    """The one line with which a command refuses; nothing else is written to the console."""
    capsys.readouterr()
    assert run(command, [str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
    assert "Traceback" not in err + out and not out
    return lines[0].removeprefix("error: ")


def printed(words: Sequence[object], capsys: Capture) -> dict:
    capsys.readouterr()
    assert run("train", [*map(str, words), "--print-config"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--gate", "hrad"], ["gate: ", "'hrad'", "allowed: closed, cosine", "did you mean 'hard'"]),
        (["--gate.warmpu", "3"], ["gate.warmpu", "allowed: epsilon, layers, paths, warmup", "did you mean 'warmup'"]),
        (["--gate.warmup", "soon"], ["gate", "warmup", "soon", "int"]),
        (["--gate.layers", "[9]"], ["gate.layers", "3 layers", "9"]),
        (["--gate", "{name: paths, answer: cosin}"], ["gate: ", "no gate is called 'cosin'", "did you mean 'cosine'"]),
        (["--optim.lr", "1"], ["optim: no such key", "allowed: ", "train"]),
        (["--latents.count", "0"], ["latents.count", "at least 1, got 0"]),
        (["--targets.concept.anchor", "lats"], ["targets.concept", "anchor", "lats", "did you mean 'last'"]),
        (["--targets.trajectory.layers", "[9]"], ["targets.trajectory", "3 layers", "9"]),
        (["--train.steps", "0"], ["train.steps: got 0; allowed: 1 or more"]),
        (["--train.lr", ".nan"], ["train.lr: got nan"]),
        (["--train.device", "gpu"], ["train.device", "gpu"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--gate.warmup"], ["--gate.warmup needs a value"]),
        (["hard"], ["'hard' is no override"]),
        (["--student.path", "/nowhere"], ["no vision-language model can be read from '/nowhere'"]),
        (["--student.freeze", "[vison]"], ["freeze: 'vison' fits no parameter", "vision"]),
        (["--data.annotations", "/absent.json"], ["'/absent.json' does not exist"]),
        (["--data.root", "/absent"], ["'/absent' does not exist"]),
        (["--data.split", "trian"], ["no split 'trian'", "did you mean 'train'"]),
        (["--data.limit", "0"], ["limit", "got 0"]),
        (["--data", "null"], ["data: this recipe (cfg) has none"]),
        (["--student", "null"], ["student: this recipe (cfg) has none"]),
        (["--latents", "null"], ["targets.concept", "no latents"]),
        (["--traces.path", "null"], ["need", "traces.path"]),
        (["--traces.path", "/absent"], ["no trace store at '/absent'"]),
        (["--traces.select", "[correctness]"], ["no verdicts of a filter 'correctness'", "allowed: alignment"]),
        (["--traces.vision_cache", "x", "--student.freeze", "[]"], ["traces.vision_cache", "student.freeze"]),
        (["--teacher.path", "/other"], ["does not fit the recipe", "teacher", "/other"]),
        (["--prompt.order", "image"], ["prompt.order: got 'image'"]),
    ],
)
def test_a_mistake_is_one_line_and_no_checkpoint(
    project: Path, tmp_path: Path, capsys: Capture, words: list[str], parts: list[str]
) -> None:
    line = refused("train", [project, "--work-dir", tmp_path / "run", *words], capsys)
    for part in parts:
        assert part in line, line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_commands_refuse_in_one_line(project: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "no recipe at" in refused("train", [tmp_path / "absent.py"], capsys)
    assert "needs a recipe" in refused("train", [], capsys)
    assert "no run folder" in refused("export", [tmp_path], capsys)
    assert "needs" in refused("extract", [project, "--traces.path"], capsys)
    assert "traces.path" in refused("extract", [project, "--traces.path", "null"], capsys)
    assert "begun with other settings" in refused("extract", [project, "--extract.top_k", "3"], capsys)
    assert "did you mean 'cosine'" in refused("show", ["cosien"], capsys)
    assert "--help" in refused("eval", [tmp_path], capsys)  # --tasks is missing
    capsys.readouterr()
    assert main(["trian"]) == 2 and "did you mean 'train'" in capsys.readouterr().err


def test_what_a_disk_does_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    line = refused("report", ["--table", "table3", "--out", tmp_path / "file" / "t.md"], capsys)
    assert line.startswith(f"'{tmp_path / 'file'}") and "cannot be read or written: " in line


@pytest.mark.parametrize(("command", "said"), [("train", "with --resume goes on"), ("sweep", "same command goes on")])
def test_a_stop_says_how_to_go_on(command: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def stopped(argv: Sequence[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"laavit.commands.{command}.main", stopped)
    assert run(command, []) == 130 and said in capsys.readouterr().err


def test_overrides_reach_the_resolved_recipe(project: Path, capsys: Capture) -> None:
    plain = printed([project], capsys)
    assert plain["gate"]["type"] == "CosineGate" and plain["latents"]["count"] == 4
    words = ["--gate", "hard", "--latents.count", "6", "--targets.trajectory", "null", "--seed", "3"]
    changed = printed([project, *words], capsys)
    assert changed["gate"]["type"] == "StepGate" and changed["latents"]["count"] == 6 and changed["seed"] == 3
    assert list(changed["targets"]) == ["concept"] and plain["train"] == changed["train"]
    mixed = printed([project, "--resume", "--gate=hard", "--work-dir", "x", "--seed", "3"], capsys)
    assert mixed["gate"]["type"] == "StepGate" and mixed["seed"] == 3
    first = printed(["--work-dir", "x", project, "--seed", "3"], capsys)
    assert first["seed"] == 3


def test_help_lists_the_recipes_keys(project: Path, capsys: Capture) -> None:
    assert run("train", [str(project), "--help"]) == 0
    text = capsys.readouterr().out
    for key in ("--gate.warmup", "--latents.count", "--targets.concept.weight", "--train.lr", "--seed", "--work-dir"):
        assert key in text, key
    assert run("train", ["--help"]) == 0
    text = capsys.readouterr().out
    assert "--resume" in text and text.startswith("usage: laavit train ")
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "extract", "eval", "export", "report", "list", "show"))


def test_list_and_show(capsys: Capture) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("gates", "cosine", "trajectory", "correctness", "arXiv 2601.10129"))
    assert main(["list", "gates"]) == 0
    text = capsys.readouterr().out
    assert "hard" in text and "trajectory" not in text
    assert main(["show", "gates/cosine"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("CosineGate", "warmup: 400", "source:", "Eq. 5"))
    assert main(["show", "qwen2_5_vl_3b"]) == 0
    assert {"students/qwen2_5_vl_3b", "teachers/qwen2_5_vl_3b"} <= set(
        capsys.readouterr().out.replace(":", " ").split()
    )


def test_extraction_and_training_leave_what_they_promise(project: Path, trained: Path) -> None:
    store = TraceStore(project.parent / "traces")
    assert len(store) == 6 and set(store.verdicts()) == {"alignment"}
    assert store.header["data"]["annotations_sha256"]
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert {"loss", "ntp", "concept", "trajectory", "gamma", "lr"} <= set(lines[0])
    assert lines[0]["gamma"] == pytest.approx(1e-6) and lines[-1]["gamma"] == 1.0
    names = {path.name for path in (trained / "checkpoints" / "iter_000003").iterdir()}
    assert {"model.safetensors", "heads.safetensors", "optimizer.safetensors", "state.json"} <= names
    environment = json.loads((trained / "environment.json").read_text())
    assert store.digest() in json.dumps(environment)


def test_a_gate_of_ones_own_trains_and_exports(project: Path, tmp_path: Path) -> None:
    (tmp_path / "my_gate.py").write_text(
        "from laavit.gates import Gate\nfrom laavit.registry import GATES\n\n\n"
        "@GATES.register_module()\nclass CliTestGate(Gate):\n    def __init__(self, half: int = 10) -> None:\n"
        "        super().__init__()\n        self.half = half\n\n"
        "    def gamma(self, step: int) -> float:\n        return 1 - 0.5 ** (step / self.half)\n"
    )
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        f"_base_ = [{str(project)!r}]\ncustom_imports = ['my_gate.py']\n"
        "gate = dict(_delete_=True, type='CliTestGate', half=1)\n"
    )
    assert run("train", [str(recipe), "--work-dir", str(tmp_path / "run"), "--train.log_every", "1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["gamma"] for line in lines] == [0.0, 0.5, 0.75]
    assert run("export", [str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_naive_sft_trains_without_traces(own_project: Path) -> None:
    run_folder = own_project.parent / "naive"
    words = ["--targets", "null", "--latents", "null", "--gate", "null", "--work-dir", str(run_folder)]
    assert run("train", [str(own_project), *words]) == 0
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert "concept" not in lines[0] and lines[0]["loss"] == pytest.approx(lines[0]["ntp"])


def test_gradient_checkpointing_trains_to_the_same_weights(project: Path, tmp_path: Path) -> None:
    logs, weights = [], []
    for setting in ("false", "true"):
        folder = tmp_path / setting
        words = ["--train.gradient_checkpointing", setting, "--train.steps", "2", "--train.log_every", "1"]
        assert run("train", [str(project), "--work-dir", str(folder), *words]) == 0
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        logs.append([{k: line[k] for k in ("loss", "ntp", "concept", "trajectory")} for line in lines])
        place = folder / "checkpoints" / "iter_000002"
        weights.append({**load_file(place / "model.safetensors"), **load_file(place / "heads.safetensors")})
    assert logs[0] == logs[1] and len(logs[0]) == 2
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- bad data ---------------------------------------------------------------------------------------------------------


def test_a_missing_trace_stops_before_step_1(own_project: Path, capsys: Capture) -> None:
    assert run("extract", [str(own_project), "--data.limit", "4"]) == 0
    run_folder = own_project.parent / "run"
    for words in ([], ["--traces.select", "[alignment]"]):
        line = refused("train", [own_project, "--work-dir", run_folder, *words], capsys)
        assert "lacks the traces of 2 samples: '20', '21'" in line
    assert not (run_folder / "checkpoints").exists()


def test_the_store_of_another_data_set_is_refused(project: Path, own_project: Path, capsys: Capture) -> None:
    records = json.loads((own_project.parent / "data.json").read_text())
    records[0]["conversations"][1]["value"] = "<answer> red </answer>"
    (own_project.parent / "data.json").write_text(json.dumps(records))
    words = ["--traces.path", project.parent / "traces", "--work-dir", own_project.parent / "run"]
    line = refused("train", [own_project, *words], capsys)
    assert "does not fit the recipe" in line and "annotations_sha256" in line
    line = refused("extract", [own_project, "--traces.path", project.parent / "traces"], capsys)
    assert "begun with other settings" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_reaches_the_user_as_one_sentence(own_project: Path, capsys: Capture, workers: int) -> None:
    assert run("extract", [str(own_project)]) == 0
    (own_project.parent / "images" / "1.png").write_bytes(b"no image at all")
    again = own_project.parent / "again"
    assert run("extract", [str(own_project), "--traces.path", str(again)]) == 0  # the others' traces are there
    aside = TraceStore(again).quarantined
    assert list(aside) == ["10", "11"] and all("1.png' cannot be read" in reason for reason in aside.values())
    words = ["--work-dir", own_project.parent / "run", "--train.workers", workers]
    assert "1.png' cannot be read" in refused("train", [own_project, *words], capsys)


def test_a_missing_image_stops_training_before_anything_is_loaded(own_project: Path, capsys: Capture) -> None:
    (own_project.parent / "images" / "2.png").unlink()
    words = ["--student.path", "/nowhere", "--targets", "null"]
    assert "no image '2.png'" in refused("train", [own_project, *words], capsys)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"image": ["../cfg.py"]}, "image"),
        ({"bboxes": [[0.1, 0.2, float("nan"), 0.9]]}, "box"),
        ({"question_id": 10}, "id"),
        ({"conversations": []}, "conversations"),
    ],
)
def test_a_bad_record_is_left_out_and_said(
    own_project: Path, caplog: pytest.LogCaptureFixture, change: dict, kind: str
) -> None:
    records = json.loads((own_project.parent / "data.json").read_text())
    records[0].update(change)
    (own_project.parent / "data.json").write_text(json.dumps(records))
    words = [str(own_project), "--targets", "null", "--train.steps", "1", "--train.batch_size", "1"]
    assert run("train", [*words, "--work-dir", str(own_project.parent / "run")]) == 0
    assert f"1 records are in quarantine ({kind} 1)" in caplog.text
    assert "5 samples, " in caplog.text


def test_an_image_outside_the_root_stops_training(own_project: Path, capsys: Capture) -> None:
    (own_project.parent / "images" / "link.png").symlink_to("/etc/passwd")
    records = json.loads((own_project.parent / "data.json").read_text())
    records[0]["image"] = ["link.png"]
    (own_project.parent / "data.json").write_text(json.dumps(records))
    assert "leads out of the image folder" in refused("train", [own_project, "--targets", "null"], capsys)


def test_weights_that_are_not_finite_stop_both(
    project: Path, own_project: Path, tiny_folder: Path, capsys: Capture
) -> None:
    from safetensors.numpy import save_file

    spoilt = own_project.parent / "spoilt"
    shutil.copytree(tiny_folder, spoilt)
    weights = load_file(spoilt / "model.safetensors")
    name = next(key for key in weights if "layers.1.mlp.down_proj" in key and "visual" not in key)
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    line = refused("extract", [own_project, "--teacher.path", spoilt], capsys)
    assert "finite" in line and "the trace of sample '" in line
    words = ["--student.path", spoilt, "--work-dir", own_project.parent / "run"]
    line = refused("train", [project, *words], capsys)
    assert "step 0: the loss is nan" in line and "samples: " in line
    assert not list((own_project.parent / "run" / "checkpoints").glob("iter_*"))


def test_a_run_is_not_overwritten_and_resume_checks_the_data(
    project: Path, trained: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert "add --resume" in refused("train", [project, "--work-dir", trained], capsys)
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    line = refused("train", [project, "--work-dir", copy, "--resume", "--data.limit", "4"], capsys)
    assert "data set differs" in line
    line = refused("train", [project, "--work-dir", copy, "--resume", "--seed", "5"], capsys)
    assert "train.seed: got 5" in line
    assert run("train", [str(project), "--work-dir", str(copy), "--resume"]) == 0  # nothing left to do


def test_an_image_of_another_shape_than_the_trace(own_project: Path, capsys: Capture) -> None:
    """Resampling takes any grid; a sample with another number of images is refused in one sentence."""
    assert run("extract", [str(own_project)]) == 0
    Image.new("RGB", (96, 16)).save(own_project.parent / "images" / "0.png")
    assert run("train", [str(own_project), "--work-dir", str(own_project.parent / "run")]) == 0
