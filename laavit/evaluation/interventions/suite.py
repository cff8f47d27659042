"""A set of interventions on a model and tasks that are loaded and answered already: records and effects of each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from laavit.evaluation.interventions.base import Intervention, intervention_of
from laavit.evaluation.interventions.collapse import collapse
from laavit.evaluation.interventions.effects import effect, share
from laavit.evaluation.interventions.observing import Observer, centre_of
from laavit.evaluation.interventions.states import Reading, read
from laavit.evaluation.records import read_records, write_records
from laavit.files import read_object, write_json
from laavit.paths import project_data
from laavit.recipe import cards
from laavit.registry import INTERVENTIONS, UserError, nearest

if TYPE_CHECKING:
    from lmms_eval.api.task import Task

    from laavit.evaluation.bridge import Laavit

logger = logging.getLogger(__name__)

#: beside an intervention's records once all of them are there
ASKED = "asked.json"

Records = list[dict[str, Any]]
#: at most so many questions a task are asked and judged -> (question, record) of each; None on all ranks but the first
Ask = Callable[[int | None], list[tuple[tuple[str, int], dict[str, Any]]] | None]


def named_sets() -> dict[str, list[str]]:
    """The sets of ``eval/interventions.yaml`` by name."""
    found: dict[str, list[str]] = yaml.safe_load((project_data("eval") / "interventions.yaml").read_text("utf-8"))
    return found


def check(model: Laavit, tasks: Sequence[Task]) -> None:
    """Raises: UserError: the model's own intervention cannot be done with it and these tasks."""
    if model.intervention is not None and (reason := model.intervention.lacks(model, _columns(tasks))):
        raise UserError(f"the intervention cannot be done: {reason}")


