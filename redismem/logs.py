"""How the processes of a service log: lines for people or JSON for programs, each with its request's id.

Logs hold no text of a memory, no query, no API key and no user (tests/http/test_no_text_in_logs.py).
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

from redismem.settings import Settings
from redismem.trace import current

#: what a LogRecord has by itself; the rest came by `extra`
_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}

#: the hash tag in a name of ours: whose it is
_TAG = re.compile(r"(redismem:\w+:)\{[^{}]*\}")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, and what `extra` tells."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _without_users(json.dumps(line, default=str, ensure_ascii=False))


class Lines(logging.Formatter):
    """One line of text; what `extra` tells follows as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return _without_users(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the name of its base
        told = [f"{name}={value}" for name, value in vars(record).items() if name not in _OWN]
        return " ".join([super().formatMessage(record), *told])


def _without_users(line: str) -> str:
    """Return a line without the users that keys and indexes are named after; errors of Redis quote these."""
    return _TAG.sub(r"\1{…}", line)


class WithRequest(logging.Filter):
    """Adds the id of the request that is worked on, if one is."""

    def filter(self, record: logging.LogRecord) -> bool:
        trace = current.get()
        if trace is not None and not hasattr(record, "request_id"):
            record.request_id = trace.request_id
        return True


def log_config(settings: Settings) -> dict[str, Any]:
    """Return what `logging.config.dictConfig` takes: everything goes to stderr.

    Of several workers uvicorn's own lines are shown too: which one ended and was started again.
    """
    levels = {"redismem": "INFO", "uvicorn.error": "INFO" if settings.workers > 1 else "WARNING"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"text": {"()": Lines}, "json": {"()": JsonLines}},
        "filters": {"request": {"()": WithRequest}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": settings.log_format,
                "filters": ["request"],
            }
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {name: {"level": level} for name, level in levels.items()},
    }
