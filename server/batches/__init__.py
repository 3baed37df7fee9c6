"""Batches: files of requests, answered in what serving leaves free."""
