"""Experiments behind decisions in the code; each prints the table that the lab log quotes."""
