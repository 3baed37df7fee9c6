"""One file per resource: its routes and their handlers."""
