"""The scheduler: it chooses the sequences and tokens of each step.

There are no phases: a sequence's `num_computed` catches up with its length, and every step spends one token budget, on
decodes first, then on chunks of running prompts, then on newcomers in order of priority and arrival; the rest may go to
drafts. `schedule` decides a step, the caller submits it to the device, and `advance` records its works one by one.

Lengths advance when a step is submitted, so `schedule` can decide the next one before the last one's tokens are read.
Only a sequence that needs those on the host (penalties, drafts) is skipped until they are read. If a sequence's last
token is read after the next step was submitted, that step computes the sequence in vain. Blocks and adapters of an
ended sequence are released once no in-flight step has it.

Blocks are numbers here, and adapters hashable keys. Stop strings are found by the API process, which calls `abort`.

Order and fairness:

- An adapter that is being loaded, or has no room yet, delays only its own sequences; others pass.
- After a sequence was refused room for `patience` steps, no younger one with an adapter is admitted until it gets room.
- While a sequence lacks blocks or a place in the batch, no younger one is admitted.
- When running sequences need more blocks than exist, the youngest is preempted: it releases everything and waits in
  its old place. Its generated tokens are kept and later recomputed like prompt tokens, never drawn again. If it is in
  flight, both it and the sequence that needs the blocks skip steps until it has been collected.
- Background sequences count as youngest, run in steps that no other sequence can use, and give up place, blocks and
  rows to the first newcomer that lacks them. One at a time, after `background_seconds`, is promoted to an ordinary one.
- Among several tenants, `shares` chooses the next sequence, the victims of preemption, and the tenants of a step.
"""

import math
from bisect import insort
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from operator import attrgetter

from server.engine.blocks import BlockGroups, extend_block_keys
from server.engine.sequence import AdapterKey, AdapterResidency, Counters, Sequence, Step, Work
from server.engine.shares import Group, Shares
from server.messages.protocol import LOAD_FAILED, TOO_LONG

_BACKGROUND_TOKENS = 128  # budget of a background step, about 0.1 s on a CPU: new requests wait for its end


