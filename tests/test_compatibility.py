"""Which parts fit together, told from the recipe alone: each rule's sentence, and every pair of named parts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laavit.backbones.base import Backbone
from laavit.cli import run as cli_run
from laavit.compatibility import RULES, check, gate_fits, latents_are_there, rows_are_not_closed
from laavit.gates import Gate
from laavit.model import LaViT, build_targets, check_layers
from laavit.recipe import Recipe, build_part, cards
from laavit.recipe_parts import Parts
from laavit.registry import DATASETS, TARGETS, UserError
from laavit.structures import Sample
from laavit.students import HFStudent
from laavit.targets import Target
from laavit.traces.shards import Header, write_header

#: what an extraction must have been told for every target to find what it needs
RICH = {"steps": "token", "answer": "gold", "semantics": "full", "logits": 8}
LATENTS: dict[str, Any] = {"none": None} | {name: {"name": name} for name in cards("latents")}
GATES: dict[str, Any] = {name: {"name": name} for name in cards("gates")}
GATES["paths"] |= {"answer": "closed", "question": "cosine"}


def recipe(folder: Path | str, /, **keys: Any) -> Recipe:
    """LaViT on a tiny student; ``keys`` go over it."""
    whole: dict[str, Any] = {
        "student": {"name": "hf", "path": str(folder)},
        "teacher": {"name": "hf", "path": str(folder)},
        "latents": "learned",
        "gate": "cosine",
        "targets": {"t": "trajectory"},
        "traces": {"path": "no/store/yet"},
    }
    return Recipe({**whole, **keys})


def refusal(folder: Path | str, /, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        check(recipe(folder, **keys))
    return str(caught.value)


def store(folder: Path, **content: Any) -> str:
    """A trace store of which there is the header alone."""
    header = {"width": 24, "teacher": "somebody", "settings": {"steps": "none", "semantics": "mean"}, **content}
    folder.mkdir()
    write_header(folder, Header(1, 1, "", header))
    return str(folder)


def test_a_recipe_that_fits_passes(tiny_folder: Path) -> None:
    check(recipe(tiny_folder))
    check(Recipe({}))  # nothing, and nothing wrong with it
    check(recipe(tiny_folder, latents=None, targets={}, gate=None, teacher=None, traces={}))


NO_LATENTS = "it reads the latents, and this recipe has no latents; name some, for example latents='learned', or leave"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"latents": None},
            f"targets.t: {NO_LATENTS} the target out; without latents align the rows 'header' and 'answer'",
        ),
        ({"latents": None, "targets": {"t": "concept"}}, f"targets.t: {NO_LATENTS} the target out"),
        (
            {"latents": None, "targets": {"t": {"name": "trajectory", "rows": ["separator"]}}},
            f"targets.t: {NO_LATENTS} the target out; without latents align the rows 'header' and 'answer'",
        ),
        (
            {"latents": None, "targets": {}, "gate": {"name": "paths", "answer": "cosine", "latent": "closed"}},
            "gate: the path latent->image is the latents', and this recipe has none; leave the path out",
        ),
        (
            {"gate": {"name": "closed", "layers": [2, 3]}},
            "gate.layers: the student has 3 layers, got (2, 3)",
        ),
        (
            {"targets": {"t": {"name": "trajectory", "layers": [-4]}}},
            "targets.t: layers: the student has 3 layers, got [-4]",
        ),
        (
            {"prompt": {"order": "question_first"}, "targets": {"t": "trajectory_question"}},
            "targets.t: with prompt.order 'question_first' the question stands before the image and cannot look at it; "
            "align 'header', 'answer' or the latents",
        ),
        (
            {"prompt": {"order": "question_first"}, "train": {"shared_prefix": True}},
            "train.shared_prefix: with prompt.order 'question_first' samples begin with their questions, and share "
            "nothing; set it to False",
        ),
        (
            {"traces": {"path": "t", "vision_cache": "v"}, "train": {"cache_vision": 8}},
            "train.cache_vision: traces.vision_cache hands all image features over already; set train.cache_vision=0",
        ),
        (
            {"gate": "closed", "targets": {"t": {"name": "trajectory", "rows": ["predicting"]}}},
            "targets.t: it aligns the attention of the rows 'predicting', and the gate keeps them from the image "
            "throughout the run; choose a gate that opens, or other rows",
        ),
        (
            {"traces": {}},
            "targets.t: it needs a teacher's traces; give traces.path (tools/extract.py makes them), or a store of its "
            "own where it takes one",
        ),
        (
            {"traces": {"select": ["correctness", "alignment"]}, "targets": {}},
            "traces.select: it names correctness, alignment, but traces.path is not given",
        ),
        (
            {"data": {"name": "hf", "annotations": "a.parquet"}, "targets": {"t": "region"}},
            "targets.t: it needs boxes, and the data have none (data.columns names no 'boxes')",
        ),
        (
            {"targets": {"t": "concept_info_nce"}, "train": {"batch_size": 4, "accumulate": 4}},
            "targets.t: it compares 2 or more samples of a micro-batch with each other, and train.batch_size 4 / "
            "train.accumulate 4 leaves 1",
        ),
        (
            {"targets": {"t": "trajectory_steps"}},
            "targets.t: steps: each latent follows a step of its own, and these traces hold none; extract with "
            "extract.steps token, word, sentence or group, or take steps: aggregate",
        ),
        (
            {"targets": {"t": "trajectory_layers"}},
            "targets.t: steps: each layer follows a step of its own, and these traces hold none; extract with "
            "extract.steps token, word, sentence or group, or take steps: aggregate",
        ),
        (
            {"targets": {"t": "trajectory_answer"}, "extract": {"steps": "token"}},
            "targets.t: steps: 'answer' compares the gold answer's tokens one by one, which needs traces with "
            "extract.steps token, extract.answer gold, extract.step_rows predicting; these have extract.answer teacher",
        ),
        (
            {"targets": {"t": "concept_ordered"}},
            "targets.t: match: 'order' leads each latent to a row of its own, and these traces hold pooled semantics "
            "(gaze_top_k); extract with extract.semantics top_k_rows or full",
        ),
        (
            {
                "targets": {"t": "concept_hungarian"},
                "latents": {"name": "learned", "count": 9},
                "extract": {"semantics": "full"},
            },
            "targets.t: match: 9 latents need as many rows, and top_k leaves 8 of them (targets: 8, extract: 8)",
        ),
        (
            {"targets": {"t": "logits_kd"}},
            "targets.t: these traces hold no answer logits; extract with extract.logits (for example 32)",
        ),
        (
            {"teacher": "dinov2_small", "targets": {}, "extract": {"logits": 8}},
            "extract.logits: a static encoder predicts no words, and has no logits along an answer",
        ),
        (
            {"extract": {"layers": [7]}},
            "extract.layers: got 7, and the teacher has 3 decoder layers (-3 to 2)",
        ),
        (
            {"extract": {"semantics_layer": 3}},
            "extract.semantics_layer: got 3; allowed: -3 to 2 (-1 is the last)",
        ),
        (
            {"extract": {"heads": [4]}},
            "extract.heads: got 4, and the teacher has 4 heads a layer (-4 to 3)",
        ),
        (
            {"filters": {"correctness": "correctness"}, "extract": {"answer": "gold"}},
            "filters.correctness: the traces carry the gold answers (extract.answer gold), which cannot be wrong",
        ),
        (
            {"filters": {"difficulty": "difficulty"}},
            "filters.difficulty: the store holds no answers given without the image: extract with extract.blind "
            "(teacher, or a text-only model), or give the difficulty filter's 'answers', a JSON file",
        ),
        (
            {"teacher": "dinov2_small", "filters": {"c": "correctness"}},
            "filters.c: the traces are a static encoder's, which gives no answer that could be wrong",
        ),
        (
            {"teacher": "dinov2_small", "extract": {"steps": "token"}},
            "extract.steps: 'token' needs an answer, and a static encoder gives none",
        ),
    ],
)
def test_what_does_not_fit_is_said(tiny_folder: Path, keys: dict[str, Any], sentence: str) -> None:
    assert refusal(tiny_folder, **keys) == sentence


def test_a_static_target_wants_a_static_store(tiny_folder: Path, tmp_path: Path) -> None:
    keys = {"targets": {"t": {"name": "static_embeddings", "store": store(tmp_path / "gaze")}}}
    said = refusal(tiny_folder, **keys)
    assert said.startswith("targets.t: static: these traces were made by 'somebody', which is no static encoder")
    keys["targets"]["t"]["store"] = store(tmp_path / "dino", static="cls")
    check(recipe(tiny_folder, **keys))
    check(recipe(tiny_folder, targets={"t": "static_embeddings"}, teacher="dinov2_small"))
    assert "which is no static encoder" in refusal(tiny_folder, targets={"t": "static_embeddings"})


def test_the_store_that_is_there_counts_and_not_what_an_extraction_would_write(
    tiny_folder: Path, tmp_path: Path
) -> None:
    steps = {"targets": {"t": "trajectory_steps"}, "traces": {"path": str(tmp_path / "s")}}
    assert "these traces hold none" in refusal(tiny_folder, **steps)
    store(tmp_path / "s", settings={"steps": "word"})
    check(recipe(tiny_folder, **steps))
    rich = {"extract": {"steps": "word"}, "traces": {"path": store(tmp_path / "plain")}}
    assert "these traces hold none" in refusal(tiny_folder, targets=steps["targets"], **rich)


def test_what_is_not_known_is_not_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """A model that is not on this machine, a store that another recipe makes: both are looked at when they are read."""
    check(recipe("Some/VLM-not-here", teacher=None, targets={"t": {"name": "trajectory", "layers": [99]}}))
    check(recipe(tiny_folder, teacher=None, targets={"t": "trajectory_steps"}))
    check(recipe(tiny_folder, targets={"t": {"name": "static_embeddings", "store": str(tmp_path / "later")}}))


def test_a_family_that_laavit_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    said = refusal(tmp_path)
    assert said.startswith("student.path: the model is of type 'llama', and laavit does not know where it keeps")


def test_flex_attention_does_not_train_on_the_cpu(tiny_folder: Path) -> None:
    student = {"name": "hf", "path": str(tiny_folder), "attention": "laavit_flex"}
    said = refusal(tiny_folder, student=student, train={"device": "cpu"})
    assert (
        said == "student.attention: 'laavit_flex' trains on a GPU alone, and train.device is 'cpu'; take 'laavit' there"
    )
    check(recipe(tiny_folder, student=student))  # where it will train is not known yet
    check(recipe(tiny_folder, student=student, latents="feedback"))  # several passes are block masks as well
    check(recipe(tiny_folder, student=student, train={"shared_prefix": True}))


def test_adapters_learn_in_no_frozen_part(tiny_folder: Path) -> None:
    student = {"name": "hf", "path": str(tiny_folder), "lora": {"rank": 4}}
    check(recipe(tiny_folder, student=student))
    said = (
        "student.freeze: 'decoder' does not learn, and student.lora puts adapters that learn into it; leave it out of "
        "student.freeze (where there are adapters the weights themselves do not learn)"
    )
    assert refusal(tiny_folder, student={**student, "freeze": ["vision", "decoder"]}) == said
    student["lora"] = {"targets": ["decoder", "vision"]}
    assert "'vision' does not learn" in refusal(tiny_folder, student=student)
    student["lora"] = {"targets": "tower"}
    assert "'tower' does not learn" in refusal(tiny_folder, student=student)
    student["lora"] = {"targets": ["q_proj"]}
    assert "'decoder' does not learn" in refusal(tiny_folder, student={**student, "freeze": ["decoder"]})
    check(recipe(tiny_folder, student={**student, "freeze": []}))


def test_sixteen_bits_want_autocast(tiny_folder: Path) -> None:
    student: dict[str, Any] = {"name": "hf", "path": str(tiny_folder), "dtype": "bfloat16"}
    bf16 = {"train": {"precision": "bf16"}}
    assert refusal(tiny_folder, student=student, **bf16).startswith("student.dtype: bfloat16 weights cannot learn")
    student["lora"] = {"rank": 2}
    said = "student.dtype: bfloat16 weights beside adapters and heads in float32 need autocast: train.precision='bf16'"
    assert refusal(tiny_folder, student=student) == said
    check(recipe(tiny_folder, student=student, **bf16))


def test_a_gate_of_one_s_own_keeps_to_its_range(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laavit.gates.CosineGate.gamma", lambda self, step: 1.0 + step)
    assert refusal(tiny_folder, train={"steps": 2}) == "gate: CosineGate.gamma(1) is 2.0; a gate's gamma lies in [0, 1]"


def test_a_gate_that_is_still_closing_at_the_end_is_warned_of(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check(recipe(tiny_folder, gate={"name": "cosine", "warmup": 4}, train={"steps": 4}))
    assert not caplog.records
    check(recipe(tiny_folder, gate={"name": "cosine", "warmup": 8}, train={"steps": 4}))
    assert "gamma is still 0.5 when the run ends" in caplog.text
    caplog.clear()
    check(recipe(tiny_folder, gate="closed", train={"steps": 4}))
    assert not caplog.records


def test_cached_features_are_of_a_tower_that_does_not_learn(tiny_folder: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"traces": {"path": "no/store/yet", "vision_cache": str(tmp_path)}}
    check(recipe(tiny_folder, **keys))
    keys["student"] = {"name": "hf", "path": str(tiny_folder), "freeze": ["decoder"]}
    said = refusal(tiny_folder, **keys)
    assert said.startswith("traces.vision_cache: cached image features would be out of date after a step: visual.")
    assert said.endswith(" learns, freeze it (student.freeze)")
    assert not list(tmp_path.iterdir())
    keys["student"] = {"name": "hf", "path": str(tiny_folder), "freeze": [], "lora": {"targets": ["decoder", "tower"]}}
    assert "student.lora changes what makes them" in refusal(tiny_folder, **keys)


def test_a_family_that_takes_no_cached_features(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laavit.backbones.families.QwenVL.takes_features", False)
    said = refusal(tiny_folder, traces={"path": "no/store/yet", "vision_cache": "x"})
    assert said == "traces.vision_cache: the family QwenVL takes no cached image features"


def test_a_question_first_gate_that_closes_nearly_nothing_is_mentioned(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = {"name": "cosine", "paths": ["question->image"]}
    check(recipe(tiny_folder, gate=gate, prompt={"order": "question_first"}))
    assert "the path question->image closes the chat markup after the image, and no more" in caplog.text
    caplog.clear()
    check(recipe(tiny_folder, gate=gate))
    check(recipe(tiny_folder, gate="livr", prompt={"order": "question_first"}))
    assert not caplog.text


@TARGETS.register_module(name="LonelyTarget")
class Lonely(Target):
    """A user's own: whatever it says of itself is heeded."""

    needs_latents, needs_trace, min_batch = True, False, 3


