"""Load tests: drive a running server from outside, and measure it beside its peers.

Imports neither `server` nor `adapters`, since it measures as a client.
"""
