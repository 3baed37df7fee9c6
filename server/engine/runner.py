"""Gives scheduled steps to the device: routed into forward passes, packed into tensors, run along their paths.

A step is given as a whole and not waited for, and the next may be given before the tokens that it drew were read: those
are taken on the device. What runs is decided by scheduler.py.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.engine.outcome import InFlightStep, Outcome
from server.engine.packing import Batch, Packer
from server.engine.paths import ForwardPath
from server.engine.routing import Router
from server.engine.sequence import Step, Work


class Runner:
    """Runs works along the paths of one router."""

    def __init__(self, router: Router, packer: Packer) -> None:
        self.router = router
        self._packer = packer

    @torch.no_grad()
    def warm_up(self, requests: int) -> None:
        """Compile, tune and record on a GPU what decoding up to `requests` requests will need."""
        if self.router.weights.graphs is not None:
            self.router.weights.graphs.warm_up(requests)

    @torch.no_grad()
    def submit(self, step: Step, before: InFlightStep | None = None) -> InFlightStep:
        """Give a step to the device, which is not waited for.

        Args:
            before: the step that was given before it, if that is in flight: pending tokens are taken from there.
        """
        outcomes: list[tuple[Seq[int], Outcome]] = []
        for path, places in self.router.passes(step.works):
            works = step.works if len(places) == len(step.works) else [step.works[place] for place in places]
            with path.weights.threads():
                outcomes.append((places, path.run(self._packed(path, works, before))))
        return InFlightStep(step, outcomes)

    @torch.no_grad()
    def logits(self, works: Seq[Work]) -> Tensor:
        """Of works that share a forward pass, fp32 [K, V]: one row per prompt row, work by work."""
        path = self.router.route(works[0].sequence)
        with path.weights.threads():
            return path.logits(self._packed(path, works))

    def _packed(self, path: ForwardPath, works: Seq[Work], before: InFlightStep | None = None) -> Batch:
        return self._packer.pack(
            works,
            None if before is None else before.tokens_after,
            adapters=not path.weights.merged,
            drafts_apart=path.weights.graphs is not None,
        )
