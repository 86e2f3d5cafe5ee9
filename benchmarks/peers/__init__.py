"""Peers: other engines, each in an environment of its own, driven over JSON lines (see `client`)."""
