"""The limits on waiting requests."""

import pytest

from server.admission import Admission
from server.errors import InvalidRequest, TooManyRequests


def test_requests_and_tokens_are_bounded_and_given_back_once() -> None:
    admission = Admission(max_requests=3, max_tokens=100)
    first = admission.enter([40, 40])
    with pytest.raises(TooManyRequests, match="80 prompt tokens"):
        admission.enter([30])
    second = admission.enter([20])
    with pytest.raises(TooManyRequests, match="3 sequences") as refusal:
        admission.enter([0])
    assert 1 <= int(refusal.value.headers["Retry-After"]) <= 60
    for ticket in [*first, *second, *first]:
        ticket.leave(served=True)
    assert (admission.requests, admission.tokens) == (0, 0)


def test_one_request_is_all_or_nothing() -> None:
    admission = Admission(max_requests=3, max_tokens=100)
    admission.enter([1, 1])
    with pytest.raises(TooManyRequests):
        admission.enter([1, 1])
    assert admission.requests == 2


def test_a_request_beyond_the_limits_is_refused_as_invalid() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        Admission(max_requests=3, max_tokens=100).enter([1] * 4)
    assert refusal.value.param == "n"


def test_a_long_prompt_enters_an_empty_queue() -> None:
    Admission(max_requests=3, max_tokens=100).enter([500])


def test_retry_after_follows_recent_waiting_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    admission = Admission(max_requests=1, max_tokens=100)
    for _ in range(30):
        (ticket,) = admission.enter([1])
        now += 20
        ticket.leave(served=True)
    admission.enter([1])
    with pytest.raises(TooManyRequests) as refusal:
        admission.enter([1])
    assert int(refusal.value.headers["Retry-After"]) in (19, 20)


def test_a_full_queue_takes_others_up_to_their_share() -> None:
    admission = Admission(max_requests=4, max_tokens=100)
    admission.enter([20] * 4, "flood")
    with pytest.raises(TooManyRequests):
        admission.enter([1], "flood")
    tickets = admission.enter([60, 10], "other")  # half of the places; the first prompt may exceed the limit
    with pytest.raises(TooManyRequests, match="sequences"):
        admission.enter([1], "other")
    tickets[0].leave(served=True)
    with pytest.raises(TooManyRequests, match="prompt tokens"):
        admission.enter([60], "other")
    admission.enter([10], "other")
    admission.enter([1], "third")
    assert (admission.requests, admission.tokens) == (7, 101)
