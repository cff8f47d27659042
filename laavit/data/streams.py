"""The values of a JSON file one after another, read once, in bounded memory.

A file is a list of records, an object that holds such a list under a known key, or JSON lines, plain or gzipped, with
or without a byte-order mark: told apart by its content, never by its suffix. A value that does not parse is given as
``Broken`` and the next ones follow; a file whose structure is broken is one ``UserError``.

The standard library's scanner reads each value out of a buffer (it is in C; an event parser costs three times as
much). Bytes that are no UTF-8 become lone surrogates, which the record that holds them is refused for, not the file.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from laavit.registry import UserError

#: Bytes read at a time, and the most characters that one value may span.
CHUNK = 1 << 20
LONGEST = 1 << 26

_SPACE = re.compile(r"[ \t\n\r]*")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*("?)|[\[\]{}]', re.DOTALL)
_SCALAR = re.compile(r"[^,\]}\s]*")
_CLOSED = '[{"'  # a value that begins so says itself where it ends
_BETWEEN = ",]} \t\n\r"
_decode = json.JSONDecoder().raw_decode


class Broken(NamedTuple):
    """Stands for a value that cannot be parsed, with the reason."""

    reason: str


def values(
    path: Path, wrapper: str | None = None, seen: Callable[[int], object] = lambda position: None
) -> Iterator[tuple[str, Any]]:
    """Every record of a file with its place ('record 3', from 0, or 'line 4', from 1), in order.

    Args:
        wrapper: the key under which an object at the top holds the list of records.
        seen: is told how many bytes of the file have been read.

    Raises:
        UserError: the file cannot be read, is cut short, or its structure is no JSON.
    """
    text = _Text(path, seen)
    try:
        first = text.peek()
        if first == "[" or (first == "{" and wrapper is not None and _enter(text, wrapper)):
            yield from _items(text)
        elif first == "{":
            text.close()
            text = _Text(path, seen)
            yield from _lines(text)
        else:
            found = "it is empty" if not first else f"it begins with {first!r}"
            raise UserError(f"'{path}' is not valid JSON: {found}; allowed: a list of records, or JSON lines")
    finally:
        text.close()


class _Text:
    """A window onto the file's text: ``buffer`` from ``at`` on is what is not yet consumed."""

    def __init__(self, path: Path, seen: Callable[[int], object]) -> None:
        self.path, self.buffer, self.at = path, "", 0
        self._seen = seen
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        try:
            with path.open("rb") as file:
                head = file.read(2)
            self._raw = path.open("rb")
        except FileNotFoundError as error:
            raise UserError(f"the annotation file '{path}' does not exist") from error
        except OSError as error:
            raise UserError(f"the annotation file '{path}' cannot be read: {error.strerror}") from error
        self._file: IO[bytes] | gzip.GzipFile = self._raw
        if head == b"\x1f\x8b":
            self._file = gzip.GzipFile(fileobj=self._raw)
        if head in (b"\xff\xfe", b"\xfe\xff"):
            self.close()
            raise UserError(f"'{path}' is not valid JSON: it is UTF-16; allowed: UTF-8")
        self.more()

    def more(self) -> bool:
        """Read on; False at the file's end."""
        try:
            # as much again as is held, so that a long value is not scanned once a chunk
            chunk = self._file.read(max(CHUNK, len(self.buffer) - self.at))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"'{self.path}' is a gzip file that is cut short or damaged: {error}") from error
        except OSError as error:
            raise UserError(f"the annotation file '{self.path}' cannot be read: {error.strerror}") from error
        self._seen(self._raw.tell())
        self.buffer = self.buffer[self.at :] + self._decoder.decode(chunk, not chunk)
        self.at = 0
        if len(self.buffer) > LONGEST:
            raise UserError(f"'{self.path}' is not valid JSON: a value in it does not end within {LONGEST} characters")
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no white space, not consumed; '' at the end."""
        while True:
            match = _SPACE.match(self.buffer, self.at)
            assert match is not None, "the pattern matches everywhere"
            self.at = match.end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._raw.close()

    def value(self) -> Any:
        """The value that begins here, consumed; ``Broken`` where it ends but does not parse.

        Raises:
            EOFError: the file ends within it.
        """
        while True:
            reason = ""
            try:
                found, stop = _decode(self.buffer, self.at)
                if stop < len(self.buffer):
                    if self.buffer[self.at] in _CLOSED or self.buffer[stop] in _BETWEEN:
                        self.at = stop
                        return found
                    reason = (
                        "it is no number"  # or one that the buffer cuts: 12.5 reads as 12 as long as it ends in 12.
                    )
            except RecursionError:
                reason = "it is nested too deeply"
            except ValueError as error:
                reason = _said(error)
            if reason and (end := self._skip()) is not None:
                self.at = end
                return Broken(reason)
            if not self.more():
                if reason:
                    raise EOFError
                self.at = stop
                return found

    def _skip(self) -> int | None:
        """Where the value that begins here ends, by its brackets and quotes alone; None where the buffer ends first."""
        if self.buffer[self.at] not in _CLOSED:
            match = _SCALAR.match(self.buffer, self.at)
            assert match is not None, "the pattern matches everywhere"
            return match.end() if match.end() < len(self.buffer) else None
        depth = 0
        for token in _TOKEN.finditer(self.buffer, self.at):
            mark = token[0][0]
            if mark == '"' and not token[1]:
                return None
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark, 0)
            if depth == 0:
                return token.end()
        return None


def _items(text: _Text) -> Iterator[tuple[str, Any]]:
    """The items of the list that begins here."""
    text.at += 1
    if text.peek() == "]":
        return
    place = 0
    while True:
        where = f"record {place}"
        if not text.peek():
            raise UserError(f"'{text.path}' is not valid JSON: it is cut short before {where}")
        try:
            value = text.value()
        except EOFError:
            raise UserError(f"'{text.path}' is not valid JSON: it is cut short, or wrong, within {where}") from None
        yield where, value
        place += 1
        mark = text.peek()
        if mark not in (",", "]"):
            found = f"{mark!r} follows it" if mark else "the list is not closed"
            raise UserError(f"'{text.path}' is not valid JSON: after {where}, {found}")
        text.at += 1
        if mark == "]":
            return


def _enter(text: _Text, wrapper: str) -> bool:
    """Go to the list that the object at the top holds under ``wrapper``; False where it holds none."""
    text.at += 1
    while True:
        if text.peek() != '"':
            return False
        try:
            key = text.value()
            if text.peek() != ":":
                return False
            text.at += 1
            if text.peek() == "[" and key == wrapper:
                return True
            if not text.peek():
                return False
            text.value()
        except EOFError:
            return False
        if text.peek() != ",":
            return False
        text.at += 1
        text.peek()


def _lines(text: _Text) -> Iterator[tuple[str, Any]]:
    """The value of every line that is not blank."""
    number, going = 1, True
    while going:
        stop = text.buffer.find("\n", text.at)
        if stop < 0:
            going = text.more()
            if going:
                continue
            stop = len(text.buffer)
        line = text.buffer[text.at : stop].strip()
        text.at = stop + 1
        if line:
            yield f"line {number}", _line(line)
        number += 1


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        return Broken("it is nested too deeply")
    except ValueError as error:
        return Broken(_said(error))


def _said(error: ValueError) -> str:
    # without the position, which counts from where the buffer happens to begin
    return error.msg if isinstance(error, json.JSONDecodeError) else "it holds a number of thousands of digits"
