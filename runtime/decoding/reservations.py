"""Memory promised to requests under way: together they take no more than there is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from internvl_edge.bundle.errors import CapacityError
from internvl_edge.bundle.remedies import Remedy, without_gains
from internvl_edge.runtime.backends import Cache
from internvl_edge.runtime.memory import MemoryGuard, gib


@dataclass(frozen=True)
class Claim:
    """What one request takes.

    Attributes:
        positions: new ones in its KV cache.
        tiles: of its images.
    """

    positions: int
    tiles: int


class Claimant:
    """Somebody with a claim: one request, while it is under way.

    Attributes:
        cache: where its positions go, once it has one.
        had_bytes: what that cache took before.
    """

    cache: Cache | None = None
    had_bytes = 0

    @property
    def taken_bytes(self) -> int:
        """What it has taken of what it was promised."""
        return 0 if self.cache is None else self.cache.held_bytes - self.had_bytes


class Reservations:
    """Promises memory to the requests of one model. Thread-safe.

    What nobody refers to any more has no claim.

    Args:
        cost: bytes that so many positions and tiles take.
        guard: refuses what is more than what is free; None: the device does.
        limit: bytes of all claims, as planned; None: what is free.
    """

    def __init__(
        self, cost: Callable[[int, int], int], guard: MemoryGuard | None, limit: int | None
    ) -> None:
        self._cost, self._guard, self._limit = cost, guard, limit
        self._claims: WeakKeyDictionary[Claimant, Claim] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def promised(self) -> int:
        """Bytes of all claims, as planned."""
        with self._lock:
            return sum(self._bytes(claim) for claim in list(self._claims.values()))

    def check(self, claim: Claim, freed: int = 0) -> None:
        """Raise CapacityError where a claim is more than there is, even alone.

        Args:
            freed: bytes that others hold, and will give back.
        """
        self._check_limit(self._bytes(claim))
        if self._guard is not None:
            self._guard.check_prompt(claim.positions, claim.tiles, -freed)

    def take(self, claimant: Claimant, claim: Claim) -> None:
        """Promise memory, instead of what the claimant was promised before.

        Raises:
            CapacityError: there is none beside what others were promised. Nothing has changed.
        """
        with self._lock:
            others = {one: held for one, held in self._claims.items() if one is not claimant}
            self._check_limit(sum(map(self._bytes, [*others.values(), claim])))
            if self._guard is not None:
                missing = sum(self._missing(one, held) for one, held in others.items())
                self._guard.check_prompt(claim.positions, claim.tiles, missing)
            self._claims[claimant] = claim

    def insist(self, claimant: Claimant, claim: Claim) -> None:
        """Promise memory that may not be there: nobody is left who could give any back."""
        with self._lock:
            self._claims[claimant] = claim

    def release(self, claimant: Claimant) -> None:
        """Forget a claim, if there is one."""
        with self._lock:
            self._claims.pop(claimant, None)

    def _bytes(self, claim: Claim) -> int:
        return self._cost(claim.positions, claim.tiles)

    def _missing(self, claimant: Claimant, claim: Claim) -> int:
        """Bytes that were promised and not taken yet."""
        return max(self._bytes(claim) - claimant.taken_bytes, 0)

    def _check_limit(self, total: int) -> None:
        if self._limit is not None and total > self._limit:
            raise CapacityError(
                f"requests under way take {gib(total)} of memory, they may take {gib(self._limit)}",
                total,
                self._limit,
                without_gains([Remedy.FEWER_IMAGES, Remedy.LOWER_TILES]),
            )
