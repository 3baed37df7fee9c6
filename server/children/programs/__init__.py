"""Programs of helper processes."""
