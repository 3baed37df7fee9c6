"""Adapters on the device: rank-row pool, host and device cache, variants beyond rank rows, merged weights."""
