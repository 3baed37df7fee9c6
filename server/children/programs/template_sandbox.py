"""A program that renders untrusted chat templates; `server.text.sandbox` is the other end."""

from typing import Any

import jinja2

from server.children.forked import serve_forked
from server.text.chat_template import ChatTemplate, TemplateRefusal


def _run_order(order: dict[str, Any]) -> dict[str, Any]:
    try:
        template = ChatTemplate(order["source"], order["special_tokens"], order["max_characters"])
        text = template.render(order["messages"], **order["options"]) if order["messages"] is not None else ""
        text.encode()
        return {"answer": text}
    except TemplateRefusal as refusal:
        return _refused(refusal.message, refusal.param)
    except jinja2.TemplateError as fault:
        return _refused(f"The chat template is not valid: {fault}", "chat_template")
    except RecursionError:
        return _refused("The chat template is nested too deep.", "chat_template")
    except UnicodeEncodeError:
        return _refused("The chat template writes half a surrogate pair.", "messages")
    except MemoryError:
        return {"limit": "takes too much memory"}


def _refused(message: str, param: str) -> dict[str, Any]:
    return {"refused": {"message": message, "param": param}}


if __name__ == "__main__":
    serve_forked(_run_order)
