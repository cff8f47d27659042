"""Token groups by a tagger: TextBlob's own lexicon, and a spaCy pipeline that says by rule what each word is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from laavit.registry import UserError
from laavit.traces.tagger import group_of, load_tagger


@pytest.mark.parametrize(
    ("tag", "group"),
    [("NOUN", "object"), ("PROPN", "object"), ("NNS", "object"), ("ADJ", "attribute"), ("NUM", "attribute"),
     ("CD", "attribute"), ("VERB", "functional"), ("ADV", "functional"), ("IN", "functional"), ("", "functional")],
)  # fmt: skip
def test_groups(tag: str, group: str) -> None:
    assert group_of(tag) == group


def test_textblob_brings_its_lexicon() -> None:
    pytest.importorskip("textblob")
    tagger = load_tagger("textblob")
    text = "The red circle  isn't left of two men's chairs,\nis it?"
    words = tagger(text)
    assert [text[a:b] for a, b, _ in words] == [
        "The", "red", "circle", "is", "n't", "left", "of", "two", "men", "'s", "chairs", ",", "is", "it", "?",
    ]  # fmt: skip
    named = {text[a:b]: group_of(tag) for a, b, tag in words}
    assert {word for word, group in named.items() if group == "object"} == {"circle", "men", "chairs"}
    assert {word for word, group in named.items() if group == "attribute"} == {"red", "two"}
    assert tagger("") == [] and tagger("  \n") == []
    for odd in ("a / b & <c> http://x.y :-)", "½ × 3 = “é”…", "/", "blue/NN"):
        assert all(odd[a:b].strip() == odd[a:b] != "" for a, b, _ in tagger(odd))


def test_spacy_by_folder(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    rules = pipeline.add_pipe("attribute_ruler")
    for word, tag in {"red": "ADJ", "circle": "NOUN", "the": "DET", "two": "NUM"}.items():
        rules.add(patterns=[[{"LOWER": word}]], attrs={"POS": tag})
    rules.add(patterns=[[{"LOWER": {"NOT_IN": ["red", "circle", "the", "two"]}}]], attrs={"POS": "X"})
    pipeline.to_disk(tmp_path / "rules")
    text = "The red circle.\n Two!"
    found = load_tagger(f"spacy:{tmp_path / 'rules'}")(text)
    assert [(text[a:b], tag) for a, b, tag in found] == [
        ("The", "DET"), ("red", "ADJ"), ("circle", "NOUN"), (".", "X"), ("Two", "NUM"), ("!", "X"),
    ]  # fmt: skip
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(UserError, match="tags no parts of speech"):
        load_tagger(f"spacy:{tmp_path / 'blank'}")
    with pytest.raises(UserError, match="python -m spacy download en_core_web_sm"):
        load_tagger("spacy:en_core_web_none")


def test_what_is_missing_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("spacy", "spacy:en_core_web_sm"), ("textblob.taggers", "textblob")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=r"pip install 'laavit\[tag\]'"):
            load_tagger(name)
    for name in ("nltk", "spacy:", "textblob:x"):
        with pytest.raises(UserError, match="no tagger is called"):
            load_tagger(name)
