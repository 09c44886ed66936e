"""The only place that says what a name, a text, a moment and metadata may be."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from msgspec import Meta

MAX_TEXT_BYTES = 32 * 1024
MAX_METADATA_BYTES = 16 * 1024
MAX_METADATA_LEVELS = 32

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Names = Annotated[list[Name], Meta(max_length=100)]
Share = Annotated[float, Meta(ge=0, le=1)]
MemoryType = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,63}\Z")]
MemoryTypes = Annotated[list[MemoryType], Meta(min_length=1, max_length=100)]
AnyOf = Annotated[list[Name], Meta(min_length=1, max_length=100)]
Scalar = str | int | float | bool | None
Metadata = dict[str, Any]


def checked_name(value: str, what: str) -> str:
    """Return `value` stripped.

    Raises:
        ValueError: it is empty, longer than 256 characters, or holds a control character.
    """
    value = value.strip()
    if not value or len(value) > 256:
        raise ValueError(f"`{what}` must have 1 to 256 characters")
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise ValueError(f"`{what}` must not hold control characters")
    return value


def checked_text(value: str, what: str = "text") -> str:
    """Return `value` unchanged.

    Raises:
        ValueError: it is blank, holds NUL, or exceeds 32 KiB of UTF-8.
    """
    if not value.strip():
        raise ValueError(f"`{what}` must not be blank")
    if "\0" in value:
        raise ValueError(f"`{what}` must not hold NUL characters")
    if len(value) > MAX_TEXT_BYTES or len(value.encode()) > MAX_TEXT_BYTES:
        raise ValueError(f"`{what}` is longer than {MAX_TEXT_BYTES} bytes; split it")
    return value


def checked_moment(value: datetime, what: str) -> None:
    """Check that a time has a year from 1 to 9999 in UTC as well.

    Raises:
        ValueError: it has not, so it could be stored but not shown.
    """
    try:
        value.astimezone(UTC)
    except (ValueError, OverflowError) as exc:
        raise ValueError(f"`{what}` must lie in the years 1 to 9999 of UTC") from exc


def checked_metadata(value: object, levels: int = MAX_METADATA_LEVELS) -> None:
    """Check that metadata is not nested too deeply to be written and read everywhere.

    Raises:
        ValueError: it has more than 32 levels.
    """
    if levels < 0:
        raise ValueError(f"`metadata` is nested deeper than {MAX_METADATA_LEVELS} levels")
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            checked_metadata(part, levels - 1)


def checked_names(values: list[str], what: str) -> list[str]:
    """Return the values checked and stripped, each once, in order."""
    return list(dict.fromkeys(checked_name(value, what) for value in values))
