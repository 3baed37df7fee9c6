"""A program that renders chat templates which nobody vouches for: no template meets another one's messages."""

import contextlib
from typing import Any

import jinja2

from server.children.programs.sandboxed import serve
from server.text.chat_template import ChatTemplate, TemplateRefusal

Answer = dict[str, Any]  # "text", or "error" and "param"


def _carry_out(order: dict[str, Any]) -> Answer:
    with contextlib.suppress(MemoryError):
        try:
            template = ChatTemplate(order["source"], order["special_tokens"])
            return {"text": template.render(order["messages"], **order["options"]) if "messages" in order else ""}
        except TemplateRefusal as refusal:
            return {"error": refusal.message, "param": refusal.param}
        except jinja2.TemplateError as fault:
            return {"error": f"The chat template is not valid: {fault}", "param": "chat_template"}
        except RecursionError:
            return {"error": "The chat template is nested too deep.", "param": "chat_template"}
    return {"error": "The adapter's chat template takes too much memory."}


if __name__ == "__main__":
    serve(_carry_out)
