"""The base model: loading, quantising, attention over the paged KV cache. Engine process."""


class UnservableModel(ValueError):
    """This base cannot be served with these settings; the message gives the reason and the remedy."""
