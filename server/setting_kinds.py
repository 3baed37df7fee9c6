"""Kinds of settings: how one is declared, read, checked and explained.

A dataclass declares its fields by the functions below, one for each kind of value; `rows` lists them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

ENV_PREFIX = "LORAKEET_"
SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://.*")  # what Kubernetes sets LORAKEET_PORT to beside a Service `lorakeet`

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_UNITS = {"GiB": 1024**3, "MiB": 1024**2, "KiB": 1024}
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # as Python has such bytes of the system; no JSON can have them
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class SettingError(ValueError):
    """A setting has a value it cannot have. The message names the flag or the variable."""


@dataclass(frozen=True)
class Setting:
    """One row of the table: how a setting is called, read, checked and explained."""

    help: str
    default: Any
    shown_default: str
    parse: Callable[[str], Any]
    choices: tuple[str, ...] | None
    within: tuple[float, float] | None
    repeatable: bool
    aliases: tuple[str, ...]
    name: str = ""  # its field's

    @property
    def flag(self) -> str:
        """The command line's flag. A boolean also has `--no-...`."""
        return "--" + self.name.replace("_", "-")

    @property
    def declarations(self) -> list[str]:
        """The flag and its aliases, as typer declares options."""
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
        """The typed value of `given`: text, several texts, or a value that is typed already."""
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
            least, most = self.within or (value, value)
            if not value >= least:
                raise ValueError(f"{value} is less than {least}")
            if not value <= most:
                raise ValueError(f"{value} is more than {most}")
        return value


def rows(settings: Any) -> list[Setting]:
    """The settings that a dataclass declares, in the order of its fields."""
    return [replace(item.metadata["setting"], name=item.name) for item in fields(settings)]


# --- values as they are written ----------------------------------------------------------------------


def parse_size(written: str) -> int:
    """Bytes from `1048576`, `512MiB`, `2GiB`, `1.5 GB`. `KiB` counts in 1024, `KB` in 1000, `K` in 1024."""
    match = _SIZE.fullmatch(written.strip())
    if match is None:
        raise ValueError("expected a size such as 512MiB or 2GiB")
    amount, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    decimal = bool(prefix) and not binary and written.strip().lower().endswith("b")
    return int(float(amount) * (1000 if decimal else 1024) ** power)


def parse_bool(written: str) -> bool:
    """A yes or a no as people write it in the environment."""
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
        raise ValueError(f"{written} begins with nobody's home directory") from None


def _parse_text(written: str) -> str:
    if not written:
        raise ValueError("expected a value")
    return written


def parse_device(written: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", written):
        raise ValueError("expected auto, cpu, cuda or cuda:N")
    return written


def parse_origin(written: str) -> str:
    """As browsers write them, letter by letter."""
    if not re.fullmatch(r"(?i)\*|null|[a-z][a-z0-9+.-]*://[^/?#@]+", written):
        raise ValueError(
            f"{written!r} is neither * nor an origin such as https://example.com, without a slash at its end"
        )
    return written.lower()


def parse_metrics_prefix(written: str) -> str:
    if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", written):
        raise ValueError("expected letters, digits and underscores, no digit first")
    return written


# --- a field of each kind ----------------------------------------------------------------------------


def _field(
    parse: Callable[[str], Any],
    default: Any,
    help: str,  # noqa: A002  # argparse's and typer's own word for it
    *,
    choices: Sequence[str] | None = None,
    within: tuple[float, float] | None = None,
    shown: str = "",
    repeatable: bool = False,
    secret: bool = False,
    vllm: str | None = None,
) -> Any:
    """A field of a dataclass.

    Args:
        default: a value, or a function that makes it.
        within: the least and the most that a number may be.
        shown: in place of the default.
        repeatable: several may be given.
        vllm: the flag by which vLLM's users look for it.
    """
    made = callable(default)
    row = Setting(
        help=help,
        default=MISSING if made else default,
        shown_default=shown or _shown(default, parse),
        parse=parse,
        choices=tuple(choices) if choices else None,
        within=within,
        repeatable=repeatable,
        aliases=(vllm,) if vllm else (),
    )
    if made:
        return field(default_factory=default, metadata={"setting": row})
    return field(default=default, metadata={"setting": row}, repr=not secret)


def _shown(default: Any, parse: Callable[[str], Any]) -> str:
    """A default as people write it."""
    if default == ():
        return "none"
    if parse is parse_size and default:
        return next((f"{default // unit}{name}" for name, unit in _UNITS.items() if default % unit == 0), str(default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def text(default: Any, help: str, *, parse: Callable[[str], Any] = _parse_text, **more: Any) -> Any:  # noqa: A002
    """Text, or what `parse` makes of it."""
    return _field(parse, default, help, **more)


def choice(
    default: str | None,
    help: str,  # noqa: A002
    choices: Sequence[str],
    *,
    renamed: Mapping[str, str] | None = None,
    **more: Any,
) -> Any:
    """One of several words. `renamed`: others that mean one of these."""

    def parse(written: str) -> str:
        return (renamed or {}).get(written, _parse_text(written))

    return _field(parse, default, help, choices=choices, **more)


def path(default: Any, help: str, **more: Any) -> Any:  # noqa: A002
    """A file or a directory, `~` being home."""
    return _field(parse_path, default, help, **more)


def switch(default: bool, help: str, **more: Any) -> Any:  # noqa: A002
    """A flag without a value, and its `--no-...`."""
    return _field(parse_bool, default, help, **more)


def whole(default: int | None, help: str, within: tuple[int, int], **more: Any) -> Any:  # noqa: A002
    """A whole number."""
    return _field(_parse_integer, default, help, within=within, **more)


def number(default: float, help: str, within: tuple[float, float], **more: Any) -> Any:  # noqa: A002
    """A number."""
    return _field(_parse_number, default, help, within=within, **more)


def size(default: int | None, help: str, within: tuple[int, int], **more: Any) -> Any:  # noqa: A002
    """Bytes."""
    return _field(parse_size, default, help, within=within, **more)
