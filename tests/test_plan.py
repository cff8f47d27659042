"""laavit plan: published counts, tiny folders, and what users get wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from families import FAMILY_NAMES, tiny
from families.parts import spread, tokenizer
from planned import LOAD, memory_of, plan_of, recipe_of, step_of
from transformers import AutoConfig, AutoProcessor, Qwen2Config, Qwen2ForCausalLM

from laavit.backbones import Backbone, PromptSettings
from laavit.cli import main
from laavit.commands.plan import memory_size
from laavit.engine import plan as planning
from laavit.engine.examples import example_trace
from laavit.engine.planning import models
from laavit.engine.planning.passes import extraction_pass, training_step
from laavit.engine.shapes import blueprint, bytes_of, fake_mode, parameters_by_part, published_names, shaped_backbone
from laavit.model import build_model
from laavit.recipe import load_recipe
from laavit.registry import UserError
from laavit.structures import Sample, Tile
from laavit.traces.schema import encode
from laavit.traces.store import TraceWriter


@pytest.mark.parametrize("name", sorted(published_names()))
def test_published_configurations_give_the_published_counts(name: str) -> None:
    stored = json.loads(published_names()[name].read_text(encoding="utf-8"))
    model = shaped_backbone(blueprint(name), "bfloat16", "laavit", fake_mode()).model
    assert sum(p.numel() for p in model.parameters()) == stored["parameters"]
    assert bytes_of(model.parameters()) == 2 * stored["parameters"]


def test_the_paper_s_model_fits_its_parts() -> None:
    """Real shapes of 3B under a 32B teacher: latents, heads, gate and every loss; gradients where they should be."""
    recipe = load_recipe("zoo:lavit/lavit.py")
    shaped = planning.shape_models(recipe)
    counts = parameters_by_part(shaped.model)
    assert counts["target heads"]["all"] == 2048 * 2048 + 2048 + 2048 * 5120 + 5120  # phi of Eq. 6 reads D, gives D_t
    assert counts["vision"] == {"all": 668_684_288, "trainable": 0}
    assert (
        "head" not in counts and counts["embeddings"]["all"] == 151_936 * 2048
    )  # tied, and the latents need no new row
    load = planning.Load()
    passes = planning.passes_of(shaped, 1, load)
    (item,) = passes.items
    assert item.spans[0].tile.cells == 1280 and len(item.input_ids) == 1280 + 128 + 16 + 5
    step = training_step(shaped, passes.items, passes.vision(False).features, load)
    assert step.losses == ("ntp", "concept", "trajectory") and step.unreached == ()
    assert step.gradients == 4 * sum(part["trainable"] for part in counts.values())


def test_a_tiny_folder_is_planned_as_it_is_built(tiny_folder: Path) -> None:
    recipe, found = recipe_of(tiny_folder), plan_of(tiny_folder)
    real = build_model(recipe, {"width": 32, "depth": 3})
    assert found["total"]["all"] == sum(p.numel() for p in real.parameters())
    assert found["total"]["trainable"] == sum(p.numel() for _, p in real.trainable_parameters())
    assert found["latents"] == {"count": 3, "embedding_rows": real.student.model.get_input_embeddings().weight.shape[0]}
    assert found["gate"]["gamma_first"] == 1e-6 and found["gate"]["open_from"] == 4
    shaped = planning.shape_models(recipe)
    plain, checkpointed, again = (step_of(shaped, 4, choice).activations for choice in (False, True, False))
    assert memory_of(found)["activations"] >= plain > checkpointed  # the vision tower's pass may be higher
    assert again == plain
    assert found["extraction"]["trace"] == 4 * 64 + 4 * 32  # 128 x 128 px, patch 8, merge 2; 32 wide


def test_adapters_are_planned_as_they_are_built(tiny_folder: Path) -> None:
    component = {"name": "hf", "path": str(tiny_folder), "lora": {"rank": 4}}
    recipe = recipe_of(tiny_folder, student=component)
    found = planning.make_plan(recipe, LOAD)
    real = build_model(recipe, {"width": 32, "depth": 3})
    assert found["total"]["all"] == sum(p.numel() for p in real.parameters())
    learned = [p for _, p in real.trainable_parameters()]
    assert found["total"]["trainable"] == sum(p.numel() for p in learned)
    assert found["parameters"]["adapters"]["trainable"] == sum(p.numel() for p in learned if p.ndim > 1) - 2 * 32 * 32
    assert found["step"]["without_gradient"] == []
    whole, own = memory_of(plan_of(tiny_folder)), memory_of(found)
    assert own["optimizer"] == 2 * bytes_of(learned) < whole["optimizer"] / 2
    assert own["weights"] > whole["weights"]
    assert found["run"]["checkpoint"] == 3 * bytes_of(learned)  # adapters alone, and what AdamW keeps of them


#: one that cuts images into tiles; the others are slow in their number alone
FAMILIES = ("llava_onevision",)


@pytest.mark.parametrize(
    "family",
    [
        name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILY_NAMES
        if name not in ("qwen2_5_vl", "qwen3_vl_moe")
    ],
)
def test_every_family_is_planned_as_it_is_built(family: str, tmp_path: Path) -> None:
    recipe = recipe_of(tiny(family, tmp_path), train={"steps": 10, "batch_size": 2})
    found = planning.make_plan(recipe, planning.Load(text=40, answer=4))
    real = build_model(recipe, {"width": 32, "depth": 3})
    assert found["total"]["all"] == sum(p.numel() for p in real.parameters())
    assert found["step"]["losses"] == ["ntp", "concept", "trajectory"] and found["step"]["without_gradient"] == []
    assert found["step"]["sequence"] > found["step"]["image_tokens"] >= 4
    own = memory_of(found)
    assert own["gradients"] == bytes_of(p for p in real.parameters() if p.requires_grad)
    assert own["activations"] > 0 and found["extraction"]["trace"] > 0


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_what_cannot_be_planned_is_refused_before_anything_is_built(
    part: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "shaped_backbone", lambda *_: pytest.fail("it was built"))
    experts, bare = tiny("qwen3_vl_moe", tmp_path / "moe"), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny("smolvlm", tmp_path / "smolvlm") / "config.json", bare)
    for folder, why in ((experts, "mixture of experts"), (bare, "a 'smolvlm' cuts images up .* put the processor's")):
        with pytest.raises(UserError, match=why):
            planning.make_plan(recipe_of(tiny_folder, **{part: {"name": "hf", "path": str(folder)}}), LOAD)
    with pytest.raises(UserError, match="teacher: plan works out HFTeacher alone, got TimmEncoder"):
        planning.make_plan(recipe_of(tiny_folder, teacher="dinov2_small"), LOAD)


def test_an_image_of_a_given_size(tiny_folder: Path, tmp_path: Path) -> None:
    """48 x 32 pixels: 3 x 2 tokens where the area decides; a processor's tiles where it does."""
    small = planning.Load(text=24, answer=4, image=(48, 32))
    assert planning.shape_models(recipe_of(tiny_folder)).example("student", small).spans[0].tile == Tile(2, 3)
    least = {"name": "hf", "path": str(tiny_folder), "min_pixels": 96 * 64}
    bounded = planning.shape_models(recipe_of(tiny_folder, student=least))
    assert bounded.example("student", small).spans[0].tile == Tile(4, 6)  # scaled up, as training does
    with pytest.raises(UserError, match=r"--image: got 4000x10: .*aspect ratio"):
        bounded.example("student", replace(small, image=(4000, 10)))
    shaped = planning.shape_models(recipe_of(tiny("internvl", tmp_path)))
    few, most = (len(shaped.example("student", load).spans) for load in (replace(small, image=(8, 8)), LOAD))
    assert few < most


