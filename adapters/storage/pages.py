"""Objects in a bucket that one server each writes and all servers read.

`<prefix>/<page>/<server>` is one server's page; no other server changes it. A page is named by its time, so that the
order of names is that of time.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from adapters.storage.bucket import Bucket, Conflict
from adapters.storage.versions import RemoteUnavailable

_READERS = 16  # pages read at once


class Pages:
    """The pages below one prefix. All methods wait for the bucket, and raise RemoteUnavailable.

    Args:
        server: the name of this server.
    """

    def __init__(self, bucket: Bucket, prefix: str, server: Callable[[], str]) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._server = server

    def own_pages(self) -> list[str]:
        """The names of this server's pages, in order."""
        return sorted(page for page, server in self._list() if server == self._server())

    def write(self, page: str, change: Callable[[bytes], bytes]) -> None:
        """Replace this server's page by `change` of it, or of `b""` if there is none."""
        path = f"{self._prefix}/{page}/{self._server()}"
        found = self._bucket.read(path)
        before = b"" if found is None else found.content
        if (after := change(before)) == before:
            return
        try:
            self._bucket.put_if(path, after, found and found.version)
        except Conflict:  # perhaps a retry after an unnoticed success
            found = self._bucket.read(path)
            if found is None or found.content != after:
                raise RemoteUnavailable(f"{path} was changed by another server") from None

    def read(self, first: str, last: str, *, include_own: bool) -> Iterator[bytes]:
        """The pages of all servers from `first` to `last`, the newest first; without `include_own`, those of the other
        servers."""
        listed = sorted(self._list(first if first == last else ""), reverse=True)
        server = self._server()
        paths = [
            f"{self._prefix}/{page}/{writer}"
            for page, writer in listed
            if first <= page <= last and (include_own or writer != server)
        ]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="pages") as readers:
            for start in range(0, len(paths), _READERS):  # lazily: a caller may stop early
                for found in readers.map(self._bucket.read, paths[start : start + _READERS]):
                    if found is not None:
                        yield found.content

    def _list(self, page: str = "") -> list[tuple[str, str]]:
        paths = [entry.path for entry in self._bucket.list(f"{self._prefix}/{page}".rstrip("/"))]
        names = [path.removeprefix(f"{self._prefix}/").partition("/") for path in paths]
        return [(page, server) for page, _, server in names]
