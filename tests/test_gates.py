"""Gates against their closed forms: at the ends, the middle and past the end (Eq. 5); whom they act on."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laavit.commands.parts import show_part
from laavit.gates import (
    ConstantGate,
    CosineGate,
    ExponentialGate,
    Gate,
    LinearGate,
    PathGates,
    SigmoidGate,
    StepGate,
    build_gate,
)
from laavit.model import check_layers, gate_paths, image_blocks
from laavit.recipe import cards
from laavit.registry import GATES, UserError
from laavit.structures import Batch, Role, Sample, Span, Tile

O, I, Q, V, A = (int(role) for role in (Role.OTHER, Role.IMAGE, Role.QUESTION, Role.LATENT, Role.ANSWER))  # noqa: E741
RAMPS = (CosineGate, LinearGate, ExponentialGate, SigmoidGate)


def equation_5(step: int, warmup: int, epsilon: float) -> float:
    if step >= warmup:
        return 1.0
    return epsilon + (1 - epsilon) / 2 * (1 - math.cos(math.pi * step / warmup))


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 100, 200, 399, 400, 401, 10_000])
def test_cosine_gate_is_equation_5(step: int) -> None:
    gate = CosineGate()
    assert gate.gamma(step) == pytest.approx(equation_5(step, 400, 1e-6), rel=1e-12)
    assert gate.bias(step) == pytest.approx(math.log(equation_5(step, 400, 1e-6)), rel=1e-12)


def test_cosine_gate_at_named_points() -> None:
    gate = CosineGate(warmup=400, epsilon=1e-6)
    assert gate.gamma(0) == pytest.approx(1e-6, rel=1e-9)
    assert gate.gamma(200) == pytest.approx((1 + 1e-6) / 2)
    assert gate.gamma(400) == 1.0 and gate.bias(400) == 0.0


def test_the_other_schedules() -> None:
    assert [LinearGate(10, 0.0).gamma(s) for s in (0, 5, 9, 10, 11)] == [0.0, 0.5, 0.9, 1.0, 1.0]
    assert [StepGate(10).gamma(s) for s in (0, 9, 10, 11)] == [0.0, 0.0, 1.0, 1.0]
    assert StepGate(10).bias(0) == -math.inf
    assert ConstantGate(1.0).bias(0) == 0.0 and ConstantGate(0.0).bias(99) == -math.inf


@pytest.mark.parametrize("epsilon", [1e-6, 0.01, 0.5])
def test_exponential_gate_raises_the_bias_in_a_straight_line(epsilon: float) -> None:
    gate = ExponentialGate(40, epsilon)
    for step in (0, 1, 20, 39):
        assert gate.bias(step) == pytest.approx(math.log(epsilon) * (1 - step / 40), rel=1e-12)
    assert gate.gamma(20) == pytest.approx(math.sqrt(epsilon)) and gate.gamma(40) == gate.gamma(99) == 1.0


@pytest.mark.parametrize("steepness", [0.1, 6.0, 40.0])
def test_sigmoid_gate_is_the_scaled_logistic_curve(steepness: float) -> None:
    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    gate = SigmoidGate(40, 1e-3, steepness)
    for step in (0, 1, 13, 20, 39):
        curve = (s(steepness * (2 * step / 40 - 1)) - s(-steepness)) / (s(steepness) - s(-steepness))
        assert gate.gamma(step) == pytest.approx(1e-3 + (1 - 1e-3) * curve, rel=1e-9, abs=1e-12)
    assert gate.gamma(0) == 1e-3 and gate.gamma(20) == pytest.approx((1 + 1e-3) / 2)
    assert gate.gamma(40) == gate.gamma(10_000) == 1.0


def test_step_gate_climbs_equal_stairs() -> None:
    gate = StepGate(12, 0.2, 4)
    assert [gate.gamma(s) for s in range(14)] == pytest.approx(
        [0.2] * 3 + [0.4] * 3 + [0.6] * 3 + [0.8] * 3 + [1.0] * 2
    )


@given(
    kind=st.sampled_from([*RAMPS, StepGate]),
    warmup=st.integers(1, 500),
    low=st.floats(1e-9, 0.99),
)
def test_every_schedule_rises_from_its_floor_to_open(kind: type[Gate], warmup: int, low: float) -> None:
    gate = kind(warmup, low)
    values = [gate.gamma(step) for step in range(warmup + 2)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(low, rel=1e-12) and values[-2:] == [1.0, 1.0]
    assert all(gate.bias(step) <= 0.0 for step in range(warmup + 2))


@given(share=st.floats(0.001, 0.999), steps=st.integers(1, 5000))
def test_a_share_of_the_run_is_its_number_of_steps(share: float, steps: int) -> None:
    gate = CosineGate(share)
    gate.set_run(steps)
    assert 1 <= gate.warmup_steps <= steps and abs(gate.warmup_steps - share * steps) <= max(0.5, 1 - share * steps)
    same = CosineGate(gate.warmup_steps)
    assert all(gate.gamma(step) == same.gamma(step) for step in (0, gate.warmup_steps // 2, steps))


def test_a_share_rounds_and_needs_the_run() -> None:
    gate = StepGate(0.07)
    with pytest.raises(UserError, match=r"0\.07 is a share of the run's steps, and their number is not known"):
        gate.gamma(0)
    gate.set_run(100)
    assert gate.warmup_steps == 7  # 0.07 * 100 is a little above 7 in floating point
    counted = StepGate(7)
    counted.set_run(10)
    assert counted.warmup_steps == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineGate(warmup=0), "warmup is a number of steps >= 1 or a share .* got 0"),
        (lambda: CosineGate(warmup=1.0), "warmup is a number of steps >= 1 or a share .* got 1.0"),
        (lambda: CosineGate(epsilon=1.0), "epsilon lies in"),
        (lambda: ExponentialGate(epsilon=0.0), r"epsilon lies in \(0, 1\)"),
        (lambda: SigmoidGate(steepness=0.0), "steepness is a number above 0"),
        (lambda: StepGate(stairs=0), "stairs is a number of 1 or more"),
        (lambda: StepGate(low=-0.1), "low lies in"),
        (lambda: CosineGate(paths=("answer->imag",)), "did you mean 'answer->image'"),
        (lambda: CosineGate(layers="last"), "allowed: a list of layers, 'first N', 'last N'"),
        (lambda: CosineGate(layers="first 4").layers_of(3), "the student has 3 layers, got first 4"),
        (lambda: CosineGate(layers=[0, -4]).layers_of(3), "the student has 3 layers"),
        (lambda: ConstantGate(1.5), "value lies in"),
        (lambda: PathGates(), "names at least one of answer, question, latent"),
        (lambda: PathGates(answer="cosin"), "answer: no gate is called 'cosin'.*did you mean 'cosine'"),
        (lambda: PathGates(question={"name": "hard", "warmpu": 3}), r"question\.warmpu: .*did you mean 'warmup'"),
        (lambda: PathGates(latent={"name": "hard", "paths": ["answer->image"]}), "latent: .*leave 'paths' out"),
        (lambda: PathGates(answer={"name": "paths", "answer": "hard"}), "answer: the gate of one path has one"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_gate_outside_its_range_is_refused() -> None:
    class Wild(Gate):
        def gamma(self, step: int) -> float:
            return 2.0

    with pytest.raises(UserError, match="gamma lies in"):
        Wild().bias(0)


# --- names ------------------------------------------------------------------------------------------------------------

#: registered name -> gamma at the steps 0, 200, 400 and 999 of a run of 1000
NAMED = {
    "closed": (0.0, 0.0, 0.0, 0.0),
    "cosine": (1e-6, 0.5, 1.0, 1.0),
    "exponential": (1e-6, 1e-3, 1.0, 1.0),
    "hard": (0.0, 0.0, 1.0, 1.0),
    "linear": (1e-6, 0.5, 1.0, 1.0),
    "livr": (0.0, 0.0, 1.0, 1.0),
    "open": (1.0, 1.0, 1.0, 1.0),
    "sigmoid": (1e-6, 0.5, 1.0, 1.0),
    "step": (0.0, 0.5, 1.0, 1.0),
}


def test_every_registered_name_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(cards("gates")) == {*NAMED, "paths"}
    assert {card.type for card in cards("gates").values()} <= set(GATES.module_dict)
    for name, values in NAMED.items():
        gate = build_gate("gate", name)
        gate.set_run(1000)
        assert [gate.gamma(step) for step in (0, 200, 400, 999)] == pytest.approx(values, abs=1e-6), name
        both = ("answer->image", "question->image")
        show_part(f"gates/{name}")
        assert "layers: null" in capsys.readouterr().out
        assert gate.paths == (both if name == "livr" else both[:1]) and gate.layers is None


# --- paths and layers -------------------------------------------------------------------------------------------------


def batch_of(roles: list[list[int]], spans: list[tuple[Span, ...]]) -> Batch:
    grid = torch.tensor(roles)
    return Batch(grid, grid.to(torch.uint8), grid, None, spans, [(0, 1)] * len(roles), {}, [])


ONE = batch_of([[O, O, I, I, O, Q, Q, O, V, V, A, A]], [(Span(2, Tile(1, 2)),)])


def test_paths_cover_markup_after_the_image_but_not_the_system_prompt() -> None:
    paths = gate_paths(ConstantGate(0.0, paths=("answer->image", "question->image")), 0, ONE, 3)
    assert paths[0].queries.nonzero()[:, 1].tolist() == [10, 11]
    assert paths[1].queries.nonzero()[:, 1].tolist() == [4, 5, 6, 7]
    assert all(path.keys.nonzero()[:, 1].tolist() == [2, 3] and path.layers is None for path in paths)
    assert gate_paths(ConstantGate(1.0), 0, ONE, 3) == () and gate_paths(None, 0, ONE, 3) == ()


def test_an_image_is_one_block_with_its_separators_and_tile_markers() -> None:
    """Rows of two with a newline each; then an image of two tiles with a marker between; text between images is not."""
    rows = [O, I, I, O, I, I, O, O, I, O, I, O, Q, A]
    spans = (Span(1, Tile(2, 2, 0), stride=3), Span(8, Tile(1, 1, 1)), Span(10, Tile(1, 1, 1)))
    two = batch_of([rows, [O, I, O, Q, A] + [O] * 9], [spans, (Span(1, Tile(1, 1)),)])
    assert image_blocks(two)[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert image_blocks(two)[1].nonzero().flatten().tolist() == [1]
    answer, question = gate_paths(ConstantGate(0.0, paths=("answer->image", "question->image")), 0, two, 3)
    assert question.queries[0].nonzero().flatten().tolist() == [7, 11, 12]
    assert torch.equal(answer.keys, image_blocks(two)) and torch.equal(question.keys, answer.keys)


def test_each_path_follows_its_own_gate() -> None:
    gate = PathGates(answer={"name": "linear", "warmup": 0.5, "epsilon": 0.0}, latent={"name": "hard", "warmup": 4})
    gate.set_run(20)
    assert gate.paths == ("answer->image", "latent->image")
    assert {name: part.gamma(3) for name, part in gate.parts().items()} == {"gamma_answer": 0.3, "gamma_latent": 0.0}
    assert [gate.gamma(step) for step in (3, 4, 10)] == [0.0, 0.4, 1.0]
    paths = gate_paths(gate, 3, ONE, 3)
    assert [path.queries.nonzero()[:, 1].tolist() for path in paths] == [[10, 11], [8, 9]]
    assert [path.bias for path in paths] == [math.log(0.3), -math.inf]
    assert len(gate_paths(gate, 4, ONE, 3)) == 1 and gate_paths(gate, 10, ONE, 3) == ()


@pytest.mark.parametrize(
    ("layers", "wanted"), [(None, None), ([0, -1], {0, 4}), ("first 2", {0, 1}), ("last 2", {3, 4}), ([-5], {0})]
)
def test_a_gate_acts_on_some_layers(layers: list[int] | str | None, wanted: set[int] | None) -> None:
    (path,) = gate_paths(ConstantGate(0.5, layers=layers), 0, ONE, 5)
    assert path.layers == wanted


def test_each_path_is_gated_and_logged_by_itself(lab: Any, samples: list[Sample]) -> None:
    """In one model: two schedules at once are the two gates' paths; evaluation is open; a wrong layer is refused."""
    student = lab.student()
    both = lab.model({}, PathGates(answer={"name": "linear", "warmup": 4}, question="closed"), student)
    batch = lab.batch(both, samples)
    both.set_step(3)
    context, _ = both.context(batch)
    alone = [LinearGate(4), ConstantGate(0.0, ("question->image",))]
    expected = [path for gate in alone for path in gate_paths(gate, 3, batch, 3)]
    assert [path.bias for path in context.paths] == [path.bias for path in expected]
    assert all(torch.equal(a.queries, b.queries) for a, b in zip(context.paths, expected, strict=True))
    losses = both(batch, mode="loss")
    assert losses["gamma_question"] == 0.0 and losses["gamma_answer"] == pytest.approx(LinearGate(4).gamma(3))
    losses = both.eval()(batch, mode="loss")
    assert losses["gamma_question"] == losses["gamma_answer"] == 1.0 and both.context(batch)[0] is None
    with pytest.raises(UserError, match=r"^gate\.layers: the student has 3 layers, got \(7,\)"):
        check_layers(ConstantGate(0.0, layers=[7]), student)


