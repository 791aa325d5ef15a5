"""Which replica answers: the least loaded one, unless another has computed the beginning of this prompt before.

The policy alone, without HTTP or Ray: it knows replicas by name, counts what runs on each, and remembers where the
beginnings of prompts went. It is used from one event loop.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence

import orjson

BLOCK_BYTES = 512  # of a prompt's JSON, about a hundred tokens: less is computed again sooner than moved
MAX_BLOCKS = 64
_PROMPT = ("model", "tools", "functions", "instructions", "system", "messages", "prompt", "input")  # as templates order


def beginnings(body: bytes) -> tuple[bytes, ...]:
    """Chained digests of the whole blocks of a request's prompt, the shortest beginning first; () without one.

    Two prompts share the first k digests just when their first k blocks are the same, model and tools included.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ()  # the replica will tell the client
    if not isinstance(fields, dict):
        return ()
    text = b"".join(orjson.dumps([name, fields[name]]) for name in _PROMPT if fields.get(name) is not None)
    digests, digest = [], b""
    for end in range(BLOCK_BYTES, min(len(text), BLOCK_BYTES * MAX_BLOCKS) + 1, BLOCK_BYTES):
        digest = hashlib.blake2b(digest + text[end - BLOCK_BYTES : end], digest_size=16).digest()
        digests.append(digest)
    return tuple(digests)


class Affinity:
    """Least load, with a preference.

    margin: a replica that knows the prompt's beginning is preferred while it runs at most so many requests more than
    the least loaded one. memory: beginnings remembered, the least recently used are forgotten.
    """

    def __init__(self, *, margin: int = 4, memory: int = 100_000):
        self._margin = margin
        self._memory = memory
        self._places: OrderedDict[bytes, Hashable] = OrderedDict()  # beginning -> the replica that computed it last
        self._running: dict[str, Hashable] = {}  # request -> its replica
        self._loads: Counter[Hashable] = Counter()
        self._turn = 0

    def load(self, replica: Hashable) -> int:
        """Requests that run on `replica`."""
        return self._loads[replica]

    def rank(self, digests: Sequence[bytes], replicas: Sequence[Hashable]) -> list[Hashable]:
        """All of `replicas`, the best first. Of equally loaded ones each is the first in turn."""
        if not replicas:
            return []
        self._turn += 1
        start = self._turn % len(replicas)
        ranked = sorted((*replicas[start:], *replicas[:start]), key=self._loads.__getitem__)
        least = self._loads[ranked[0]]
        for digest in reversed(digests):  # the longest known beginning that somebody near has
            known = self._places.get(digest)
            if known in replicas and self._loads[known] <= least + self._margin:
                ranked.remove(known)
                return [known, *ranked]
        return ranked

    def began(self, request: str, replica: Hashable, digests: Sequence[bytes]) -> None:
        """`request` was sent to `replica`, which knows these beginnings from now on."""
        self.ended(request)
        self._running[request] = replica
        self._loads[replica] += 1
        for digest in reversed(digests):  # so that the longest are forgotten first
            self._places[digest] = replica
            self._places.move_to_end(digest)
        while len(self._places) > self._memory:
            self._places.popitem(last=False)

    def ended(self, request: str) -> None:
        """`request` is over, however it ended. Said twice, or of an unknown one, it changes nothing."""
        replica = self._running.pop(request, None)
        if replica is not None:
            self._loads[replica] -= 1
            if not self._loads[replica]:
                del self._loads[replica]

    def keep(self, replicas: Sequence[Hashable]) -> None:
        """These replicas are left; what the others ran and knew is gone."""
        left = set(replicas)
        self._running = {request: replica for request, replica in self._running.items() if replica in left}
        self._loads = Counter(self._running.values())
        for digest in [digest for digest, replica in self._places.items() if replica not in left]:
            del self._places[digest]
