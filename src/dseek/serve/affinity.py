"""`Affinity`: which replica has seen the beginning of a prompt, and which one should answer.

A replica keeps the pages of prompts it has computed, so a prompt goes where most of its beginning is, unless that
replica has clearly more to do than another. The router has no tokenizer: beginnings are compared by characters, in
blocks with chained hashes, which follow the pages closely enough. Nothing depends on a hash being right: a wrong guess
costs time, not correctness.

Source: two random choices by load: Mitzenmacher 2001, The power of two choices in randomized load balancing.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

Name = TypeVar("Name", int, str)
"""How a replica is named."""

BLOCK_CHARS = 256
"""Characters of a block, about a page of 64 tokens."""

MAX_BLOCKS = 128
"""Blocks of a prompt that are looked at."""

MAX_KNOWN = 65_536
"""Blocks that are remembered; the oldest are forgotten."""

SLACK = 4
"""Requests by which a replica that knows a prompt may be busier than the least busy one, and still gets it."""


def beginning(body: bytes) -> str:
    """Write what a request's prompt begins with, as comparable text.

    Args:
        body: JSON of a request.

    Returns:
        The text; empty where there is no prompt, or no JSON.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(found, Mapping):
        return ""
    prompt = found.get("messages", found.get("prompt", found.get("input")))
    if isinstance(prompt, str):
        return prompt[: BLOCK_CHARS * MAX_BLOCKS]
    parts: list[str] = []
    size = 0
    for item in prompt if isinstance(prompt, list) else ():
        part = f"{item.get('role')}\0{_text(item.get('content'))}\0" if isinstance(item, Mapping) else f"{item},"
        parts.append(part)
        size += len(part)
        if size >= BLOCK_CHARS * MAX_BLOCKS:
            break
    return "".join(parts)[: BLOCK_CHARS * MAX_BLOCKS]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)[: BLOCK_CHARS * MAX_BLOCKS]


def block_hashes(text: str) -> list[bytes]:
    """Hash the whole blocks of a text, each with all before it.

    Args:
        text: a beginning.

    Returns:
        One hash a whole block; of a text shorter than a block, none.
    """
    state = hashlib.blake2b(digest_size=12)
    hashes = []
    for start in range(0, len(text) - BLOCK_CHARS + 1, BLOCK_CHARS):
        state.update(text[start : start + BLOCK_CHARS].encode("utf-8", "surrogatepass"))
        hashes.append(state.digest())
    return hashes


class Affinity(Generic[Name]):
    """Remembers where beginnings were computed, and chooses.

    Args:
        seed: of the random choices; None draws one.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._known: OrderedDict[bytes, Name] = OrderedDict()
        self._random = random.Random(seed)
        self.num_hits = 0
        """Requests that went where their beginning was."""

    def choose(self, hashes: Sequence[bytes], loads: Mapping[Name, int]) -> Name:
        """Choose a replica, and remember that it will know the prompt.

        Args:
            hashes: of the prompt's beginning.
            loads: requests in work by replica, for those that may be chosen; at least one.

        Returns:
            The replica.
        """
        known = self._longest(hashes, loads.keys())
        least = min(loads.values())
        if known is not None and loads[known] <= least + SLACK:
            chosen = known
            self.num_hits += 1
        else:
            pair = self._random.sample(sorted(loads), min(2, len(loads)))
            chosen = min(pair, key=lambda replica: loads[replica])
        self.learn(hashes, chosen)
        return chosen

    def learn(self, hashes: Sequence[bytes], replica: Name) -> None:
        """Remember that a replica will know a prompt.

        Args:
            hashes: of the prompt's beginning.
            replica: which one.
        """
        for digest in hashes:
            self._known[digest] = replica
            self._known.move_to_end(digest)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def forget(self, replica: Name) -> None:
        """Forget what a replica knew, since it was started anew.

        Args:
            replica: which one.
        """
        for digest in [digest for digest, owner in self._known.items() if owner == replica]:
            del self._known[digest]

    def _longest(self, hashes: Sequence[bytes], allowed: Collection[Name]) -> Name | None:
        for digest in reversed(hashes):
            owner = self._known.get(digest)
            if owner is not None and owner in allowed:
                return owner
        return None
