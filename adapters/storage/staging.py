"""Where an adapter's files are written before they are checked and published."""

import shutil
from pathlib import Path
from types import TracebackType


class Staging:
    """A private directory to write an adapter's files into, gone on exit unless published. See `VersionFiles.stage`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
