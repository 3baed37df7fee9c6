"""Fair shares among tenants: the order of sequences, the tenants of a step, and the victims of preemption.

Service is counted in virtual tokens, one for a computed prompt token and two for a generated one, over the tenant's
weight (VTC: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024). The tenant with the least service
comes next. A tenant that returns after a pause is lifted to the least service of the present ones, so that service
cannot be saved up.

A tenant's holding is its dominant share of the places in the batch and of the KV cache, over its weight's part of all
present weights (DRF: Ghodsi et al., NSDI 2011): above 1 it holds more than its share, which it may while no other
tenant needs it. A newcomer of a tenant within its share takes the place of the youngest sequence of the tenant
furthest above its own.

A tenant is *light* if it would be within its share with all of its sequences running, and *heavy* otherwise. As long
as a light tenant has had no more service than the heavy ones, its prompts run in steps without theirs: its TTFT is as
if it were alone, except for the step in flight.

With one tenant, all of this costs and changes nothing.
"""

import math
from bisect import insort
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter

from server.engine.sequence import Sequence, Work

_GENERATED = 2.0  # virtual tokens of a generated one, since it needs a step of its own


@dataclass(frozen=True, slots=True)
class Group:
    """The sequences allowed in a step: background ones, or those of some tenants, or all others."""

    background: bool = False
    tenants: frozenset[str] | None = None

    def has(self, sequence: Sequence) -> bool:
        """Whether a sequence belongs to the group."""
        return sequence.background == self.background and (self.tenants is None or sequence.tenant in self.tenants)


@dataclass(slots=True)
class _Tenant:
    weight: float
    served: float = 0.0  # virtual tokens over its weight
    sequences: int = 0  # running or waiting
    tokens: int = 0  # of their prompts


