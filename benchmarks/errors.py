"""Errors of the harness, told to the user in one line."""

from __future__ import annotations


class BenchmarkError(Exception):
    """A row could not be run: a peer, a model or the machine lacks something; the message says what."""


class IncorrectError(Exception):
    """A row's correctness check is red, so its figures are not reported; the message says what differed."""
