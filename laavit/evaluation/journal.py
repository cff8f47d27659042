"""Finished answers, one JSON line each, so that an evaluation that was killed goes on where it stopped.

The first line of a file says what was asked, and how: weights, latents, intervention, protocol, dtype, system prompt,
image settings, versions. An answer is taken over only where all of that is equal, and the question's own prompt, images
and settings are. Each rank of a run writes a file of its own and reads all of them, so that any number of processes
goes on from any other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from laavit.registry import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
PATTERN = "answers*.jsonl"


@dataclass(frozen=True)
class Answer:
    """What became of one question.

    Args:
        task: its task. number: which document of it. key: a hash of what was asked (``question_key``).
        text: the answer. prompt, tokens: how many tokens were read and written.
        latents: how many latents the model wrote before its answer. seconds: a batch's time, shared out evenly.
    """

    task: str
    number: int
    key: str
    text: str
    prompt: int
    tokens: int
    latents: int
    seconds: float


class Journal:
    """The answers of one evaluation, in a folder.

    Args:
        folder: where they are kept. about: what all of them have in common, as plain data.
        rank: whose answers are added.

    Raises:
        UserError: the folder holds the answers of another evaluation, or cannot be read or written.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], rank: int = 0) -> None:
        self.folder, self.about = Path(folder), {"format": FORMAT, **json.loads(json.dumps(about))}
        self.file = self.folder / (f"answers-{rank}.jsonl" if rank else "answers.jsonl")
        self._found: dict[tuple[str, int, str], Answer] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            whole = {file: self._read(file) for file in files(self.folder)}
        except OSError as error:
            raise self._failed("read", error) from error
        self._whole = whole.get(self.file, 0)
        self._stream: Any = None
        if self._found:
            logger.info("%d answers are there already (%s)", len(self._found), self.folder / PATTERN)

    def __len__(self) -> int:
        return len(self._found)

    def get(self, task: str, number: int, key: str) -> Answer | None:
        """The answer to this very question; None where it is still to be asked."""
        return self._found.get((task, number, key))

    def add(self, answers: Iterable[Answer]) -> None:
        """Write answers down before the next ones are asked.

        Raises:
            UserError: the disk is full or cannot be written; what was added before is kept.
        """
        lines = [json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers]
        try:
            if self._stream is None:
                self._stream = self._opened()
            self._stream.write("".join(lines).encode())
            self._stream.flush()
        except OSError as error:
            self.close()
            raise self._failed("written", error) from error

    def close(self) -> None:
        """No more answers follow."""
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what could not be flushed was reported when it was added
                logger.debug("'%s' could not be closed", self.file)

    def _opened(self) -> Any:
        """The own file, cut to its whole lines, its first line written."""
        stream = self.file.open("ab")
        if stream.tell() > self._whole:
            stream.truncate(self._whole)
        if not self._whole:
            stream.write((json.dumps(self.about, ensure_ascii=False) + "\n").encode())
        return stream

    def _read(self, file: Path) -> int:
        """Take over a file's answers; the bytes of its whole lines: what a kill left of the last one does not count."""
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].decode().split("\n")[:-1]
        if not lines:
            return 0
        try:
            head, *rows = map(json.loads, lines)
            self._check(file, head)
            for row in rows:
                answer = Answer(**row)
                self._found[answer.task, answer.number, answer.key] = answer
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise UserError(f"'{file}' is no journal of answers ({error}); --fresh starts anew") from error
        return whole

    def _check(self, file: Path, head: Mapping[str, Any]) -> None:
        names = sorted({*head, *self.about})
        other = [name for name in names if head.get(name) != self.about.get(name)]
        if other:
            told = ", ".join(
                f"{name} was {_short(head.get(name))} and is {_short(self.about.get(name))}" for name in other
            )
            raise UserError(
                f"'{file}' holds answers of an unfinished evaluation of another kind ({told}); "
                "--fresh drops them, or give another --out"
            )

    def _failed(self, what: str, error: OSError) -> UserError:
        return UserError(
            f"the answers in '{self.folder}' cannot be {what}: {error.strerror or error}; those that were written are "
            "kept, and the same command goes on from them"
        )


def files(folder: Path) -> list[Path]:
    """All ranks' files, and nobody else's: they are deleted in the end."""
    return sorted(file for file in folder.glob(PATTERN) if re.fullmatch(r"answers(-\d+)?\.jsonl", file.name))


def drop(folder: str | Path) -> None:
    """Delete all ranks' files: what they held stands elsewhere, or is not wanted any more."""
    for file in files(Path(folder)):
        file.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"


def question_key(chat: Sequence[Mapping[str, Any]], settings: Sequence[Any], digest: Callable[[Image], str]) -> str:
    """A hash of all that one answer depends on beside what the whole evaluation has in common.

    Args:
        chat: the prompt, its images as ``{"type": "image", "image": PIL}``. settings: of its generation.
        digest: what an image's pixels are known by.
    """

    def plain(value: Any) -> Any:
        return digest(value) if isinstance(value, Image) else str(value)

    asked = json.dumps([chat, settings], default=plain, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()
