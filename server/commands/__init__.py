"""The command line's clients: thin, over HTTP, importing nothing of the server that they talk to."""
