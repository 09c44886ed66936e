"""The only place that knows spaCy: names in a text, by a pipeline that the operator has installed.

spaCy is optional, large and slow to load, so nothing imports it before `load`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from redismem.errors import Misconfigured

#: labels of spaCy's English pipelines for what may have memories of its own: not dates, languages, peoples
LABELS = frozenset("PERSON ORG GPE LOC FAC PRODUCT EVENT WORK_OF_ART".split())

#: characters of a text that are read: the cost is linear
MOST_CHARS = 4_000


class SpacyNames:
    """Finds names with a spaCy pipeline.

    Args:
        nlp: a pipeline; its `ents` have labels. Not safe for threads: one call at a time.
    """

    def __init__(self, nlp: Callable[[str], Any]) -> None:
        self._nlp = nlp

    def names(self, text: str) -> list[str]:
        """Return the names in the first 4,000 characters of `text` in order, each once, blanks single.

        Cost: the pipeline's, linear.
        """
        found = (entity for entity in self._nlp(text[:MOST_CHARS]).ents if entity.label_ in LABELS)
        return [name for name in dict.fromkeys(" ".join(entity.text.split()) for entity in found) if name]


def load(name_or_path: str) -> SpacyNames:
    """Load a pipeline by the name of its package, or from a directory.

    Raises:
        Misconfigured: spaCy or the pipeline is missing, or the pipeline cannot be loaded.

    Cost: disk and memory of the pipeline: seconds.
    """
    try:
        library = import_module("spacy")
    except ImportError as exc:
        raise Misconfigured(
            "REDISMEM_SPACY_MODEL is set, but spaCy is missing: pip install -e '.[spacy]', or unset it.",
            field="spacy_model",
        ) from exc
    try:
        return SpacyNames(library.load(name_or_path))
    except Exception as exc:  # a wrong name, path or file raises any of a dozen types
        raise Misconfigured(
            f"REDISMEM_SPACY_MODEL {name_or_path!r} cannot be loaded ({type(exc).__name__}); "
            f"python -m spacy download {name_or_path}, or give the directory of a saved pipeline.",
            field="spacy_model",
        ) from exc
