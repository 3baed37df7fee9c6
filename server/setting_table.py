"""The table of docs/reference/settings.md, and warnings about misspelt variables."""

import logging
import re
from collections.abc import Mapping

from server.setting_kinds import ENV_PREFIX
from server.settings import settings_fields

# Variables that are no settings: of clients, kernels and deploy/ray, and those that Kubernetes sets for Services.
_NO_SETTING = re.compile(r"URL|NATIVE|TRITON|RAY_\w+|\w*SERVICE_\w+|\w*PORT(_\w+)?")

log = logging.getLogger(__name__)


def warn_about_unknown(environ: Mapping[str, str]) -> None:
    """Log a warning for each variable that has the settings' prefix and is no setting, so probably misspelt."""
    known = {row.env for row in settings_fields()}
    for name in sorted(environ.keys() - known):
        if name.startswith(ENV_PREFIX) and not _NO_SETTING.fullmatch(name.removeprefix(ENV_PREFIX)):
            log.warning("%s is not a setting", name)


def settings_table() -> str:
    """Return the table of docs/reference/settings.md, in Markdown."""
    lines = ["| Flag | Alias | Variable | Default | Meaning |", "|---|---|---|---|---|"]
    for row in settings_fields():
        flag, *aliases = (
            f"`{declared.replace('/', '`, `')}`" if row.default else f"`{declared.partition('/')[0]}`"
            for declared in row.declarations
        )
        meaning = row.help
        if row.choices:
            meaning += " One of " + ", ".join(f"`{word}`" for word in row.choices) + "."
        if row.repeatable:
            meaning += " Repeatable; comma-separated in the variable."
        lines.append(f"| {flag} | {', '.join(aliases)} | `{row.env}` | {row.default_text} | {meaning} |")
    return "\n".join(lines) + "\n"
