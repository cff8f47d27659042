"""A sweep file, read and checked: what is varied, what is asked of every run, and what has to be there before.

It is a ``cfg.py`` read as recipes are (``_base_`` works; names that begin with ``_`` are the file's own), or YAML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mmengine.config import Config

from laavit.recipe import apply_overrides, checked, zoo_path
from laavit.registry import MISTAKES, UserError, mistake, nearest

SEED = "{seed}"
#: what YAML 1.1 makes of the words on and off
SWITCH = {True: "on", False: "off"}


@dataclass(frozen=True)
class Questions:
    """How every run is evaluated; the words of ``laavit eval``.

    Args:
        tasks: names of lmms-eval's tasks and of ``eval/tasks``; none: the runs are trained and exported, no more.
        data_root: local copies of the data sets. include_path: more folders of lmms-eval YAML.
        batch_size: questions a pass. limit: at most so many questions a task.
        latents: in which modes each run with latents answers: 'on', 'off', or how many; runs without have 'on' alone.
        interventions: names for ``--interventions``, asked of at most ``intervention_limit`` questions a task.
        protocol: for ``--protocol``; None is the command's own default.
    """

    tasks: tuple[str, ...] = ()
    data_root: str | None = None
    include_path: tuple[str, ...] = ()
    batch_size: int = 16
    limit: int | None = None
    latents: tuple[str, ...] = ("on",)
    interventions: tuple[str, ...] = ()
    intervention_limit: int | None = None
    protocol: str | None = None


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Args:
        recipe: a recipe of its own in place of the sweep's ``base``.
        model: a model folder or hub name that is evaluated as it is, in place of a recipe; ``{seed}`` names one a seed.
        overrides: dotted keys of the recipe and their values. latents: modes, in place of ``evaluate.latents``.
        seeds: in place of the sweep's. label: what the table calls it; default the arm's name.
    """

    recipe: str | None = None
    model: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    latents: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    label: str | None = None


