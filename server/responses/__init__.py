"""Responses that are kept, on one server's disk or in the object store of several, and those in the making."""
