"""Anthropic's request and response shapes, converted to and from the chat request of `server/openai/`. API process."""
