"""Logging: one line per record, as text or as JSON. Never holds prompts, bodies or keys: callers pass none."""

import json
import logging
import sys
import time
from typing import Any, Literal

FIELDS = "fields"  # the `extra` key under which structured fields travel


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time (UTC), level, logger, message, its structured fields, the exception."""

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
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").disabled = True  # ours carries the request's id and duration
