"""What the exits cost on this device: measured once at load, followed while running."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping

from ..errors import InputError

__all__ = ["ExitCosts", "measure_exit_costs"]

# Share of what an exit costs above its time at load that is forgotten with every frame that another answers: an exit
# that is slow for good is tried again once in a few hundred frames. And where nothing ran, so that nothing is to lose.
_FORGOTTEN, _FORGOTTEN_IDLE = 0.01, 0.1


class ExitCosts:
    """Every exit's time in milliseconds.

    Measured times go through a median of the last three and then into an exponential average. So one outlier alone (a
    context switch, a page fault) changes nothing, while a device that has become slower is followed from the second
    slow frame on. What is not run is not measured, so a cost that has risen falls back towards that at load (`rest`).
    Not safe for several threads at once: one session's consumer owns it.

    Args:
        measured: Milliseconds by exit, from `measure_exit_costs`.
        weight: What one new value counts in the average, in (0, 1].

    Raises:
        InputError: If there is no exit, a time is not finite and above 0, or `weight` is out of range.
    """

    def __init__(self, measured: Mapping[str, float], *, weight: float = 0.1) -> None:
        if not measured:
            raise InputError("no exit's cost is given; measure at least one exit")
        if not 0.0 < weight <= 1.0:
            raise InputError(f"weight is {weight}; give a number above 0 and at most 1")
        for name, ms in measured.items():
            if not (math.isfinite(ms) and ms > 0.0):
                raise InputError(f"the cost of exit {name!r} is {ms} ms; it must be finite and above 0")
        self._weight = weight
        self._measured = {name: float(ms) for name, ms in measured.items()}
        self._ms = {name: float(ms) for name, ms in measured.items()}
        self._last_two = {name: (ms, ms) for name, ms in self._ms.items()}
        self._order: tuple[str, ...] | None = None

    def ms(self, exit_name: str) -> float:
        """What `exit_name` costs now, in milliseconds.

        Raises:
            InputError: If there is no such exit.
        """
        try:
            return self._ms[exit_name]
        except KeyError:
            raise self._unknown(exit_name) from None

    def observe(self, exit_name: str, ms: float) -> None:
        """Take in the time in milliseconds that `exit_name` took for one frame.

        Raises:
            InputError: If there is no such exit, or the time is not finite or negative.
        """
        if exit_name not in self._ms:
            raise self._unknown(exit_name)
        if not (math.isfinite(ms) and ms >= 0.0):
            raise InputError(f"exit {exit_name!r} is said to have taken {ms} ms; give a finite time of 0 or more")
        before, last = self._last_two[exit_name]
        self._last_two[exit_name] = (last, ms)
        middle = sorted((before, last, ms))[1]
        self._ms[exit_name] += self._weight * (middle - self._ms[exit_name])
        self._order = None

    def rest(self, ran: Collection[str]) -> None:
        """Count one frame for the exits that did not run: what they cost above their time at load slowly goes.

        Without it, a spell in which the device was slow would put an exit out of a deadline's reach for good, and where
        it was every exit, drop every frame from then on.

        Args:
            ran: The exits that did run for the frame; none where it was dropped.
        """
        kept = 1.0 - (_FORGOTTEN if ran else _FORGOTTEN_IDLE)
        for name, least in self._measured.items():
            above = self._ms[name] - least
            if above <= 0.0 or name in ran:
                continue
            # In the end it is there, and nothing is left to do.
            ms = least + kept * above if above > 1e-3 * least else least
            self._ms[name] = ms
            # A slow frame follows at once if the next one is as slow; a fast one is not outvoted by two from then.
            self._last_two[name] = (ms, self._last_two[name][1])
            self._order = None

    def cheapest(self) -> str:
        """The exit that costs least."""
        return self.order()[0]

    def order(self) -> tuple[str, ...]:
        """The exits, cheapest first; among equals in the order in which they were measured."""
        if self._order is None:
            self._order = tuple(sorted(self._ms, key=self._ms.__getitem__))
        return self._order

    def _unknown(self, exit_name: str) -> InputError:
        return InputError(f"exit {exit_name!r} has no cost; there are: {', '.join(self._ms)}")


def measure_exit_costs(
    run: Callable[[str], None], exits: Iterable[str], clock: Callable[[], float], rounds: int = 5
) -> dict[str, float]:
    """Time every exit: one run each to warm up, then rounds over all of them.

    Rounds go over the exits in turn, so that a device that gets slower meanwhile does so for all of them alike.

    Args:
        run: Runs the named exit once and returns when its answer is there.
        exits: Names.
        clock: Seconds, monotonic.
        rounds: Timed runs of each exit.

    Returns:
        Median milliseconds by exit; at least a nanosecond, so that a coarse clock does not make an exit free.

    Raises:
        InputError: If there are no exits or `rounds` is below 1.
    """
    names = tuple(exits)
    if not names or rounds < 1:
        raise InputError(f"{len(names)} exits are to be timed in {rounds} rounds; give at least one of both")
    for name in names:
        run(name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = clock()
            run(name)
            seconds[name].append(clock() - start)
    return {name: max(1e-6, statistics.median(times) * 1e3) for name, times in seconds.items()}
