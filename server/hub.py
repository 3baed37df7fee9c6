"""References to adapters on the Hugging Face Hub: `hf://OWNER/NAME[@REVISION][/FOLDER]`."""

import re
from collections.abc import Collection
from dataclasses import dataclass

SCHEME = "hf://"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(
    rf"{SCHEME}(?P<repository>{_WORD}/{_WORD})(@(?P<revision>{_WORD}))?(?P<folder>(/{_WORD}){{0,16}})"
)
_ALLOWED = re.compile(rf"{_WORD}/({_WORD}|\*)")


@dataclass(frozen=True)
class Reference:
    """A directory of a repository, by default of its main branch."""

    repository: str
    revision: str | None = None
    folder: str = ""

    @classmethod
    def parse(cls, written: str) -> "Reference":
        """Parse a written reference. Raises ValueError."""
        if (match := _REFERENCE.fullmatch(written)) is None:
            raise ValueError("a reference to the hub is written hf://OWNER/NAME or hf://OWNER/NAME@REVISION/FOLDER")
        return cls(match["repository"], match["revision"], match["folder"].lstrip("/"))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repository}{revision}" + (f"/{self.folder}" if self.folder else "")

    def within(self, allowed: Collection[str]) -> bool:
        """Whether a list of repositories (`parse_allowed`) contains its repository."""
        return not {self.repository, f"{self.repository.partition('/')[0]}/*"}.isdisjoint(allowed)


def parse_allowed(written: str) -> str:
    """Check an entry of a list of repositories, `OWNER/NAME` or `OWNER/*`, and return it. Raises ValueError."""
    if not _ALLOWED.fullmatch(written):
        raise ValueError(f"{written!r} is neither OWNER/NAME nor OWNER/*")
    return written
