"""The engine process apart from its engine."""

import subprocess
import sys

# Its start takes long, and here never ends; the process that it is told it was started by is another than its parent.
_STARTED = """
import sys, time
from server.engine import process
from server.messages import protocol
protocol.decode_config = lambda _: time.sleep(100)
sys.argv = ["process", "1", "{}"]
process.main()
"""


def test_it_ends_when_its_parent_went_before_it_could_look() -> None:
    """Killed with its engine just started, an API process left one behind that held the device for ever."""
    assert subprocess.run([sys.executable, "-c", _STARTED], timeout=300, check=False).returncode == 1