def test_latents_that_are_fed_back_are_planned(tiny_folder: Path) -> None:
    """Each is a pass of its own: the same tokens, more of them read one by one."""
    learned = plan_of(tiny_folder)
    recipe = recipe_of(tiny_folder, latents={"name": "feedback", "count": 3})
    passes = planning.passes_of(planning.shape_models(recipe), None, LOAD)
    step = passes.step(checkpointing=False)
    found = planning.described_step(passes, step)
    assert {**found, "logits": 0} == {**learned["step"], "logits": 0} and found["without_gradient"] == []
    assert step.forward + step.backward == pytest.approx(sum(learned["ways"][0]["flops"].values()), rel=0.1)


def test_a_composed_student_is_planned_as_it_is_built(tiny_folder: Path, tmp_path: Path) -> None:
    words = tokenizer(("<|end|>",), eos_token="<|end|>", pad_token="<|end|>")
    words.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    language = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), num_key_value_heads=2, **shape))
    spread(language, 1)
    for part in (language, words):
        part.save_pretrained(tmp_path)
    options = {"patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2}
    tower = {"tower": "timm:vit_tiny_patch16_224", "image_size": 32, "pretrained": False, "options": options}
    recipe = recipe_of(tiny_folder, student={"name": "composed", "language": str(tmp_path), **tower})
    found = planning.make_plan(recipe, LOAD)
    real = build_model(recipe, {"width": 32, "depth": 3})
    assert found["total"]["all"] == sum(p.numel() for p in real.parameters())
    assert found["step"]["image_tokens"] == 16 and found["step"]["without_gradient"] == []


def test_what_an_extraction_records_is_planned(tiny_folder: Path) -> None:
    """Stored rows and steps cost storage, and the targets that read them fit."""
    settings = {"semantics": "top_k_rows", "top_k": 5, "steps": "token", "normalisation": "minmax"}
    recipe = recipe_of(tiny_folder, extract=settings, targets={"concept": "concept", "trajectory": "trajectory_steps"})
    shaped = planning.shape_models(recipe)
    planned = extraction_pass(shaped, LOAD)["trace"]
    # a map a token of the answer and one of all, and 5 states with the tokens that they are of
    assert planned == 4 * 64 * (1 + 4) + 4 * 5 * 32 + 4 * 5
    assert step_of(shaped, 1).losses == ("ntp", "concept", "trajectory")
    whole = planning.shape_models(recipe_of(tiny_folder, extract={"semantics": "full", "semantics_dtype": "float16"}))
    assert extraction_pass(whole, LOAD)["trace"] == 4 * 64 + 2 * 64 * 32 + 4 * 64
    tiles = whole.example("teacher", LOAD).spans[0].tile
    trace = example_trace((tiles,), 32, whole.recipe.build("extract").card(), whole.example("student", LOAD))
    stored = encode(trace, None, "float16")
    kept = sum(stored[name].nbytes for name in ("gaze_values", "gaze_indices", "semantics", "semantic_tokens"))
    assert kept == 4 * 64 + 2 * 64 * 32 + 4 * 64
    with pytest.raises(UserError, match=r"targets\.trajectory: steps: .*extract\.steps"):
        planning.shape_models(recipe_of(tiny_folder, targets={"trajectory": "trajectory_steps"}))


def test_emitted_latents_of_varying_number_are_planned_at_their_most(tiny_folder: Path) -> None:
    """The sequence of the largest number; logits of what is emitted come on top of the answer's."""
    forced = plan_of(tiny_folder)["step"]
    recipe = recipe_of(tiny_folder, latents={"name": "learned", "count": [2, 5], "emitted": True})
    passes = planning.passes_of(planning.shape_models(recipe), None, LOAD)
    emitted = planning.described_step(passes, passes.step(checkpointing=False))
    assert emitted["sequence"] == forced["sequence"] + 2  # 5 latents in place of 3
    assert emitted["losses"] == ["ntp", "emit", *forced["losses"][1:]]
    rows = passes.shaped.model.student.model.get_input_embeddings().weight.shape[0]
    assert emitted["logits"] == 4 * (LOAD.answer + 6) * rows * 4


def test_a_full_embedding_grows_by_latents_and_separator(tiny_folder: Path, tmp_path: Path) -> None:
    """A folder with a configuration alone: every row counts as taken."""
    shutil.copy(tiny_folder / "config.json", tmp_path)
    rows = AutoConfig.from_pretrained(tiny_folder).get_text_config().vocab_size
    component = {"name": "hf", "path": str(tmp_path), "max_pixels": 64 * 64}
    shaped = planning.shape_models(recipe_of(tmp_path, student=component, teacher=component))
    assert shaped.model.student.model.get_input_embeddings().weight.shape[0] == rows + 4
    assert shaped.example("student", LOAD).spans[0].tile.cells == 16


def test_accumulation_and_processes_share_a_batch(tiny_folder: Path) -> None:
    whole, parts = plan_of(tiny_folder), plan_of(tiny_folder, gpus=2)
    assert parts["step"]["micro_batch"] == 2 < whole["step"]["micro_batch"]
    shared = memory_of(parts, "ddp")
    assert shared["activations"] < memory_of(whole)["activations"]
    assert shared["exchanged"] == shared["gradients"]
    with pytest.raises(UserError, match=r"4 does not divide by 3 GPUs .*allowed: multiples of 3"):
        planning.make_plan(recipe_of(tiny_folder), planning.Load(gpus=3))


def test_a_trained_vision_tower_costs_more(tiny_folder: Path) -> None:
    found = plan_of(tiny_folder)
    component = {"name": "hf", "path": str(tiny_folder), "freeze": []}
    other = planning.make_plan(recipe_of(tiny_folder, student=component), LOAD)
    frozen, trained = memory_of(found), memory_of(other)
    assert trained["activations"] > frozen["activations"] and trained["optimizer"] > frozen["optimizer"]
    assert other["ways"][0]["flops"]["backward"] > found["ways"][0]["flops"]["backward"]
    assert other["step"]["without_gradient"] == []
    freed = dict(planning.levers(other))["student.freeze=[vision]"]
    states = ("gradients", "optimizer")
    assert freed >= sum(trained[part] - frozen[part] for part in states) > 0
    assert "student.freeze=[vision]" not in dict(planning.levers(found))


# --- the command, and the pixel bounds it reads ----------------------------------------------------------------------


def test_the_command_prints_tables_and_json(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tmp_path / "cfg.py"
    cfg.write_text(f"student = dict(name='hf', path={str(tiny_folder)!r})\ntrain = dict(batch_size=2)\n")
    words = ["--memory", "8GB", "--gpu", "L4", "--mfu", "0.5", "--train.precision", "bf16"]
    assert main(["plan", str(cfg), *words]) == 0
    text = capsys.readouterr().out
    assert "AdamW states" in text and "assumed:" in text and "left of 8000 MB" in text and "proposed: single" in text
    assert "time of the run" in text and "50% of L4's peak" in text
    assert max(len(line) for line in text.splitlines()) <= 80 and "…" not in text
    assert main(["plan", str(cfg), "--json", "--gpus", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"]["micro_batch"] == 1 and found["gate"] is None and found["extraction"] is None


def test_targets_without_a_teacher_and_with_a_store_of_their_own(tiny_folder: Path, tmp_path: Path) -> None:
    """Boxes and regions need no teacher; a static encoder's store tells its own width; what is matched is counted."""
    header = {"width": 7, "static": "cls", "teacher": "vit", "settings": {"semantics": "top_k_rows", "top_k": 8}}
    with TraceWriter(tmp_path / "static", header):
        pass
    own = {"name": "static_embeddings", "store": str(tmp_path / "static"), "anchor": "all", "match": "hungarian"}
    shaped = planning.shape_models(recipe_of(tiny_folder, teacher=None, targets={"b": "box", "r": "region", "c": own}))
    assert {"b", "r", "c"} <= set(step_of(shaped, 2).losses)
    assert parameters_by_part(shaped.model)["target heads"]["all"] == 32 * 32 + 32 + 32 * 7 + 7
    with pytest.raises(UserError, match=r"targets\.t needs traces, and the recipe has no teacher"):
        planning.shape_models(recipe_of(tiny_folder, teacher=None, targets={"t": "trajectory"}))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--memory", "lots"], "--memory: got 'lots'"),
        (["--gpus", "0"], "--gpus: got 0"),
        (["--gpus", "many"], "invalid int value"),
        (["--gpu", "h10"], "no GPU is called 'h10' here; allowed:"),
        (["--gpu", "a100-80"], "no GPU is called 'a100-80' here; allowed:"),
        (["--mfu", "40"], "--mfu: got 40.0; allowed: above 0"),
        (["--mfu", "nan", "--gpu", "h100"], "--mfu: got nan; allowed: above 0"),
        (["--mfu", "0.3"], "--mfu is a share of what a GPU can do: say which by --gpu"),
        (["--memory", "80TB"], "--memory: got '80TB'"),
        (["--dry-run", "--gpu", "h100"], "leave --memory and --gpu to the plan"),
        (["--gpus", "3"], "train.batch_size: 16 does not divide by 3 GPUs"),
        (["--gpus", "2", "--strategy", "single"], "--gpus 2: strategy: single trains in one process"),
        (["--gpus", "1", "--strategy", "ddp"], "--gpus 1: strategy: ddp copies the model to several processes"),
        (["--gpus", "8", "--strategy", "fsdp2", "--strategy.replicate", "3"], "--gpus 8: strategy.replicate: got 3"),
        (["--image", "big"], "--image: got 'big'"),
        (["--student.path", "Qwen/Qwen2.5-VL-4B-Instruct"], "did you mean 'Qwen/Qwen2.5-VL-"),
        (["--gaet", "hard"], "no such key in a recipe"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "zoo:lavit/naive_sft.py", *words]) == 2
    error = capsys.readouterr().err
    assert part in error and "Traceback" not in error


def test_memory_sizes() -> None:
    assert memory_size("80GB") == 80 * 10**9 and memory_size("2 GiB") == 2**31 and memory_size("24") == 24 * 10**9


RECIPES = ("naive_sft", "lavit", "no_trajectory", "no_concept", "hard_gate", "single_stage")


@pytest.mark.parametrize("name", RECIPES)
def test_the_paper_s_recipes_resolve(name: str) -> None:
    recipe = load_recipe(f"zoo:lavit/{name}.py")
    train = recipe.build("train")
    assert (train.steps, train.batch_size, train.lr, train.betas) == (1000, 16, 5e-6, (0.9, 0.999))
    assert train.gradient_checkpointing and train.precision == "bf16" and train.warmup_steps == 30
    expected = {"naive_sft": set(), "no_trajectory": {"concept"}, "no_concept": {"trajectory"}}
    assert set(recipe.config["targets"]) == expected.get(name, {"concept", "trajectory"})
    if name == "naive_sft":
        assert not recipe.has("latents") and not recipe.has("gate") and "latent" not in recipe.build("prompt").system
    else:
        gamma = {"hard_gate": (0.0, 0.0, 1.0), "single_stage": (1.0, 1.0, 1.0)}.get(name, (1e-6, 0.5, 1.0))
        gate = recipe.build("gate")
        assert [gate.gamma(step) for step in (0, 200, 400)] == pytest.approx(gamma, abs=1e-6)


def test_pixel_bounds_scale_images_and_are_saved(tiny_folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    def tokens(backbone: Backbone) -> int:
        (span,) = backbone.builder(PromptSettings()).prompt_of(Sample("a", (pictures[1],), "What?", "blue")).spans
        return span.tile.cells

    own = Backbone.load(str(tiny_folder))
    assert tokens(own) == 12  # 64 x 48 px, 16 px a token
    small = Backbone.load(str(tiny_folder), max_pixels=32 * 32)
    assert tokens(small) <= 4 and small.processor.image_processor.size["shortest_edge"] == 16 * 16
    small.save(tmp_path)
    assert dict(AutoProcessor.from_pretrained(tmp_path).image_processor.size)["longest_edge"] == 32 * 32
    assert tokens(Backbone.load(str(tiny_folder), min_pixels=128 * 128, max_pixels=256 * 256)) >= 60
    with pytest.raises(UserError, match="min_pixels <= max_pixels"):
        Backbone.load(str(tiny_folder), min_pixels=2000, max_pixels=1000)
