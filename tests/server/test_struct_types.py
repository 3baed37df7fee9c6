"""msgspec crashes if several threads use a struct's type first at the same time, so types are prepared beforehand."""

import subprocess
import sys
from pathlib import Path

_LOOK = """
import gc, sys
from pathlib import Path
from adapters.peft_format.text import _Document
from server.batches.rows import _Named
from server.batches.store import Batch, BatchStore, Fault
from server.finetune.database import open_database
from server.finetune.evaluation_store import Evaluation, EvaluationStore
from server.finetune.jobs import Event, Job, JobStore, StoredCheckpoint
from server.finetune.rows import ChatExample, CompletionExample, TextExample
from server.messages.training import Metrics
from server.tenants.audit import Entry

database = open_database(Path(sys.argv[1]))
stores = [store(database) for store in (BatchStore, EvaluationStore, JobStore)]
used = (
    *(_Document, _Named, Batch, Fault, Evaluation, Event, Job, StoredCheckpoint),
    *(ChatExample, CompletionExample, TextExample, Metrics, Entry),
)
for kind in used:
    if not any(type(part).__name__ == "StructInfo" for part in gc.get_referents(kind)):
        print(kind.__name__)
"""


def test_types_are_ready_before_threads_use_them(tmp_path: Path) -> None:
    looked = subprocess.run([sys.executable, "-c", _LOOK, tmp_path / "db"], capture_output=True, text=True, check=True)
    assert looked.stdout == ""
