"""Types of the JSON objects in responses: OpenAI's where they exist, with vLLM's additions and ours.

The OpenAPI document describes responses with them, and the tests validate all responses against it.
"""
