"""Grammars: compiled by llguidance on a thread, cached, and followed token by token.

A sequence with a grammar has a `Constraint`, with the tokens allowed next (a bit mask, made while the device computes)
and the forced ones, which need no drawing; a run of forced tokens takes one forward pass.
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

from adapters.background import Priority, thread_pool
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.text import NO_TEXT, AdapterText
from server.messages.grammar_definition import LIMITS, definition
from server.messages.protocol import AdapterRef, Grammar, Sampling, ThoughtBudget

Mask = NDArray[np.int32]  # [ceil(vocabulary / 32)]: bit i % 32 of word i // 32 allows token i

_TOKENIZERS = 8  # cached tokenizers of adapters with added tokens: 60 MB each and more
_LEXER_FULL = "lexer error"  # beginning of llguidance's error
_LEAST_SIZE = 1 << 20  # smallest size assumed for a compiled grammar, in bytes


class InvalidGrammar(ValueError):
    """A grammar that cannot be followed; the message may be shown to the client."""


class _Thought:
    """A sequence's thought, with a budget of tokens."""

    def __init__(self, budget: ThoughtBudget, tokenizer: LLTokenizer) -> None:
        self.tokens: list[int] = []
        self.closing_tokens = budget.close
        self.max_tokens = max(0, budget.most - len(budget.close))
        self._budget = budget
        self._tokenizer = tokenizer

    def must_end(self, drafts: Seq[int] = ()) -> bool | None:
        """Whether the thought must end after these drafts; None: it has ended, or the text began without one."""
        tokens = [*self.tokens, *drafts]
        if len(tokens) < self.max_tokens:
            return False
        text = self._tokenizer.decode_str(tokens).lstrip()
        if text.startswith(self._budget.begin) and self._budget.end not in text:
            return not text.endswith("\N{REPLACEMENT CHARACTER}")  # never in the middle of a character
        return False if self._budget.begin.startswith(text) else None


