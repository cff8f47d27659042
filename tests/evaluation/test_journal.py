"""The journal of answers: what is taken over, what is not, and what a kill or a full disk leaves."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from laavit.evaluation.journal import Answer, Journal, drop, question_key
from laavit.registry import UserError

ABOUT = {"weights": "a" * 64, "latents": "on", "system": None, "versions": {"torch": "2"}}
FIRST = Answer("mmvp", 0, "k0", "(a) \u2028 é", 10, 2, 4, 0.25)
SECOND, THIRD = replace(FIRST, number=1, key="k1", text="b"), replace(FIRST, task="pope", key="k2", text="c")


def written(folder: Path, *answers: Answer, rank: int = 0) -> Path:
    journal = Journal(folder, ABOUT, rank)
    journal.add(answers)
    journal.close()
    return journal.file


def test_answers_are_found_again_by_what_was_asked(tmp_path: Path) -> None:
    written(tmp_path, FIRST, SECOND)
    again = Journal(tmp_path, ABOUT)
    assert len(again) == 2 and again.get("mmvp", 0, "k0") == FIRST and again.get("mmvp", 1, "k1") == SECOND
    assert again.get("mmvp", 0, "k1") is None and again.get("pope", 0, "k0") is None  # another prompt, another task
    again.add([THIRD])
    again.close()
    assert len(Journal(tmp_path, ABOUT)) == 3
    assert (tmp_path / "answers.jsonl").read_text().count('"format"') == 1  # one head
    drop(tmp_path)
    assert list(tmp_path.iterdir()) == [] and len(Journal(tmp_path, ABOUT)) == 0


def test_an_answer_is_in_the_file_before_the_next_is_asked(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "folder", ABOUT)
    assert not journal.file.exists()  # nothing is written before there is an answer
    journal.add([FIRST])
    assert json.loads(journal.file.read_text().split("\n")[1])["text"] == FIRST.text
    journal.close()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    """At whatever byte the kill came, a character's middle included; what follows starts on a line of its own."""
    file = written(tmp_path, SECOND, FIRST)
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    again = Journal(tmp_path, ABOUT)
    assert again.get("mmvp", 0, "k0") is None and again.get("mmvp", 1, "k1") == SECOND
    again.add([FIRST])
    again.close()
    assert file.read_bytes() == content


def test_a_torn_first_line_is_no_journal_yet(tmp_path: Path) -> None:
    file = written(tmp_path, FIRST)
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    again = Journal(tmp_path, ABOUT)
    assert len(again) == 0
    again.add([FIRST])
    again.close()
    assert file.read_bytes() == whole


def test_every_rank_writes_its_own_and_reads_all(tmp_path: Path) -> None:
    assert written(tmp_path, FIRST).name == "answers.jsonl"
    assert written(tmp_path, SECOND, rank=1).name == "answers-1.jsonl"
    assert written(tmp_path, THIRD, rank=2).name == "answers-2.jsonl"
    before = (tmp_path / "answers-2.jsonl").read_bytes()
    (tmp_path / "answers-2.jsonl").write_bytes(before + b'{"torn')
    for rank in range(2):  # two go on from three
        journal = Journal(tmp_path, ABOUT, rank)
        assert len(journal) == 3 + rank
        journal.add([replace(FIRST, number=7 + rank)])
        journal.close()
    assert len(Journal(tmp_path, ABOUT)) == 5
    assert (tmp_path / "answers-2.jsonl").read_bytes() == before + b'{"torn'  # nobody writes into another's file
    (tmp_path / "answers_of_mine.jsonl").write_text("kept\n")
    drop(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["answers_of_mine.jsonl"]


def test_answers_of_another_evaluation_are_refused_by_name(tmp_path: Path) -> None:
    written(tmp_path, FIRST)
    other = ABOUT | {"latents": "off", "weights": "b" * 64}
    with pytest.raises(UserError) as caught:
        Journal(tmp_path, other)
    said = str(caught.value)
    assert 'latents was "on" and is "off"' in said and "weights was" in said and "system" not in said
    assert "--fresh drops them" in said and len(said) < 500
    with pytest.raises(UserError, match="more was null and is 1"):
        Journal(tmp_path, ABOUT | {"more": 1})
    with pytest.raises(UserError, match="format was"):
        head, rest = (tmp_path / "answers.jsonl").read_text().split("\n", 1)
        (tmp_path / "answers.jsonl").write_text(head.replace('"format": 1', '"format": 0') + "\n" + rest)
        Journal(tmp_path, ABOUT)


@pytest.mark.parametrize("line", ["no json", "[1]", '{"task": "a"}'])
def test_what_is_no_journal_is_refused(tmp_path: Path, line: str) -> None:
    file = written(tmp_path, FIRST)
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"is no journal of answers .*--fresh starts anew"):
        Journal(tmp_path, ABOUT)
    drop(tmp_path)
    file.write_text(line + "\n")
    with pytest.raises(UserError, match="--fresh"):
        Journal(tmp_path, ABOUT)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, FIRST)
    journal = Journal(tmp_path, ABOUT)
    kept = file.rename(tmp_path / "kept")
    file.symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot be written: No space left on device; those that were written are kept"):
        journal.add([SECOND])
    file.unlink()
    kept.rename(file)
    assert Journal(tmp_path, ABOUT).get("mmvp", 0, "k0") == FIRST


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read: "):
        Journal(tmp_path / "file" / "out", ABOUT)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        written(tmp_path, FIRST)


def test_a_key_hangs_on_prompt_images_and_settings(tmp_path: Path) -> None:
    def key(text: str = "how many?", colour: str = "red", settings: tuple = (4, ("\n",)), images: int = 1) -> str:
        shown = [{"type": "image", "image": Image.new("RGB", (2, 2), colour)}] * images
        return question_key(
            [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}],
            settings,
            lambda image: image.tobytes().hex(),
        )

    plain = key()
    others = [key("how many"), key(colour="blue"), key(settings=(5, ("\n",))), key(settings=(4, ())), key(images=2)]
    assert key() == plain and len({plain, *others}) == 6
