"""The base's tokenizer and chat templates, and text that is streamed. API process."""