def _columns(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """The columns of each task's documents."""
    return {str(task.config.task): list(task.eval_docs_no_media.features) for task in tasks}


@dataclass(frozen=True)
class Suite:
    """Interventions by name, and those of them that may be left out where a model or a task does not have their like.

    Args:
        names: in order, each once. optional: those that only a set named.
        limit: at most so many questions a task, from the first; None takes all that were answered.
    """

    names: tuple[str, ...]
    optional: frozenset[str] = frozenset()
    limit: int | None = None

    @classmethod
    def of(cls, given: Sequence[str], answered: int | None = None, limit: int | None = None) -> Suite:
        """Names of interventions, and of sets of them.

        Args:
            answered: at most so many questions a task were answered. limit: at most so many are asked again.

        Raises:
            UserError: nothing has such a name, or the limit is no number from 1.
        """
        if limit is not None and limit < 1:
            raise UserError(f"intervention_limit={limit} was given; allowed: whole numbers from 1, or none for all")
        sets, known = named_sets(), cards("interventions")
        names: dict[str, bool] = {}
        for name in given:
            if name not in sets and name not in known and INTERVENTIONS.get(name) is None:
                raise UserError(f"no intervention is called '{name}'; {nearest(name, [*sets, *known])}")
            for one in sets.get(name, [name]):
                names[one] = names.get(one, True) and name in sets
        fewest = min((number for number in (answered, limit) if number is not None), default=None)
        return cls(tuple(names), frozenset(name for name, optional in names.items() if optional), fewest)

    def ready(self, model: Laavit, tasks: Sequence[Task]) -> tuple[dict[str, Intervention], dict[str, str]]:
        """The interventions that can be done with this model and these tasks, and why the others cannot.

        Raises:
            UserError: one that was asked for by its own name cannot, or the model's latents are altered already.
        """
        if model.latents == "off" or model.intervention is not None:
            raise UserError(
                "interventions are compared with the model as it is: leave out latents=off and intervention"
            )
        columns = _columns(tasks)
        found: dict[str, Intervention] = {}
        skipped: dict[str, str] = {}
        for name in self.names:
            part = intervention_of(name)
            reason = part.lacks(model, columns)
            if reason is None:
                found[name] = part
            elif name in self.optional:
                skipped[name] = reason
            else:
                raise UserError(f"intervention '{name}' cannot be done: {reason}")
        return found, skipped

    def run(self, model: Laavit, tasks: Sequence[Task], reference: Records | None, ask: Ask, out: Path) -> None:
        """Ask again under each intervention, and write ``interventions.json`` and records beside the evaluation's.

        Args:
            model, tasks: as they answered. reference: their records. ask: asks again. out: the evaluation's folder.
        """
        parts, skipped = self.ready(model, tasks)
        readings = self._readings(model, tasks)
        own = [reading.latents.last for reading in readings.values() if reading.latents is not None]
        latents = [one for found in everywhere(own) for one in found]
        asked: dict[str, Records] = {}
        for name, part in parts.items():
            folder = out / "interventions" / name
            kept = self._kept(folder, name)
            if kept is not None:  # of this evaluation, before it was killed
                asked |= {name: kept} if reference is not None else {}
                continue
            observer = Observer(readings, centre_of(latents) if part.on != "latents" else None)
            with model.altered(part, observer, readings):
                answered = ask(self.limit)
            measured = dict(item for found in everywhere(observer.found) for item in found.items())
            if answered is not None:
                asked[name] = [record | found for key, record in answered if (found := measured[key]) is not None]
                write_records(folder / "records.jsonl", asked[name])
                write_json(folder / ASKED, self._asked(name))
                logger.info("%s: %d answers asked again", name, len(asked[name]))
        if reference is not None:
            found = _figures(reference, asked, {name: part.on for name, part in parts.items()}, skipped)
            write_json(out / "interventions.json", found | {"collapse": collapse(latents)})
            for name, one in found["effects"].items():
                logger.info("%s", _said(name, one))
            for name, reason in found["skipped"].items():
                logger.info("%s: left out, %s", name, reason)

    def _asked(self, name: str) -> dict[str, Any]:
        """What an intervention's records hang on, beside the evaluation."""
        return {"limit": self.limit, "intervention": str(cards("interventions").get(name, name))}

    def _kept(self, folder: Path, name: str) -> Records | None:
        """The records that a killed suite left of an intervention; None where it was not finished, or asked otherwise.

        The evaluation clears what is of other answers before (``laavit.evaluation.run``).
        """
        file = folder / ASKED
        if not file.is_file() or read_object(file) != self._asked(name):
            return None
        logger.info("%s: asked before the evaluation was stopped", name)
        return read_records(folder / "records.jsonl")

    def _readings(self, model: Laavit, tasks: Sequence[Task]) -> dict[tuple[str, int], Reading]:
        """How every question is read without intervention; what is drawn from this is kept in the main memory."""
        requests = [
            request for task in tasks for request in task.instances if self.limit is None or request.doc_id < self.limit
        ]
        found: dict[tuple[str, int], Reading] = {}
        for questions in model.questions(requests):
            readings = read(model, [question.chat for question in questions])
            found |= {question.key: reading for question, reading in zip(questions, readings, strict=True)}
        return found


def everywhere(found: Any) -> list[Any]:
    """What every rank found, in the order of the ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [found]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, found)
    return ranks


def _said(name: str, one: Mapping[str, Any]) -> str:
    """An effect in a line: 'latents_off: accuracy -0.7 [-2.0, 0.7] points, 1.0 % [0.3, 2.9] of 300 answers changed'."""
    (delta, low, high), (share_, least, most) = (tuple(100 * x for x in one[key]) for key in ("delta", "changed"))
    return (
        f"{name}: accuracy {delta:+.1f} [{low:.1f}, {high:.1f}] points, "
        f"{share_:.1f} % [{least:.1f}, {most:.1f}] of {one['n']} answers changed"
    )


def _figures(
    reference: Records, asked: Mapping[str, Records], kinds: Mapping[str, str], skipped: Mapping[str, str]
) -> dict[str, Any]:
    by_key = {(record["task"], record["id"]): record for record in reference}
    effects: dict[str, Any] = {}
    left_out = dict(skipped)
    for name, records in asked.items():
        if records:
            effects[name] = effect(kinds[name], [by_key[r["task"], r["id"]] for r in records], records)
        else:
            left_out[name] = "no question that was asked can be changed in this way"
    read_keys = {(record["task"], record["id"]) for records in asked.values() for record in records}
    compared = [record["correct"] for key, record in by_key.items() if key in read_keys]
    return {
        "n": len(compared),
        "reference": {"accuracy": share(compared)} if compared else None,
        "effects": effects,
        "skipped": left_out,
    }
