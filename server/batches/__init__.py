"""Batches: files of requests, answered with capacity left over by serving."""
