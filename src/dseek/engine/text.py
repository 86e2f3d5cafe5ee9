"""`TextAssembler`: collects an answer's text and holds back whatever may still become a stop text.

A stop text can span tokens, so its beginning must not be shown before it is known that the rest does not follow.
"""

from __future__ import annotations

from collections.abc import Sequence


class TextAssembler:
    """Joins pieces of text, ends at the first stop text and releases only what is final.

    Args:
        stop: texts that end the answer, none of them empty.
    """

    __slots__ = ("_fresh", "_held", "_released", "_stop", "_stopped")

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self._fresh: list[str] = []
        self._released: list[str] = []
        self._stopped = False

    @property
    def text(self) -> str:
        """Everything released so far, taken or not."""
        return "".join(self._released)

    def push(self, piece: str) -> bool:
        """Add a piece of the answer.

        Args:
            piece: text that follows what was pushed before; ignored once a stop text was met.

        Returns:
            Whether the answer has met a stop text. The text before it is released, the rest is dropped.
        """
        if self._stopped or not piece:
            return self._stopped
        if not self._stop:
            self._release(piece)
            return False
        text = self._held + piece
        ends = [position for position in map(text.find, self._stop) if position >= 0]
        if ends:
            self._release(text[: min(ends)])
            self._held = ""
            self._stopped = True
            return True
        keep = self._num_held(text)
        self._release(text[: len(text) - keep])
        self._held = text[len(text) - keep :]
        return False

    def flush(self) -> None:
        """Release what was held back: the answer is over, no stop text can follow."""
        self._release(self._held)
        self._held = ""

    def take(self) -> str:
        """Return what was released since the last call.

        Returns:
            Text, perhaps empty.
        """
        piece = "".join(self._fresh)
        self._fresh.clear()
        return piece

    def _release(self, text: str) -> None:
        """Hand out final text."""
        if text:
            self._fresh.append(text)
            self._released.append(text)

    def _num_held(self, text: str) -> int:
        """Count the characters at the end of the text that begin a stop text."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