class Constraint:
    """One sequence's position in its grammar.

    Args:
        matcher: at its beginning; owned by this object.
        stops: tokens that may end the text wherever the grammar lets it end, besides the tokenizer's own.
        thought: the token budget of a thought before the answer.
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
        self.forced: list[int] = []  # forced tokens not yet generated; the matcher has consumed them already
        self.stopped = False  # the text ends after the forced tokens
        self.error: str | None = None
        self._matcher = matcher
        self._fresh = fresh
        self._consumed: list[int] = []  # tokens that the matcher has consumed
        self._stops = frozenset(stops)
        self._mask_words = -(-tokenizer.vocab_size // 32)
        self._end_mask = self._bit_mask([*tokenizer.eos_tokens, *stops])
        self._prepared: Future[None] | None = None
        self._rows: list[tuple[Mask, bool]] = []
        self._thought = None if thought is None else _Thought(thought, tokenizer)
        self._take_forced()
        self._end_thought_if_due()

    def consume(self, token: int) -> bool:
        """Advance by a token. Returns whether the text ends with it."""
        if self.forced:
            assert token == self.forced[0], "a forced token was drawn otherwise"
            del self.forced[0]
        elif self._consume([token]):
            self._take_forced()
        elif token in self._stops:
            self.stopped = True
        else:
            self.error = self._matcher.get_error()
        if self._thought is not None:
            self._thought.tokens.append(token)
            self._end_thought_if_due()
        return self.stopped and not self.forced

    def final_forced_tokens(self, sampling: Sampling) -> list[int]:
        """Return the forced tokens if they end the text and need no forward pass (no logprobs); else none."""
        return list(self.forced) if self.stopped and sampling.logprobs is None else []

    def valid_prefix(self, drafts: list[int]) -> list[int]:
        """Return the longest prefix of the drafts that the grammar and the thought's budget allow."""
        if self._thought is not None:
            drafts = drafts[: max(0, self._thought.max_tokens - len(self._thought.tokens) - 1)]
        return drafts[: self._matcher.validate_tokens(drafts)] if drafts else drafts

    def _consume(self, tokens: Seq[int]) -> bool:
        """Give tokens to the matcher; return whether it accepts them."""
        accepted = self._matcher.consume_tokens(list(tokens))
        if accepted:
            self._consumed += tokens
        elif self._renew():
            return self._consume(tokens)
        return accepted

    def _renew(self) -> bool:
        """Replace a matcher with a full lexer by a new one of this sequence alone; return whether that worked.

        Sequences of one compiled grammar share a lexer. It grows with each sequence's text, and is unusable beyond its
        limit.
        """
        if self._fresh is None or not self._matcher.is_error() or _LEXER_FULL not in self._matcher.get_error():
            return False
        self._matcher, self._fresh = self._fresh(), None
        self._matcher.consume_tokens(self._consumed)
        return not self._matcher.is_error()

    def _end_thought_if_due(self) -> None:
        """Force the end of a thought with an exhausted budget."""
        if self._thought is None or self.forced:
            return
        due = self._thought.must_end()
        if due:
            self._consume(self._thought.closing_tokens)
            self.forced += self._thought.closing_tokens
            self._take_forced()
        if due is not False:
            self._thought = None

    def _take_forced(self) -> None:
        while (forced := self._matcher.compute_ff_tokens()) or self._renew():
            self._consume(forced)
            self.forced += forced
        self.stopped = self._matcher.is_stopped() and not self._matcher.is_error()

    # --- masks ---------------------------------------------------------------------------------------

    def masks(self) -> list[tuple[Mask, bool]]:
        """Wait for the masks started by `Grammars.prepare`. Each comes with whether the text can only end there."""
        assert self._prepared is not None
        self._prepared.result()
        return self._rows

    def _make_masks(self, drafts: Seq[int], skipped: int) -> None:
        """Make the masks of the next draw and of the draw after each draft, except the first `skipped` ones."""
        rows: list[tuple[Mask, bool]] = []
        forced, walked = list(self.forced), 0
        for index in range(len(drafts) + 1):
            if walked and not forced:
                forced = self._matcher.compute_ff_tokens()
            if self._thought is not None and not forced and index == len(drafts) and self._thought.must_end(drafts):
                forced = self._thought.closing_tokens
            if index >= skipped:
                rows.append((self._bit_mask(forced[:1]), False) if forced else self._allowed_mask())
            if index == len(drafts):
                break
            if forced and forced.pop(0) != drafts[index]:  # this draft will be rejected: the later rows are not used
                rows += [(self._end_mask, False)] * (len(drafts) - index)
                break
            if not self.forced:
                self._matcher.consume_token(drafts[index])
                walked += 1
        if self._renew():
            self._make_masks(drafts, skipped)
            return
        if walked:
            self._matcher.rollback(walked)
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
        self._rows = rows

    def _allowed_mask(self) -> tuple[Mask, bool]:
        mask = np.zeros(self._mask_words, np.int32)
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            return np.zeros_like(mask), False
        if (mask & self._end_mask).any():
            mask |= self._end_mask
        return mask, not (mask & ~self._end_mask).any()

    def _bit_mask(self, tokens: Iterable[int]) -> Mask:
        mask = np.zeros(self._mask_words, np.uint32)
        for token in tokens:
            if token < 32 * self._mask_words:
                mask[token // 32] |= np.uint32(1 << token % 32)
        return mask.view(np.int32)


@dataclass
class Compiled:
    """A compiled grammar over one tokenizer.

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
        """Return a new constraint for one sequence."""
        matcher = self.matcher.deep_copy()
        return Constraint(matcher, self.tokenizer, sampling.stop_token_ids, sampling.thought, self._fresh)

    def _fresh(self) -> LLMatcher:
        self.spent = True
        return self._compile()

    def _compile(self) -> LLMatcher:
        return LLMatcher(self.tokenizer, self.defined, log_level=0, limits=LIMITS)


class Grammars:
    """Compiles and caches grammars on one thread, and makes masks on another.

    Args:
        model: the base's directory; its tokenizer is read at once.
        vocabulary: size of the base's logits.
        eos_token_ids: the base's.
        budget: most bytes of cached compiled grammars.
        priority: of the compiling thread.
    """

    def __init__(self, model: Path, vocabulary: int, eos_token_ids: Seq[int], budget: int, priority: Priority) -> None:
        self._vocabulary = vocabulary
        self._eos = list(eos_token_ids) or None
        self._budget = budget
        self._compiler = thread_pool(1, "grammar", priority)
        self._masks = ThreadPoolExecutor(1, "masks")
        self._compiled: OrderedDict[tuple[str, str, str], tuple[Future[Compiled], int]] = OrderedDict()
        self._size = 0
        self._adapter_tokenizers: OrderedDict[str, LLTokenizer] = OrderedDict()  # by adapter's digest
        self._source = ""
        self._base_tokenizer: LLTokenizer | None = None
        self._base_error = "the model has no tokenizer.json"
        try:  # at start, since it holds the GIL for about a second
            self._source = (model / "tokenizer.json").read_text(encoding="utf-8")
            self._base_tokenizer = self._tokenizer(NO_TEXT)
        except OSError:
            pass
        except ValueError as fault:
            self._base_error = str(fault)

    def compile(self, grammar: Grammar, adapters: Seq[AdapterRef]) -> Future[Compiled]:
        """Return the future of a compiled grammar, from the cache if it is there; it fails with `InvalidGrammar`."""
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
        """Start making masks in the background, for each (constraint, drafts, number of leading drafts to skip)."""
        works = list(works)
        prepared = self._masks.submit(_make_all_masks, works)
        for constraint, _, _ in works:
            constraint._prepared = prepared

    def _compile(self, grammar: Grammar, adapter: AdapterRef | None) -> Compiled:
        tokenizer = self._base_tokenizer if adapter is None else self._own_tokenizer(adapter)
        if tokenizer is None:
            raise InvalidGrammar(f"This model's answers cannot follow a grammar: {self._base_error}.")
        try:
            compiled = Compiled(tokenizer, definition(grammar))
        except (ValueError, TypeError, KeyError, AssertionError) as fault:
            raise InvalidGrammar(f"The grammar is not valid: {fault}") from None
        if compiled.matcher.is_error():
            raise InvalidGrammar(f"The grammar is not valid: {' '.join(compiled.matcher.get_error().split())[:500]}")
        return compiled

    def _own_tokenizer(self, adapter: AdapterRef) -> LLTokenizer | None:
        if self._base_tokenizer is None:
            return None
        if adapter.digest not in self._adapter_tokenizers:
            self._adapter_tokenizers[adapter.digest] = self._tokenizer(AdapterSpec.read(Path(adapter.path)).text)
            if len(self._adapter_tokenizers) > _TOKENIZERS:
                self._adapter_tokenizers.popitem(last=False)
        self._adapter_tokenizers.move_to_end(adapter.digest)
        return self._adapter_tokenizers[adapter.digest]

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
            return LLTokenizer(source, eos_token=self._eos)  # some tokenizers have more tokens than there are logits


def _is_spent(compiled: Future[Compiled]) -> bool:
    return compiled.done() and compiled.exception() is None and compiled.result().spent


def _make_all_masks(works: Iterable[tuple[Constraint, Seq[int], int]]) -> None:
    for constraint, drafts, skipped in works:
        constraint._make_masks(drafts, skipped)