class Shares:
    """The tenants with running or waiting sequences.

    Args:
        places: most sequences running at once.
        tokens: capacity of the KV cache.
        background_seconds: waiting time after which a background sequence may be promoted.
    """

    def __init__(self, max_requests: int, cache_tokens: int, background_seconds: float = math.inf) -> None:
        self._background_seconds = background_seconds
        self._promoted: Sequence | None = None  # the last promoted background sequence, until it ends
        self._max_requests = max_requests
        self._tokens = cache_tokens
        self._tenants: dict[str, _Tenant] = {}
        self._paused: dict[str, float] = {}  # service of absent tenants, where above the least of the present ones

    @property
    def is_contended(self) -> bool:
        """Whether more than one tenant has sequences."""
        return len(self._tenants) > 1

    def served(self, tenant: str) -> float:
        """Return a tenant's virtual tokens over its weight."""
        return self._tenants[tenant].served

    def add(self, sequence: Sequence) -> None:
        """Add a sequence, which sets its tenant's weight."""
        tenant = self._tenants.get(sequence.tenant)
        if tenant is None:
            least = min((other.served for other in self._tenants.values()), default=0.0)
            paused = self._paused.pop(sequence.tenant, 0.0)
            tenant = self._tenants[sequence.tenant] = _Tenant(sequence.weight, max(least, paused))
        tenant.weight = sequence.weight
        tenant.sequences += 1
        tenant.tokens += len(sequence.prompt)

    def remove(self, sequence: Sequence) -> None:
        """Remove an ended sequence."""
        if sequence is self._promoted:
            self._promoted = None
        tenant = self._tenants[sequence.tenant]
        tenant.sequences -= 1
        tenant.tokens -= len(sequence.prompt)
        if tenant.sequences:
            return
        del self._tenants[sequence.tenant]
        least = min((other.served for other in self._tenants.values()), default=float("inf"))
        self._paused[sequence.tenant] = tenant.served
        self._paused = {name: served for name, served in self._paused.items() if served > least}

    def promote(self, now: float, *queues: list[Sequence]) -> None:
        """Make the oldest background sequence an ordinary one after `background_seconds`, one at a time."""
        if self._promoted is not None:
            return
        background_queues = [queue for queue in queues if queue and queue[-1].background]
        found = [(one, queue) for queue in background_queues for one in queue if one.background]
        oldest, queue = min(found, key=lambda pair: pair[0].arrival, default=(None, []))
        if oldest is None or now - oldest.arrival < self._background_seconds:
            return
        queue.remove(oldest)
        oldest.background, oldest.order = False, (False, *oldest.order[1:])
        insort(queue, oldest, key=attrgetter("order"))
        self._promoted = oldest

    def charge(self, work: Work) -> None:
        """Charge a submitted work to its tenant."""
        tenant = self._tenants[work.sequence.tenant]
        tenant.served += (work.count + (_GENERATED - 1) * work.samples) / tenant.weight

    def order(self, waiting: Seq[Sequence]) -> Iterator[Sequence]:
        """Yield the waiting sequences, each time the next one of the tenant with the least service.

        Yielded sequences count as served here, since they will be.
        """
        if not self.is_contended:
            yield from waiting
            return
        queues: dict[str, list[Sequence]] = {}
        for sequence in reversed(waiting):
            queues.setdefault(sequence.tenant, []).append(sequence)
        served = {name: self.served(name) for name in queues}
        while queues:
            name = min(queues, key=lambda name: (served[name], queues[name][-1].order))
            sequence = queues[name].pop()
            served[name] += sequence.num_uncomputed / self._tenants[name].weight
            yield sequence
            if not queues[name]:
                del queues[name]

    def tenants_of_next_step(self, running: Seq[Sequence], waiting: Seq[Sequence]) -> frozenset[str] | None:
        """Return the tenants to which the next step belongs; None: all."""
        if not self.is_contended:
            return None
        heavy = {
            name
            for name, tenant in self._tenants.items()
            if self._relative_share(name, tenant.sequences, tenant.tokens) > 1
        }
        if not heavy:
            return None
        most = min(self.served(name) for name in heavy)
        light = frozenset(name for name in self._tenants.keys() - heavy if self.served(name) <= most)
        prompts = any(one.tenant in light for one in waiting) or any(
            one.tenant in light and one.num_uncomputed > 1 for one in running
        )
        return light if light and prompts else None

    def victim(self, newcomer: Sequence, running: Seq[Sequence]) -> Sequence | None:
        """Return the running sequence to preempt for a newcomer, if any may be.

        It is a background sequence, or else one of another tenant that holds more than its share. A tenant without
        running sequences may have one place even if that is more than its share.
        """
        if newcomer.background or not running:
            return None
        if running[-1].background:
            return running[-1]
        if not self.is_contended:
            return None
        share_after = self._holding(newcomer.tenant, [*running, newcomer])
        if share_after > 1 and any(one.tenant == newcomer.tenant for one in running):
            return None
        return self.youngest(running, above=max(1.0, share_after), excluded={newcomer.tenant})

    def youngest(self, running: Seq[Sequence], above: float = 0.0, excluded: Collection[str] = ()) -> Sequence | None:
        """Return the youngest background sequence, or else the youngest of the tenant furthest above its share."""
        if not self.is_contended or not running or running[-1].background:
            return running[-1] if running else None
        held = {name: self._holding(name, running) for name in {one.tenant for one in running}.difference(excluded)}
        heaviest = max(held, key=held.__getitem__, default=None)
        if heaviest is None or held[heaviest] <= above:
            return None
        return next(one for one in reversed(running) if one.tenant == heaviest)

    def _holding(self, name: str, running: Seq[Sequence]) -> float:
        own = [one for one in running if one.tenant == name]
        return self._relative_share(name, len(own), sum(one.length for one in own))

    def _relative_share(self, name: str, sequences: int, tokens: int) -> float:
        """Return the dominant share over the tenant's fair share by weight."""
        dominant = max(sequences / self._max_requests, tokens / self._tokens)
        return dominant * sum(tenant.weight for tenant in self._tenants.values()) / self._tenants[name].weight
