"""Removal of orphans: objects of the store without a record, left by a server's death or an outage of the store."""

from collections.abc import Callable, Collection

from adapters.storage.bucket import Bucket
from adapters.storage.records import Content, Records

Needs = Callable[[Content | None], Collection[str] | None]  # a record's content -> its objects; None: all existing ones


def remove_orphans(bucket: Bucket, prefix: str, records: Records, needs: Needs, seconds: float) -> int:
    """Remove the objects `<prefix>/<key>/...` that the record of their key does not need; return the count.

    Objects are written before the record that names them: a key is skipped while one of its objects is younger than
    `seconds`.
    """
    found: dict[str, dict[str, float]] = {}
    for entry in bucket.list(prefix):
        found.setdefault(entry.path.split("/")[1], {})[entry.path] = entry.age
    count = 0
    for key, ages in found.items():
        if min(ages.values()) <= seconds:
            continue
        record = records.fetch(key)
        needed = None if record.fault is not None else needs(record.content)
        if needed is not None and (gone := sorted(ages.keys() - set(needed))):
            bucket.delete(gone)
            count += len(gone)
    return count
