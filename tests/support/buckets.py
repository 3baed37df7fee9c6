"""An S3-compatible server in its own process, which can be stopped and restarted; a restart loses its buckets."""

import subprocess
import sys
import time

import httpx
import obstore
from obstore.store import S3Store

from tests.support.running import free_port

BUCKET = "adapters"


class S3Server:
    """moto's S3 (`tests.support.s3_program`) on a fixed port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for its clients."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it with an empty bucket."""
        command = [sys.executable, "-m", "tests.support.s3_program", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 180
        while True:
            assert self._process.poll() is None, "moto's server ended"
            try:
                httpx.put(f"{self.endpoint}/{BUCKET}").raise_for_status()
                return
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def stop(self) -> None:
        """Stop it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def suffer(self, *faults: tuple[str, str, str, int]) -> None:
        """Inject only these faults from now on: kind, method (LIST; empty: any), a part of the path, frequency."""
        named = [dict(zip(("kind", "method", "path", "every"), fault, strict=True)) for fault in faults]
        httpx.put(f"{self.endpoint}/__faults__", json=named, timeout=180).raise_for_status()

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix of the bucket."""
        store = self._store(prefix)
        paths = [entry["path"] for entry in obstore.list(store).collect()]
        return {path: obstore.get(store, path).bytes().to_bytes() for path in paths}

    def put(self, prefix: str, key: str, content: bytes | None) -> None:
        """Replace or remove an object without the knowledge of any server."""
        if content is None:
            obstore.delete(self._store(prefix), key)
        else:
            obstore.put(self._store(prefix), key, content)

    def _store(self, prefix: str) -> S3Store:
        return S3Store(
            BUCKET,
            prefix=prefix,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id="key",
            secret_access_key="secret",
            client_options={"allow_http": True},
        )
