"""The base's tokenizer and chat templates, and streamed text. API process."""
