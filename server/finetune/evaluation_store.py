"""Evaluations in the database. Every change is on disk when the call returns."""

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
    """A model's score. Loss in nats per token; `exact_match` is None when there is no answer to compare."""

    loss: float
    perplexity: float
    exact_match: float | None


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation."""

    id: str
    tenant: str
    status: Status
    created_at: int
    finished_at: int | None = None
    model: str  # as named by the client
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
    deaths: int = 0  # of engines with one of its sequences in flight

    @property
    def has_work(self) -> bool:
        """Whether it is unfinished."""
        return self.status == "running"


class UnknownEvaluationError(LookupError):
    """The tenant has no evaluation with this id."""


class EvaluationStateError(ValueError):
    """Another server holds the evaluation, or it was deleted."""


class EvaluationStore(RecordTable[Evaluation, Status]):
    """All evaluations."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, "evaluations", Evaluation, UnknownEvaluationError, get_args(Status), FINAL)

    def create(
        self, tenant: str, *, model: str, adapter: str | None, digest: str | None, file: str, max_examples: int | None
    ) -> Evaluation:
        """Add a new evaluation, with status "running"."""
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

    # --- sharing among servers: overridden by `SharedEvaluations` --------------------------------------

    def save(self, evaluation: Evaluation) -> None:
        """Write an evaluation's state. Raises EvaluationStateError if its lease is lost or it was deleted."""
        self.write(evaluation)

    def delete(self, evaluation_id: str) -> None:
        """Delete an evaluation."""
        self.remove(evaluation_id)

    def has_results(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation has results, or may still have some: it has neither failed nor been deleted."""
        try:
            return self.get(evaluation.tenant, evaluation.id).status != "failed"
        except UnknownEvaluationError:
            return False