def test_a_target_of_one_s_own_takes_part(tiny_folder: Path) -> None:
    own = {"targets": {"mine": {"type": "LonelyTarget"}}, "teacher": None, "traces": {}}
    check(recipe(tiny_folder, **own))
    assert refusal(tiny_folder, **own, latents=None) == f"targets.mine: {NO_LATENTS} the target out"
    assert "compares 3 or more samples" in refusal(tiny_folder, **own, train={"batch_size": 2})


def test_every_command_refuses_before_weights_are_read(
    own_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(Backbone, "load", load)
    for command in ("train", "extract", "plan"):
        for words in ([], ["--print-config"]):
            assert cli_run(command, [str(own_project), "--latents", "null", *words]) == 2
            assert f"error: targets.concept: {NO_LATENTS} the target out" in capsys.readouterr().err
    assert cli_run("train", [str(own_project), "--print-config"]) == 0
    away = json.dumps({"concept": {"name": "concept", "store": "no/such/store"}})  # another recipe may be making it
    assert cli_run("train", [str(own_project), "--targets", away, "--print-config"]) == 0
    assert cli_run("train", [str(own_project), "--targets", away]) == 2
    assert "error: targets.concept: there is no trace store at 'no/such/store'" in capsys.readouterr().err


def test_the_readers_without_boxes_say_so() -> None:
    unknown = {name for name, cls in DATASETS.module_dict.items() if not hasattr(cls, "has_boxes")}
    assert not unknown
    columns = DATASETS.find("Columns")
    assert columns.has_boxes({"columns": {"boxes": "bbox"}}) and not columns.has_boxes({"columns": None})


@pytest.fixture(scope="module")
def students(tiny_folder: Path) -> dict[str, HFStudent]:
    """A tiny student for each kind of latents, set up as ``build_model`` does it."""
    found = {}
    for name, spec in LATENTS.items():
        student = HFStudent(str(tiny_folder))
        latents = build_part("latents", "latents", spec) if spec else None
        student.setup(latents, torch.Generator().manual_seed(0))
        found[name] = student
    return found


@pytest.fixture(scope="module")
def pairs(tiny_folder: Path) -> dict[str, dict[str, Parts]]:
    """Every named target beside every kind of latents; rules are asked with a gate of choice."""
    found: dict[str, dict[str, Parts]] = {}
    for latents, spec in LATENTS.items():
        named = {name: {"name": name} for name in cards("targets")}
        whole = recipe(tiny_folder, latents=spec, targets=named, gate=None, extract=RICH)
        found[latents] = {name: Parts.of(alone(whole, name)) for name in named}
    return found


def alone(whole: Recipe, target: str) -> Recipe:
    """The recipe with one of its targets."""
    one = copy.copy(whole)
    one.config = {**whole.config, "targets": {"t": whole.config["targets"][target]}}
    return one


def reason(parts: Parts, rules: Sequence[Callable[[Parts], None]] = RULES) -> str | None:
    try:
        for rule in rules:
            rule(parts)
    except UserError as error:
        return str(error)
    return None


def header_of(parts: Parts, student: HFStudent) -> Mapping[str, Any]:
    """What the teacher's store would say."""
    own = {"static": "cls"} if parts.recipe.config["teacher"]["type"] == "TimmEncoder" else {}
    return {"width": student.backbone.width, "teacher": "t", "settings": parts.extract.card(), **own}


@pytest.mark.parametrize("latents", LATENTS)
def test_what_passes_is_built_and_what_is_refused_cannot_be(
    pairs: dict[str, dict[str, Parts]], students: dict[str, HFStudent], latents: str
) -> None:
    """Every kind of latents with every target: an early refusal and a late one always go together."""
    student = students[latents]
    for target, parts in pairs[latents].items():
        refused, late = reason(parts), None
        try:
            build_targets(parts.recipe, student, header_of(parts, student))
        except UserError as error:
            late = str(error)
        assert (refused is None) == (late is None), f"{latents}, {target}: {refused}; {late}"
        assert refused is None or refused.startswith("targets.t: ")


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_with_every_target(
    pairs: dict[str, dict[str, Parts]], students: dict[str, HFStudent], gate: str
) -> None:
    """A gate is refused beside a target that it leaves nothing to learn from, and beside no other."""
    built: Gate = build_part("gate", "gates", GATES[gate])
    built.set_run(1000)
    for latents, beside in pairs.items():
        check_layers(built, students[latents])
        for target, parts in beside.items():
            gated = replace(parts, gate=built)
            gated.__dict__["student"] = parts.student  # read once
            refused = reason(gated, (gate_fits, latents_are_there, rows_are_not_closed))
            own = reason(parts, (latents_are_there,))
            shut = gate in ("closed", "paths") and target in (
                "trajectory_no_latents",
                "trajectory_answer",
                "box_no_latents",
                "box_final_no_latents",
                "box_layers_no_latents",
            )
            if own is None and shut and (latents != "none" or target != "trajectory_answer"):
                assert refused is not None and "throughout the run" in refused, f"{latents}, {target}"
            else:
                assert refused == own, f"{latents}, {target}"


def test_closed_rows_have_nothing_to_learn_from(lab: Any, samples: list[Sample]) -> None:
    """Why they are refused: the loss of rows that see no image is a constant."""
    for rows, closed in ((("answer",), True), (("predicting",), True), (("header", "answer"), False)):
        target = build_part("t", "targets", {"name": "trajectory", "rows": rows})
        model: LaViT = lab.model({"t": target}, gate=build_part("gate", "gates", "closed"))
        batch = lab.batch(model, samples)
        output = model.observe(batch)
        loss = target(output, batch.roles, batch.targets["t"])
        loss.backward()
        moved = any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        assert moved != closed, rows


def test_a_budget_of_tokens_leaves_the_number_of_samples_open(tiny_folder: Path) -> None:
    targets = {"t": {"name": "concept", "loss": "info_nce"}}
    said = refusal(tiny_folder, targets=targets, train={"tokens": 4096})
    assert said == "targets.t: it compares a micro-batch's samples; train.tokens leaves open how many"
    check(recipe(tiny_folder, targets=targets))


def test_processes_that_share_weights_read_as_many_passes(tiny_folder: Path) -> None:
    varying: dict[str, Any] = {"latents": {"name": "feedback", "count": (2, 4)}}
    said = refusal(tiny_folder, strategy="fsdp2", **varying)
    assert said.startswith("latents.count: fed-back latents are read one pass each, and with strategy 'fsdp2'")
    check(recipe(tiny_folder, strategy="ddp", **varying))
    check(recipe(tiny_folder, strategy="fsdp2", latents="feedback"))
