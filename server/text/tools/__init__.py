"""Calls of functions: how models are told of tools, and how their calls are read and enforced."""
