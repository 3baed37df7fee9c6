"""An object store for the tests of a file."""

from collections.abc import Iterator

import pytest

from tests.support.buckets import S3Server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    server.start()
    yield server
    server.stop()
