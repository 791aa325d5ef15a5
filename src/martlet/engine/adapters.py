"""LoRA adapters by name, and which of them lie in the runner's slots.

Names are the public side: a name stands for one version of an adapter at a time. A sequence keeps the version that was
current when it came, to its end, whatever is reloaded or removed meanwhile. Slots are memory of the device: few, filled
when a sequence enters that needs one, given up by the adapter that was used least recently and that nobody is using.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from martlet.errors import ModelNotFound, did_you_mean

if TYPE_CHECKING:
    from martlet.model.adapters import Adapter


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """One adapter under one name. number: differs for everything that is registered."""

    name: str
    number: int
    adapter: Adapter

    @property
    def cache_key(self) -> str:
        """What the prefix cache knows it by."""
        return f"{self.name}@{self.number}"


class AdapterNames:
    """The registered adapters. Any thread may call it; a change is seen by the requests that come after it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._versions: dict[str, Version] = {}

    def put(self, name: str, adapter: Adapter) -> Version:
        """Register an adapter, in place of the one of that name if there is one."""
        with self._lock:
            version = self._versions[name] = Version(name, next(self._numbers), adapter)
        return version

    def remove(self, name: str) -> None:
        """Raises ModelNotFound."""
        with self._lock:
            if self._versions.pop(name, None) is None:
                raise self._unknown(name)

    def get(self, name: str) -> Version:
        """Raises ModelNotFound with the nearest names."""
        with self._lock:
            version = self._versions.get(name)
            if version is None:
                raise self._unknown(name)
            return version

    def names(self) -> tuple[str, ...]:
        """In the order in which they were first registered."""
        with self._lock:
            return tuple(self._versions)

    def _unknown(self, name: str) -> ModelNotFound:
        there = ", ".join(self._versions) or "none is loaded"
        near = did_you_mean(name, self._versions)
        return ModelNotFound(f"no adapter is called {name!r}; there is {there}.{near}", param="model")


class AdapterSlots:
    """Slots 1 ... size of a runner; slot 0 stands for the base model. Belongs to the scheduler's thread.

    load(slot, adapter): puts an adapter's weights there, for the steps launched from now on.
    """

    def __init__(self, size: int, load: Callable[[int, Adapter], None]):
        self.size, self._load = size, load
        self._slots: dict[Version, int] = {}  # least recently used first
        self._users: dict[Version, int] = {}
        self.loads = 0

    def has_room(self, version: Version) -> bool:
        """Whether `acquire` would find a slot now."""
        return version in self._slots or len(self._users) < self.size

    def acquire(self, version: Version | None) -> int:
        """The slot of an adapter, held until `release`, to be called when it has room. Raises what `load` raises."""
        if version is None:
            return 0
        slot = self._slots.pop(version, None)
        if slot is None:
            slot = self._take()
            self._load(slot, version.adapter)
            self.loads += 1
        self._slots[version] = slot
        self._users[version] = self._users.get(version, 0) + 1
        return slot

    def release(self, version: Version | None) -> None:
        if version is None:
            return
        self._users[version] -= 1
        if not self._users[version]:
            del self._users[version]

    def _take(self) -> int:
        """A slot that holds nothing; what it held is forgotten."""
        if len(self._slots) < self.size:
            return next(slot for slot in range(1, self.size + 1) if slot not in self._slots.values())
        return self._slots.pop(next(version for version in self._slots if version not in self._users))

    def check(self, running: list[Version]) -> None:
        """Raise AssertionError when an invariant is broken (for the simulator)."""
        assert len(set(self._slots.values())) == len(self._slots) <= self.size, "two adapters in one slot"
        assert all(1 <= slot <= self.size for slot in self._slots.values()), "no such slot"
        assert {v: running.count(v) for v in running} == self._users, "users of an adapter miscounted"
        assert self._users.keys() <= self._slots.keys(), "an adapter in use has no slot"
