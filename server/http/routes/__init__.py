"""Routes and their handlers, one file per resource."""
