"""Tenants: who asks, with which key, and what is theirs."""
