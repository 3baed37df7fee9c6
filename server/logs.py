"""Logging: one line per record, as text or as JSON. Callers never pass prompts, bodies or keys."""

import asyncio
import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, Literal

FIELDS = "fields"  # the `extra` key of a record's structured fields

_log_fields: ContextVar[dict[str, Any] | None] = ContextVar("log_fields", default=None)


def collect_log_fields() -> dict[str, Any]:
    """Return a new dict, to which `add_log_fields` adds from now on in this request and in tasks that it starts."""
    notes: dict[str, Any] = {}
    _log_fields.set(notes)
    return notes


def add_log_fields(**fields: Any) -> None:
    """Add fields to the access line of the current request, if there is one. Fields of None are left out."""
    if (notes := _log_fields.get()) is not None:
        notes.update({name: value for name, value in fields.items() if value is not None})


class JsonFormatter(logging.Formatter):
    """Formatter of a record as one JSON object: time (UTC), level, logger, message, structured fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: Literal["debug", "info", "warning", "error"], *, as_json: bool) -> None:
    """Send every record at `level` or above to stderr, uvicorn's among them."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else plain)
    handler.addFilter(_is_not_cancellation)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").disabled = True  # our access line has the request's id and duration, too


def _is_not_cancellation(record: logging.LogRecord) -> bool:
    """Whether a record is anything but uvicorn's traceback of a request cancelled by the operator."""
    return not (record.name == "uvicorn.error" and record.exc_info and record.exc_info[0] is asyncio.CancelledError)
