"""`POST /tokenize` and `/detokenize`: the base's tokenizer, in vLLM's shapes."""

from starlette.routing import BaseRoute

routes: list[BaseRoute] = []
