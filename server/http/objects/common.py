"""Errors, lists and deletions, of whatever kind."""

from typing import Generic, Literal, NotRequired, TypedDict, TypeVar

T = TypeVar("T")


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(TypedDict):
    error: ErrorDetail


class ListObject(TypedDict, Generic[T]):
    """`first_id` and `last_id` are there when the page is not empty; `total` counts all pages' objects."""

    object: Literal["list"]
    data: list[T]
    has_more: NotRequired[bool]
    total: NotRequired[int]
    first_id: NotRequired[str]
    last_id: NotRequired[str]


class DeletedObject(TypedDict):
    id: str
    object: str
    deleted: Literal[True]
