"""`POST /v1/completions`."""

from starlette.routing import BaseRoute

routes: list[BaseRoute] = []
