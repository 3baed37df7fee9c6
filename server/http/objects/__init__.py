"""The JSON objects that answers are made of: OpenAI's where it has one, with vLLM's additions and ours.

Types alone. The OpenAPI document describes answers with them, and the tests hold every answer that they get against it.
"""
