"""Tenants' quotas of storage and training, checked before new content is accepted."""

import asyncio
import time
from pathlib import Path

from starlette.requests import Request

from server.errors import PermissionDenied, TooManyRequests
from server.services import Services, caller_of, services_of

_DAY = 86400


async def check_storage_quota(request: Request, directory: Path | None = None) -> None:
    """Check the storage quota for the files in this directory, or else for the announced body.

    Raises PermissionDenied beyond `stored_bytes`.
    """
    services, caller = services_of(request), caller_of(request)
    limit = caller.allowance.limits.stored_bytes
    if limit is None:
        return
    announced = request.headers.get("content-length", "")
    added = int(announced) if announced.isdigit() else 0
    if directory is not None:
        added = await asyncio.to_thread(_size, directory)
    stored = await asyncio.to_thread(stored_bytes, services, caller.tenant)
    if stored + added > limit:
        message = f"You keep {stored} bytes, and these are {added} more; your limit is {limit}."
        raise PermissionDenied(message, code="storage_quota_exceeded")


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def stored_bytes(services: Services, tenant: str) -> int:
    """Return the bytes of a tenant's adapters, files and responses; content shared by several names counts once."""
    versions = {
        version.digest: version.receipt["bytes"]
        for version in services.store.all_versions()
        if version.tenant == tenant
    }
    with services.tuning.database.reading() as connection:
        query = "SELECT COALESCE(SUM(bytes), 0) FROM files WHERE tenant = ?"
        files: int = connection.execute(query, (tenant,)).fetchone()[0]
    return sum(versions.values()) + files + services.responses.stored_bytes(tenant)


async def check_training_quota(request: Request) -> None:
    """Check the training quotas. Raises TooManyRequests at the limit of unfinished jobs or of tokens per day."""
    services, caller = services_of(request), caller_of(request)
    limits = caller.allowance.limits
    if limits.training_jobs is not None:
        jobs = await asyncio.to_thread(services.tuning.jobs.unfinished)
        unfinished = sum(job.tenant == caller.tenant for job in jobs)
        if unfinished >= limits.training_jobs:
            message = f"{unfinished} of your jobs are unfinished; your limit is {limits.training_jobs}."
            raise TooManyRequests(message, retry_after=60)
    if limits.training_tokens_per_day is not None:
        trained = await asyncio.to_thread(services.ledger.trained_today, caller.tenant)
        if trained >= limits.training_tokens_per_day:
            message = f"Your limit is {limits.training_tokens_per_day} trained tokens per day (UTC)."
            raise TooManyRequests(message, retry_after=int(_DAY - time.time() % _DAY) + 1)
