"""Stored responses, on one server's disk or in an object store shared by servers, and background responses."""
