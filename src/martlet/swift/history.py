"""One round of a dialogue as SWIFT tells it."""

from __future__ import annotations


class HistoryPair(list):
    """[query, response]: a list as SWIFT 2.x makes it, that also equals, and prints as, the tuple its guide shows."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, query: str, response: str):
        super().__init__((query, response))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, tuple)) and tuple(self) == tuple(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self):
        return HistoryPair, tuple(self)
