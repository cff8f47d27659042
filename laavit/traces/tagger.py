"""Which words of an answer are functional, objects or attributes: the token groups of the perception gap (Fig. 3).

The paper names the three groups and not how it finds them. Here a part-of-speech tagger does, and the groups are ours:
nouns and proper nouns are *objects*; adjectives and numbers are *attributes*; all else is *functional* (also verbs and
adverbs, which name no thing and no property of one).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

from laavit.registry import UserError

GROUPS = ("functional", "object", "attribute")
#: Universal and Penn Treebank tags -> group; every other tag is functional
_TAGS = dict.fromkeys(("NOUN", "PROPN", "NN", "NNS", "NNP", "NNPS"), "object") | dict.fromkeys(
    ("ADJ", "NUM", "JJ", "JJR", "JJS", "CD"), "attribute"
)
INSTALL = "pip install 'laavit[tag]'"

#: words as the Penn Treebank cuts them: clitics and punctuation by themselves
_WORDS = re.compile(r"\w+(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|\w+(?:[.-]\w+)*|[^\w\s]", re.I)

#: a word of a text: first character, the one after its last, part of speech
Word = tuple[int, int, str]


class Tagger(Protocol):
    """Finds the words of a text and their parts of speech."""

    def __call__(self, text: str) -> list[Word]:
        """The words in order, with their places in the text; parts of speech as Universal or Penn Treebank tags."""
        ...


def group_of(tag: str) -> str:
    """The group of a part of speech: 'functional', 'object' or 'attribute'."""
    return _TAGS.get(tag, "functional")


class SpacyTagger:
    """A spaCy pipeline.

    Args:
        name: an installed pipeline (``en_core_web_sm``) or the folder of one.

    Raises:
        UserError: spaCy or the pipeline is missing, or it tags no parts of speech.
    """

    def __init__(self, name: str) -> None:
        try:
            import spacy
        except ImportError:
            raise UserError(f"the tagger 'spacy:{name}' needs spaCy: {INSTALL}") from None
        try:
            self.pipeline = spacy.load(name, exclude=["ner", "parser", "lemmatizer"])
        except OSError:
            raise UserError(
                f"spaCy has no pipeline '{name}': python -m spacy download en_core_web_sm, or give a pipeline's folder"
            ) from None
        if not self.pipeline("word")[0].pos_:
            raise UserError(f"the spaCy pipeline '{name}' tags no parts of speech; allowed: one with a tagger")

    def __call__(self, text: str) -> list[Word]:
        return [(t.idx, t.idx + len(t.text), t.pos_) for t in self.pipeline(text) if not t.is_space]


class TextBlobTagger:
    """TextBlob's pattern tagger: English, its lexicon and rules come with the package as plain text.

    Raises:
        UserError: TextBlob is missing.
    """

    def __init__(self) -> None:
        try:
            from textblob.taggers import PatternTagger
        except ImportError:
            raise UserError(f"the tagger 'textblob' needs TextBlob: {INSTALL}") from None
        self._tagger: Any = PatternTagger()

    def __call__(self, text: str) -> list[Word]:
        # The words are cut here, so that their places are known and never guessed from the tagger's own cutting.
        places = [(found.start(), found.end()) for found in _WORDS.finditer(text)]
        if not places:
            return []
        tagged = self._tagger.tag(" ".join(text[a:b] for a, b in places), tokenize=False)
        if len(tagged) != len(places):
            raise UserError(f"the tagger 'textblob' found {len(tagged)} words and not {len(places)} in '{text[:80]}'")
        return [(a, b, str(tag)) for (a, b), (_, tag) in zip(places, tagged, strict=True)]


def load_tagger(name: str) -> Tagger:
    """A tagger by name: 'spacy:PATH_OR_NAME' or 'textblob'.

    Raises:
        UserError: no such tagger, or what it needs is not installed; the message holds the command that installs it.
    """
    kind, colon, rest = name.partition(":")
    if kind == "textblob" and not colon:
        return TextBlobTagger()
    if kind == "spacy" and rest:
        return SpacyTagger(str(Path(rest).expanduser()) if "/" in rest else rest)
    raise UserError(f"no tagger is called '{name}'; allowed: 'spacy:PATH_OR_NAME' or 'textblob'")
