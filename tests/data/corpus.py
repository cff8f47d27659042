"""Good and bad records mixed in one Visual-CoT file with real image files: what a run over broken data must survive.

``write(folder)`` makes the file and its images. Every bad input ends in quarantine, at reading (``RECORDS``) or when
its images are opened (``IMAGES``), and every good record is there. Whole files that are broken are in ``FILES``.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."


class Corpus(NamedTuple):
    """What ``write`` made.

    Args:
        annotations: the JSON file. root: its image folder.
        good_ids: of the samples that must all be there, in order.
        bad_ids: of the samples that must all be in quarantine, at reading or by their images -> what the reason says.
            Records whose id cannot be read, and doubles of good ones, are not among them.
    """

    annotations: Path
    root: Path
    good_ids: tuple[str, ...]
    bad_ids: dict[str, str]


def four(
    question_id: Any = 1,
    path: Any = "cot/a.png",
    pixels: str = "[10, 10, 50, 40]",
    box: str = "[0.1, 0.2, 0.5, 0.8]",
    **changes: Any,
) -> dict[str, Any]:
    """A record as viscot_363k.json has them, of a 100 x 50 image."""
    record = {
        "dataset": "flickr30k",
        "split": "train",
        "question_id": question_id,
        "image": [path, f"{path}###{pixels}"],
        "conversations": talk(f"<image>\nWhat does the child wear?{REQUEST}", box, "<image>", "Blue shorts."),
    }
    return record | changes


def two(question_id: Any = 1, path: Any = "cot/a.png", **changes: Any) -> dict[str, Any]:
    """A record of the short form."""
    record = {
        "dataset": "flickr30k",
        "split": "train",
        "question_id": question_id,
        "image": [path],
        "conversations": talk(
            "<image>\nWhat does the child wear?\nProvide a short and direct response.",
            "<lvr>\n<answer> Blue shorts. </answer>",
        ),
        "bboxes": [[0.1, 0.2, 0.5, 0.8]],
    }
    return record | changes


def talk(*values: Any) -> list[dict[str, Any]]:
    """Turns of human and gpt."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    """The record, lacking one key."""
    return {k: v for k, v in record.items() if k != key}


def asked(question: Any, answer: Any = "<answer>no</answer>") -> dict[str, Any]:
    """A short record with another question or answer."""
    return two(conversations=talk(question, answer))


#: name -> (a record, what the reason says). A record is plain data, or the text or the bytes that stand in the file.
RECORDS: dict[str, tuple[Any, str]] = {
    "a text": ("x", "format: .*value of type str"),
    "null": (None, "format: .*nothing"),
    "a number": (3, "format: .*type int"),
    "a list": ([four()], "format: .*type list"),
    "an empty object": ({}, "id: 'question_id' is None"),
    "broken inside": (b'{"question_id": 1 "image": []}', "format: .*not valid JSON"),
    "a trailing comma": (b'{"question_id": 1,}', "format: .*not valid JSON"),
    "deep nesting": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "format: it is .*nested too deeply"),
    "nested as deep as parses": (two(more=json.loads("[" * 300 + "]" * 300)) | {"image": 3}, "image"),
    "a huge number": (b'{"question_id": ' + b"9" * 5000 + b"}", "format: .*not valid JSON"),
    "a huge id": (b'{"question_id": ' + b"9" * 200 + b"}", "id: "),
    "a control character": (b'{"question_id": "a\x01"}', "format: .*not valid JSON"),
    "no id": (without(four(), "question_id"), "id: 'question_id' is None"),
    "id of another type": (four([1]), "id: "),
    "id is true": (four(True), "id: "),
    "id is a fraction": (four(1.5), "id: "),
    "id is blank": (four("  "), "id: "),
    "dataset is a number": (four(dataset=3), "dataset: "),
    "split is a list": (four(split=["train"]), "split: "),
    "image is missing": (without(four(), "image"), "image: it is None"),
    "image is an empty list": (four(image=[]), "image: "),
    "image holds a number": (four(image=["a.png", 3]), "image: it holds .*int"),
    "image is an object": (four(image={"path": "a.png"}), "image: "),
    "path is empty": (four(image=[""]), "image: its path is empty"),
    "path is blank": (four(image=[" "]), "image: its path is empty"),
    "null character in a path": (four(path="cot/\0a.png"), "image: .*null character"),
    "absolute path": (four(path="/etc/passwd"), "image: .*is absolute or"),
    "climbing path": (four(path="cot/../../a.png"), "image: .*is absolute or"),
    "windows path": (four(path="C:\\a.png"), "image: .*is absolute or"),
    "backslash climb": (four(path="cot\\..\\..\\a.png"), "image: .*is absolute or"),
    "network path": (four(path="\\\\host\\a.png"), "image: .*is absolute or"),
    "pixel box is cut": (four(pixels="[1, 2"), "box: .*not of the form"),
    "pixel box of three": (four(pixels="[1, 2, 3]"), "box: .*not four numbers"),
    "no turns": (without(four(), "conversations"), "conversations: there is nothing"),
    "conversations is a text": (four(conversations="q"), "conversations: "),
    "three turns": (four(conversations=talk("q", "[0,0,1,1]", "a")), "conversations: there is 3 turns"),
    "a turn is a text": (four(conversations=["q", "a"]), "conversations: turn 1"),
    "speakers swapped": (four(conversations=talk("q", "a")[::-1]), "conversations: turn 1"),
    "a turn without a value": (four(conversations=[{"from": "human"}, {"from": "gpt"}]), "conversations: turn 1"),
    "question is a list": (asked(["q"]), "conversations: turn 1"),
    "question is empty": (asked("<image>\n" + REQUEST), "question: it is empty"),
    "question of 50,000 characters": (asked("why " * 12_500 + "?"), "question: it has 50001 characters"),
    "answer is empty": (asked("q?", "<answer> </answer>"), "answer: it is empty"),
    "answer is a number": (asked("q?", 7), "conversations: turn 2"),
    "half a surrogate": (asked("q \ud800?"), "encoding: "),
    "invalid UTF-8": (json.dumps(asked("q XX?")).encode().replace(b"XX", b"\xff\xfe"), "encoding: "),
    "Latin-1 in a path": (json.dumps(two(path="cot/XX.png")).encode().replace(b"XX", b"\xe9"), "encoding: "),
    "no box in its turn": (four(box="I cannot tell"), "box: .*holds no box"),
    "box of words": (four(box="[a, b, c, d]"), "box: .*not four numbers"),
    "box of five": (four(box="[0, 0, 1, 1, 1]"), "box: .*not four numbers"),
    "NaN in a box": (four(box="[nan, 0, 1, 1]"), "box: .*not finite"),
    "infinity in a box": (four(box="[0, 0, 1, 1e999]"), "box: .*not finite"),
    "inverted box": (four(box="[0.5, 0, 0.4, 1]"), "box: .*inverted"),
    "box too far out": (four(box="[0, 0, 1.02, 1]"), "box: .*1 % past"),
    "box far below zero": (four(box="[-0.02, 0, 1, 1]"), "box: .*1 % past"),
    "box outside altogether": (two(bboxes=[[1.001, 0, 1.005, 1]]), "box: .*no area"),
    "flat box": (two(bboxes=[[0.5, 0, 0.5, 1]]), "box: .*no area"),
    "bboxes is a text": (two(bboxes="[0,0,1,1]"), "box: 'bboxes'"),
    "bboxes of texts": (two(bboxes=[["0", "0", "1", "1"]]), "box: .*not four numbers"),
    "bboxes of null": (two(bboxes=[None]), "box: .*not four numbers"),
    "bboxes with a bare NaN": (two(bboxes=[[float("nan"), 0, 1, 1]]), "box: .*not finite"),
    "bboxes with a huge number": (two(bboxes=[[0, 0, 10**400, 1]]), "box: .*not four numbers"),
    "box counts differ": (four(box="[0, 0, 1, 1] [0, 0, 0.5, 1]"), "box: 2 normalised boxes"),
    "box on which image": (two(image=["cot/a.png", "cot/b.png"]), "box: .*on which of the 2 images"),
}

#: name -> (what makes its image file, or None, what the reason says); the record shows ``cot/NAME.png``
IMAGES: dict[str, tuple[Callable[[Path], object] | None, str]] = {
    "missing": (None, "there is no image"),
    "zero bytes": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text("no picture"), "cannot be read"),
    "a folder": (lambda path: path.mkdir(), "there is no image"),
    "cut short": (lambda path: path.write_bytes(png()[:2000]), "cannot be read"),
    "a header alone": (lambda path: path.write_bytes(png()[:40]), "cannot be read"),
    "JPEG cut short": (lambda path: path.write_bytes(png("JPEG")[:1500]), "cannot be read"),
    "30,000 x 30,000 pixels": (lambda path: path.write_bytes(bomb()), "cannot be read"),
    "a link out of the root": (lambda path: path.symlink_to(path.parents[2] / "secret.png"), "leads out of"),
    "a link to itself": (lambda path: path.symlink_to(path), "image"),
    "a broken link": (lambda path: path.symlink_to(path.with_name("nothing")), "there is no image"),
    "a pipe": (lambda path: os.mkfifo(path), "there is no image"),
}

#: name -> a pixel box that the image's size refutes, what the reason says
PIXELS: dict[str, tuple[str, str]] = {
    "pixel box too far out": ("[1, 1, 102, 2]", "100 x 50 pixels"),
    "pixel box of no area": ("[5, 5, 5, 9]", "no area"),
}

#: name -> an unusual image file that is good
UNUSUAL: dict[str, Callable[[Path], object]] = {
    "one pixel": lambda path: Image.new("RGB", (1, 1), "red").save(path, "PNG"),
    "CMYK": lambda path: Image.new("CMYK", (60, 40), (0, 200, 0, 0)).save(path, "JPEG"),
    "grey": lambda path: Image.new("L", (60, 40), 90).save(path, "PNG"),
    "16 bits": lambda path: Image.fromarray(np.full((40, 60), 40_000, np.uint16)).save(path, "PNG"),
    "16 bits TIFF": lambda path: Image.fromarray(np.full((40, 60), 40_000, np.uint16)).save(path, "TIFF"),
    "palette with transparency": lambda path: Image.new("P", (60, 40)).save(path, "PNG", transparency=0),
    "animated": lambda path: Image.new("RGB", (60, 40)).save(
        path, "GIF", save_all=True, append_images=[Image.new("RGB", (60, 40), "red")]
    ),
    "turned by EXIF": lambda path: Image.new("RGB", (40, 60)).save(path, "JPEG", exif=turned()),
    "JPEG named PNG": lambda path: path.write_bytes(png("JPEG")),
    "a link within the root": lambda path: path.symlink_to(path.with_name("a.png")),
}


def png(kind: str = "PNG") -> bytes:
    """A noisy image file of 60 x 40 pixels."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


