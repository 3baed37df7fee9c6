"""The HTTP application: routes, middleware, lifespan.

Collaborators are passed in; nothing is opened here.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette

from server.errors import EXCEPTION_HANDLERS
from server.http.inside import respond
from server.http.middleware import middleware
from server.http.routes import (
    adapters,
    audit,
    batches,
    chat,
    checks,
    classify,
    completions,
    embeddings,
    evaluations,
    files,
    fine_tuning,
    health,
    merging,
    messages,
    models,
    pins,
    reference,
    responses,
    server_history,
    sharing,
    tenants,
    tokenize,
    ui,
    usage,
    versions,
    vllm,
)
from server.services import Services
from server.tenants.sending import send_periodically

_LAST_SENDING_SECONDS = 10  # for the last usage and audit records to reach the object store
_THREADS = 64


def build_app(services: Services) -> Starlette:
    """Build the application. Its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # Enough threads that calls waiting for a locked database do not block other work.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "worker"))
        await services.tenants.start()
        await services.engine.start()
        await services.tuning.start()
        services.batches.answer = partial(respond, app)
        await services.batches.start()
        registry, tenants = services.registry, services.tenants
        working = registry.collect_orphans(), registry.following.run(), tenants.run(), tenants.follow()
        others = services.history.run(), services.responses.run()
        background = [asyncio.create_task(work) for work in (*working, *others)]
        shared, seconds = services.settings.adapter_store is not None, services.settings.store_send_seconds
        sends = services.ledger.send, services.audit.send
        sending = asyncio.create_task(send_periodically(seconds, *sends)) if shared else None
        try:
            yield
        finally:
            for task in background:
                task.cancel()
            await services.responses.stop()
            await services.batches.stop()
            await services.tuning.stop()
            await services.engine.stop(grace=0.0)
            await services.registry.publisher.close()
            await services.ledger.stop()
            if sending is not None:
                sending.cancel()
                await asyncio.wait({sending}, timeout=_LAST_SENDING_SECONDS)
            await services.grammars.close()
            if services.text.renderer is not None:
                await services.text.renderer.close()

    # An adapter's name may contain slashes: routes with a suffix after the name come before the bare name.
    resources = [
        completions,
        chat,
        responses,
        messages,
        tokenize,
        versions,
        checks,
        pins,
        sharing,
        merging,
        adapters,
        models,
        files,
        batches,
        classify,
        embeddings,
        fine_tuning,
        evaluations,
        health,
        server_history,
        tenants,
        usage,
        audit,
        reference,
    ]
    resources += [vllm] if services.settings.lora_dir is not None or services.settings.adapter_hub else []
    resources += [ui] if services.settings.ui else []
    app = Starlette(
        routes=[route for resource in resources for route in resource.routes],
        middleware=middleware(services.drain, services.settings, services.tenants),
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.services = services
    return app
