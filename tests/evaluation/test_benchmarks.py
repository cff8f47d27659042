"""Every benchmark from a small local copy in its published schema, under both protocols, and by lmms-eval's command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lmms_command import lmms_eval
from published import BLINK, write_all
from transformers import Qwen2_5_VLForConditionalGeneration

from laavit.evaluation.benchmarks import Benchmark, benchmarks
from laavit.evaluation.paper_tasks import BY_LETTER, doc_to_messages, question_of
from laavit.evaluation.records import read_records
from laavit.evaluation.run import evaluate
from laavit.evaluation.tasks import load_tasks, task_manager
from laavit.paths import project_data
from laavit.registry import UserError

#: One of every schema and every trap; the rest of BLINK and the other parts are slow.
SOME = ["mmvp", "vstar_bench", "vstar_bench_direct_attributes", "blink_forensic_detection", "blink_relative_depth"]
SOME += ["mmstar", "hallusion_bench_image", "pope", "pope_adv", "cv_bench", "cv_bench_3d"]
REST = [name for name, entry in benchmarks().items() if not entry.members and name not in SOME]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets are cached in a folder of the test session, and nothing is asked of the hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def speaker(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student made to answer with one word: A, B, yes or no."""
    folder = tmp_path_factory.mktemp("speaker") / "export"
    shutil.copytree(export, folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    head, end = model.lm_head.weight.data, vocabulary["<|im_end|>"]
    said = [vocabulary[word] for word in ("A", "B", "yes", "no")]
    rows = head[said].clone() * 4
    head.zero_()
    head[said] = rows
    head[said, 0] = 0
    head[end, 0] = 20  # after a word, whose embedding points there, the answer ends
    model.get_input_embeddings().weight.data[said] = 0
    model.get_input_embeddings().weight.data[said, 0] = 100
    model.save_pretrained(folder)
    return folder


Evaluated = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def evaluated(speaker: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """protocol -> summary, records"""
    out = tmp_path_factory.mktemp("evaluated")
    found = {}
    for protocol in ("lmms", "paper"):
        summary = evaluate(speaker, SOME, out / protocol, batch_size=16, data_root=root, protocol=protocol)
        assert summary is not None and summary["protocol"] == protocol
        found[protocol] = summary, read_records(out / protocol / "records.jsonl")
    return found


def test_every_question_is_answered_and_judged_under_both_protocols(evaluated: Evaluated) -> None:
    asked = dict.fromkeys(SOME, 8) | {
        "vstar_bench": 16,
        "mmstar": 12,
        "hallusion_bench_image": 12,
        "pope": 24,
        "cv_bench": 16,
    }
    for protocol, (summary, records) in evaluated.items():
        assert {name: entry["n"] for name, entry in summary["tasks"].items()} == asked
        assert {record["correct"] for record in records} == {True, False}
        assert len({record["prediction"] for record in records}) > 2, protocol
        for name, entry in summary["tasks"].items():
            assert entry["figures"]["micro"] == entry["accuracy"]
            ids = [record["id"] for record in records if record["task"] == name]
            assert len(set(ids)) == len(ids) == entry["n"]
    ids = [[(record["task"], record["id"]) for record in records] for _, records in evaluated.values()]
    assert ids[0] == ids[1]  # so that two protocols, too, can be paired


def test_kinds_and_groups(evaluated: Evaluated) -> None:
    summary, records = evaluated["paper"]
    kinds = {name: set(entry["by_kind"]) for name, entry in summary["tasks"].items()}
    assert kinds["vstar_bench"] == {"direct_attributes", "relative_position"}
    assert kinds["vstar_bench_direct_attributes"] == {"direct_attributes"}
    assert kinds["blink_forensic_detection"] == {"Forensic_Detection"}
    assert kinds["mmstar"] == {"coarse perception", "instance reasoning", "math"}
    assert kinds["hallusion_bench_image"] == {"VD", "VS"}
    assert kinds["pope"] == {"adversarial", "popular", "random"}
    assert kinds["cv_bench"] == {"Count", "Relation", "Depth", "Distance"}
    pairs = [record["groups"]["pair"] for record in records if record["task"] == "mmvp"]
    assert pairs == ["48", "48", "49", "49", "50", "50", "51", "51"]  # Index 97 ... 104: 99 and 100 are a pair


def test_figures_are_those_of_lmms_eval_on_one_scale(evaluated: Evaluated) -> None:
    """Whatever lmms-eval reports for a benchmark is found again among the figures computed from the records."""
    tasks = evaluated["lmms"][0]["tasks"]
    figures = {name: entry["figures"] for name, entry in tasks.items()}
    metrics = {name: entry["metrics"] for name, entry in tasks.items()}
    assert figures["mmvp"]["pair"] == metrics["mmvp"]["mmvp_pair_accuracy"]
    assert 100 * figures["vstar_bench"]["micro"] == pytest.approx(metrics["vstar_bench"]["vstar_overall_acc"])
    attributes = metrics["vstar_bench_direct_attributes"]["vstar_direct_attributes_acc"]
    assert 100 * figures["vstar_bench_direct_attributes"]["micro"] == pytest.approx(attributes)
    assert 100 * tasks["vstar_bench"]["by_kind"]["direct_attributes"]["accuracy"] == pytest.approx(attributes)
    assert figures["blink_relative_depth"]["micro"] == metrics["blink_relative_depth"]["blink_acc"]
    assert figures["mmstar"]["macro"] == pytest.approx(metrics["mmstar"]["average"])
    assert figures["mmstar"]["macro"] != pytest.approx(figures["mmstar"]["micro"])
    for ours, theirs in {"micro": "aAcc", "pair": "qAcc", "figure": "fAcc"}.items():
        assert figures["hallusion_bench_image"][ours] == pytest.approx(metrics["hallusion_bench_image"][theirs])
    for ours, theirs in {"micro": "accuracy", "precision": "precision"}.items():
        assert figures["pope"][ours] == pytest.approx(metrics["pope"][f"pope_{theirs}"])
    assert metrics["pope"]["pope_yes_ratio"] == 0.5  # of the labels, whatever is answered
    said = [record["read"] for record in evaluated["lmms"][1] if record["task"] == "pope"]
    assert figures["pope"]["yes_ratio"] == said.count("yes") / 24 != 0.5
    assert figures["cv_bench"]["micro"] == metrics["cv_bench"]["cv_bench_acc"]
    assert figures["cv_bench"]["macro"] == (figures["cv_bench"]["2D"] + figures["cv_bench"]["3D"]) / 2
    assert figures["cv_bench"]["3D"] == figures["cv_bench_3d"]["macro"]


def test_the_papers_protocol_reads_what_is_offered_and_nothing_else(evaluated: Evaluated) -> None:
    summary, records = evaluated["paper"]
    for record in records:
        assert record["correct"] == (record["read"] == record["target"])
        letters = not record["task"].startswith(("pope", "hallusion"))
        assert record["read"] in ({"A", "B", None} if letters else {"yes", "no", None})
    unread = {name: entry["unread"] for name, entry in summary["tasks"].items()}
    assert sum(unread.values()) == sum(record["read"] is None for record in records) > 0


def test_prompts_of_the_papers_protocol(root: Path) -> None:
    names = ["mmvp", "vstar_bench", "blink_forensic_detection", "mmstar", "cv_bench", "pope"]
    texts, documents = {}, {}
    for task in load_tasks(names, data_root=root, protocol="paper"):
        documents[task.config.task] = list(task.test_docs())
        texts[task.config.task] = question_of(documents[task.config.task][0]).prompt
    assert texts["mmvp"] == f"Is the circle left of the square?\nA. Yes\nB. No\n{BY_LETTER}"
    assert texts["vstar_bench"].count(BY_LETTER) == 1
    assert texts["mmstar"] == f"What is the colour?\nA. dark, very blue\nB. red\nC. green\nD. yellow\n{BY_LETTER}"
    other = question_of(documents["mmstar"][3])  # in another form: as it is published
    assert other.text == documents["mmstar"][3]["question"] and dict(other.offered) == dict(zip("ABCD", "1234"))
    assert texts["cv_bench"].startswith("Which one?\nSelect from the following choices. Count\n(A) 0\n(B) 3\n")
    assert texts["pope"] == "Is there a snowboard in the image?\nAnswer with yes or no directly."
    [message] = doc_to_messages(documents["blink_forensic_detection"][0])
    assert [part["type"] for part in message["content"]] == ["image"] * 4 + ["text"]
    with pytest.raises(UserError, match="'C' is none of A, B, which are offered by 'Which"):
        question_of(documents["mmvp"][0] | {"Question": "Which?", "Correct Answer": "(c)"})
    unreadable = documents["mmstar"][0] | {"question": "What? Options: A: one, B: two", "answer": "C"}
    assert list(question_of(unreadable).offered) == list("ABCD")  # not all options could be read: letters alone
    with pytest.raises(UserError, match="no benchmark's"):
        question_of({"question": "What?", "reply": ""})


def test_mistakes(speaker: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"protocol=papr was given; .*'paper'"):
        evaluate(speaker, ["mmvp"], tmp_path, data_root=root, protocol="papr")
    with pytest.raises(UserError, match="task 'microlab_test' has no protocol 'paper'"):
        evaluate(speaker, ["microlab_test"], tmp_path, data_root=root, protocol="paper")


class Plain(yaml.SafeLoader):
    """Names of functions as text."""


Plain.add_constructor("!function", lambda loader, node: node.value)


@pytest.mark.parametrize("entry", [entry for entry in benchmarks().values() if not entry.members], ids=lambda e: e.name)
def test_task_files_and_the_registry_agree(entry: Benchmark) -> None:
    file = project_data("eval") / "tasks" / "paper" / f"{entry.task('paper')}.yaml"
    loaded = yaml.load(file.read_text(), Plain)
    wanted = (entry.task("paper"), entry.repository, entry.config, entry.split)
    assert (loaded["task"], loaded["dataset_path"], loaded.get("dataset_name"), loaded["test_split"]) == wanted
    theirs = task_manager()._get_config(entry.task("lmms"))
    assert (theirs["dataset_path"], theirs.get("dataset_name") or "default", theirs["test_split"]) == (
        entry.repository,
        entry.config or "default",
        entry.split,
    )


def _equal_to_the_command(
    names: dict[str, str], summaries: dict[str, dict[str, Any]], model: Path, root: Path, out: Path
) -> None:
    """lmms-eval's command, run where the copies lie, against our summaries; ``names``: its name of a task -> ours."""
    results = json.loads(lmms_eval(model, list(names), out, "--batch_size", "7", cwd=root).read_text())["results"]
    for theirs, ours in names.items():
        entry = summaries["paper" if theirs.startswith("paper_") else "lmms"]["tasks"][ours]
        found = {key.partition(",")[0]: value for key, value in results[theirs].items() if key.endswith(",none")}
        found = {key: value for key, value in found.items() if "_stderr" not in key and isinstance(value, float | int)}
        assert found == pytest.approx(entry["metrics"]), theirs


def test_lmms_evals_own_command_gives_equal_scores(
    evaluated: Evaluated, speaker: Path, root: Path, tmp_path: Path
) -> None:
    """V*'s parts alone cannot be had from it: their files hand `category` to `load_dataset`."""
    names = ["mmvp", "vstar_bench", "blink_forensic_detection", "mmstar", "hallusion_bench_image", "pope_adv"]
    names += ["cv_bench_3d"]
    tasks = {benchmarks()[name].task("lmms"): name for name in names}
    tasks |= {f"paper_{name}": name for name in ("mmvp", "blink_forensic_detection", "vstar_bench_direct_attributes")}
    summaries = {protocol: summary for protocol, (summary, _) in evaluated.items()}
    _equal_to_the_command(tasks, summaries, speaker, root, tmp_path)


@pytest.mark.slow
def test_all_benchmarks(speaker: Path, root: Path, tmp_path: Path) -> None:
    summaries = {}
    for protocol in ("lmms", "paper"):
        names = [*REST, *SOME, "blink", "pope_full"]
        summary = evaluate(speaker, names, tmp_path / protocol, 16, data_root=root, protocol=protocol)
        assert summary is not None
        summaries[protocol] = summary
        assert set(summary["tasks"]) == {*REST, *SOME}
        assert len([name for name in summary["tasks"] if name.startswith("blink_")]) == len(BLINK)
    tasks = {benchmarks()[name].task(p): name for name in [*REST, *SOME] for p in summaries}
    for part in ("direct_attributes", "relative_position"):  # see above
        del tasks[f"vstar_bench_{part}"]
    _equal_to_the_command(tasks, summaries, speaker, root, tmp_path)
