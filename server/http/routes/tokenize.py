"""`POST /tokenize` and `/detokenize`: the base's tokenizer, with an adapter's own tokens, in vLLM's shapes.

`GET /tokenizer_info` is how lm-eval's remote tokenizer learns the special tokens and renders chats by itself.
"""

from functools import partial
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.errors import InvalidRequest
from server.http.objects import Detokenized, TokenizerInfo, Tokens
from server.http.operations import OPENING, Operation
from server.openai.body import Body
from server.openai.conversation import Conversation
from server.openai.target import open_target
from server.services import services_of


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


async def tokenize(request: Request, body: TokenizeChatBody | TokenizePromptBody) -> Response:
    """Token ids of a text or a conversation."""
    services = services_of(request)
    async with open_target(services, body.model or services.settings.base_name) as target:
        text = target.text
    if isinstance(body, TokenizeChatBody):
        ids = await body.encode(text, services.engine_info.max_model_len)
    else:
        (ids,) = await text.encode([body.prompt], add_special_tokens=body.add_special_tokens)
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": services.engine_info.max_model_len,
            "tokens": ids,
            "token_strs": [text.token(id_).text for id_ in ids] if body.return_token_strs else None,
        }
    )


async def detokenize(request: Request, body: DetokenizeBody) -> Response:
    """The text of token ids."""
    services = services_of(request)
    async with open_target(services, body.model or services.settings.base_name) as target:
        text, vocabulary = target.text, target.vocab_size
    for i, id_ in enumerate(body.tokens):
        if id_ >= vocabulary:
            message = f"`tokens`: {id_} is outside the vocabulary of {vocabulary}."
            raise InvalidRequest(message, param=f"tokens.{i}")
    decode = partial(text.decode, body.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": await text.in_thread(len(body.tokens), decode)})


async def tokenizer_info(request: Request) -> Response:
    """The base's special tokens by name, its chat template (null: none) and the longest context, in tokens."""
    services = services_of(request)
    template = services.text.chat_template
    return JSONResponse(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",  # what transformers makes of any tokenizer.json
            "chat_template": template.source if template is not None else None,
            "model_max_length": services.engine_info.max_model_len,
            **services.text.special_tokens,
        }
    )


routes = [
    Operation("GET", "/tokenizer_info", tokenizer_info, answers=TokenizerInfo),
    Operation("POST", "/tokenize", tokenize, answers=Tokens, refuses=OPENING),
    Operation("POST", "/detokenize", detokenize, answers=Detokenized, refuses=OPENING),
]
