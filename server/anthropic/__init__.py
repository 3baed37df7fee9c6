"""Anthropic's request and response shapes, over the chat request of `server/openai/`. API process."""
