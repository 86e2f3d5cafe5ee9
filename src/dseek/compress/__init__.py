"""Compression: what a model's numbers look like, and the narrower formats they fit into."""