class Scheduler:
    """Schedules every step; owns the queues and the references of running sequences to blocks and adapters.

    Args:
        blocks: the KV blocks.
        residency: of adapters; also asked for `()`, the bare base, which is always ready.
        max_batch_tokens: token budget of a step.
        max_batch_requests: most sequences running at once; less than the budget, so that decodes cannot starve prompts.
        max_model_len: most tokens of one sequence, prompt included.
        eos_token_ids: tokens that end a sequence unless it ignores them.
        starts: returns where in a prompt resident adapters come into force (digest -> position); missing ones apply
            from the first token.
        patience: steps for which younger sequences may pass one with an adapter that was refused room.
        doubling_tokens: extra tokens that double a step's time; the fewer, the likelier a draft must be accepted.
        background_seconds: as in `Shares`.
    """

    def __init__(
        self,
        blocks: BlockGroups,
        residency: AdapterResidency,
        *,
        max_batch_tokens: int,
        max_batch_requests: int,
        max_model_len: int,
        eos_token_ids: Seq[int] = (),
        find_adapter_starts: Callable[[AdapterKey, Seq[int]], Mapping[str, int]] = lambda key, prompt: {},
        patience: int = 64,
        doubling_tokens: int = 3,
        background_seconds: float = math.inf,
    ) -> None:
        if not 1 <= max_batch_requests < max_batch_tokens:
            raise ValueError(f"max_batch_tokens ({max_batch_tokens}) must exceed {max_batch_requests=}")
        self.running: list[Sequence] = []  # sorted by `Sequence.order`, like `waiting`; both public for reading
        self.waiting: list[Sequence] = []
        self.ended_in_flight: list[Sequence] = []  # ended but still in flight: they keep their blocks and adapters
        self.counters = Counters()
        self._blocks = blocks
        self._residency = residency
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_requests = max_batch_requests
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self._find_adapter_starts = find_adapter_starts
        self._patience = patience
        self._doubling_tokens = doubling_tokens
        self._by_id: dict[str, Sequence] = {}
        self._failed: list[Sequence] = []
        self._arrivals = 0
        self._steps = 0
        self._shares = Shares(max_batch_requests, blocks.capacity * blocks.block_size, background_seconds)
        self._to_preempt: Sequence | None = None  # in flight; preempted once its step has been collected
        self._preempting: Sequence | None = None  # `_to_preempt` of the previous step

    @property
    def idle(self) -> bool:
        """Whether nothing is running, waiting or in flight."""
        return not self._by_id and not self.ended_in_flight

    @property
    def waiting_tokens(self) -> int:
        """The number of known tokens of the waiting sequences."""
        return sum(len(sequence.tokens) for sequence in self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. If it can never run, `take_failed` reports it after the next `schedule`."""
        if sequence.id in self._by_id:
            raise ValueError(f"sequence {sequence.id} is already queued")
        if self._blocks.states is not None:
            sequence.drafter = None  # a state cannot be rolled back after a rejected draft
        sequence.max_new_tokens = min(sequence.sampling.max_tokens, self._max_model_len - len(sequence.prompt))
        sequence.order = (sequence.background, sequence.priority, self._arrivals)
        self._arrivals += 1
        self._shares.add(sequence)
        self._by_id[sequence.id] = sequence
        insort(self.waiting, sequence, key=attrgetter("order"))

    def abort(self, sequence_id: str) -> bool:
        """Drop a sequence. Returns False if it is unknown or has ended."""
        if (sequence := self._by_id.get(sequence_id)) is None:
            return False
        sequence.finish_reason = "abort"
        self._remove(sequence)
        return True

    def fail(self, sequence_id: str, message: str, code: str) -> None:
        """End one sequence with an error; its last step's blocks are not cached. Unknown ids are ignored.

        Non-finite keys and values may stay in its blocks: attention never reads beyond a sequence's own tokens.
        """
        if (sequence := self._by_id.get(sequence_id)) is not None:
            sequence.error, sequence.code = message, code
            self._remove(sequence)
            self._failed.append(sequence)

    def take_failed(self) -> list[Sequence]:
        """Return the sequences that ended with an `error` and `code` since the last call."""
        failed, self._failed = self._failed, []
        return failed

    # --- scheduling ------------------------------------------------------------------------------

    def schedule(self, now: float) -> Step | None:
        """Return the next step, to be submitted to the device at once; None when nothing can run now.

        Every work must eventually be advanced, in order. Steps may be scheduled before the last one is collected.

        Args:
            now: seconds on the clock of `Sequence.arrival`.
        """
        self._steps += 1
        self._preempting, self._to_preempt = self._to_preempt, None
        self._shares.promote(now, self.running, self.waiting)
        works = next(filter(None, (self._schedule_group(now, group) for group in self._groups())), None)
        if works is None and self._preempting is not None and self._to_preempt is None:  # its place is no longer needed
            return self.schedule(now)
        if works is None:
            if len(self.running) > 1 and not any(sequence.in_flight for sequence in self.running):
                self._preempt(self.running[-1])  # all are prompts waiting for blocks
            return None
        self._add_drafts(works)
        works = self._blocks.assign_states(works)
        for work in works:
            sequence = work.sequence
            sequence.num_computed += work.count - len(work.drafts)
            sequence.pending += work.samples
            sequence.in_flight += 1
            self._shares.charge(work)
        works.sort(key=lambda work: (work.sequence.adapter, work.sequence.order))
        return Step(tuple(works))

    def _groups(self) -> Iterator[Group]:
        """Yield the groups of sequences that the step may belong to; the first that can run anything gets it."""
        if tenants := self._shares.tenants_of_next_step(self.running, self.waiting):
            yield Group(tenants=tenants)
        yield Group()
        if self._to_preempt is None and all(sequence.background for sequence in self.running):
            yield Group(background=True)

    def _schedule_group(self, now: float, group: Group) -> list[Work]:
        """Return a group's works for this step, except for a sequence about to be preempted."""
        works: list[Work] = []
        self._schedule_decodes(works, group)
        most = min(_BACKGROUND_TOKENS, self._max_batch_tokens) if group.background else self._max_batch_tokens
        budget = max(0, most - len(works))
        for sequence in list(self.running):
            if not self._may_run(sequence, group) or sequence.num_uncomputed <= 1 or not budget:
                continue
            while not (count := self._blocks.allocate_chunk(sequence, budget)) and self._preempt_for(sequence, works):
                pass
            if count:
                works.append(sequence.work(count))
                budget -= works[-1].count
        self._admit(works, budget, now, group)
        return works

    def _may_run(self, sequence: Sequence, group: Group) -> bool:
        """Whether a sequence is of this group, still running, and not about to be preempted."""
        return group.has(sequence) and bool(sequence.tables) and sequence not in (self._preempting, self._to_preempt)

    def _schedule_decodes(self, works: list[Work], group: Group) -> None:
        """Add one token of each decoding sequence, oldest first; the youngest are preempted when blocks run out."""
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            # Sequences with more to compute are prompts, scheduled by `_schedule_group`.
            if not self._may_run(sequence, group) or sequence.num_uncomputed != 1 or sequence.awaits_token:
                position += 1
            elif self._blocks.grow(sequence, sequence.length):
                works.append(sequence.work(1))
                position += 1
            elif self.ended_in_flight:  # blocks are about to be released
                position += 1
            else:  # preempt this one or one not scheduled yet
                youngest = self._shares.youngest(self.running[position:]) or sequence
                if youngest.in_flight:
                    self._to_preempt = youngest
                    position += 1
                elif len(self.running) == 1:
                    self._fail_too_long(sequence)
                else:
                    self._preempt(youngest)

    def _admit(self, works: list[Work], budget: int, now: float, group: Group) -> None:
        """Start waiting sequences in order, as far as budget, places, adapters and blocks allow."""
        refused: dict[AdapterKey, str | None] = {}
        starving = False
        for sequence in self._shares.order([one for one in self.waiting if group.has(one)]):
            if not budget or not (self._has_room or self._shares.victim(sequence, self.running)):
                break
            if len(sequence.prompt) > self._max_model_len or not self._blocks.fits(len(sequence.tokens)):
                self._fail_too_long(sequence)
                continue
            if starving and sequence.adapter:
                continue
            if not self._acquire_adapter(sequence, refused, works):
                since = sequence.refused_since
                starving |= since is not None and self._steps - since >= self._patience
                continue
            while not (placed := self._has_room and self._allocate_blocks(sequence)) and self._preempt_for(
                sequence, works
            ):
                pass
            if not placed:
                self._residency.release(sequence.adapter)
                break
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=attrgetter("order"))
            sequence.refused_since = None
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
            works.append(sequence.work(budget))
            budget -= works[-1].count

    @property
    def _has_room(self) -> bool:
        return len(self.running) < self._max_batch_requests

    def _preempt_for(self, sequence: Sequence, works: list[Work]) -> bool:
        """Preempt another sequence for this one, if possible; one in flight is only marked. Returns whether it was."""
        victim = self._shares.victim(sequence, self.running)
        if victim is None:
            return False
        if victim.in_flight:
            self._to_preempt = victim
            return False
        works[:] = [work for work in works if work.sequence is not victim]
        self._preempt(victim)
        return True

    def _acquire_adapter(self, sequence: Sequence, refused: dict[AdapterKey, str | None], works: list[Work]) -> bool:
        """Acquire the sequence's adapter if it is ready. `refused`: this step's other answers (an error, or None)."""
        key = sequence.adapter
        if key not in refused:
            while (answer := self._residency.acquire(key)) == "full" and self._preempt_for(sequence, works):
                pass
            if answer == "ready":
                sequence.adapter_starts = self._find_adapter_starts(key, sequence.prompt)
                return True
            refused[key] = self._residency.error(key) if answer == "failed" else None
            if answer == "full" and sequence.refused_since is None:
                sequence.refused_since = self._steps
        if (error := refused[key]) is not None:
            self.fail(sequence.id, error, LOAD_FAILED)
        return False

    def _allocate_blocks(self, sequence: Sequence) -> bool:
        """Take a newcomer's cached blocks and allocate the rest for its known tokens, or change nothing."""
        # The last token is always computed, for its logits; so is every prompt token still to be scored.
        reusable = len(sequence.tokens) - 1
        if sequence.sampling.prompt_logprobs is not None:
            reusable = min(reusable, sequence.prompt_scored)
        extend_block_keys(self._blocks, sequence, len(sequence.tokens))
        keys = sequence.block_keys[: reusable // self._blocks.block_size]
        # One spare block for each running sequence, or the newcomer would be preempted when the next one grows.
        if not self._blocks.admit(sequence, keys, len(self.running)):
            return False
        if sequence.first_scheduled is None:
            sequence.cached_tokens = sequence.num_computed
            self.counters.prefix_queries += len(sequence.prompt)
            self.counters.prefix_hits += sequence.cached_tokens
        return True

    def _add_drafts(self, works: list[Work]) -> None:
        """Add drafts within the step's remaining budget and blocks: forced tokens, or guesses where they pay."""
        rows = sum(work.count for work in works)
        for index, work in enumerate(works):
            sequence = work.sequence
            forced = () if sequence.constraint is None else sequence.constraint.forced
            if not work.samples or not (forced or (sequence.drafter is not None and work.count == 1)):
                continue
            most = min(self._max_batch_tokens - rows, sequence.tokens_left - 1)
            # A draft pays if its probability of acceptance is at least its row's share of the step's cost.
            drafts = list(forced[:most]) if forced else sequence.draft(most, rows / (rows + self._doubling_tokens))
            if drafts := drafts[: self._blocks.allocate_drafts(sequence, len(drafts), len(self.running))]:
                works[index] = replace(work, count=work.count + len(drafts), drafts=drafts, forced=bool(forced))
                rows += len(drafts)
                self.counters.drafted += 0 if forced else len(drafts)

    # --- results -------------------------------------------------------------------------------------

    def advance(self, work: Work, new_tokens: Seq[int] = ()) -> list[int]:
        """Record that a work was computed, and the tokens drawn after it (none in the middle of a prompt).

        Args:
            new_tokens: the accepted drafts, then one more token.

        Returns:
            The valid tokens, up to the one that ended the sequence, and forced ones that end the text. If it ended,
            `finish_reason` is set and the scheduler has dropped it. Empty if it ended after this work was scheduled.
        """
        sequence = work.sequence
        sequence.in_flight -= 1
        if sequence.ended:
            self._blocks.finish_work(work, None)
            if not sequence.in_flight:
                self.ended_in_flight.remove(sequence)
                self._release(sequence)
            return []
        assert work.samples or not new_tokens
        assert len(new_tokens) <= 1 + len(work.drafts)
        sequence.pending -= work.samples
        kept: list[int] = []
        tokens = list(new_tokens)
        for token in tokens:
            kept.append(token)
            sequence.tokens.append(token)
            sequence.check_stop(self._eos)
            if sequence.finish_reason is not None:
                break
            if sequence.constraint is not None and len(kept) == len(tokens):
                tokens += sequence.constraint.final_forced_tokens(sequence.sampling)
        accepted = max(0, min(len(kept), len(new_tokens)) - 1)
        # The next work overwrites the keys and values of rejected drafts.
        sequence.num_computed += accepted
        sequence.prompt_scored = max(sequence.prompt_scored, work.prompt_rows.stop)
        num_computed = work.start + work.count - len(work.drafts) + accepted
        self._blocks.finish_work(work, num_computed)
        self.counters.accepted += 0 if work.forced else accepted
        if sequence.drafter is not None:
            sequence.drafter.learn(new_tokens)
        # No token may be drawn: max_tokens is 0, or the prompt fills the context.
        if not sequence.num_uncomputed and not sequence.in_flight:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            self._remove(sequence)
        elif self._blocks.states is not None and accepted < len(work.drafts):
            self._preempt(sequence)  # its state includes rejected drafts
        return kept

    # --- preemption and removal ----------------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        self.counters.preemptions += 1
        insort(self.waiting, sequence, key=attrgetter("order"))

    def _remove(self, sequence: Sequence) -> None:
        del self._by_id[sequence.id]
        self._shares.remove(sequence)
        if not sequence.tables:  # running sequences have tables, waiting ones none
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        if sequence.in_flight:
            self.ended_in_flight.append(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._blocks.release(sequence)
        self._residency.release(sequence.adapter)

    def _fail_too_long(self, sequence: Sequence) -> None:
        most = min(self._max_model_len, self._blocks.capacity * self._blocks.block_size)
        message = f"This sequence needs {len(sequence.tokens)} tokens of context; at most {most} fit."
        self.fail(sequence.id, message, TOO_LONG)
