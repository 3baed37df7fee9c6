"""The roles of each route; a key needs one of them. A route missing from the table cannot be created."""

from server.tenants.caller import OPERATOR, ROLES

_ANY = " ".join(ROLES)
_OPEN = f"{_ANY} {OPERATOR}"  # access is decided by the middleware

_TABLE = {
    # --- generation
    "POST /v1/completions": "serve",
    "POST /v1/chat/completions": "serve",
    "POST /v1/messages": "serve",
    "POST /v1/messages/count_tokens": "serve",
    "POST /v1/embeddings": "serve",
    "POST /v1/classify": "serve",
    "POST /v1/responses": "serve",
    "POST /v1/responses/input_tokens": "serve",
    "POST /v1/responses/compact": "serve",
    "GET /v1/responses/{id}": "serve",
    "GET /v1/responses/{id}/input_items": "serve",
    "POST /v1/responses/{id}/cancel": "serve",
    "DELETE /v1/responses/{id}": "serve",
    "POST /v1/batches": "serve",
    "GET /v1/batches": "serve",
    "GET /v1/batches/{id}": "serve",
    "POST /v1/batches/{id}/cancel": "serve",
    "POST /tokenize": _ANY,
    "POST /detokenize": _ANY,
    "GET /tokenizer_info": _ANY,
    # --- adapters
    "GET /v1/models": _ANY,
    "GET /v1/models/{id:path}": _ANY,
    "DELETE /v1/models/{id:path}": "upload",
    "GET /v1/adapters": _ANY,
    "POST /v1/adapters": "upload",
    "GET /v1/adapters/{name:path}": _ANY,
    "DELETE /v1/adapters/{name:path}": "upload",
    "GET /v1/adapters/{name:path}/config": "upload tune",
    "GET /v1/adapters/{name:path}/weights": "upload tune",
    "GET /v1/adapters/{name:path}/versions": _ANY,
    "POST /v1/adapters/{name:path}/promote": "upload",
    "POST /v1/adapters/{name:path}/rollback": "upload",
    "POST /v1/adapters/{name:path}/pin": "upload",
    "DELETE /v1/adapters/{name:path}/pin": "upload",
    "POST /v1/adapters/{name:path}/share": "upload",
    "DELETE /v1/adapters/{name:path}/share": "upload",
    "POST /v1/adapters/{name:path}/warm": "serve upload",
    "POST /v1/adapters/{name:path}/verify": "serve upload",
    "GET /v1/adapters/{name:path}/merge": _ANY,
    "POST /v1/adapters/{name:path}/merge": "upload",
    "DELETE /v1/adapters/{name:path}/merge": "upload",
    "GET /v1/adapters/{name:path}/merge/{file}": "upload",
    "POST /v1/load_lora_adapter": "upload",
    "POST /v1/unload_lora_adapter": "upload",
    # --- files and training
    "POST /v1/files": _ANY,
    "GET /v1/files": _ANY,
    "GET /v1/files/{id}": _ANY,
    "GET /v1/files/{id}/content": _ANY,
    "GET /v1/files/{id}/preview": _ANY,
    "DELETE /v1/files/{id}": _ANY,
    "POST /v1/fine_tuning/jobs": "tune",
    "GET /v1/fine_tuning/jobs": "tune",
    "POST /v1/fine_tuning/estimate": "tune",
    "GET /v1/fine_tuning/jobs/{id}": "tune",
    "GET /v1/fine_tuning/jobs/{id}/events": "tune",
    "GET /v1/fine_tuning/jobs/{id}/checkpoints": "tune",
    "POST /v1/fine_tuning/jobs/{id}/cancel": "tune",
    "POST /v1/fine_tuning/jobs/{id}/pause": "tune",
    "POST /v1/fine_tuning/jobs/{id}/resume": "tune",
    "POST /v1/evaluations": "tune",
    "GET /v1/evaluations": "tune",
    "GET /v1/evaluations/{id}": "tune",
    "DELETE /v1/evaluations/{id}": "tune",
    # --- tenants
    "GET /v1/admin/tenants": "admin",
    "POST /v1/admin/tenants": OPERATOR,
    "GET /v1/admin/tenants/{id}": "admin",
    "POST /v1/admin/tenants/{id}": OPERATOR,
    "DELETE /v1/admin/tenants/{id}": OPERATOR,
    "GET /v1/usage": _ANY,
    "GET /v1/admin/audit": "admin",
    "GET /v1/admin/keys": "admin",
    "POST /v1/admin/keys": "admin",
    "GET /v1/admin/keys/{id}": "admin",
    "DELETE /v1/admin/keys/{id}": "admin",
    # --- the server
    "GET /v1/server/history": OPERATOR,
    "GET /openapi.json": _ANY,
    "GET /docs": _ANY,
    "GET /health": _OPEN,
    "GET /ready": _OPEN,
    "GET /version": _OPEN,
    "GET /metrics": OPERATOR,
}


# POST requests that change nothing.
_NO_CHANGE = frozenset(
    {
        *("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"),
        *("/v1/embeddings", "/v1/classify"),
        *("/v1/responses", "/tokenize", "/detokenize", "/v1/fine_tuning/estimate"),
        *("/v1/adapters/{name:path}/warm", "/v1/adapters/{name:path}/verify"),
    }
)


def is_change(method: str, path: str) -> bool:
    """Whether a request to this path changes something and belongs in the audit log."""
    return method != "GET" and path not in _NO_CHANGE


def role_error_message(roles: frozenset[str]) -> str:
    """Return the error message for a caller without any of these roles."""
    if OPERATOR in roles:
        return "This needs the key of an admin of the default tenant."
    return f"This needs a key with the role {' or '.join(sorted(roles - {'admin'}) or ['admin'])}."


def roles_of(method: str, path: str) -> frozenset[str]:
    """Return the roles of a route, one of which suffices. Raises KeyError for a route missing from the table."""
    return frozenset(_TABLE[f"{method} {path}"].split())
