"""The command line's clients: thin, over HTTP, importing nothing of the server."""