def test_a_gate_on_no_layer_of_a_model_changes_nothing(lab: Any, samples: list[Sample]) -> None:
    student = lab.student()
    outs = []
    for gate in (None, ConstantGate(0.0, layers=[]), ConstantGate(0.0, layers=[1]), ConstantGate(0.0)):
        model = lab.model({}, gate, student)
        with torch.no_grad():
            outs.append(model.observe(lab.batch(model, samples)).hidden)
    assert torch.equal(outs[0], outs[1])
    assert len({float(out.sum()) for out in outs}) == 3


# --- in a recipe ------------------------------------------------------------------------------------------------------


def test_a_recipe_names_share_layers_and_a_gate_for_each_path(own_project: Path) -> None:
    from laavit.model import build_gate as of_recipe
    from laavit.recipe import load_recipe

    def gate(*words: str) -> Gate:
        built = of_recipe(load_recipe(own_project, ["--train.steps", "50", *words]))
        assert built is not None
        return built

    shared = gate("--gate.warmup", "0.3", "--gate.layers", "last 1")
    assert shared.warmup_steps == 15 and shared.layers_of(3) == {2}  # type: ignore[attr-defined]
    assert gate("--gate", "{name: hard, warmup: 9, layers: [0, 2]}").layers_of(3) == {0, 2}
    both = gate("--gate", "{name: paths, answer: cosine, question: {name: hard, warmup: 0.5}}")
    assert both.parts()["gamma_question"].gamma(24) == 0.0 and both.parts()["gamma_question"].gamma(25) == 1.0
    with pytest.raises(UserError, match=r"^gate: question\.warmup: .*1\.5"):
        gate("--gate", "{name: paths, question: {name: hard, warmup: 1.5}}")
    assert of_recipe(load_recipe(own_project, ["--gate", "null"])) is None
    kept = load_recipe(own_project, ["--gate.warmup", "0.3"])
    assert type(kept.config["gate"]["warmup"]) is float and pickle.loads(pickle.dumps(kept)).text() == kept.text()  # noqa: S301
