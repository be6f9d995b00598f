"""The router: which exit answers a frame. Pure: signals, costs and time in, a decision out.

An exact exit (``whole``; ``plain`` at age 0) is always eligible. An inexact one is where the rule's margin allows it
for this frame's predicted score, the input is of a known kind (novelty at most 1), and, for a consumer, there is a
cache of a calibrated age of the same scene; where there is none, branches are judged by the margin of age 0. Consumers
answer before branches, as margins are made: where a consumer is eligible no branch is chosen, but for a deadline that
no eligible exit meets. Of what is left, the cheapest exit that is done by the deadline answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from ..errors import InputError
from ..promise.calibration import Rule, score_value
from .exit_costs import ExitCosts

__all__ = ["Decision", "Degraded", "ExitRoles", "Request", "Router", "RouterOptions", "Signals"]

Degraded = Literal["cheaper exit", "older cache", "dropped"]


@dataclass(frozen=True, slots=True)
class Signals:
    """What the predictor says of one frame.

    Attributes:
        predicted: Predicted score by exit.
        spread: Its spread by exit.
        novelty: Distance of the input from known ones; above 1 it is of another kind.
        change: How far the input is from the cache's; above 1 it is another scene. 0 from the cold predictor.
        cold: Whether the cold predictor said so, which knows of no cache: then the margin without a cache applies.
    """

    predicted: Mapping[str, float]
    spread: Mapping[str, float]
    novelty: float
    change: float = 0.0
    cold: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One frame to be routed.

    Attributes:
        frame: Its index.
        age: Age of the newest cache in frames; None: there is none.
        signals: What the predictor says; None where it failed or there is none: only exact exits are eligible.
        remaining_ms: Time left until the deadline in milliseconds; None: there is no deadline.
    """

    frame: int
    age: int | None
    signals: Signals | None
    remaining_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What answers the frame.

    Attributes:
        exit: The exit; None: the frame is dropped.
        predicted: The quality that the predictor expects, in the metric's unit; None for exact exits, or where
            nothing was predicted for the exit.
        degraded: What was given up because no eligible exit is done by the deadline; None: nothing.
        scene_cut: Whether caches of earlier frames are of another scene or subject.
        ranking: What to try, in this order, where the answer is not finite: the costlier eligible exits, the whole
            generator last. Empty where that answers itself, or nothing does.
    """

    exit: str | None
    predicted: float | None = None
    degraded: Degraded | None = None
    scene_cut: bool = False
    ranking: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExitRoles:
    """What the exits are for; those that are not named here are branches.

    Attributes:
        whole: The whole generator: exact, and always there.
        plain: The exit that is exact at age 0, and answers at no other; None: there is none.
        consumers: The inexact exits that read the cache.
    """

    whole: str
    plain: str | None
    consumers: frozenset[str]


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """How a router decides, apart from its rule.

    Attributes:
        max_age: The oldest cache that a consumer may read, in frames; None: whatever is calibrated.
        room: Spreads beyond the margin with which a cheaper exit is taken at once.
        hold: Frames running that a cheaper exit must have been eligible for otherwise.
        gain: Share of the last exit's cost that a cheaper one must save to be worth a switch.
        novel_frames: Frames running with a novelty above 1 that make a new subject.

    Raises:
        InputError: If a value is out of range.
    """

    max_age: int | None = None
    room: float = 1.0
    hold: int = 4
    gain: float = 0.05
    novel_frames: int = 3

    def __post_init__(self) -> None:
        if self.max_age is not None and self.max_age < 0:
            raise InputError(
                f"max_age {self.max_age} is negative; give 0 or more frames, or None for what is calibrated"
            )
        if not self.room >= 0.0 or self.hold < 1 or not 0.0 <= self.gain < 1.0 or self.novel_frames < 1:
            raise InputError(
                f"room, hold, gain and novel_frames are {self.room}, {self.hold}, {self.gain}, {self.novel_frames}; "
                "give room >= 0, hold >= 1, 0 <= gain < 1 and novel_frames >= 1"
            )


class Router:
    """Decides for one session, frame by frame.

    Hysteresis, so that exits do not flicker: to a costlier exit at once; to a cheaper one where it is cheaper by more
    than `gain`, and has `room` spreads beyond the margin or has been eligible for `hold` frames running. From a branch
    to an eligible consumer at once: beside it the branch may not stay, and the whole generator would have to answer.

    Args:
        rule: The session's rule; `route` takes another for a single frame.
        costs: What exits cost; those with a cost are the ones to choose from. Followed by others while running.
        exits: What they are for.
        options: How it decides.

    Raises:
        InputError: If the whole generator has no cost.
    """

    def __init__(self, rule: Rule, costs: ExitCosts, exits: ExitRoles, options: RouterOptions | None = None) -> None:
        names = costs.order()
        if exits.whole not in names:
            raise InputError(f"exit {exits.whole!r} has no cost; there are: {', '.join(names)}")
        self.rule = rule
        self._costs = costs
        self._options = RouterOptions() if options is None else options
        self._whole = exits.whole
        self._plain = exits.plain if exits.plain in names else None
        self._inexact = tuple(name for name in names if name not in (exits.whole, exits.plain))
        self._consumers = exits.consumers
        self._branches = frozenset(self._inexact) - exits.consumers
        self._last: str | None = None
        self._eligible_for = dict.fromkeys(self._inexact, 0)
        self._novel_for = 0
        self._novelty_told = False

    def wants_cold(self, age: int | None, rule: Rule | None = None) -> bool:
        """Which predictor is to be asked for a frame whose newest cache is `age` frames old: the cold one, or not.

        The cold one where there is no cache that a consumer may be eligible with: then only branches may be, and they
        are judged by the margin without a cache.
        """
        return age is None or not self._age_allowed(age, rule or self.rule)

    def route(self, request: Request, rule: Rule | None = None, tightening: float = 0.0) -> Decision:
        """Decide for one frame; frames come in their order.

        Args:
            request: The frame.
            rule: The frame's own rule; None is the session's.
            tightening: Spreads that are added to the rule's margin.

        Returns:
            What answers. Without a deadline always an eligible exit; with one, an exit that is done by it, or a drop.
        """
        rule = rule or self.rule
        signals = request.signals
        if signals is not None and not _finite(signals):
            signals = None
        changed = signals is not None and signals.change > 1.0
        scene_cut = self._scene_cut(signals, changed)
        slack = self._slack(request.age, signals, changed, rule, tightening)
        self._count(slack)
        if not self._consumers.isdisjoint(slack):
            # Consumers before branches, as margins were made.
            slack = {name: beyond for name, beyond in slack.items() if name in self._consumers}
        order = self._costs.order()
        exact = (self._whole, self._plain if request.age == 0 else None)
        eligible = [name for name in order if name in slack or name in exact]
        if request.remaining_ms is None:
            chosen: str | None = self._steady(eligible, slack)
        else:
            fitting = [name for name in eligible if self._costs.ms(name) <= request.remaining_ms]
            chosen = self._steady(fitting, slack) if fitting else None
        degraded: Degraded | None = None
        if chosen is None:
            chosen, degraded = self._degraded(request, signals, changed, rule)
        if chosen is None:
            return Decision(None, degraded=degraded, scene_cut=scene_cut)
        self._last = chosen
        predicted = None
        if signals is not None and chosen not in exact and chosen in signals.predicted:
            predicted = score_value(rule.quality.metric, signals.predicted[chosen])
        ranking: tuple[str, ...] = ()
        if chosen != self._whole:
            costlier = order[order.index(chosen) + 1 :]
            ranking = (*(name for name in costlier if name in eligible and name != self._whole), self._whole)
        return Decision(chosen, predicted, degraded, scene_cut, ranking)

    def _slack(
        self, age: int | None, signals: Signals | None, changed: bool, rule: Rule, tightening: float
    ) -> dict[str, float]:
        """The inexact exits that are eligible, each with the spreads that it has beyond what the margin asks for."""
        if signals is None or signals.novelty > 1.0:
            return {}
        cold = signals.cold or age is None
        if not cold and age not in rule.margins:
            return {}  # how far off the predictor is that knows of a cache was never measured at this age
        readable = not cold and not changed and age is not None and self._age_allowed(age, rule)
        # The margin of an age is made for consumers with branches behind them; branches alone have that of age 0.
        margin = rule.margin(age if readable else None) + tightening
        score = rule.quality.score
        slack = {}
        for name in self._inexact:
            predicted = signals.predicted.get(name)
            if predicted is None or (name in self._consumers and not readable):
                continue
            # The form in which margins are made from the calibration, so that both round alike.
            beyond = (score - predicted) / signals.spread[name] - margin
            if beyond >= 0.0:
                slack[name] = beyond
        return slack

    def _age_allowed(self, age: int, rule: Rule) -> bool:
        """Whether a consumer may be eligible with a cache of this age."""
        return age >= 1 and age in rule.margins and (self._options.max_age is None or age <= self._options.max_age)

    def _count(self, slack: Mapping[str, float]) -> None:
        for name, frames in self._eligible_for.items():
            self._eligible_for[name] = frames + 1 if name in slack else 0

    def _steady(self, candidates: list[str], slack: Mapping[str, float]) -> str:
        """The cheapest candidate that hysteresis admits; `candidates` are eligible, in time, cheapest first."""
        if self._last is None:
            return candidates[0]
        ms = self._costs.ms
        last_ms = ms(self._last)
        keeps = self._last in candidates
        if self._last in self._branches:
            # Beside a consumer the branch may not stay, and a step up from it to the whole generator would be a waste.
            candidates = list(takewhile(self._consumers.__contains__, candidates)) or candidates
        for name in candidates:
            if name == self._last or ms(name) >= last_ms:
                return name
            settled = slack.get(name, math.inf) >= self._options.room or self._eligible_for[name] >= self._options.hold
            if settled and not (keeps and ms(name) > (1.0 - self._options.gain) * last_ms):
                return name
        # The last exit may not answer and nothing costlier is in time: the costliest of what is eligible.
        return candidates[-1]

    def _degraded(
        self, request: Request, signals: Signals | None, changed: bool, rule: Rule
    ) -> tuple[str | None, Degraded]:
        """What answers where no eligible exit is done by the deadline."""
        remaining = request.remaining_ms
        assert remaining is not None
        age = request.age
        fitting = [name for name in self._inexact if self._costs.ms(name) <= remaining]
        branches = [name for name in fitting if name not in self._consumers]
        # A cache of another scene is worse than no answer.
        consumers = [] if age is None or changed else [name for name in fitting if name in self._consumers]
        young = age is not None and (age == 0 or self._age_allowed(age, rule))
        cheaper = self._best(branches + consumers if young else branches, signals)
        if cheaper is not None:
            return cheaper, "cheaper exit"
        older = self._best(consumers, signals)
        return (older, "older cache") if older is not None else (None, "dropped")

    def _best(self, names: list[str], signals: Signals | None) -> str | None:
        """The exit of best predicted quality; where nothing is predicted, the costliest, as it should be the best."""
        if not names:
            return None
        known = {} if signals is None else {name: p for name in names if (p := signals.predicted.get(name)) is not None}
        return min(known, key=known.__getitem__) if known else max(names, key=self._costs.ms)

    def _scene_cut(self, signals: Signals | None, changed: bool) -> bool:
        """Whether this frame starts another scene or subject; a subject is told once, until a known one is back."""
        if signals is None:
            return False
        novel = signals.novelty > 1.0
        self._novel_for = self._novel_for + 1 if novel else 0
        told = self._novelty_told and novel
        new_subject = not told and self._novel_for >= self._options.novel_frames
        # A cut to another subject is one change: its caches must not be forgotten again a few frames later.
        self._novelty_told = told or new_subject or (novel and changed)
        return changed or new_subject


def _finite(signals: Signals) -> bool:
    isfinite = math.isfinite
    if not (isfinite(signals.novelty) and isfinite(signals.change)):
        return False
    for name, predicted in signals.predicted.items():
        spread = signals.spread.get(name, math.nan)
        if not (isfinite(predicted) and isfinite(spread) and spread > 0.0):
            return False
    return True
