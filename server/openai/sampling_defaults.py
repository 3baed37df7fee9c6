"""Sampling defaults recommended by a model's authors, for fields missing in a request."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from server.model_source import BUILT_IN
from server.settings import SettingError

FILE = "generation_config.json"
# name -> (lowest, highest); the fields that vLLM reads too. `do_sample` is not read: temperature decides.
_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 2.0),
}

log = logging.getLogger(__name__)


def sampling_defaults(source: str, ref: str, model: Path) -> dict[str, float]:
    """Return defaults by request field. Values outside a field's range are left out with a warning.

    Args:
        source: "auto" (the model's own file, or the table of built-in models), "none", or another directory.
        ref: the model's name as given by the operator.
        model: its directory.

    Raises SettingError for another directory without the file, and for a file that is not a JSON object.
    """
    if source == "none":
        return {}
    if source == "auto" and ref in BUILT_IN:
        return dict(BUILT_IN[ref].sampling)
    path = (model if source == "auto" else Path(source).expanduser()) / FILE
    if not path.is_file():
        if source == "auto":
            return {}
        raise SettingError(f"--generation-config: {path} does not exist")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as fault:
        raise SettingError(f"--generation-config: {path} is not JSON: {fault}") from None
    if not isinstance(content, dict):
        raise SettingError(f"--generation-config: {path} is not a JSON object")
    defaults: dict[str, float] = {}
    for name, (lowest, highest) in _RANGES.items():
        value = content.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest:
            defaults[name] = int(value) if name == "top_k" else float(value)
        elif value is not None:
            log.warning("%s: %s = %r is out of range; not used as a default", path, name, value)
    return defaults
