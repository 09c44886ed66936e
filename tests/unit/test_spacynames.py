"""Names by spaCy: with the real library where it is installed, and what is said where it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from redismem.errors import Misconfigured
from redismem.spacynames import MOST_CHARS, SpacyNames, load

PATTERNS = [
    {"label": "PERSON", "pattern": "Marie Curie"},
    {"label": "GPE", "pattern": "Paris"},
    {"label": "ORG", "pattern": "Knight Ventures"},
    {"label": "DATE", "pattern": "last week"},
    {"label": "LANGUAGE", "pattern": "French"},
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a saved pipeline that knows the names of PATTERNS."""
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed: pip install -e '.[spacy]'")
    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns(PATTERNS)
    path = tmp_path_factory.mktemp("spacy") / "pipeline"
    nlp.to_disk(path)
    return path


@pytest.fixture(scope="module")
def names(pipeline: Path) -> SpacyNames:
    return load(str(pipeline))


def test_names_come_in_order_and_once(names: SpacyNames) -> None:
    text = "In Paris Marie Curie met Knight Ventures; Marie Curie left Paris."
    assert names.names(text) == ["Paris", "Marie Curie", "Knight Ventures"]


def test_times_and_languages_are_no_names(names: SpacyNames) -> None:
    assert names.names("last week I spoke French in Paris") == ["Paris"]


def test_a_text_without_names_has_none(names: SpacyNames) -> None:
    assert names.names("") == []
    assert names.names("we went home") == []


def test_only_the_beginning_of_a_text_is_read(names: SpacyNames) -> None:
    assert names.names("x " * (MOST_CHARS // 2 - 4) + "Paris") == ["Paris"]
    assert names.names("x " * (MOST_CHARS // 2) + "Paris") == []


def test_a_pipeline_that_is_missing_names_its_remedy(pipeline: Path) -> None:
    with pytest.raises(Misconfigured, match=r"REDISMEM_SPACY_MODEL 'no_such_pipeline'.*spacy download"):
        load("no_such_pipeline")


def test_a_damaged_pipeline_is_a_misconfiguration(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "config.cfg").write_text("[nlp\n")
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        load(str(tmp_path))


def test_without_spacy_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)  # importing it fails, as where it is not installed
    with pytest.raises(Misconfigured, match=r"REDISMEM_SPACY_MODEL.*pip install -e '\.\[spacy\]'"):
        load("en_core_web_sm")
