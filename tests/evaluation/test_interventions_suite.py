"""``--interventions``: what is written, that it is right, that nothing is loaded or asked twice, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, List, Value

from laavit.cli import run
from laavit.evaluation.bridge import Laavit, Settings
from laavit.evaluation.interventions import Questions
from laavit.evaluation.interventions.effects import kl
from laavit.evaluation.interventions.states import read
from laavit.evaluation.interventions.suite import Suite, named_sets
from laavit.evaluation.records import read_records
from laavit.evaluation.run import evaluate
from laavit.evaluation.statistics import wilson
from laavit.evaluation.tasks import load_tasks
from laavit.recipe import cards
from laavit.registry import UserError

LIMIT = 6


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("LAAVIT_MICROLAB", raising=False)
        yield


@pytest.fixture(scope="module")
def boxed(microlab_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same questions with boxes, all but the second."""
    folder = tmp_path_factory.mktemp("boxed")
    for file in microlab_data.glob("*.parquet"):
        data = Dataset.from_parquet(str(file), cache_dir=str(tmp_path_factory.mktemp("cache")))
        assert isinstance(data, Dataset)
        boxes = [[] if i == 1 else [[0.0, 0.0, 0.5, 0.5]] for i in range(len(data))]
        data = data.add_column("boxes", boxes, feature=List(List(Value("float32"))))  # type: ignore[arg-type]
        data.to_parquet(folder / file.name)
    return folder


