"""Load tests: drive a running server from outside, and measure it beside its peers.

Knows HTTP, time and files; imports neither `server` nor `adapters`, so that it can say nothing about them that a
client could not see.
"""
