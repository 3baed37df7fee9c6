"""All formats of tool calls, in the order of matching chat templates."""

import re
from functools import lru_cache

from server.text.tools.deepseek import DEEPSEEK
from server.text.tools.deepseek_dsml import DEEPSEEK_DSML
from server.text.tools.format import ToolFormat
from server.text.tools.gemma import GEMMA, GEMMA4
from server.text.tools.glm import GLM
from server.text.tools.granite import GRANITE, PHI4
from server.text.tools.harmony import HARMONY
from server.text.tools.hermes import HERMES
from server.text.tools.kimi import KIMI
from server.text.tools.llama3_json import LLAMA3_JSON
from server.text.tools.minimax import MINIMAX, MINIMAX_M3
from server.text.tools.mistral import MISTRAL, MISTRAL_ARGS
from server.text.tools.python_lines import MINICPM, OLMO3
from server.text.tools.pythonic import LFM, PYTHONIC
from server.text.tools.qwen3_coder import QWEN3_CODER, SEED
from server.text.tools.tagged_list import COHERE, NEMOTRON, TOOL_CALLS, XLAM

_ALL = (
    MINICPM,
    LFM,
    KIMI,
    MINIMAX_M3,
    MINIMAX,
    HARMONY,
    DEEPSEEK_DSML,
    DEEPSEEK,
    GEMMA4,
    GEMMA,
    GLM,
    SEED,
    QWEN3_CODER,
    MISTRAL_ARGS,
    MISTRAL,
    PHI4,
    GRANITE,
    COHERE,
    NEMOTRON,
    TOOL_CALLS,
    OLMO3,
    XLAM,
    PYTHONIC,
    LLAMA3_JSON,
    HERMES,
)
_FIELD = re.compile(r"""\[["']tools["']\]""")
_TEXTS = re.compile(r"""'[^']*'|"[^"]*["]""")

FORMATS = {each.name: each for each in _ALL}
VLLM_NAMES = dict.fromkeys(
    ("hunyuan_a13b", "jamba"), "tool_calls"
) | {  # names of vLLM's parsers -> formats here; the others have the same name or no counterpart
    "deepseek_v3": "deepseek",
    "deepseek_v31": "deepseek",
    "deepseek_v32": "deepseek_dsml",
    "functiongemma": "gemma",
    "glm45": "glm",
    "kimi_k2": "kimi",
    "minimax_m2": "minimax",
    "glm47": "glm",
    "cohere_command": "cohere",
    "nemotron_nano_v2": "nemotron",
    "seed_oss": "seed",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "openai": "harmony",
    "phi4_mini_json": "phi4",
    "qwen3_xml": "qwen3_coder",
}


@lru_cache(64)
def knows_tools(template: str) -> bool:
    """Whether a chat template's source uses `tools`, as a variable or as a field of a message."""
    for part in re.split(r"[%}]\}", template):
        begin = max(part.rfind("{%"), part.rfind("{{"))
        code = _TEXTS.sub("", _FIELD.sub(" tools ", part[begin:])) if begin >= 0 else ""
        if re.search(r"\btools\b", code):
            return True
    return False


@lru_cache(64)
def format_of(template: str, named: str | None = None) -> ToolFormat:
    """Return the format of a chat template's source. `named`: the format in place of a recognised one, for templates
    that know tools."""
    if not knows_tools(template):
        return HERMES
    if named is not None:
        return FORMATS[named]
    return next((each for each in _ALL if any(sign in template for sign in each.signs)), HERMES)
