"""The HTTP application: routes, middleware and lifespan around the services it is given.

`build_app` is pure: collaborators come in, nothing is opened. `server.main` makes them for a real server.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from server.api import chat, completions, tokenize
from server.errors import EXCEPTION_HANDLERS
from server.middleware import middleware
from server.services import Services


def build_app(services: Services) -> Starlette:
    """The application. Its lifespan starts the engine and, at the end, stops it."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await services.engine.start()
        try:
            yield
        finally:
            await services.engine.stop(grace=0.0)

    settings = services.settings
    app = Starlette(
        routes=[*completions.routes, *chat.routes, *tokenize.routes],
        middleware=middleware(services.drain, settings.api_key, settings.allowed_origins),
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.services = services
    return app
