"""What is run when several requests are under way: who begins, and how much of a prompt at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.quoting import quoted
from internvl_edge.runtime.arguments import number, whole, whole_or

#: Tokens of a prompt that are run beside decoding before anything was measured.
FIRST_CHUNK = 16
#: By how much a chunk, as measured, may change at once.
LARGEST_CHANGE = 2.0
#: A wait that tells two requests apart, and the least that a token takes.
SHORTEST_S = 1e-9
#: Weight of the newest measurement of a pass.
NEWEST = 0.25
#: Steps of whose times the middle one is taken: what delays one of them is no measure.
MEASURED = 15


@dataclass(frozen=True)
class Policy:
    """How requests share a model.

    Attributes:
        most_running: requests that are under way at once; others wait.
        growth: by how much the time between two tokens of running answers may grow while a prompt
            is read or a picture encoded, as a part of it: 1.0 doubles it at most.
        aging_s: waiting so many seconds counts as much as a priority that is larger by one, so that
            nobody waits for ever.
        memory_bytes: most memory that KV caches and images of all requests under way take, as
            planned; None: what is free.
        ahead: positions of an answer that are reserved at once. A longer one reserves more on the
            way; where there is no more, the newest request is dropped and begun again later.
    """

    most_running: int = 32
    growth: float = 1.0
    aging_s: float = 10.0
    memory_bytes: int | None = None
    ahead: int = 256

    def __post_init__(self) -> None:
        for name, typed, least in (
            ("most_running", whole, 1),
            ("growth", number, 0),
            ("aging_s", number, 0),
            ("ahead", whole, 1),
        ):
            value = typed(name, getattr(self, name))
            if not value >= least:
                raise UsageError(f"is {quoted(value)}, it must be at least {least}", option=name)
            object.__setattr__(self, name, value)
        if (limit := whole_or("memory_bytes", self.memory_bytes, None)) is not None and limit < 0:
            raise UsageError(f"is {quoted(limit)}, it must be at least 0", option="memory_bytes")
        object.__setattr__(self, "memory_bytes", limit)

    @classmethod
    def of(cls, value: Policy | None) -> Policy:
        """Return a policy, the default for None.

        Raises:
            UsageError: it is something else.
        """
        if value is None or isinstance(value, Policy):
            return value or cls()
        raise UsageError(f"is {quoted(value)}, it must be a Policy", option="policy")

    def rank(self, priority: int, waited_s: float) -> float:
        """Return what a request is preferred by: the larger comes first."""
        return priority + waited_s / max(self.aging_s, SHORTEST_S)


class Pace:
    """Finds how many tokens of a prompt, and how much of a picture, fit beside decoding, from how
    long passes took.

    Args:
        growth: see `Policy`.
        clock: seconds.
    """

    def __init__(self, growth: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._growth = growth
        self.clock = clock
        self._decoding: dict[int, deque[float]] = {}  # seconds by the number of sequences
        self._chunk = float(FIRST_CHUNK)
        self._token: float | None = None  # seconds that a token of a prompt adds
        self._last: tuple[int, float] = (0, 0.0)  # sequences and seconds of the last step
        self._overshoot, self._beside = 0.0, False

    @property
    def share(self) -> float:
        """Seconds that pictures may take before the next step, so that with it, and with what
        their operators take to rest, the time between two tokens grows by no more than it may."""
        sequences, seconds = self._last
        # Nobody is faster beside others: a step that was tells what one alone takes now.
        alone = min(self._alone(sequences), seconds) if self._decoding else seconds
        return max((1 + self._growth) * alone - seconds - self._overshoot, 0.0)

    def rested(self, seconds: float | None) -> None:
        """Note how long operators of pictures took to rest before this step; None: there are no
        pictures."""
        self._beside = seconds is not None
        self._overshoot = max(seconds or 0.0, (1 - NEWEST) * self._overshoot)

    @property
    def chunk(self) -> int:
        """Tokens of a prompt, at least one, that a pass may take beside others' tokens."""
        return max(1, int(self._chunk))

    def decoded(self, sequences: int, seconds: float) -> None:
        """Note how long a step took that did nothing but decode."""
        self._last = sequences, seconds
        if self._beside and self._decoding:  # of cold caches: it is not what it is alone
            return
        self._decoding.setdefault(sequences, deque(maxlen=MEASURED)).append(seconds)

    def prefilled(self, sequences: int, tokens: int, seconds: float) -> None:
        """Note how long a step took that ran `tokens` of a prompt beside decoding."""
        self._last = sequences, seconds
        if not self._decoding or tokens < self.chunk:  # the end of a prompt says less
            return
        alone = self._alone(sequences)
        added = max(seconds - alone, SHORTEST_S) / tokens
        before = added if self._token is None else self._token
        self._token = before + NEWEST * (added - before)
        least, most = self._chunk / LARGEST_CHANGE, self._chunk * LARGEST_CHANGE
        self._chunk = max(1.0, min(max(self._growth * alone / self._token, least), most))

    def _alone(self, sequences: int) -> float:
        """Seconds of a step that decodes about so many sequences, and nothing else."""
        nearest = min(self._decoding, key=lambda known: abs(known - sequences))
        return median(self._decoding[nearest])
