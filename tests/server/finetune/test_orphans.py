"""Objects that no record needs leave the store, and no others."""

from pathlib import Path

from adapters.storage.bucket import Bucket
from adapters.storage.records import Content, Records
from server.finetune.orphans import remove_orphans


def needed(content: Content | None) -> list[str] | None:
    return [] if content is None else content["needs"]


def test_only_what_no_record_needs_goes(tmp_path: Path) -> None:
    bucket = Bucket(f"file://{tmp_path}/bucket")
    records = Records(bucket, "files")
    for path in ("a/1", "a/2", "all/1", "removed/1", "never/1", "damaged/1"):
        bucket.put_if(f"contents/{path}", b"x", None)
    records.change("a", lambda _: {"needs": ["contents/a/1"]})
    records.change("all", lambda _: {"needs": None})
    records.change("removed", lambda _: {"needs": None})
    records.change("removed", lambda _: None)
    bucket.put_if("files/damaged.json", b"{", None)
    assert remove_orphans(bucket, "contents", records, needed, 3600) == 0  # they came just now
    assert remove_orphans(bucket, "contents", records, needed, 0) == 3
    left = sorted(entry.path.removeprefix("contents/") for entry in bucket.list("contents"))
    assert left == ["a/1", "all/1", "damaged/1"]
