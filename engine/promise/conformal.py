"""Margins that keep a promise: conformal risk control, quantile tracking while running, and a test for drift.

A margin is counted in spreads: an exit is eligible where its predicted score lies at least so many spreads below the
threshold's. All three are bookkeeping over numbers that the caller measured; nothing here knows of exits or images.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError

__all__ = ["AdaptiveMargin", "DriftTest", "allowed_losses", "binomial_tail", "risk_control_margin"]

_WINDOWS = (5, 10, 20, 40)
_LEVEL = 1e-4


def allowed_losses(samples: int, alpha: float) -> int:
    """How many of `samples` calibration frames may be lost: the most with (lost + 1) / (samples + 1) <= `alpha`.

    Returns:
        That number; -1 where even none lost is too many, because there are too few samples for so small an `alpha`.
    """
    # 1 - 0.9 is a little less than 0.1: a billionth of a frame decides nothing, rounding would.
    return math.floor(alpha * (samples + 1) + 1e-9) - 1


def risk_control_margin(lost_at: ArrayLike, alpha: float) -> float:
    """The least margin at which the expected share of lost frames is at most `alpha`.

    Frame i is lost at every margin up to and including ``lost_at[i]``, and at none above: the loss is 0 or 1 and falls
    with the margin, which is all that the guarantee asks for. For a new frame that is exchangeable with the n
    calibration frames, the probability of being lost at the returned margin is at most `alpha`.

    Args:
        lost_at: [n], the largest margin at which each calibration frame is lost; -inf: never, inf: always.
        alpha: The share that may be lost, in (0, 1).

    Returns:
        The margin: -inf where the promise holds at any, inf where no margin keeps it.

    Raises:
        InputError: If `lost_at` is not a vector or holds NaN, or `alpha` is not in (0, 1).

    Source: Angelopoulos, Bates, Fisch, Lei, Schuster, "Conformal risk control", ICLR 2024, equation (4) with a loss
    bounded by B = 1: the least margin with n / (n + 1) * mean loss + 1 / (n + 1) <= alpha.
    """
    _check_alpha(alpha)
    values = np.asarray(lost_at, np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise InputError(f"lost_at must be a vector without NaN, not one of shape {values.shape} or with NaN in it")
    allowed = allowed_losses(values.size, alpha)
    if allowed < 0:
        return math.inf
    if allowed >= values.size:
        return -math.inf
    # The first frame that may not be lost: it is at this margin, and is not at the next number above.
    first = float(np.sort(values)[values.size - 1 - allowed])
    return first if math.isinf(first) else float(np.nextafter(first, np.inf))


class AdaptiveMargin:
    """What is added to a calibrated margin while running, so that the share of misses returns to what was promised.

    Quantile tracking: every audit moves the tightening by ``step * (missed - alpha)``, up after a miss and slowly down
    otherwise, never below 0. So, whatever the frames do, after n audits

        misses <= alpha * n + tightening / step,

    and where nothing can be missed from a tightening of B on (only exact exits are left), the tightening stays
    below B + step + the largest jump, so that the share of misses comes down to `alpha` as 1 / n.

    A miss by more than a spread is no matter of bad luck: the tightening jumps by what is above one spread, at most
    `largest_jump`. Jumps only raise the tightening, so the bound above holds with them too.

    Args:
        alpha: The share of misses that is promised, in (0, 1).
        step: How far one miss moves the margin, in spreads.
        largest_jump: The most that one miss adds beside the step, in spreads.

    Raises:
        InputError: If an argument is out of range.

    Source: Angelopoulos, Candès, Tibshirani, "Conformal PID control for time series prediction", NeurIPS 2023,
    equation (4) and proposition 1; the floor and the jump are ours.
    """

    def __init__(self, alpha: float, step: float = 0.25, *, largest_jump: float = 4.0) -> None:
        _check_alpha(alpha)
        for name, value in (("step", step), ("largest_jump", largest_jump)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}; give a number of spreads above 0")
        self.alpha = alpha
        self.step = step
        self.largest_jump = largest_jump
        self._tightening = 0.0

    @property
    def tightening(self) -> float:
        """What to add to the calibrated margin, in spreads; 0 or more."""
        return self._tightening

    def observe(self, missed: bool, excess: float = 0.0) -> None:
        """Take in one audit.

        Args:
            missed: Whether the frame was worse than the threshold.
            excess: How many spreads the true score was over the threshold's; only read where `missed`.
        """
        self._tightening = max(0.0, self._tightening + self.step * (float(missed) - self.alpha))
        if missed:
            self.jump(self._limited(excess) - 1.0)

    def jump(self, spreads: float) -> None:
        """Raise the tightening at once by `spreads`, at most by `largest_jump`; what is not above 0 changes nothing."""
        self._tightening += max(0.0, self._limited(spreads))

    def _limited(self, spreads: float) -> float:
        # A true score that is not a number is as bad as can be.
        return self.largest_jump if math.isnan(spreads) else min(spreads, self.largest_jump)


class DriftTest:
    """Whether recent audits miss more often than was promised: a binomial test over sliding windows.

    After each audit, each window's misses are compared with the most that `alpha` explains: an alarm is a count whose
    probability, were frames missed independently with probability `alpha`, is below `level`. Short windows notice a
    gross change within a few audits, long ones a mild one.

    Args:
        alpha: The share of misses that is promised, in (0, 1).
        windows: Lengths in audits.
        level: Probability below which a window's count is an alarm.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(self, alpha: float, *, windows: Sequence[int] = _WINDOWS, level: float = _LEVEL) -> None:
        _check_alpha(alpha)
        if not windows or min(windows) < 1:
            raise InputError(f"windows are {tuple(windows)}; give lengths of 1 audit or more")
        if not 0.0 < level < 1.0:
            raise InputError(f"level is {level}; give a probability between 0 and 1")
        self.alpha = alpha
        self._alarm_at = {length: _alarm_count(length, alpha, level) for length in sorted(set(windows))}
        self._recent: deque[bool] = deque(maxlen=max(windows))

    def observe(self, missed: bool) -> bool:
        """Take in one audit; returns whether recent audits contradict the promise."""
        recent = self._recent
        recent.append(bool(missed))
        if not missed:
            return False  # No count rises by a hit: had it been an alarm, it was one before.
        newest_first = list(recent)[::-1]
        # A window that is not full yet counts too: as many misses among fewer audits are less probable still.
        return any(sum(newest_first[:length]) >= count for length, count in self._alarm_at.items())

    def reset(self) -> None:
        """Forget all audits, as after an alarm that was acted on."""
        self._recent.clear()


def binomial_tail(count: int, trials: int, probability: float) -> float:
    """The probability of `count` or more successes in `trials` independent trials."""
    return math.fsum(
        math.comb(trials, k) * probability**k * (1.0 - probability) ** (trials - k) for k in range(count, trials + 1)
    )


def _alarm_count(length: int, alpha: float, level: float) -> int:
    """The least count in a window that is an alarm; above `length` where even misses throughout are none."""
    return next((k for k in range(length + 1) if binomial_tail(k, length, alpha) < level), length + 1)


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise InputError(f"alpha is {alpha}; give the share of frames that may be lost, between 0 and 1")
