"""The store compared with a simple model."""

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapters.storage.versions import UnknownAdapter, Version
from tests.support.publishing import Box, content_of, put, spec_of


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class StoreMachine(RuleBasedStateMachine):
    """The store equals a dictionary of lists, through restarts and with leases held."""

    names = st.sampled_from(["x", "y"])
    contents = st.sampled_from("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.box = Box(Path(self.directory.name), retain=2)
        self.model: dict[str, list[str]] = {}
        self.leases: list[tuple[Version, str, Any]] = []

    @rule(name=names, content=contents)
    def publish(self, name: str, content: str) -> None:
        before = self.model.get(name, [])
        _, changed = put(self.box.store, name, content)
        assert changed == (before[:1] != [content])
        self.model[name] = [content, *(old for old in before if old != content)][:2]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), back=st.booleans())
    def repoint(self, data: st.DataObject, back: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        before = self.model[name]
        content = before[-1] if back else data.draw(st.sampled_from(before))
        if not back:
            self.box.store.promote("t", name, spec_of(content).digest[:30])
        elif len(before) > 1:
            self.box.store.roll_back("t", name)
        self.model[name] = [content, *(old for old in before if old != content)]

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.model:
            self.box.store.delete("t", name)
            del self.model[name]
        else:
            with pytest.raises(UnknownAdapter):
                self.box.store.delete("t", name)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def take_lease(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        version = self.box.store.get("t", name)
        lease = self.box.store.lease(version)
        lease.__enter__()
        self.leases.append((version, self.model[name][0], lease))

    @precondition(lambda self: self.leases)
    @rule()
    def end_lease(self) -> None:
        self.leases.pop(0)[2].__exit__(None, None, None)

    @precondition(lambda self: not self.leases)
    @rule()
    def restart(self) -> None:
        self.box.again()

    @invariant()
    def agrees(self) -> None:
        found = {
            name: [content_of(version) for version in self.box.store.versions("t", name)] for name in sorted(self.model)
        }
        assert found == self.model
        assert [version.name for version in self.box.store.list("t")] == sorted(self.model)
        assert [content_of(version) for version, _, _ in self.leases] == [content for _, content, _ in self.leases]
        needed = {content for contents in self.model.values() for content in contents}
        needed |= {content for _, content, _ in self.leases}
        wait_for(lambda: self.box.on_disk() == (0, sorted(needed)))
        assert not self.box.set_aside()

    def teardown(self) -> None:
        for _, _, lease in self.leases:
            lease.__exit__(None, None, None)
        wait_for(lambda: not any(thread.name == "adapter-collector" for thread in threading.enumerate()))
        self.box.names.close()
        self.directory.cleanup()


def test_the_store_equals_its_model() -> None:
    run_state_machine_as_test(StoreMachine, settings=settings(max_examples=10, stateful_step_count=20, deadline=None))
