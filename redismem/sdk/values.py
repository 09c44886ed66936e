"""The only place of the client that checks what is asked and reads what was answered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from redismem.errors import InvalidInput, RedisMemError
from redismem.fields import checked_name

T = TypeVar("T")

_QUOTED = re.compile(r"`(\w+)`")


def built(kind: type[T], given: Mapping[str, object]) -> T:
    """Return a request made of its fields, checked as the service would.

    Raises:
        InvalidInput: a value is wrong; `field` names it.
    """
    try:
        return msgspec.json.decode(msgspec.json.encode(given), type=kind)
    except msgspec.ValidationError as exc:
        message, _, place = str(exc).partition(" - at `")
        path = [place.strip("`").removeprefix("key in ").removeprefix("$").lstrip(".")]
        if (quoted := _QUOTED.search(message)) and not message.startswith("Expected"):
            path.append(quoted[1])
        raise InvalidInput(message, field=".".join(filter(None, path)) or None) from exc
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise InvalidInput(f"this cannot be sent as JSON: {exc}") from exc


def decoded(raw: bytes | str, kind: type[T]) -> T:
    """Return a reply; fields that a newer service added are ignored.

    Raises:
        RedisMemError: it is not what redismem answers.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise RedisMemError(f"the answer is none of redismem's: {exc}") from exc


def checked_id(value: str, what: str = "id") -> str:
    """Return an id to be put into a path.

    Raises:
        InvalidInput: it cannot be one.
    """
    try:
        return checked_name(value, what)
    except ValueError as exc:
        raise InvalidInput(str(exc), field=what) from exc
