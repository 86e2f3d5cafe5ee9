"""Causal attention over a paged cache, and the rotary embedding of its queries and keys."""
