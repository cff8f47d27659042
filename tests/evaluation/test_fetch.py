"""What `laavit data fetch` prints is what `--data-root` finds."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from published import write_all

from laavit.cli import main
from laavit.evaluation.benchmarks import benchmarks
from laavit.evaluation.fetch import downloads
from laavit.evaluation.tasks import load_tasks
from laavit.registry import UserError


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))


def fetched(command: str, hub: Path) -> None:
    """What the printed command does, with ``hub`` in place of the hub."""
    words = shlex.split(command)
    assert words[:2] == ["hf", "download"] and words[3:5] == ["--repo-type", "dataset"]
    source, folder = hub / words[2], Path(words[words.index("--local-dir") + 1])
    patterns = [words[place + 1] for place, word in enumerate(words) if word == "--include"]
    files = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
    for name in filter_repo_objects(files, allow_patterns=patterns):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder / name)


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "mmvp": ["mmvp"],
        "vstar_bench_direct_attributes": ["vstar_bench"],
        "blink_multi_view_reasoning": ["blink_multi_view_reasoning"],
        "blink": ["blink_jigsaw", "blink_counting"],
        "mmstar": ["mmstar"],
        "hallusion_bench_image": ["hallusion_bench_image"],
        "pope": ["pope"],
        "pope_adv": ["pope_adv"],
        "cv_bench": ["cv_bench", "cv_bench_3d"],
        "cv_bench_2d": ["cv_bench_2d"],
    }.items(),
)
def test_what_is_printed_is_found(
    name: str, parts: list[str], hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each benchmark fetched by itself: the card names files of others, which are not there."""
    assert main(["data", "fetch", name, "--root", str(tmp_path / "root")]) == 0
    note, command = capsys.readouterr().out.splitlines()
    assert note.startswith(f"# {benchmarks()[name].title}; ")
    fetched(command, hub)
    for protocol in ("lmms", "paper"):
        for task, whole in zip(
            *(load_tasks(parts, data_root=place, protocol=protocol) for place in (tmp_path / "root", hub))
        ):
            assert len(task.test_docs()) == len(whole.test_docs()) > 0


def test_one_download_a_repository_and_all_without_names(tmp_path: Path) -> None:
    every = downloads([], tmp_path)
    assert len(every) == 7 == len({download.repository for download in every})
    [blink] = [download for download in every if "BLINK" in download.repository]
    assert blink.patterns == ("README.md", "*/val-*.parquet")
    [two] = downloads(["blink_jigsaw", "blink_iq_test"], tmp_path)
    assert two.patterns == ("README.md", "Jigsaw/val-*.parquet", "IQ_Test/val-*.parquet")
    assert two.folder == tmp_path / "BLINK-Benchmark/BLINK"


def test_run_downloads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "laavit.evaluation.fetch.snapshot_download",
        lambda repository, **words: asked.append({"id": repository, **words}),
    )
    assert main(["data", "fetch", "mmstar", "--root", str(tmp_path), "--run"]) == 0
    wanted = {
        "repo_type": "dataset",
        "local_dir": tmp_path / "Lin-Chen/MMStar",
        "allow_patterns": ["README.md", "*.parquet"],
    }
    assert asked == [{"id": "Lin-Chen/MMStar", **wanted}]


def test_without_a_network_it_says_so_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(repository: str, **_: Any) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more lines")

    words = ["data", "fetch", "mmvp", "--root", str(tmp_path), "--run"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(words) == 2
    assert (
        capsys.readouterr().err
        == "error: HF_HUB_OFFLINE is set, so 'lmms-lab-eval/MMVP' is not fetched; unset it and try again\n"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("laavit.evaluation.fetch.snapshot_download", refused)
    assert main(words) == 2
    assert capsys.readouterr().err == "error: 'lmms-lab-eval/MMVP' could not be fetched from the hub: no connection\n"
    assert main(["data", "fetch", "mvp", "--root", str(tmp_path)]) == 2
    assert "did you mean 'mmvp'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_public_data_need_no_login_and_the_hub_is_asked_for_what_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a local copy the repository, configuration and split go to `load_dataset`, and no token is demanded."""
    asked: list[tuple[str, str | None, dict[str, Any]]] = []

    def loaded(path: str, name: str | None = None, **words: Any) -> None:
        asked.append((path, name, words))
        raise RuntimeError("seen enough")

    monkeypatch.setattr("lmms_eval.api.task.datasets.load_dataset", loaded)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    for name in ("mmvp", "mmstar", "pope_adv", "vstar_bench_direct_attributes"):
        with pytest.raises(UserError, match=f"the data of task '{name}' could not be loaded from '.*': seen enough"):
            load_tasks([name])
        path, config, words = asked[-1]
        assert (path, config) == (benchmarks()[name].repository, benchmarks()[name].config)
        assert not words.get("token") and "category" not in words
