"""OpenAI's request and response shapes: validation, generation, assembly. API process."""