def bomb(side: int = 30_000) -> bytes:
    """A PNG that claims side x side pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + png()[33:]


def turned(orientation: int = 6) -> Image.Exif:
    """EXIF data of a photograph that lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def encoded(record: Any) -> bytes:
    """A record as it stands in the file."""
    return record if isinstance(record, bytes) else json.dumps(record).encode()


def good_records() -> list[dict[str, Any]]:
    """Records that are good, of both forms, numbers and texts as ids."""
    plain = [
        four(1),
        two(2),
        four("three"),
        two(4, image="cot/b.png", bboxes=[]),
        two(5, image=["cot/a.png###[10, 10, 50, 40]"], bboxes=None),
        four(6, box="[-0.005, 0, 0.5, 1.002]"),
        two(7, conversations=talk("这是什么颜色？", "<answer>藍 \u202eü</answer>"), more={"a": [1, None]}),
        two(8, image=["cot/a.png", "cot/b.png"], bboxes=None),
        four(9, dataset="gqa", split="val"),
    ]
    unusual = [two(100 + i, path=f"cot/{name}.png", bboxes=[]) for i, name in enumerate(UNUSUAL)]
    return plain + unusual


def write(folder: Path) -> Corpus:
    """Write ``folder/annotations.json`` and ``folder/images``: good records and every bad one, one after the other."""
    root = folder / "images"
    (root / "cot").mkdir(parents=True)
    for name, size in (("a", (100, 50)), ("b", (40, 40)), ("secret", (9, 9))):
        path = folder / "secret.png" if name == "secret" else root / "cot" / f"{name}.png"
        Image.new("RGB", size, "blue").save(path)
    for name, make in UNUSUAL.items():
        make(root / "cot" / f"{name}.png")
    bad: list[Any] = []
    reasons: dict[str, str] = {}
    for number, (record, reason) in enumerate(RECORDS.values()):
        own = isinstance(record, dict) and type(record.get("question_id")) is int
        if own:  # every record with a readable id has one of its own
            record = record | {"question_id": 1000 + number}
            reasons[str(1000 + number)] = reason
        bad.append(record)
    for number, (name, (maker, reason)) in enumerate(IMAGES.items()):
        if maker is not None:
            maker(root / "cot" / f"{name}.png")
        bad.append(two(2000 + number, path=f"cot/{name}.png"))
        reasons[str(2000 + number)] = reason
    for number, (pixels, reason) in enumerate(PIXELS.values()):
        bad.append(two(3000 + number, image=[f"cot/a.png###{pixels}"], bboxes=None))
        reasons[str(3000 + number)] = reason
    bad += [four(1), two(2, more="other content")]  # a duplicate, and another record of the same id
    good = good_records()
    mixed: list[Any] = []
    for number, record in enumerate(bad):
        if number % 4 == 0 and good:
            mixed.append(good.pop(0))
        mixed.append(record)
    mixed += good
    (folder / "annotations.json").write_bytes(b"[" + b",\n ".join(map(encoded, mixed)) + b"]\n")
    ids = tuple(str(record["question_id"]) for record in good_records())
    return Corpus(folder / "annotations.json", root, ids, reasons)


