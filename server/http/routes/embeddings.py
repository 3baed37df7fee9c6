"""`POST /v1/embeddings`: refused with a reason, as the model does not define how to pool its hidden states."""

from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from server.errors import InvalidRequest
from server.http.operations import OPEN_ERRORS, Operation
from server.openai.body import Body, Items, Label
from server.openai.schema import INT32
from server.openai.target import open_target
from server.services import caller_of, services_of


class EmbeddingBody(Body):
    """OpenAI's body of `POST /v1/embeddings`."""

    model: str = Field(min_length=1)
    input: Annotated[str, Field(min_length=1)] | Items[Any]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=INT32)
    user: Label | None = None


async def create_embedding(request: Request, body: EmbeddingBody) -> Response:
    """Refuse, with the reason."""
    async with open_target(services_of(request), caller_of(request), body.model, user=body.user, task="any"):
        raise InvalidRequest(
            "This server's model generates text. Its directory has no pooling configuration (sentence-transformers' "
            "`modules.json` and `1_Pooling/config.json`), and embedding models are not supported.",
            param="model",
            code="embeddings_unsupported",
        )


routes = [
    Operation("POST", "/v1/embeddings", create_embedding, response_type=dict[str, Any], errors=OPEN_ERRORS),
]
