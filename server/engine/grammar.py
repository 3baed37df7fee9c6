"""Grammars of answers: compiled on a thread, kept, and followed token by token. llguidance does the work.

A sequence with a grammar has a `Constraint`. It knows which tokens may come next (a bit mask, made while the device
computes) and which must: those need no drawing, and a run of them takes one forward pass.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from adapters.background import Priority, threads
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.text import NO_TEXT, AdapterText
from server.messages.grammar_definition import LIMITS, definition
from server.messages.protocol import AdapterRef, Grammar, Sampling, ThoughtBudget

Mask = NDArray[np.int32]  # [ceil(vocabulary / 32)]: bit i % 32 of word i // 32 allows token i

_TOKENIZERS = 8  # of adapters with tokens of their own, kept: 60 MB each and more
_LEXER_FULL = "lexer error"  # how llguidance's error begins
_LEAST_SIZE = 1 << 20  # bytes that a compiled grammar is taken for, at least


class InvalidGrammar(ValueError):
    """A grammar that cannot be followed; the message is fit for the client."""


class _Thought:
    """A thought that may have to be ended."""

    def __init__(self, budget: ThoughtBudget, tokenizer: LLTokenizer) -> None:
        self.taken: list[int] = []
        self.close = budget.close
        self.room = max(0, budget.most - len(budget.close))
        self._budget = budget
        self._tokenizer = tokenizer

    def due(self, more: Seq[int] = ()) -> bool | None:
        """Whether it has to end, after `more` tokens; None: it is over, or there will be none."""
        tokens = [*self.taken, *more]
        if len(tokens) < self.room:
            return False
        text = self._tokenizer.decode_str(tokens).lstrip()
        if text.startswith(self._budget.begin) and self._budget.end not in text:
            return not text.endswith("\N{REPLACEMENT CHARACTER}")  # never in the middle of a character
        return False if self._budget.begin.startswith(text) else None


class Constraint:
    """One sequence's way through its grammar.

    Args:
        matcher: at its beginning, and nobody else's.
        stops: tokens that may end the text wherever the grammar lets it end, besides the tokenizer's own.
        thought: how long it may think first.
        fresh: makes a matcher that shares nothing with others.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        tokenizer: LLTokenizer,
        stops: Seq[int],
        thought: ThoughtBudget | None = None,
        fresh: Callable[[], LLMatcher] | None = None,
    ) -> None:
        self.forced: list[int] = []  # tokens that must come next; the matcher has been told of them already
        self.stopped = False  # nothing follows these
        self.error: str | None = None
        self._matcher = matcher
        self._fresh = fresh
        self._told: list[int] = []  # what the matcher has consumed
        self._stops = frozenset(stops)
        self._words = -(-tokenizer.vocab_size // 32)
        self._ends = self._bits([*tokenizer.eos_tokens, *stops])
        self._prepared: Future[None] | None = None
        self._rows: list[tuple[Mask, bool]] = []
        self._thought = None if thought is None else _Thought(thought, tokenizer)
        self._force()
        self._end_thought()

    def consume(self, token: int) -> bool:
        """The sequence goes on with this token; whether nothing follows it."""
        if self.forced:
            assert token == self.forced[0], "a forced token was drawn otherwise"
            del self.forced[0]
        elif self._tell([token]):
            self._force()
        elif token in self._stops:
            self.stopped = True
        else:
            self.error = self._matcher.get_error()
        if self._thought is not None:
            self._thought.taken.append(token)
            self._end_thought()
        return self.stopped and not self.forced

    def last_words(self, sampling: Sampling) -> list[int]:
        """The forced tokens, where they are the last and nothing is to be computed for them."""
        return list(self.forced) if self.stopped and sampling.logprobs is None else []

    def valid(self, drafts: list[int]) -> list[int]:
        """Those of the drafts, from the first on, that the grammar allows."""
        if self._thought is not None:
            drafts = drafts[: max(0, self._thought.room - len(self._thought.taken) - 1)]
        return drafts[: self._matcher.validate_tokens(drafts)] if drafts else drafts

    def _tell(self, tokens: Seq[int]) -> bool:
        """Whether the matcher goes on with these."""
        taken = self._matcher.consume_tokens(list(tokens))
        if taken:
            self._told += tokens
        elif self._renew():
            return self._tell(tokens)
        return taken

    def _renew(self) -> bool:
        """Whether this sequence goes on with a matcher of its own.

        All that began with one grammar share a lexer. It grows with every text that any of them meets, up to its limit,
        and is of no use to anybody from then on.
        """
        if self._fresh is None or not self._matcher.is_error() or _LEXER_FULL not in self._matcher.get_error():
            return False
        self._matcher, self._fresh = self._fresh(), None
        self._matcher.consume_tokens(self._told)
        return not self._matcher.is_error()

    def _end_thought(self) -> None:
        """Force the end of a thought that has had its tokens."""
        if self._thought is None or self.forced:
            return
        due = self._thought.due()
        if due:
            self._tell(self._thought.close)
            self.forced += self._thought.close
            self._force()
        if due is not False:
            self._thought = None

    def _force(self) -> None:
        while (forced := self._matcher.compute_ff_tokens()) or self._renew():
            self._tell(forced)
            self.forced += forced
        self.stopped = self._matcher.is_stopped() and not self._matcher.is_error()

    # --- masks ---------------------------------------------------------------------------------------

    def masks(self) -> list[tuple[Mask, bool]]:
        """The masks that `Grammars.prepare` started, and whether the text can only end there. Waits for them."""
        assert self._prepared is not None
        self._prepared.result()
        return self._rows

    def _make(self, drafts: Seq[int], skipped: int) -> None:
        """The masks of a draw, and of one after each of the drafts, the first `skipped` ones left out."""
        rows: list[tuple[Mask, bool]] = []
        forced, walked = list(self.forced), 0
        for index in range(len(drafts) + 1):
            if walked and not forced:
                forced = self._matcher.compute_ff_tokens()
            if self._thought is not None and not forced and index == len(drafts) and self._thought.due(drafts):
                forced = self._thought.close
            if index >= skipped:
                rows.append((self._bits(forced[:1]), False) if forced else self._allowed())
            if index == len(drafts):
                break
            if forced and forced.pop(0) != drafts[index]:  # nothing is drawn after it
                rows += [(self._ends, False)] * (len(drafts) - index)
                break
            if not self.forced:
                self._matcher.consume_token(drafts[index])
                walked += 1
        if self._renew():
            self._make(drafts, skipped)
            return
        if walked:
            self._matcher.rollback(walked)
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
        self._rows = rows

    def _allowed(self) -> tuple[Mask, bool]:
        mask = np.zeros(self._words, np.int32)
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            return np.zeros_like(mask), False
        if (mask & self._ends).any():
            mask |= self._ends
        return mask, not (mask & ~self._ends).any()

    def _bits(self, tokens: Iterable[int]) -> Mask:
        mask = np.zeros(self._words, np.uint32)
        for token in tokens:
            if token < 32 * self._words:
                mask[token // 32] |= np.uint32(1 << token % 32)
        return mask.view(np.int32)


@dataclass
class Compiled:
    """A grammar as it begins, over one tokenizer.

    Attributes:
        spent: its lexer is full: the next sequence is to begin with another.
    """

    tokenizer: LLTokenizer
    defined: str
    matcher: LLMatcher = field(init=False)
    spent: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.matcher = self._compile()

    def constraint(self, sampling: Sampling) -> Constraint:
        """A way through it for one sequence; see there."""
        matcher = self.matcher.deep_copy()
        return Constraint(matcher, self.tokenizer, sampling.stop_token_ids, sampling.thought, self._fresh)

    def _fresh(self) -> LLMatcher:
        self.spent = True
        return self._compile()

    def _compile(self) -> LLMatcher:
        return LLMatcher(self.tokenizer, self.defined, log_level=0, limits=LIMITS)


class Grammars:
    """Compiles grammars and keeps them, and makes masks, each on a thread of its own.

    Args:
        model: the base's directory; its tokenizer is read at once.
        vocabulary: of the base's logits.
        eos_token_ids: the base's.
        budget: bytes of compiled grammars that are kept.
        priority: of the thread that compiles.
    """

    def __init__(self, model: Path, vocabulary: int, eos_token_ids: Seq[int], budget: int, priority: Priority) -> None:
        self._vocabulary = vocabulary
        self._eos = list(eos_token_ids) or None
        self._budget = budget
        self._compiler = threads(1, "grammar", priority)
        self._masks = ThreadPoolExecutor(1, "masks")
        self._compiled: OrderedDict[tuple[str, str, str], tuple[Future[Compiled], int]] = OrderedDict()
        self._size = 0
        self._adapted: OrderedDict[str, LLTokenizer] = OrderedDict()  # by adapter's digest
        self._source = ""
        self._base: LLTokenizer | None = None
        self._fault = "the model has no tokenizer.json"
        try:  # it holds the interpreter's lock for its whole second, so nobody may be waiting
            self._source = (model / "tokenizer.json").read_text(encoding="utf-8")
            self._base = self._tokenizer(NO_TEXT)
        except OSError:
            pass
        except ValueError as fault:
            self._fault = str(fault)

    def compile(self, grammar: Grammar, adapters: Seq[AdapterRef]) -> Future[Compiled]:
        """Compiled, now or later; fails with `InvalidGrammar`."""
        own = adapters[0] if len(adapters) == 1 and adapters[0].tokens else None
        key = (own.digest if own else "", grammar.kind, grammar.thought + grammar.text)
        found = self._compiled.get(key)
        if found is not None and _is_spent(found[0]):
            self._size -= self._compiled.pop(key)[1]
            found = None
        if found is None:
            size = max(grammar.size, _LEAST_SIZE)
            found = self._compiled[key] = self._compiler.submit(self._compile, grammar, own), size
            self._size += size
            while self._size > self._budget and len(self._compiled) > 1:
                self._size -= self._compiled.popitem(last=False)[1][1]
        self._compiled.move_to_end(key)
        return found[0]

    def prepare(self, works: Iterable[tuple[Constraint, Seq[int], int]]) -> None:
        """Start computing masks in the background, for (constraint, drafts, leading drafts that need no mask)."""
        works = list(works)
        prepared = self._masks.submit(_make_all, works)
        for constraint, _, _ in works:
            constraint._prepared = prepared

    def _compile(self, grammar: Grammar, own: AdapterRef | None) -> Compiled:
        tokenizer = self._base if own is None else self._own_tokenizer(own)
        if tokenizer is None:
            raise InvalidGrammar(f"This model's answers cannot follow a grammar: {self._fault}.")
        try:
            compiled = Compiled(tokenizer, definition(grammar))
        except (ValueError, TypeError, KeyError, AssertionError) as fault:
            raise InvalidGrammar(f"The grammar is not valid: {fault}") from None
        if compiled.matcher.is_error():
            raise InvalidGrammar(f"The grammar is not valid: {' '.join(compiled.matcher.get_error().split())[:500]}")
        return compiled

    def _own_tokenizer(self, adapter: AdapterRef) -> LLTokenizer | None:
        if self._base is None:
            return None
        if adapter.digest not in self._adapted:
            self._adapted[adapter.digest] = self._tokenizer(AdapterSpec.read(Path(adapter.path)).text)
            if len(self._adapted) > _TOKENIZERS:
                self._adapted.popitem(last=False)
        self._adapted.move_to_end(adapter.digest)
        return self._adapted[adapter.digest]

    def _tokenizer(self, text: AdapterText) -> LLTokenizer:
        source = self._source
        if text.tokens:
            document = json.loads(source)
            document["added_tokens"] += [asdict(token) for token in text.tokens]
            source = json.dumps(document)
        try:
            return LLTokenizer(source, n_vocab=self._vocabulary, eos_token=self._eos)
        except ValueError as fault:
            if "too small" not in str(fault):
                raise
            return LLTokenizer(source, eos_token=self._eos)  # some have more tokens than the model has logits


def _is_spent(compiled: Future[Compiled]) -> bool:
    return compiled.done() and compiled.exception() is None and compiled.result().spent


def _make_all(works: Iterable[tuple[Constraint, Seq[int], int]]) -> None:
    for constraint, drafts, skipped in works:
        constraint._make(drafts, skipped)
