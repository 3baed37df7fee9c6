"""Kinds of settings: declaration, parsing, checks and help.

A dataclass declares its fields with the functions below, one for each kind of value; `settings_of` lists them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

ENV_PREFIX = "LORAKEET_"
SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://.*")  # Kubernetes's value of LORAKEET_PORT for a Service `lorakeet`

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_UNITS = {"GiB": 1024**3, "MiB": 1024**2, "KiB": 1024}
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # Python's stand-ins for bytes that are not UTF-8; JSON cannot hold them
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class SettingError(ValueError):
    """An invalid value of a setting. The message names the flag or the variable."""


@dataclass(frozen=True)
class Setting:
    """One row of the table: a setting's name, parser, checks and help."""

    help: str
    default: Any
    default_text: str
    parse: Callable[[str], Any]
    choices: tuple[str, ...] | None
    bounds: tuple[float, float] | None
    repeatable: bool
    aliases: tuple[str, ...]
    name: str = ""  # of its field

    @property
    def flag(self) -> str:
        """The command line's flag. A boolean also has `--no-...`."""
        return "--" + self.name.replace("_", "-")

    @property
    def declarations(self) -> list[str]:
        """The flag and its aliases, in typer's notation."""
        return [f"{flag}/--no-{flag[2:]}" if self.is_bool else flag for flag in (self.flag, *self.aliases)]

    @property
    def env(self) -> str:
        """The environment variable. A repeatable setting takes comma-separated values there."""
        return ENV_PREFIX + self.name.upper()

    @property
    def is_bool(self) -> bool:
        """Whether the flag takes no value."""
        return self.parse is parse_bool

    def read(self, given: Any, source: str) -> Any:
        """Return the typed value of `given`: text, several texts, or a typed value. Raises SettingError."""
        try:
            if self.repeatable:
                values = [v for v in given.split(",") if v] or [""] if isinstance(given, str) else given
                return tuple(self._check(self.parse(v.strip()) if isinstance(v, str) else v) for v in values)
            return self._check(self.parse(given) if isinstance(given, str) else given)
        except ValueError as exc:
            raise SettingError(f"{source}: {exc}") from None

    def _check(self, value: Any) -> Any:
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{value!r} is not one of {', '.join(self.choices)}")
        if isinstance(value, str | Path) and _NOT_UTF8.search(str(value)):
            raise ValueError(f"{str(value)!r} is not UTF-8")
        if isinstance(value, int | float) and not isinstance(value, bool):
            lowest, highest = self.bounds or (value, value)
            if not value >= lowest:
                raise ValueError(f"{value} is less than {lowest}")
            if not value <= highest:
                raise ValueError(f"{value} is more than {highest}")
        return value


def settings_of(settings: Any) -> list[Setting]:
    """Return the settings of a dataclass, in the order of its fields."""
    return [replace(item.metadata["setting"], name=item.name) for item in fields(settings)]


# --- parsers of values -------------------------------------------------------------------------------


def parse_size(written: str) -> int:
    """Return the bytes of `1048576`, `512MiB`, `2GiB` or `1.5 GB`. `KiB` and `K` are 1024, `KB` is 1000."""
    match = _SIZE.fullmatch(written.strip())
    if match is None:
        raise ValueError("expected a size such as 512MiB or 2GiB")
    amount, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    decimal = bool(prefix) and not binary and written.strip().lower().endswith("b")
    return int(float(amount) * (1000 if decimal else 1024) ** power)


def parse_bool(written: str) -> bool:
    """Return the truth of `1`, `true`, `yes`, `on`, or their opposites."""
    if (word := written.strip().lower()) in _TRUE | _FALSE:
        return word in _TRUE
    raise ValueError("expected true or false")


def _parse_integer(written: str) -> int:
    if re.fullmatch(r"[+-]?\d{1,18}", written.strip()):
        return int(written)
    raise ValueError("expected a whole number")


def _parse_number(written: str) -> float:
    try:
        return float(written)
    except ValueError:
        raise ValueError("expected a number") from None


