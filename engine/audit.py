"""Audits: which answered frames are compared with the whole generator's answer, and what the comparison changes.

Bookkeeping alone: whoever owns it renders and measures. A log counts audits and misses, adds to the rule's margin what
the misses ask for, and tells when they contradict the promise.

**One tightening for all ages.** Audits are few (one frame in `every`), and a shift of the inputs, another person or
light, makes the predictor wrong at every age alike. Split by age, each part would learn from a fifth of the audits, and
what one age has learnt would not protect the next. The price is that the long-run bound holds for the frames of all
ages together; the calibrated margins below it stay by age.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping

import numpy as np

from .conformal import AdaptiveMargin, DriftTest, binomial_tail
from .errors import InputError, WarpcacheError

__all__ = ["AuditLog"]

_RECOVERY = 20
_RECOVERY_LEVEL = 0.2


class AuditLog:
    """Which frames of one session are audited, and what their results change.

    Each block of `every` frames has one audit. Which frame of its block it is, is drawn: at fixed steps, audits would
    fall into step with a policy's period and see one cache age alone. While an audit is in flight there is no other;
    it then takes the next free frame of its block, and where there is none the block goes without.

    In quiet times the margin follows by quantile tracking (`AdaptiveMargin`). When recent audits contradict the promise
    (`DriftTest`) that would take too long: then the tightening jumps to what the worst of the recent misses would have
    needed, and goes on jumping after every miss until `recovery` audits are in keeping with the promise again. From
    there on it falls as slowly as the tracking lets it.

    Not safe for several threads at once.

    Args:
        every: Frames for one audit; 0 is none.
        confidence: Share of the frames that keep the quality, as promised; in (0, 1).
        step: How far one miss moves the margin, in spreads.
        recovery: Audits by which a drift is judged to be over.
        seed: Of the draw within blocks.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self, every: int, confidence: float, *, step: float = 0.25, recovery: int = _RECOVERY, seed: int = 0
    ) -> None:
        if every < 0 or recovery < 1:
            raise InputError(f"every is {every} and recovery {recovery}; give every >= 0 (0: no audits), recovery >= 1")
        if not 0.0 < confidence < 1.0:
            raise InputError(f"confidence {confidence} is not between 0 and 1; give for example 0.95")
        self.every = every
        self._alpha = 1.0 - confidence
        self._margin = AdaptiveMargin(self._alpha, step)
        self._test = DriftTest(self._alpha)
        self._recovery = recovery
        self._seed = seed
        self._block = -1  # the last block that had its audit
        self._target = (-1, -1)  # a block and its frame to audit
        self._in_flight: tuple[int, float] | None = None  # frame, tightening that it was answered with
        self._recent: deque[tuple[bool, float]] = deque(maxlen=recovery)  # missed, tightening that it needed
        self._drifting_for: int | None = None
        self._drifts = 0
        self._audits: Counter[int] = Counter()
        self._misses: Counter[int] = Counter()
        self._warning: str | None = None

    @property
    def audits(self) -> int:
        """Audits that have ended with a result."""
        return self._audits.total()

    @property
    def misses(self) -> int:
        """Those of them whose frame was worse than promised."""
        return self._misses.total()

    @property
    def by_age(self) -> Mapping[int, tuple[int, int]]:
        """Audits and misses by age; 0 is without a cache."""
        return {age: (count, self._misses[age]) for age, count in sorted(self._audits.items())}

    @property
    def drifts(self) -> int:
        """How often a drift began."""
        return self._drifts

    @property
    def drifting(self) -> bool:
        """Whether recent audits contradict the promise, and no `recovery` audits since have kept it."""
        return self._drifting_for is not None

    @property
    def in_flight(self) -> int | None:
        """The frame whose audit has started and not ended."""
        return None if self._in_flight is None else self._in_flight[0]

    def tightening(self, age: int | None = None) -> float:
        """Spreads to add to the rule's margin; the same at every `age`, see above."""
        return self._margin.tightening

    def due(self, frame: int) -> bool:
        """Whether `frame`, just answered, is to be audited; changes nothing."""
        if self.every == 0 or self._in_flight is not None:
            return False
        block = frame // self.every
        return block != self._block and frame >= self._target_of(block)

    def started(self, frame: int) -> None:
        """The audit of `frame` is under way.

        Raises:
            WarpcacheError: If another one is: a bug of the caller.
        """
        if self._in_flight is not None:
            raise _impossible(f"an audit of frame {frame} started while that of frame {self._in_flight[0]} was running")
        self._in_flight = (frame, self._margin.tightening)
        self._block = frame // max(1, self.every)

    def abandoned(self, frame: int) -> None:
        """The audit of `frame` ended without a result: it failed, or the session closed."""
        self._take(frame)

    def finished(
        self, frame: int, age: int | None, missed: bool, excess_score: float = 0.0, spread: float = 1.0
    ) -> None:
        """Take in a result. A frame that an exact exit answered counts too, as a hit: the promise is over all frames.

        Args:
            frame: The frame whose audit started.
            age: Age of the cache it was answered from; None or 0: without one.
            missed: Whether its answer was worse than the threshold.
            excess_score: By how much its true score is over the threshold's (below 0 where not missed).
            spread: The spread that was predicted for the exit that answered it, in units of score.

        Raises:
            WarpcacheError: If no audit of `frame` is under way: a bug of the caller.
        """
        tightening = self._take(frame)
        group = age or 0
        self._audits[group] += 1
        self._misses[group] += missed
        excess = excess_score / spread if spread > 0.0 else math.nan
        if math.isnan(excess):
            excess = math.inf  # nothing is known but that it was bad: the margin limits what that may change
        self._margin.observe(missed, excess)
        # A prediction wrong by as much again would have been kept out by this tightening.
        self._recent.append((missed, tightening + min(max(excess, 0.0), self._margin.largest_jump)))
        if self._drifting_for is None:
            if self._test.observe(missed):
                self._begin_drift()
        else:
            self._follow_drift(missed)

    def take_warning(self) -> str | None:
        """The warning of a drift that began since the last call; one a drift, None otherwise."""
        warning, self._warning = self._warning, None
        return warning

    def _begin_drift(self) -> None:
        self._drifting_for = 0
        self._drifts += 1
        self._raise_to(max(needed for missed, needed in self._recent if missed))
        recent = [missed for missed, _ in self._recent]
        self._warning = (
            f"{sum(recent)} of the last {len(recent)} audited frames are worse than promised, where at most "
            f"{self._alpha:.3g} of them should be: the inputs differ from those that the bundle was calibrated with; "
            f"the rule is tightened by {self._margin.tightening:.2g} spreads and dearer exits answer; compile the "
            "bundle again with frames like these if it lasts"
        )
        self._recent.clear()
        self._test.reset()

    def _follow_drift(self, missed: bool) -> None:
        assert self._drifting_for is not None
        self._drifting_for += 1
        if missed:
            self._raise_to(self._recent[-1][1])
        if self._drifting_for >= self._recovery:
            misses = sum(was_missed for was_missed, _ in self._recent)
            if binomial_tail(misses, self._recovery, self._alpha) > _RECOVERY_LEVEL:
                self._drifting_for = None

    def _raise_to(self, tightening: float) -> None:
        self._margin.jump(tightening - self._margin.tightening)

    def _target_of(self, block: int) -> int:
        """The frame of `block` from which on it is audited."""
        if self._target[0] != block:
            # A generator of its own for every block: whichever blocks are asked for, the draws are the same.
            drawn = int(np.random.default_rng((self._seed, block)).integers(self.every))
            self._target = (block, block * self.every + drawn)
        return self._target[1]

    def _take(self, frame: int) -> float:
        if self._in_flight is None or self._in_flight[0] != frame:
            raise _impossible(f"an audit of frame {frame} ended that was not started")
        tightening = self._in_flight[1]
        self._in_flight = None
        return tightening


def _impossible(what: str) -> WarpcacheError:
    return WarpcacheError(f"{what}; this is a bug in what drives the audits, please report it")
