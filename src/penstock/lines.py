"""Lines of text out of bytes that come in pieces, however they are cut. Pure."""

from __future__ import annotations

from typing import Final

LONGEST_CHARACTER: Final = 4
"""The bytes of the longest UTF-8 sequence (RFC 3629, section 3)."""

_CONTINUATION: Final = 0b1000_0000  # the two highest bits of each byte of a sequence but its first


class LineSplitter:
    """Takes bytes apart into lines of text, and long lines into pieces. Pure; bounded if popped empty before a feed."""

    def __init__(self, max_line_bytes: int) -> None:
        self.ended = False
        self._max = max_line_bytes
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes) -> None:
        """Add what was read; `b""` is the end."""
        del self._buffer[: self._start]
        self._start = 0
        self._buffer += data
        self.ended = not data

    def pop(self) -> str | None:
        """The next line or piece; None if there is none yet."""
        start = self._start
        newline = self._buffer.find(b"\n", start)
        end = len(self._buffer) if newline < 0 else newline
        following = end + (newline >= 0)
        if self._buffer.endswith(b"\r", start, end):
            end -= 1  # as a part of the line end, or perhaps: then it waits for what follows
        if end - start > self._max:
            end = following = self._cut(start + self._max)
        elif newline < 0 and (not self.ended or following == start):
            return None
        self._start = following
        return self._buffer[start:end].decode(errors="replace")

    def _cut(self, end: int) -> int:
        """The last place up to `end` that is not within a character; where the bytes are no UTF-8 anyway, `end`."""
        for place in range(end, end - LONGEST_CHARACTER, -1):
            if self._buffer[place] & 0b1100_0000 != _CONTINUATION:
                return place
        return end
