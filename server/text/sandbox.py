"""Rendering of adapters' chat templates in processes that can be killed, within limits of time, memory and output."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from adapters.peft_format.fields import AdapterError
from server.children.helper import FORK_GRACE_SECONDS, HelperFailed, HelperLimit, forking_helpers
from server.errors import InvalidRequest
from server.text.chat_template import MAX_OUTPUT

_PROBE = ({"role": "user", "content": "Hello"},)


class TemplateRenderer:
    """A renderer of any template, within limits, in the adapters' turn. `close` ends its processes."""

    def __init__(self, seconds: float, cpu_seconds: int, memory_bytes: int) -> None:
        self._seconds = seconds + FORK_GRACE_SECONDS
        self._helpers = forking_helpers("template_sandbox", seconds, cpu_seconds, memory_bytes)

    async def close(self) -> None:
        """End the processes."""
        await self._helpers.close()

    async def check(self, source: str) -> None:
        """Raise `InvalidRequest` for an invalid template; measure its duration, for the queue."""
        await self.render(source, {}, None)
        with suppress(InvalidRequest):
            await self.render(source, {}, _PROBE, 2**20)

    async def render(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        messages: Sequence[Mapping[str, Any]] | None,
        max_characters: int = MAX_OUTPUT,
        adapter: str = "",
        **options: Any,
    ) -> str:
        """As `ChatTemplate.render`, in `adapter`'s turn. Raises `InvalidRequest` beyond a limit, too."""
        known = {"source": source, "special_tokens": special_tokens, "max_characters": max_characters}
        order, param = known | {"messages": messages, "options": options}, "messages"
        try:
            text: str = await self._helpers.ask(adapter, order, self._seconds, str, str(hash(source)))
            return text
        except AdapterError as refusal:
            message, param = f"The adapter's {str(refusal).removeprefix('The ')}", refusal.param
        except HelperLimit as limit:
            message = f"The adapter's chat template {limit}."
        except HelperFailed:
            message = "The adapter's chat template takes too long, or too much memory."
        raise InvalidRequest(message, param=param, code="chat_template_failed")
