"""The engine as the API process sees it: requests, replies, supervision, the socket."""
