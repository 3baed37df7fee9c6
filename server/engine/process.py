"""The engine process, which owns the device: start, loop over a socket, exit.

Started as `python -m server.engine.process PARENT CONFIG_JSON` by the API process of pid PARENT; exits when that
process ends. Requests carry token ids and adapter digests, and nothing here is durable.
"""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

log = logging.getLogger("lorakeet.engine")

SWITCH_SECONDS = 5e-4  # the GIL's switch interval: how long an adapter's loading thread may delay the stepping one


def _exit_with_parent(parent: int) -> None:
    """End this process soon after its parent, even if the parent ended before the first check."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os._exit(1)


def main() -> int:
    """Load the model and serve until drained. The exit status is 0 only after a drain."""
    threading.Thread(target=_exit_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    sys.setswitchinterval(SWITCH_SECONDS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the API process decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Imported late: these take seconds, in which the parent may end.
    import transformers
    import zmq

    from server.engine import boot, selfcheck
    from server.engine.loop import Loop
    from server.messages import protocol
    from server.model.base import UnservableModel

    transformers.utils.logging.disable_progress_bar()
    config = protocol.decode_config(sys.argv[2])
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(config.address)
    try:
        engine = boot.boot(config, lambda engine: selfcheck.run(engine, Path(config.cache_dir)))
        Loop(engine, boot.gap_work(engine, config), socket).run()
    except UnservableModel as fault:
        socket.send(protocol.encode(protocol.Fatal(message=str(fault), retry=False)))
        status = 2
    except Exception as fault:
        log.exception("the engine failed and exits")
        socket.send(protocol.encode(protocol.Fatal(message=f"{type(fault).__name__} in the engine")))
        status = 1
    else:
        status = 0
    socket.close(linger=1000)
    context.term()
    return status


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main())