def parse_path(written: str) -> Path:
    if not written:
        raise ValueError("expected a path")
    try:
        return Path(written).expanduser()
    except RuntimeError:
        raise ValueError(f"{written}: there is no such home directory") from None


def _parse_text(written: str) -> str:
    if not written:
        raise ValueError("expected a value")
    return written


def parse_device(written: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", written):
        raise ValueError("expected auto, cpu, cuda or cuda:N")
    return written


def parse_origin(written: str) -> str:
    """Return an origin, in lower case, as browsers send it."""
    if not re.fullmatch(r"(?i)\*|null|[a-z][a-z0-9+.-]*://[^/?#@]+", written):
        raise ValueError(
            f"{written!r} is neither * nor an origin such as https://example.com, without a trailing slash"
        )
    return written.lower()


def parse_metrics_prefix(written: str) -> str:
    if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", written):
        raise ValueError("expected letters, digits and underscores, not starting with a digit")
    return written


# --- fields by kind ----------------------------------------------------------------------------------


def _field(
    parse: Callable[[str], Any],
    default: Any,
    help: str,  # noqa: A002  # argparse's and typer's own word for it
    *,
    choices: Sequence[str] | None = None,
    bounds: tuple[float, float] | None = None,
    default_text: str = "",
    repeatable: bool = False,
    secret: bool = False,
    vllm: str | None = None,
) -> Any:
    """Declare a field of a dataclass.

    Args:
        default: a value, or a function that makes it.
        bounds: the range of a number, both ends included.
        default_text: text in place of the default in the help.
        repeatable: whether several values may be given.
        vllm: vLLM's flag for it, an alias.
    """
    is_factory = callable(default)
    row = Setting(
        help=help,
        default=MISSING if is_factory else default,
        default_text=default_text or _default_text(default, parse),
        parse=parse,
        choices=tuple(choices) if choices else None,
        bounds=bounds,
        repeatable=repeatable,
        aliases=(vllm,) if vllm else (),
    )
    if is_factory:
        return field(default_factory=default, metadata={"setting": row})
    return field(default=default, metadata={"setting": row}, repr=not secret)


def _default_text(default: Any, parse: Callable[[str], Any]) -> str:
    """Return a default's text in the help."""
    if default == ():
        return "none"
    if parse is parse_size and default:
        return next((f"{default // unit}{name}" for name, unit in _UNITS.items() if default % unit == 0), str(default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def text(default: Any, help: str, *, parse: Callable[[str], Any] = _parse_text, **more: Any) -> Any:  # noqa: A002
    """Text, converted by `parse`."""
    return _field(parse, default, help, **more)


def choice(
    default: str | None,
    help: str,  # noqa: A002
    choices: Sequence[str],
    *,
    synonyms: Mapping[str, str] | None = None,
    **more: Any,
) -> Any:
    """One of several words. `synonyms`: synonyms -> words."""

    def parse(written: str) -> str:
        return (synonyms or {}).get(written, _parse_text(written))

    return _field(parse, default, help, choices=choices, **more)


def path(default: Any, help: str, **more: Any) -> Any:  # noqa: A002
    """A file or a directory; `~` is expanded."""
    return _field(parse_path, default, help, **more)


def switch(default: bool, help: str, **more: Any) -> Any:  # noqa: A002
    """A flag without a value, and its `--no-...`."""
    return _field(parse_bool, default, help, **more)


def integer(default: int | None, help: str, bounds: tuple[int, int], **more: Any) -> Any:  # noqa: A002
    """A whole number."""
    return _field(_parse_integer, default, help, bounds=bounds, **more)


def number(default: float, help: str, bounds: tuple[float, float], **more: Any) -> Any:  # noqa: A002
    """A number."""
    return _field(_parse_number, default, help, bounds=bounds, **more)


def size(default: int | None, help: str, bounds: tuple[int, int], **more: Any) -> Any:  # noqa: A002
    """A number of bytes."""
    return _field(parse_size, default, help, bounds=bounds, **more)