def _list(*records: Any) -> bytes:
    return b"[" + b", ".join(map(encoded, records)) + b"]"


#: name -> (a file's bytes, what the one error says)
FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "not valid JSON: it is empty"),
    "white space": (b" \n ", "not valid JSON: it is empty"),
    "a web page": (b"<html>404</html>", "not valid JSON: it begins with '<'"),
    "a number": (b"3", "not valid JSON"),
    "cut inside a record": (_list(four(1), four(2))[:-60], "cut short, or wrong, within record 1"),
    "cut between records": (_list(four(1), four(2))[:-1], "after record 1, the list is not closed"),
    "cut after a comma": (b"[" + encoded(four(1)) + b",", "cut short before record 1"),
    "a comma is missing": (b"[" + encoded(four(1)) + encoded(four(2)) + b"]", "after record 0, '{' follows"),
    "a quote is missing": (b'[{"a": "x}, {"b": 1}]', "not valid JSON"),
    "brackets without end": (b"[" * 200_000, "not valid JSON"),
    "no records": (b"[]", "holds no records"),
    "an object without records": (b'{"other": []}', "no good record"),
    "every record is bad": (_list("x", {}, four([])), "no good record among 3"),
    "UTF-16": (json.dumps([four()]).encode("utf-16"), "UTF-16"),
    "binary": (bytes(range(256)), "not valid JSON"),
    "gzip cut short": (gzip.compress(_list(*map(four, range(200))))[:-20], "gzip file that is cut short or damaged"),
    "gzip damaged": (b"\x1f\x8b" + b"nonsense" * 9, "gzip file that is cut short or damaged|cannot be read"),
    "gzip of nothing": (gzip.compress(b""), "it is empty"),
}

#: name -> a file's bytes that hold the records 0, 1, 2, 3 of the four-turn form
FORMS: dict[str, Callable[[], bytes]] = {
    "a list": lambda: _list(*map(four, range(4))),
    "an indented list": lambda: json.dumps([four(i) for i in range(4)], indent=2).encode(),
    "with a byte-order mark": lambda: b"\xef\xbb\xbf" + _list(*map(four, range(4))),
    "JSON lines": lambda: b"\n".join(encoded(four(i)) for i in range(4)),
    "JSON lines of Windows": lambda: b"\xef\xbb\xbf" + b"\r\n\r\n".join(encoded(four(i)) for i in range(4)) + b"\r\n",
    "a gzipped list": lambda: gzip.compress(_list(*map(four, range(4)))),
    "gzipped JSON lines": lambda: gzip.compress(b"\n".join(encoded(four(i)) for i in range(4))),
    "two gzip members": lambda: gzip.compress(b"[") + gzip.compress(_list(*map(four, range(4)))[1:]),
}
