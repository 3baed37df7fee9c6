"""The engine process, without an engine."""

import subprocess
import sys

# Its start takes long, and here never ends; its reported parent process is not its actual parent.
_STARTED = """
import sys, time
from server.engine import process
from server.messages import protocol
protocol.decode_config = lambda _: time.sleep(100)
sys.argv = ["process", "1", "{}"]
process.main()
"""


def test_it_ends_when_its_parent_went_before_it_could_look() -> None:
    """An API process killed just after starting its engine once left it behind, holding the device forever."""
    assert subprocess.run([sys.executable, "-c", _STARTED], timeout=300, check=False).returncode == 1
