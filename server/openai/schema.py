"""The parameters shared by completions and chat: types, ranges, defaults, no-op values.

Checks that depend on the model (vocabulary, context length) are in `generation`.
"""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from server.errors import InvalidRequest
from server.messages.protocol import Grammar, Sampling, ThoughtBudget
from server.openai.body import Body, Entries, Items, Label, Metadata, PromptCacheOptions
from server.openai.grammars import ConstrainedBody
from server.settings import MAX_SPECULATIVE_TOKENS

MAX_ADAPTERS = 8  # per request
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
INT32 = 2**31 - 1
INT64 = 2**63 - 1


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if not all(stops):
        raise ValueError("must not contain an empty string")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop strings are accepted")
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"a stop string has at most {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _logit_bias(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("must be an object from token id to bias")
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError("every key must be a token id")
    return {int(key): bias for key, bias in value.items()}


_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_STOPS = BeforeValidator(_stops, json_schema_input_type=_Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)])
_Bias = Annotated[float, Field(ge=-100, le=100)]
_TOKEN_ID = Field(pattern=r"^[0-9]{1,10}$")
_BIASES = BeforeValidator(_logit_bias, json_schema_input_type=dict[Annotated[str, _TOKEN_ID], _Bias])


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: with `include_usage`, every chunk has the usage so far
    include_obfuscation: bool = False  # OpenAI's padding of chunks against eavesdroppers; never added


class WeightedAdapter(Body):
    """One of several adapters that a request applies to the same tokens."""

    id: str = Field(min_length=1)
    weight: float = Field(1.0, ge=-100, le=100)


class SamplingBody(Body):
    """Sampling and stop parameters, with the names of OpenAI's completions and vLLM."""

    min_tokens: int = Field(0, ge=0, le=INT32)
    top_k: int = Field(0, ge=-1, le=INT32)  # 0 and -1: off
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    stop: Annotated[tuple[str, ...], _STOPS] = ()
    stop_token_ids: Items[Annotated[int, Field(ge=0, le=INT32)]] = Field([])
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    speculative_tokens: int | None = Field(None, ge=0, le=MAX_SPECULATIVE_TOKENS)  # None: the server's setting
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    priority: int = Field(0, ge=-INT32, le=INT32)  # vLLM's: the lowest of the caller's requests runs first


# Sampling parameters of other servers with the values that disable them, as their clients send them.
_FOREIGN_NO_OPS: dict[str, tuple[Any, ...]] = {
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "top_a": (0, 0.0),
    "mirostat": (0,),
    "repeat_penalty": (1, 1.0),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
    "cache_prompt": (True,),
    "mm_processor_kwargs": ({},),
    "vllm_xargs": ({},),
}
SERVICE_TIERS = ("auto", "default", "flex", "priority", "scale")  # OpenAI's; no effect


class GenerationBody(ConstrainedBody, SamplingBody):
    """Fields of both endpoints. Labels and hints that cannot change the answer are validated and ignored."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = _FOREIGN_NO_OPS | {
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "early_stopping": (False,),
        "detokenize": (True,),
        "spaces_between_special_tokens": (True,),
        "bad_words": ([],),
        "logits_processors": ([],),
        "allowed_token_ids": ([],),
        "return_tokens_as_token_ids": (False,),
        "service_tier": SERVICE_TIERS,
        "documents": ([],),
    }

    model: str = Field(min_length=1)
    adapter_id: str | None = Field(None, min_length=1)
    adapter_source: Literal["local"] | None = None
    adapters: Items[WeightedAdapter] = Field([], max_length=MAX_ADAPTERS)

    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)  # 0: only the likeliest token
    logit_bias: Annotated[Entries[int, _Bias], _BIASES] = Field({})
    return_token_ids: bool = False  # vLLM's: of prompt and answer

    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Label | None = None  # a split name resolves to the same version for one user
    best_of: int | None = Field(None, ge=1, le=128)  # must equal `n`: every sample is returned

    metadata: Metadata | None = None
    store: bool = False
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    safety_identifier: Label | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` may only be given with `stream: true`.", param="stream_options")
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> "GenerationBody":
        if self.best_of not in (None, self.n):
            raise InvalidRequest("`best_of` must equal `n`: no more are generated than returned.", param="best_of")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk has the usage so far."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling(
        self,
        defaults: Mapping[str, float],
        *,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
        thought: ThoughtBudget | None = None,
    ) -> Sampling:
        """Return the engine's parameters for sample 0; `max_tokens` and the model's stop tokens are added later.

        Args:
            defaults: the model's, for fields that the client left out.
            grammar: of the answer, already checked.
            thought: budget of the thought.
        """

        def chosen(name: str) -> Any:
            return getattr(self, name) if name in self.model_fields_set else defaults.get(name, getattr(self, name))

        return Sampling(
            min_tokens=self.min_tokens,
            temperature=chosen("temperature"),
            top_p=chosen("top_p"),
            top_k=max(chosen("top_k"), 0),
            min_p=chosen("min_p"),
            seed=secrets.randbits(63) if self.seed is None else self.seed % 2**63,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=chosen("repetition_penalty"),
            logit_bias=self.logit_bias,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
            thought=thought,
        )