@dataclass(frozen=True)
class Command:
    """Something that has to be there before the first run.

    Args:
        run: a command line (no shell); ``laavit`` and ``python`` are this installation's. With ``{seed}`` in it, one a
            seed. creates: the file or folder that says it is done; without it, a note under OUT/before does.
        arms: who needs it; it is left out where none of them is run. Default: all.
    """

    run: str
    creates: str | None = None
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Args:
        name: of the sweep. out: where everything goes; default runs/sweeps/<name>.
        base: the recipe of the arms that name none: beside the file, zoo:NAME.py, or from the working directory.
        arms: label -> recipe, or dict(recipe=, model=, overrides=, latents=, seeds=, label=). Default: the base alone.
        grid: key of the recipe -> values; every arm with a recipe is run with every combination.
        seeds: every arm is run with each. overrides: for every run, before an arm's own.
        per_seed: key -> value with ``{seed}`` in it, for example a student folder for each seed.
        evaluate: see ``Questions``. reference: the arm that differences are taken to.
        before: commands that run once, stage by stage: a command, dict(run=, creates=, arms=), or a list of them that
            run side by side.
        keep: 'export' deletes a run's checkpoints once it is exported, 'all' keeps them.
        slurm: options of the array job, ``{"gres": "gpu:1", "time": "12:00:00"}``.
    """

    name: str
    out: str | None = None
    base: str | None = None
    arms: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    overrides: dict[str, Any] = field(default_factory=dict)
    per_seed: dict[str, str] = field(default_factory=dict)
    evaluate: Questions = Questions()
    reference: str | None = None
    before: tuple[Any, ...] = ()
    keep: Literal["export", "all"] = "export"
    slurm: dict[str, Any] = field(default_factory=dict)
    title: str = ""

    @property
    def stages(self) -> list[list[Command]]:
        """``before`` as stages of commands."""
        listed = [stage if isinstance(stage, list | tuple) else [stage] for stage in self.before]
        return [[_command(f"before[{i}]", each) for each in stage] for i, stage in enumerate(listed)]


def read_sweep(path: Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """A sweep file with overrides of its own keys (``{"evaluate.limit": 10}``) applied, every key checked.

    Raises:
        UserError: it is not there, does not read, or a key or a value is not allowed.
    """
    if not path.is_file():
        raise UserError(f"no sweep at '{path}'; give a sweep.py, for example one of model_zoo/microlab/sweeps")
    try:
        raw = Config.fromfile(path, import_custom_modules=False).to_dict()
    except MISTAKES as error:
        raise UserError(f"{path} does not read as a sweep: {mistake(error)}") from None
    raw = apply_overrides({key: value for key, value in raw.items() if not key.startswith("_")}, overrides or {})
    allowed = [each.name for each in fields(Sweep)]
    for key in raw:
        if key not in allowed:
            raise UserError(f"{key}: no such key in a sweep; {nearest(key, allowed)}")
    questions = _mapping("evaluate", raw.pop("evaluate", None) or {})
    questions["latents"] = modes("evaluate.latents", questions.get("latents", ("on",)))
    evaluate = Questions(**checked("evaluate", Questions, questions))
    arms = _mapping("arms", raw.pop("arms", None) or {})
    sweep = Sweep(**checked("sweep", Sweep, raw) | {"arms": arms, "evaluate": evaluate})
    for key, values in sweep.grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"grid.{key}: got {values!r}; allowed: a list of values")
    for key, text in sweep.per_seed.items():
        if SEED not in text:
            raise UserError(f"per_seed.{key}: got '{text}'; it has to hold {SEED}")
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise UserError(f"seeds: got {list(sweep.seeds)}; allowed: one or more, all different")
    return sweep


def read_arms(sweep: Sweep, places: Path) -> dict[str, Arm]:
    """The arms by name, their recipes as paths.

    Args:
        places: the folder of the sweep file.

    Raises:
        UserError: an arm is neither a recipe nor a model, or the reference is none of the arms.
    """
    given: dict[str, Any] = sweep.arms or {_stem(sweep): {}}
    arms = {name: _arm(name, spec) for name, spec in given.items()}
    found = {}
    for name, arm in arms.items():
        if arm.model is not None and (arm.recipe or arm.overrides):
            raise UserError(f"arms.{name}: 'model' is evaluated as it is, and takes neither recipe nor overrides")
        recipe = arm.recipe or (sweep.base if arm.model is None else None)
        if arm.model is None and recipe is None:
            raise UserError(f"arms.{name}: it names neither a recipe nor a model, and the sweep has no 'base'")
        place = None if recipe is None else _place(recipe, places)
        found[name] = Arm(place, arm.model, arm.overrides, arm.latents, arm.seeds, arm.label or name)
    return found


def modes(key: str, given: Any) -> list[str]:
    """Modes of the latents as words; ``[on, off]`` of YAML is true and false.

    Raises:
        UserError: one is neither 'on' nor 'off' nor a number.
    """
    listed = given if isinstance(given, list | tuple) else [given]
    words = [SWITCH[mode] if isinstance(mode, bool) else str(mode) for mode in listed]
    for word in words:
        if word not in ("on", "off") and not word.isdigit():
            raise UserError(f"{key}: got '{word}'; allowed: on, off, or how many")
    return words


def _arm(name: str, spec: Any) -> Arm:
    given: dict[str, Any] = {"recipe": spec} if isinstance(spec, str) else _mapping(f"arms.{name}", spec or {})
    if given.get("latents") is not None:
        given["latents"] = modes(f"arms.{name}.latents", given["latents"])
    return Arm(**checked(f"arms.{name}", Arm, given))


def _command(key: str, spec: Any) -> Command:
    return Command(**checked(key, Command, {"run": spec} if isinstance(spec, str) else _mapping(key, spec)))


def _mapping(key: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"{key}: got {given!r}; expected dict(...)")
    return dict(given)


def _stem(sweep: Sweep) -> str:
    if sweep.base is None:
        raise UserError("a sweep has 'arms', or a 'base' recipe with a grid")
    return Path(sweep.base).stem


def _place(recipe: str, beside: Path) -> str:
    """A recipe's path: of the zoo, beside the sweep file, or as it is."""
    if recipe.startswith("zoo:"):
        return zoo_path(recipe)
    return str(beside / recipe) if (beside / recipe).is_file() else recipe


def with_seed(text: str, seed: int) -> str:
    """A text with the seed in its place."""
    return text.replace(SEED, str(seed))


def seeds_of(arm: Arm, sweep: Sweep) -> Sequence[int]:
    """The seeds of an arm; a model that does not hang on the seed has one run alone."""
    seeds = sweep.seeds if arm.seeds is None else arm.seeds
    return seeds[:1] if arm.model is not None and SEED not in arm.model else seeds
