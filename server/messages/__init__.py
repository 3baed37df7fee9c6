"""The messages that cross the socket between the API process and the engine process."""