@pytest.fixture(scope="module")
def standard(export: Path, boxed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of eight questions, six of them asked again under each intervention; one model is loaded."""
    out = tmp_path_factory.mktemp("standard")
    loads, asked = [], []

    def counted_load(self: Laavit, *given: Any, **more: Any) -> None:
        loads.append(given)
        load(self, *given, **more)

    def counted_answer(self: Laavit, chats: Any, *given: Any) -> Any:
        asked.append((self.intervention, len(chats)))
        return answer(self, chats, *given)

    with pytest.MonkeyPatch.context() as patch:
        load, answer = Laavit.__init__, Laavit.answer_and_count
        patch.setattr(Laavit, "__init__", counted_load)
        patch.setattr(Laavit, "answer_and_count", counted_answer)
        words = ["--tasks", "microlab_test", "--data-root", str(boxed), "--limit", "8", "--batch-size", "4"]
        more = ["--interventions", "standard", "--intervention-limit", str(LIMIT), "--out", str(out)]
        assert run("eval", [str(export), *words, *more]) == 0
    assert len(loads) == 1
    assert sum(count for part, count in asked if part is None) == 8  # the reference is asked once
    assert sum(count for part, count in asked) == 8 + LIMIT * len(named_sets()["standard"])
    return out


def found(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "interventions.json").read_text())
    return result


def test_the_standard_set_is_all_there_is() -> None:
    assert sorted(named_sets()["standard"]) == sorted(cards("interventions"))


def test_what_is_written(standard: Path) -> None:
    written, names = found(standard), named_sets()["standard"]
    assert list(written["effects"]) == names and written["skipped"] == {} and written["n"] == LIMIT
    reference = read_records(standard / "records.jsonl")[:LIMIT]
    right = sum(record["correct"] for record in reference)
    assert written["reference"]["accuracy"] == [right / LIMIT, *wilson(right, LIMIT)]
    for name, entry in written["effects"].items():
        records = read_records(standard / "interventions" / name / "records.jsonl")
        boxes = name in ("latents_oracle", "image_inside_masked", "image_outside_masked")
        asked = [record for i, record in enumerate(reference) if i != 1 or not boxes]
        assert [record["id"] for record in records] == [record["id"] for record in asked]
        assert entry["n"] == len(records) and entry["on"] == name.partition("_")[0].rstrip("s").replace(
            "latent", "latents"
        )
        assert entry["accuracy"][0] == sum(record["correct"] for record in records) / len(records)
        moved = [a["prediction"] != b["prediction"] for a, b in zip(asked, records, strict=True)]
        assert entry["changed"][0] == sum(moved) / len(records)
        assert entry["kl"][0] == pytest.approx(sum(record["kl"] for record in records) / len(records))
        assert entry["kl"][0] > 0 and entry["kl"][1] <= entry["kl"][0] <= entry["kl"][2]
        shift = entry["latent_shift"]
        assert (shift is None) == (entry["on"] == "latents") and (shift is None or shift[0] > 0)
    assert written["collapse"]["latents"] == 4 and 1 <= written["collapse"]["effective_rank"][0] <= 4
    assert -1 <= written["collapse"]["pairwise_cosine"][0] <= 1


def test_the_figures_are_those_of_the_model_asked_directly(standard: Path, export: Path, boxed: Path) -> None:
    """Predictions and KL of swapped latents and of the blanked image, one question at a time."""
    [task] = load_tasks(["microlab_test"], data_root=boxed)
    plain = Laavit(str(export))
    for name in ("latents_off", "image_blanked"):
        model = Laavit(str(export), intervention=name)
        for record, document in zip(
            read_records(standard / "interventions" / name / "records.jsonl"), task.dataset["test"]
        ):
            content = [{"type": "image", "image": document["image"]}, {"type": "text", "text": document["question"]}]
            chat = [{"role": "user", "content": content}]
            [answer] = model.answer([chat], Settings(4, ("\n\n",)))
            assert record["prediction"] == answer.text
            [before] = read(plain, [chat])
            chats = [chat]
            if model.intervention is not None and name == "image_blanked":
                chats = model.intervention.chats(Questions.of(chats))
            [after] = read(model, chats)
            assert record["kl"] == pytest.approx(kl(before.first, after.first), rel=1e-2, abs=1e-5)


def test_the_same_seed_gives_the_same_bits(standard: Path, export: Path, boxed: Path, tmp_path: Path) -> None:
    """Two of them again in another order, without the others, through the library; states of swapped latents, too."""
    names = ["image_shuffled", "latents_swapped", "latents_noised"]
    evaluate(
        export, ["microlab_test"], tmp_path, 4, limit=8, data_root=boxed, interventions=names, intervention_limit=LIMIT
    )
    again, before = found(tmp_path)["effects"], found(standard)["effects"]
    assert list(again) == names and all(again[name] == before[name] for name in names)


def test_a_model_without_latents_and_a_task_without_boxes(
    stock: Path, microlab_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The set leaves out what cannot be done and says why; no latents, no shift and no collapse."""
    with caplog.at_level("INFO"):
        evaluate(stock, ["microlab_test"], tmp_path, 4, limit=4, data_root=microlab_data, interventions=["standard"])
    written = found(tmp_path)
    assert list(written["effects"]) == ["image_blanked", "image_shuffled", "image_swapped"]
    assert written["collapse"] is None and written["skipped"]["latents_mean"] == "the model has no latents"
    assert "no column 'boxes' or 'bbox'" in written["skipped"]["image_inside_masked"]
    assert all(entry["latent_shift"] is None and entry["kl"][0] > 0 for entry in written["effects"].values())
    assert "latents_zeroed: left out, the model has no latents" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"interventions": ["latents_zero"]},
            r"is called 'latents_zero'.*did you mean 'latents_zeroed'",
        ),
        ({"interventions": ["image_inside_masked"]}, "cannot be done: the documents of microlab_test have no column"),
        (
            {"intervention": "latents_oracle"},
            "intervention cannot be done: the documents of microlab_test have no column",
        ),
        ({"interventions": ["standard"], "intervention_limit": 0}, "intervention_limit=0 was given"),
        ({"interventions": ["standard"], "latents": "off"}, "compared with the model as it is"),
        ({"interventions": ["standard"], "intervention": "image_blanked"}, "compared with the model as it is"),
    ],
)
def test_what_is_refused(
    arguments: dict[str, Any], message: str, export: Path, microlab_data: Path, tmp_path: Path
) -> None:
    """Before anything is answered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Laavit, "generate_until", lambda *_: pytest.fail("asked"))
        with pytest.raises(UserError, match=message):
            evaluate(export, ["microlab_test"], tmp_path, data_root=microlab_data, limit=2, **arguments)


def test_states_of_a_model_without_latents_are_refused(stock: Path) -> None:
    model = Laavit(str(stock), intervention="latents_mean")
    with pytest.raises(UserError, match="the model has no latents"):
        model.answer([[{"role": "user", "content": [{"type": "text", "text": "how many ?"}]}]], Settings(2, ()))


def test_sets_and_names_are_put_together_once() -> None:
    suite = Suite.of(["image_blanked", "standard"], answered=5, limit=9)
    assert suite.names[0] == "image_blanked" and len(suite.names) == len(set(suite.names)) == 12
    assert "image_blanked" not in suite.optional and len(suite.optional) == 11 and suite.limit == 5
    assert Suite.of(["latents_mean"], None, 9).limit == 9 and Suite.of(["latents_mean"]).limit is None
    assert torch.is_inference_mode_enabled() is False


def test_a_suite_that_was_stopped_asks_only_what_is_missing(
    export: Path, boxed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done before stays, unless the answers it is compared with are others."""
    given: dict[str, Any] = {"data_root": boxed, "limit": 4, "batch_size": 4}
    names = ["latents_mean", "image_blanked", "latents_first"]
    asked: list[str] = []
    answer = Laavit.answer_and_count

    def answer_and_count(self: Laavit, chats: Any, *more: Any) -> Any:
        name = type(self.intervention).__name__ if self.intervention else "-"
        if name == "FirstLatent" and "FirstLatent" not in asked:
            asked.append(name)
            raise KeyboardInterrupt
        asked.append(name)
        return answer(self, chats, *more)

    monkeypatch.setattr(Laavit, "answer_and_count", answer_and_count)
    with pytest.raises(KeyboardInterrupt):
        evaluate(export, ["microlab_test"], tmp_path, interventions=names, **given)
    assert len(set(asked)) == 4 and not (tmp_path / "interventions.json").exists()
    del asked[:-1]
    evaluate(export, ["microlab_test"], tmp_path, interventions=names, **given)
    assert asked[1:] == ["FirstLatent"]
    stopped = found(tmp_path)
    asked[1:] = []
    evaluate(export, ["microlab_test"], tmp_path, interventions=names, **given)  # a finished one is asked anew
    assert len(asked) == 1 + 4 and found(tmp_path) == stopped
