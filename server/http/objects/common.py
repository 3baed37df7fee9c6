"""Errors, lists and deletions of all kinds."""

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
    """`first_id` and `last_id` are present when the page is not empty; `total` counts the objects of all pages."""

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
