"""Tenants: callers and their keys, limits, and the audit log."""
