"""Log lines as people and programs get them."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from redismem.logs import JsonLines, Lines, log_config
from redismem.settings import Settings
from redismem.trace import Trace, current


@pytest.fixture
def request_trace() -> Iterator[Trace]:
    trace = Trace("search", "the-request")
    token = current.set(trace)
    yield trace
    current.reset(token)


@pytest.fixture
def restored() -> Iterator[None]:
    """Give logging back as it was: pytest's own handlers hang on it."""
    names = ("", "redismem", "uvicorn.error")
    before = [(logging.getLogger(name), logging.getLogger(name).handlers[:]) for name in names]
    levels = [logger.level for logger, _ in before]
    yield
    for (logger, handlers), level in zip(before, levels, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)


def record(message: str = "told", *args: object, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": message, "args": args, "levelno": 30, "levelname": "WARNING"})
    made.name = "redismem.test"
    vars(made).update(extra)
    return made


def line_of(made: logging.LogRecord) -> dict[str, Any]:
    text = JsonLines().format(made)
    assert "\n" not in text
    line: dict[str, Any] = json.loads(text)
    return line


def logged(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> io.StringIO:
    """Configure logging as a service does; return what goes to stderr."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logging.config.dictConfig(log_config(Settings(**settings)))
    return stream


def test_a_line_of_json_tells_time_level_logger_message_and_extras() -> None:
    line = line_of(record("%d of %s", 3, "five", status=503, split={"redis_ms": 1.5}))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "logger": "redismem.test",
        "message": "3 of five",
        "status": 503,
        "split": {"redis_ms": 1.5},
    }


@pytest.mark.parametrize("text", ['quote " and \\', "two\nlines", "\u2028\x00\x1b[31m", "é 日本 🐝"])
def test_whatever_a_message_holds_a_line_is_one_line_of_json(text: str) -> None:
    line = line_of(record("%s", text, told=text))
    assert (line["message"], line["told"]) == (text, text)


def test_what_json_has_no_word_for_is_told_as_text() -> None:
    assert line_of(record(told=ValueError("x")))["told"] == "x"


def test_an_exception_is_in_the_same_line() -> None:
    try:
        int("broken")
    except ValueError:
        made = record()
        made.exc_info = sys.exc_info()
    line = line_of(made)
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith(": 'broken'")


def test_a_line_for_people_ends_with_the_extras() -> None:
    text = Lines().format(record("slow request", operation="search", redis_ms=1.5))
    assert text.endswith("WARNING redismem.test: slow request operation=search redis_ms=1.5")
    assert "taskName" not in text


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_lines_of_a_request_carry_its_id_whoever_logs_them(
    log_format: str, monkeypatch: pytest.MonkeyPatch, restored: None, request_trace: Trace
) -> None:
    stream = logged(monkeypatch, log_format=log_format)
    for name in ("redismem.http.gate", "uvicorn.error", "redis", "any"):
        logging.getLogger(name).warning("told")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    for line in lines:
        assert request_trace.request_id in line
        if log_format == "json":
            assert json.loads(line)["request_id"] == request_trace.request_id


def test_lines_outside_of_requests_carry_none(monkeypatch: pytest.MonkeyPatch, restored: None) -> None:
    assert current.get() is None
    stream = logged(monkeypatch, log_format="json")
    logging.getLogger("redismem").info("started")
    assert set(json.loads(stream.getvalue())) == {"time", "level", "logger", "message"}


def test_an_id_that_the_caller_of_the_logger_gives_is_kept(
    monkeypatch: pytest.MonkeyPatch, restored: None, request_trace: Trace
) -> None:
    stream = logged(monkeypatch, log_format="json")
    logging.getLogger("redismem").warning("told", extra={"request_id": "another"})
    assert json.loads(stream.getvalue())["request_id"] == "another"


def test_ours_are_told_from_info_on_others_from_warnings_on(
    monkeypatch: pytest.MonkeyPatch, restored: None
) -> None:
    stream = logged(monkeypatch)
    for name in ("redismem.lane", "httpx", "uvicorn.error"):
        logging.getLogger(name).debug("debug of %s", name)
        logging.getLogger(name).info("info of %s", name)
        logging.getLogger(name).warning("warning of %s", name)
    told = [line.partition(": ")[2] for line in stream.getvalue().splitlines()]
    assert told == [
        "info of redismem.lane",
        "warning of redismem.lane",
        "warning of httpx",
        "warning of uvicorn.error",
    ]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_uvicorn_adds_for_its_own_colours_is_left_out(
    log_format: str, monkeypatch: pytest.MonkeyPatch, restored: None
) -> None:
    """With several workers its lines are shown: it tells each a second time, coloured."""
    stream = logged(monkeypatch, log_format=log_format, workers=2)
    extra = {"color_message": "Started server process [\x1b[36m%d\x1b[0m]"}
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7, extra=extra)
    assert "Started server process [7]" in stream.getvalue()
    assert "36m" not in stream.getvalue()
