"""The base model: loading, quantising, attention over the paged KV cache. Engine process."""
