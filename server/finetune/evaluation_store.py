"""Evaluations as the database knows them: their records, which are on disk when a call returns."""

import time
from typing import Literal, get_args

import msgspec

from adapters.storage.database import Database
from server.finetune.files import new_id
from server.finetune.jobs import JobError
from server.finetune.record_table import RecordTable

Status = Literal["running", "succeeded", "failed"]
FINAL: frozenset[Status] = frozenset({"succeeded", "failed"})


class Score(msgspec.Struct, frozen=True):
    """How well one model does. Loss in nats per token; `exact_match` is None where there is no answer to compare."""

    loss: float
    perplexity: float
    exact_match: float | None


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation now."""

    id: str
    tenant: str
    status: Status
    created_at: int
    finished_at: int | None = None
    model: str  # as the client named it
    adapter: str | None  # stored name, None for the base alone
    digest: str | None
    file: str
    max_examples: int | None = None
    examples: int = 0
    tokens: int = 0
    base: Score | None = None
    adapted: Score | None = None
    result_files: list[str] = []
    error: JobError | None = None
    deaths: int = 0  # of engines that had one of its sequences

    @property
    def goes_on(self) -> bool:
        """Whether there is work to do for it."""
        return self.status == "running"


class UnknownEvaluationError(LookupError):
    """No evaluation of that id for this tenant."""


class EvaluationStateError(ValueError):
    """The evaluation is another server's, or no more."""


class EvaluationStore(RecordTable[Evaluation, Status]):
    """All evaluations."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, "evaluations", Evaluation, UnknownEvaluationError, get_args(Status), FINAL)

    def create(
        self, tenant: str, *, model: str, adapter: str | None, digest: str | None, file: str, max_examples: int | None
    ) -> Evaluation:
        """A new one, which runs."""
        evaluation = Evaluation(
            id=new_id("eval-"),
            tenant=tenant,
            status="running",
            created_at=int(time.time()),
            model=model,
            adapter=adapter,
            digest=digest,
            file=file,
            max_examples=max_examples,
        )
        self.add(evaluation)
        return evaluation

    # --- for others: `SharedEvaluations` are those of several servers ----------------------------------

    def settle(self, evaluation: Evaluation) -> None:
        """Write down how one stands. Raises EvaluationStateError when that is no longer this server's to say."""
        self.write(evaluation)

    def delete(self, evaluation_id: str) -> None:
        """Forget one."""
        self.remove(evaluation_id)

    def has_results(self, evaluation: Evaluation) -> bool:
        """Whether one has results, or may have: it has neither failed nor been deleted."""
        try:
            return self.get(evaluation.tenant, evaluation.id).status != "failed"
        except UnknownEvaluationError:
            return False
