"""`POST /v1/chat/completions`."""

from starlette.routing import BaseRoute

routes: list[BaseRoute] = []
