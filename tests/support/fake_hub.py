"""A Hugging Face Hub in this process, limited to the requests of `huggingface_hub` for models' files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

Files = dict[str, bytes]


class FakeHub:
    """Repositories by `OWNER/NAME` and revision; `main` is the default.

    Attributes:
        asked: the paths of all requests.
        holding: while clear, no request is answered.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Files]] = {}
        self.asked: list[str] = []
        self.holding = threading.Event()
        self.holding.set()

    def put(self, repository: str, files: Files, revision: str = "main") -> str:
        """Set the files of a revision; return its commit."""
        self.repositories.setdefault(repository, {})[revision] = files
        return self.commit(files)

    @staticmethod
    def commit(files: Files) -> str:
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def find(self, repository: str, revision: str) -> Files | None:
        """The files of a revision, by its name or commit."""
        revisions = self.repositories.get(repository, {})
        by_commit = {self.commit(files): files for files in revisions.values()}
        return revisions.get(revision) or by_commit.get(revision)


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fake hub, used by processes started from now on."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if not ("/resolve/" in self.path or self.path.startswith("/api/models/")):  # statistics
                self._answer(404, b"", {})
                return
            hub.asked.append(self.path)
            hub.holding.wait()
            path = unquote(self.path.partition("?")[0])
            if path.startswith("/api/models/"):
                owner, name, *rest = path.removeprefix("/api/models/").split("/")
                files = hub.find(f"{owner}/{name}", rest[1] if rest else "main")
                if files is None:
                    known = f"{owner}/{name}" in hub.repositories
                    self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
                    return
                siblings = [{"rfilename": one, "size": len(content)} for one, content in files.items()]
                told = {"id": f"{owner}/{name}", "sha": hub.commit(files), "siblings": siblings}
                self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
                return
            owner, name, _, revision, *rest = path.lstrip("/").split("/")
            files = hub.find(f"{owner}/{name}", revision) or {}
            if (content := files.get("/".join(rest))) is None:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            described = {"X-Repo-Commit": hub.commit(files), "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._answer(200, content, described)

        def do_HEAD(self) -> None:
            self.do_GET()

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield hub
    finally:
        hub.holding.set()
        server.shutdown()
        server.server_close()
        thread.join()
