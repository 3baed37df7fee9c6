"""Gap work's share of the device's time while requests run."""

import time
from collections.abc import Callable

STARVED_SECONDS = 1.0


class Pacer:
    """Admits pieces of gap work between inference steps.

    Args:
        max_stall: most seconds of gap work between two inference steps.
        share: most of the device's time while requests run (below 1).
    """

    def __init__(self, max_stall: float, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_stall = max_stall
        self._per_second = share / (1.0 - share)  # seconds of gap work earned by a second of inference
        self._clock = clock
        self._earned = 0.0
        self._left = 0.0  # of this gap
        self._last_piece = clock()

    def served(self, seconds: float) -> None:
        """Count a finished inference step; a new gap begins."""
        # Unspent time is saved for a few gaps only: a burst of work would delay requests.
        self._earned = min(self._earned + seconds * self._per_second, 4 * self.max_stall)
        self._left = self.max_stall

    def allows(self, seconds: float) -> bool:
        """Whether a piece of about this duration may run now.

        A piece too long for any gap runs once a second, so that its job makes progress.
        """
        if self._per_second == 0.0:
            return False
        if seconds <= self.max_stall:
            return seconds <= min(self._left, self._earned)
        return self._clock() - self._last_piece > STARVED_SECONDS

    def spent(self, seconds: float) -> None:
        """Count a finished piece."""
        self._left -= seconds
        self._earned -= seconds
        self._last_piece = self._clock()
