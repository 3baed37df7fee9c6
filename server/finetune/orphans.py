"""Objects in a store that no record needs: what was left when a server died, or the store was away."""

from collections.abc import Callable, Collection

from adapters.storage.bucket import Bucket
from adapters.storage.records import Content, Records

Needs = Callable[[Content | None], Collection[str] | None]  # a record's content -> objects; None: all that there are


def remove_orphans(bucket: Bucket, prefix: str, records: Records, needs: Needs, seconds: float) -> int:
    """Remove objects `<prefix>/<key>/...` that the record of this key does not need; how many.

    Objects come before the record that names them: a key is left alone while one of its came in the last so many
    seconds.
    """
    found: dict[str, dict[str, float]] = {}
    for entry in bucket.list(prefix):
        found.setdefault(entry.path.split("/")[1], {})[entry.path] = entry.age
    count = 0
    for key, ages in found.items():
        if min(ages.values()) <= seconds:
            continue
        record = records.look(key)
        needed = None if record.fault is not None else needs(record.content)
        if needed is not None and (gone := sorted(ages.keys() - set(needed))):
            bucket.delete(gone)
            count += len(gone)
    return count
