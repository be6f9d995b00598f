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
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, WarpcacheError
from ..promise.conformal import AdaptiveMargin, DriftTest, binomial_tail

__all__ = ["AuditLog"]

_RECOVERY = 20
_RECOVERY_LEVEL = 0.2


class AuditLog:
    """Which frames of one session are audited, and what their results change.

    Each block of `every` frames has one audit. Which frame of its block it is, is drawn: at fixed steps, audits would
    fall into step with a policy's period and see one cache age alone. While an audit is in flight there is no other;
    it then takes the next free frame of its block, and where there is none the block goes without.

    In quiet times the margin follows by quantile tracking (`AdaptiveMargin`). Two tests for drift watch the audits: one
    their misses, one the predictor's errors (`Rule.beyond`). The second is the sharper one: an error shows where the
    threshold is far, and where the tightening already keeps frames from missing; but an exact exit's audit says nothing
    of the predictor, and does not count in it. At an alarm of either, tracking would take too long: the tightening
    jumps to what the worst of the recent audits would have needed, and follows every miss until the last `recovery`
    audits are in keeping with the calibration again. From there on it falls as slowly as the tracking lets it.

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
        self._miss_test = DriftTest(self._alpha)
        self._error_test = DriftTest(self._alpha)
        self._recovery = recovery
        self._seed = seed
        self._block = -1  # the last block that had its audit
        self._target = (-1, -1)  # a block and its frame to audit
        self._in_flight: tuple[int, float] | None = None  # frame, tightening that it was answered with
        self._needed: deque[float] = deque(maxlen=recovery)  # tightening that an audit asks for, by audit
        self._drifting: _Drift | None = None
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
        """Whether a drift began and the last `recovery` audits since are not yet in keeping with the calibration."""
        return self._drifting is not None

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
        self,
        frame: int,
        age: int | None,
        missed: bool,
        excess_score: float = -math.inf,
        spread: float = 1.0,
        *,
        beyond: float | None = None,
    ) -> None:
        """Take in a result. A frame that an exact exit answered counts too, as a hit: the promise is over all frames.

        Args:
            frame: The frame whose audit started.
            age: Age of the cache it was answered from; None or 0: without one.
            missed: Whether its answer was worse than the threshold.
            excess_score: By how much its true score is over the threshold's: below 0 where not missed, -inf for an
                exact exit.
            spread: The spread that was predicted for the exit that answered it, in units of score.
            beyond: What `Rule.beyond` says of the prediction; None for an exact exit, or where it is not known.

        Raises:
            WarpcacheError: If no audit of `frame` is under way: a bug of the caller.
        """
        tightening = self._take(frame)
        group = age or 0
        self._audits[group] += 1
        self._misses[group] += missed
        limit = self._margin.largest_jump
        # Of a miss whose size is not known, only the limit says how far it may move the margin.
        excess = excess_score / spread if spread > 0.0 and not math.isnan(excess_score) else limit
        self._margin.observe(missed, excess)
        # A prediction wrong by as much again would have been kept out by so much tightening.
        needed = tightening + min(max(excess, 0.0), limit) if missed else 0.0
        surprised = None if beyond is None else not beyond < 0.0
        if beyond is not None and surprised:
            needed = max(needed, limit if math.isnan(beyond) else beyond)
        self._needed.append(needed)
        if self._drifting is None:
            by_misses = self._miss_test.observe(missed)
            by_errors = surprised is not None and self._error_test.observe(surprised)
            if by_misses or by_errors:
                self._begin_drift(by_errors=by_errors)
        else:
            self._follow_drift(self._drifting, missed, surprised)

    def take_warning(self) -> str | None:
        """The warning of a drift that began since the last call; one a drift, None otherwise."""
        warning, self._warning = self._warning, None
        return warning

    def _begin_drift(self, *, by_errors: bool) -> None:
        self._drifts += 1
        self._drifting = _Drift(by_errors, deque(maxlen=self._recovery))
        self._raise_to(max(self._needed))
        self._warning = (
            f"{sum(needed > 0.0 for needed in self._needed)} of the last {len(self._needed)} audited frames are worse "
            f"than promised or than the predictor leaves open, where about {self._alpha:.3g} of them should be: the "
            "inputs differ from those that the bundle was calibrated with; the rule is tightened by "
            f"{self._margin.tightening:.2g} spreads and costlier exits answer; compile the bundle again with frames "
            "like these if it lasts"
        )
        self._needed.clear()
        self._miss_test.reset()
        self._error_test.reset()

    def _follow_drift(self, drift: _Drift, missed: bool, surprised: bool | None) -> None:
        # The first audits show how far the predictor is off, each later miss that it is further.
        if missed or len(drift.recent) < self._recovery:
            self._raise_to(self._needed[-1])
        # What was noticed by errors is over when the errors are: misses end as soon as the tightening is enough.
        contradicts = surprised if drift.by_errors else missed
        if contradicts is not None:
            drift.recent.append(contradicts)
        if len(drift.recent) == self._recovery:
            probability = binomial_tail(sum(drift.recent), self._recovery, self._alpha)
            if probability > _RECOVERY_LEVEL:
                self._drifting = None

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


@dataclass(frozen=True, slots=True)
class _Drift:
    """A drift that has begun: which test noticed it, and what that test's events were since."""

    by_errors: bool
    recent: deque[bool]


def _impossible(what: str) -> WarpcacheError:
    return WarpcacheError(f"{what}; this is a bug in what drives the audits, please report it")
