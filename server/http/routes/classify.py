"""`POST /v1/classify`: prompts scored by an adapter's classification head, in vLLM's shapes."""

import time
import uuid
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from server.errors import TooManyRequests
from server.http.answer import CancellableResponse, send_json
from server.http.objects.generation import Classification
from server.http.operations import OPEN_ERRORS, Operation
from server.openai.classification import ClassifyChatBody, ClassifyInputBody, probabilities, scores
from server.openai.target import open_target
from server.services import Services, caller_of, services_of
from server.tenants.caller import Caller


async def classify(request: Request, body: ClassifyChatBody | ClassifyInputBody) -> CancellableResponse:
    """Classify prompts: the likeliest label of each, and all labels' probabilities."""
    return CancellableResponse(partial(_answer, services_of(request), caller_of(request), body))


async def _answer(services: Services, caller: Caller, body: ClassifyChatBody | ClassifyInputBody, send: Send) -> None:
    if isinstance(body, ClassifyInputBody):
        services.admission.check_size(len(body.input), "input")
    async with open_target(services, caller, body.model, body.adapter_id, user=body.user, task="classify") as target:
        prompts = await body.prompts(target, services.engine_info.max_model_len)
        all_scores, usage = await scores(services, body, target, prompts)
    answer = {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": target.requested_name,
        "data": [_entry(index, label_scores, body.use_activation) for index, label_scores in enumerate(all_scores)],
        "usage": usage.as_json(),
    }
    await send_json(send, answer, {"X-Adapter-Digest": target.digest})


def _entry(index: int, label_scores: list[float], use_activation: bool) -> dict[str, Any]:
    return {
        "index": index,
        "label": f"LABEL_{label_scores.index(max(label_scores))}",
        "probs": probabilities(label_scores) if use_activation else label_scores,
        "num_classes": len(label_scores),
    }


routes = [
    Operation("POST", "/v1/classify", classify, response_type=Classification, errors=(*OPEN_ERRORS, TooManyRequests)),
]
