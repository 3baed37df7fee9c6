"""moto's S3, one request at a time, with faults on request: `python -m tests.support.s3_program PORT`.

moto itself checks a condition and then writes, not atomically. `PUT /__faults__` sets the faults: a
list of `{"kind", "method", "path", "every"}`; each `every`-th request of that method with `path` in its path gets

- `busy`: 503, nothing done;
- `lost`: it is done, but the connection is closed without a response;
- `late`: a list as of the time when the fault was set or the list first requested;
- `hang`: nothing done and no response, until other faults are set.
"""

import json
import socket
import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

_BUSY = "503 Slow Down"


class _Faulty:
    def __init__(self) -> None:
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._faults: list[dict[str, Any]] = []
        self._let_go = threading.Event()  # releases hanging requests
        self._lists: dict[str, tuple[list[Any], list[bytes]]] = {}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            if environ["PATH_INFO"] == "/__faults__":
                self._let_go.set()
                self._let_go = threading.Event()
                self._faults = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
                self._lists = {}
                start_response("200 OK", [("Content-Length", "0")])
                return [b""]
            kind, let_go = self._fault(environ), self._let_go
            if kind == "busy":
                start_response(_BUSY, [("Content-Length", "0")])
                return [b""]
            if kind != "hang":
                return self._done(kind, environ, start_response)
        let_go.wait()
        start_response(_BUSY, [("Content-Length", "0")])
        return [b""]

    def _done(self, kind: str | None, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        asked = environ["QUERY_STRING"]
        if kind == "late" and asked in self._lists:
            head, body = self._lists[asked]
        else:
            head, body = self._answer(environ)
            if kind == "late":
                self._lists[asked] = head, body
        if kind == "lost":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response(*head)
        return body

    def _answer(self, environ: dict[str, Any]) -> tuple[list[Any], list[bytes]]:
        head: list[Any] = []
        body = list(self._app(environ, lambda *args: head.extend(args[:2])))
        return head, body

    def _fault(self, environ: dict[str, Any]) -> str | None:
        for fault in self._faults:
            listing = "list-type" in environ["QUERY_STRING"]
            method = "LIST" if listing else environ["REQUEST_METHOD"]
            if fault["method"] in (method, "") and fault["path"] in environ["PATH_INFO"] + environ["QUERY_STRING"]:
                fault["seen"] = fault.get("seen", 0) + 1
                if fault["seen"] % fault["every"] == 0:
                    return str(fault["kind"])
        return None


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), _Faulty(), threaded=True)
