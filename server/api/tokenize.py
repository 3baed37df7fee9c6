"""`POST /tokenize` and `/detokenize`: the base's tokenizer, in vLLM's shapes. Adapters share it."""

from functools import partial
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from server.api.body import Body, read_as
from server.api.chat import Conversation
from server.api.target import open_target
from server.errors import InvalidRequest
from server.services import Services, services_of


class TokenizePromptBody(Body):
    """A text."""

    model: str | None = Field(None, min_length=1)
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(Conversation):
    """A conversation."""

    model: str | None = Field(None, min_length=1)
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = Field(None, min_length=1)
    tokens: list[Annotated[int, Field(ge=0)]]


async def tokenize(request: Request) -> Response:
    """Token ids of a text or a conversation."""
    body = await read_as(request, _tokenize_body)
    services = services_of(request)
    await _check_model(services, body.model)
    if isinstance(body, TokenizeChatBody):
        ids = await body.encode(services.text)
    else:
        (ids,) = await services.text.encode([body.prompt], add_special_tokens=body.add_special_tokens)
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": services.engine_info.max_model_len,
            "tokens": ids,
            "token_strs": [services.text.token(id_).text for id_ in ids] if body.return_token_strs else None,
        }
    )


def _tokenize_body(data: Any) -> TokenizePromptBody | TokenizeChatBody:
    chat = isinstance(data, dict) and data.get("messages") is not None
    return TokenizeChatBody.validate_object(data) if chat else TokenizePromptBody.validate_object(data)


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    body = await DetokenizeBody.read(request)
    services = services_of(request)
    await _check_model(services, body.model)
    vocabulary = services.engine_info.vocab_size
    for i, id_ in enumerate(body.tokens):
        if id_ >= vocabulary:
            message = f"`tokens`: {id_} is outside the vocabulary of {vocabulary}."
            raise InvalidRequest(message, param=f"tokens.{i}")
    decode = partial(services.text.decode, body.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": await services.text.in_thread(len(body.tokens), decode)})


async def _check_model(services: Services, model: str | None) -> None:
    """Raises `ModelNotFound` for a name that nobody has."""
    if model is not None:
        async with open_target(services, model):
            pass


routes: list[BaseRoute] = [
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]
