"""`POST /tokenize` and `/detokenize`: the base's tokenizer, with an adapter's own tokens, in vLLM's shapes.

lm-eval's remote tokenizer reads special tokens and the chat template from `GET /tokenizer_info`.
"""

from functools import partial
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Send

from server.errors import InvalidRequest
from server.http.answer import CancellableResponse, send_json
from server.http.objects.generation import Detokenized, Tokens
from server.http.objects.models import TokenizerInfo
from server.http.operations import OPEN_ERRORS, Operation
from server.openai.body import Body, Items
from server.openai.conversation import Conversation
from server.openai.target import open_target
from server.services import Services, caller_of, services_of
from server.tenants.caller import Caller


class TokenizePromptBody(Body):
    """A text to tokenize."""

    model: str | None = Field(None, min_length=1)
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(Conversation):
    """A conversation to tokenize."""

    model: str | None = Field(None, min_length=1)
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Token ids to decode."""

    model: str | None = Field(None, min_length=1)
    tokens: Items[Annotated[int, Field(ge=0)]]


async def tokenize(request: Request, body: TokenizeChatBody | TokenizePromptBody) -> CancellableResponse:
    """Tokenize a text or a conversation."""
    return CancellableResponse(partial(_tokenize, services_of(request), caller_of(request), body))


async def _tokenize(
    services: Services, caller: Caller, body: TokenizeChatBody | TokenizePromptBody, send: Send
) -> None:
    longest = services.engine_info.max_model_len
    async with open_target(services, caller, body.model or services.settings.base_name, task="any") as target:
        text = target.text
    if isinstance(body, TokenizeChatBody):
        _, ids = await body.encode(text, longest)
    else:
        special = body.add_special_tokens
        (ids,) = await text.encode([body.prompt], add_special_tokens=special, max_tokens=longest, param="prompt")
    texts = None
    if body.return_token_strs:
        texts = await text.in_thread(10 * len(ids), lambda: [text.token(id_).text for id_ in ids])
    await send_json(send, {"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": texts}, {})


async def detokenize(request: Request, body: DetokenizeBody) -> CancellableResponse:
    """Decode token ids to text."""
    return CancellableResponse(partial(_detokenize, services_of(request), caller_of(request), body))


async def _detokenize(services: Services, caller: Caller, body: DetokenizeBody, send: Send) -> None:
    async with open_target(services, caller, body.model or services.settings.base_name, task="any") as target:
        text, vocabulary = target.text, target.vocab_size
    if max(body.tokens, default=0) >= vocabulary:
        i, id_ = next((i, id_) for i, id_ in enumerate(body.tokens) if id_ >= vocabulary)
        message = f"`tokens`: {id_} is outside the vocabulary of {vocabulary}."
        raise InvalidRequest(message, param=f"tokens.{i}")
    decode = partial(text.decode, body.tokens, skip_special_tokens=False)
    await send_json(send, {"prompt": await text.in_thread(len(body.tokens), decode)}, {})


async def tokenizer_info(request: Request) -> Response:
    """Get the base's special tokens by name, chat template (null: none) and maximum context in tokens."""
    services = services_of(request)
    template = services.text.chat_template
    return JSONResponse(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",  # transformers' class for any tokenizer.json
            "chat_template": template.source if template is not None else None,
            "model_max_length": services.engine_info.max_model_len,
            **services.text.special_tokens,
        }
    )


routes = [
    Operation("GET", "/tokenizer_info", tokenizer_info, response_type=TokenizerInfo),
    Operation("POST", "/tokenize", tokenize, response_type=Tokens, errors=OPEN_ERRORS),
    Operation("POST", "/detokenize", detokenize, response_type=Detokenized, errors=OPEN_ERRORS),
]
