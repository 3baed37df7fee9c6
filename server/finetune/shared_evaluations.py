"""Evaluations shared by several servers in an object store; the rows in the local database are a copy.

`evaluations/<id>.json` is an evaluation and its lease. Partial results are not stored: a server that takes it over
starts from the beginning, as the same server would.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from server.finetune.evaluation_store import Evaluation, EvaluationStateError, EvaluationStore, Status
from server.finetune.shared import Shared, list_position

if TYPE_CHECKING:
    from adapters.storage.records import Content


class SharedEvaluations(Shared[Evaluation, Status], EvaluationStore):
    """All evaluations of the servers on one object store."""

    stopped = EvaluationStateError

    def add(self, record: Evaluation, number: int | None = None) -> None:
        super().add(record, number or list_position())

    def create(
        self, tenant: str, *, model: str, adapter: str | None, digest: str | None, file: str, max_examples: int | None
    ) -> Evaluation:
        """Record an evaluation for all servers; its row is removed again when that fails."""
        evaluation = super().create(
            tenant, model=model, adapter=adapter, digest=digest, file=file, max_examples=max_examples
        )
        try:
            self._upload_new(evaluation.id)
        except BaseException:
            self._remove_unshared(evaluation.id)
            raise
        return evaluation

    def share_all(self) -> None:
        """Upload evaluations created before the server used a store."""
        for evaluation in self.unshared_records():
            self._upload_new(evaluation.id)

    def save(self, evaluation: Evaluation) -> None:
        changed = {"record": msgspec.to_builtins(evaluation)}
        self._change(evaluation, lambda content: content | changed, {})

    def delete(self, evaluation_id: str) -> None:
        self._stored.change(evaluation_id, lambda content: None)
        self.leases.drop(evaluation_id)
        self.remove(evaluation_id)

    def has_results(self, evaluation: Evaluation) -> bool:
        self.refresh(evaluation.id)
        return super().has_results(evaluation)

    def _removed(self, id_: str) -> None:
        self.remove(id_)

    def _merged(self, id_: str, content: "Content") -> "Content":
        return content if "record" in content else content | {"record": self._row(id_)["record"]}

    def _copy(self, content: "Content", changes: Mapping[str, Any] | None = None, *, claimed: bool = False) -> bool:
        return self._copy_row(content, changes)
