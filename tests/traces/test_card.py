"""The folder as it is pushed: the card's front matter is what `datasets` reads, and only the store's files go."""

import math
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from huggingface_hub.errors import LocalEntryNotFoundError

from laavit.registry import UserError
from laavit.structures import Sample
from laavit.traces import hub
from laavit.traces.card import card_text, write_card
from laavit.traces.filters import CorrectnessFilter
from laavit.traces.judging import judge_all
from laavit.traces.store import TraceStore


@pytest.fixture
def store(write):
    store = write("whole", range(10), quarantined=[4], laavit="0.1.0")
    samples = [Sample(f"s{i}", (), "?", f"answer {i} ü" if i < 6 else "x") for i in range(10)]
    spec = {"correctness": {"type": "CorrectnessFilter", "minimum": 1.0, "judge": None}}
    judge_all(store, samples, {"correctness": CorrectnessFilter()}, spec)
    store.write_verdicts("alignment", dict.fromkeys(store.ids, False), dict.fromkeys(store.ids, math.nan))
    return TraceStore(store.path)


def test_datasets_loads_the_folder_offline(store, tmp_path):
    write_card(store)
    (store.path / ".lock").touch()
    rows = load_dataset(str(store.path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["sample_id"][:] == list(store.ids)
    assert rows[0]["gaze_values"] == store[0].gaze.tolist()
    verdicts = load_dataset(str(store.path), "verdicts-correctness", split="train", cache_dir=str(tmp_path / "cache"))
    assert dict(zip(verdicts["sample_id"], verdicts["verdict"], strict=True)) == store.verdicts()["correctness"]


def test_the_card_says_what_is_there(store):
    text = card_text(store, "Traces of tiny")
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["configs"][0] == {"config_name": "default", "data_files": "shard-*.arrow", "default": True}
    assert front["size_categories"] == ["n<1K"] and front["pretty_name"] == "Traces of tiny"
    assert "| correctness | 5 (55.6 %) | 5 (55.6 %) | CorrectnessFilter, minimum=1.0 |" in body
    assert "| alignment | 0 (0.0 %) | 0 (0.0 %) |  |" in body
    assert "9 traces" in body and "`shard-*.json`: 1." in body and "`tiny`" in body
    assert store.digest(["correctness", "alignment"]) in body
    assert str(store.path.parent) not in text  # nothing of the machine it was made on


class FakeApi:
    """What the hub would have been asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def create_repo(self, repo_id: str, **options: object) -> None:
        self.calls.append((repo_id, options))

    def upload_folder(self, **options: object) -> None:
        self.calls.append((str(options["repo_id"]), options))


def test_push_uploads_the_store_s_files_alone(store):
    (store.path / "notes.txt").write_text("mine")
    (store.path / ".lock").touch()
    with pytest.raises(UserError, match=r"has no README\.md"):
        hub.push(store, "me/traces", api=FakeApi())
    write_card(store)
    api = FakeApi()
    assert hub.push(store, "me/traces", api=api) == "hf://datasets/me/traces"
    (_, made), (_, sent) = api.calls
    assert made["private"] is True and made["repo_type"] == "dataset"
    names = [
        *("README.md", "header.json", "shard-00000.arrow", "shard-00000.json", "shard-00001.arrow"),
        *("shard-00001.json", "shard-00002.arrow", "shard-00002.json", "verdicts/alignment.arrow"),
        *("verdicts/correctness.arrow", "verdicts/correctness.json"),
    ]
    assert sent["allow_patterns"] == names == [str(path) for path in hub.files_of(store)]


def test_a_damaged_store_is_not_pushed(store):
    write_card(store)
    file = store.path / "shard-00001.arrow"
    file.write_bytes(file.read_bytes()[:-1])
    api = FakeApi()
    with pytest.raises(UserError, match=r"not pushed: shard-00001.arrow truncated"):
        hub.push(store, "me/traces", api=api)
    assert not api.calls
    with pytest.raises(UserError, match="'traces' is no repository"):
        hub.push(store, "traces", api=api)


def test_addresses(store, monkeypatch):
    asked = []

    def download(repository: str, **options: object) -> str:
        asked.append((repository, options["revision"]))
        if repository == "me/none":
            raise LocalEntryNotFoundError("not in the cache\nand more")
        return str(store.path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.local_store("some/folder") == Path("some/folder") and not asked
    assert len(TraceStore(hub.local_store("hf://datasets/me/traces"))) == 9
    hub.local_store("hf://datasets/me/traces@v1")
    assert asked == [("me/traces", None), ("me/traces", "v1")]
    with pytest.raises(UserError, match=r"'hf://datasets/me/none' cannot be downloaded: not in the cache$"):
        hub.local_store("hf://datasets/me/none")
    for bad in ("hf://models/me/x", "hf://datasets/x", "hf://datasets/me/x@", "hf://datasets/../x"):
        with pytest.raises(UserError, match=f"'{bad}' is no trace store's address"):
            hub.local_store(bad)
