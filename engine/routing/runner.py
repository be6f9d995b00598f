"""One session's routing on the device: its predictor, its router, the chosen exit, and what to do where one fails."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle.roles import Role, Route
from ..device.placement import Workspace
from ..errors import BackendError, ClosedError
from ..promise.calibration import Rule, score_value
from ..schedule.events import Invalidated, SchedulerEvent, StartConsumer
from ..spec import AGE_INPUT, AGE_SPEC
from ..telemetry import Telemetry
from .audits import Auditing
from .exit_costs import ExitCosts
from .plan import RoutingPlan
from .router import Decision, Degraded, Request, Router, RouterOptions, Signals

__all__ = ["RoutedAnswer", "Routing"]

logger = logging.getLogger(__name__)

_KEPT_AGES = 256


@dataclass(frozen=True, slots=True)
class RoutedAnswer:
    """The answer to a frame whose exit was chosen here.

    Attributes:
        exit: Which exit gave it.
        outputs: The generator's outputs by name.
        age: Age of the cache that the exit read, in frames; 0 where it read none.
        predicted: The quality that the predictor expects of it, in the metric's unit; None for an exact exit.
        degraded: What was given up for the deadline; None: nothing.
        exit_ms: What the exit itself took.
    """

    exit: Route
    outputs: dict[str, Any]
    age: int
    predicted: float | None
    degraded: Degraded | None
    exit_ms: float


class Routing:
    """Chooses and runs the exit of every frame of one session. All calls but `close` come from the reader's thread.

    Args:
        plan: What the engine's quality comes to.
        workspace: The session's memory and lanes.
        telemetry: The session's counters.
        now: The session's clock, seconds.
        turn: Held while the consumer's stream is used.
        post: Hands an event to the session's scheduler.
        lock: The session's, under which its audits' results are taken in.
    """

    def __init__(
        self,
        plan: RoutingPlan,
        workspace: Workspace,
        *,
        telemetry: Telemetry,
        now: Callable[[], float],
        turn: threading.Lock,
        post: Callable[[SchedulerEvent], None],
        lock: threading.Condition,
    ) -> None:
        self._plan = plan
        self._workspace = workspace
        self._telemetry = telemetry
        self._now = now
        self._turn = turn
        self._post = post
        self._costs = ExitCosts(plan.costs)
        self._router = Router(plan.rule, self._costs, plan.roles, RouterOptions(max_age=plan.max_age))
        self._auditing = Auditing(plan, workspace, telemetry=telemetry, lock=lock) if plan.audit_every else None
        self._ages: dict[int, Any] = {}

    def answer(
        self, action: StartConsumer, inputs: Mapping[str, Any], *, rule: Rule | None, deadline: float | None
    ) -> RoutedAnswer | None:
        """Answer one frame; blocks until the answer is there.

        Args:
            action: What the scheduler says of it: the cache's slot and age.
            inputs: Its inputs, as `Workspace.take_input` gave them.
            rule: The frame's own rule; None is the session's.
            deadline: When its answer is due on the session's clock, in seconds; None: no deadline.

        Returns:
            The answer, which is finite; None where no exit could give it in time, and it was counted as dropped.

        Raises:
            BackendError: If the chosen exit failed, or every exit's answer was not finite.
        """
        age = None if action.slot is None else action.age
        rule = self._plan.rule if rule is None else rule
        cold = self._router.wants_cold(age, rule)
        signals = self._predict(action, inputs, cold=cold)
        group = 0 if cold else action.age
        tightening = 0.0 if self._auditing is None else self._auditing.tightening(group, rule)
        started = self._now()
        remaining_ms = None if deadline is None else (deadline - started) * 1e3
        decision = self._router.route(Request(action.frame, age, signals, remaining_ms), rule, tightening)
        self._telemetry.routed((self._now() - started) * 1e3)
        if decision.scene_cut:
            self._telemetry.scene_cut()
            self._post(Invalidated(action.frame, started))
        if decision.exit is None:
            self._costs.rest(())
            self._telemetry.dropped_for_deadline()
            return None
        answer = self._run(action, inputs, decision, decision.exit, signals, rule)
        if self._auditing is not None and answer.degraded is None:
            # Nothing was promised of a degraded answer.
            expected = None
            if signals is not None and answer.predicted is not None:
                expected = signals.predicted[answer.exit], signals.spread[answer.exit]
            self._auditing.offer(action.frame, inputs, answer.outputs, group=group, rule=rule, expected=expected)
        return answer

    def between_frames(self) -> None:
        """The last answer is out and the reader is back: what is to be audited starts now, and waits where it must."""
        if self._auditing is not None:
            self._auditing.begin()
            if self._plan.waits_for_audits:
                self._auditing.wait()

    def close(self) -> None:
        """Let go of an audit that runs: it ends unheard. Safe to call twice and from any thread."""
        if self._auditing is not None:
            self._auditing.close()

    def _predict(self, action: StartConsumer, inputs: Mapping[str, Any], *, cold: bool) -> Signals | None:
        """What the predictor says of a frame; None where it failed, or the bundle has none for such a frame."""
        columns = self._plan.cold_columns if cold else self._plan.columns
        if not columns:
            return None
        started = self._now()
        error: BaseException | None = None
        signals = None
        try:
            given = inputs if cold else {**inputs, AGE_INPUT: self._age(action.age)}
            lane = self._workspace.lane(Role.PREDICTOR_COLD if cold else Role.PREDICTOR)
            prediction = lane.take_outputs()
            with self._turn:
                lane.enqueue(given, None if cold else action.slot, prediction).wait()
                signals = _signals(prediction, columns, cold=cold)
        except ClosedError:
            raise
        except Exception as exc:
            error = exc
        self._telemetry.predicted((self._now() - started) * 1e3)
        if signals is None and self._telemetry.predictor_failed() == 1:
            logger.warning(
                "the predictor %s on frame %d; exact exits answer such frames (further failures are counted in the "
                "session's statistics)",
                "failed" if error is not None else "gave values that are not finite",
                action.frame,
                exc_info=error,
            )
        return signals

    def _run(
        self,
        action: StartConsumer,
        inputs: Mapping[str, Any],
        decision: Decision,
        chosen: Route,
        signals: Signals | None,
        rule: Rule,
    ) -> RoutedAnswer:
        """Run the chosen exit, and as long as an answer is not finite the next one."""
        ran = []
        for name in (chosen, *decision.ranking):
            lane = self._workspace.exit(name)
            outputs = lane.take_outputs()
            with self._turn:
                begun = self._now()
                lane.enqueue(inputs, action.slot, outputs).wait()
                exit_ms = (self._now() - begun) * 1e3
            self._costs.observe(name, exit_ms)
            ran.append(name)
            if self._workspace.finite(outputs):
                self._costs.rest(ran)
                predicted, degraded = decision.predicted, decision.degraded
                if name != chosen:
                    score = None if signals is None else signals.predicted.get(name)
                    predicted = None if score is None else score_value(rule.quality.metric, score)
                    degraded = None  # all that may follow is eligible: late, but as good as promised
                age = action.age if name in self._plan.roles.consumers else 0
                return RoutedAnswer(name, outputs, age, predicted, degraded, exit_ms)
            if self._telemetry.non_finite() == 1:
                logger.warning(
                    "exit %r gave NaN or infinity on frame %d, and the next exit answers it (further such answers are "
                    "counted in the session's statistics)",
                    name,
                    action.frame,
                )
        raise BackendError(
            f"frame {action.frame} cannot be answered: every exit, the whole generator too, gave NaN or infinity; look "
            "at its inputs"
        )

    def _age(self, age: int) -> Any:
        """An age as the predictor's lane takes it; made once, since a handful of them serve all frames."""
        taken = self._ages.get(age)
        if taken is None:
            if len(self._ages) >= _KEPT_AGES:
                self._ages.clear()
            array = np.full(AGE_SPEC.shape, age, AGE_SPEC.dtype)
            taken = self._ages[age] = self._workspace.take_input(AGE_SPEC, array, finite=False, keep=True)
        return taken


def _signals(prediction: Mapping[str, Any], columns: tuple[str, ...], *, cold: bool) -> Signals | None:
    """What a predictor's outputs say; None where a value is not finite or a spread not above 0."""
    predicted = prediction["predicted"][0].tolist()
    spread = prediction["spread"][0].tolist()
    novelty = float(prediction["novelty"][0, 0])
    change = 0.0 if cold else float(prediction["change"][0, 0])
    # Where one of them is not finite, neither is their sum.
    if not math.isfinite(sum(predicted) + sum(spread) + novelty + change) or min(spread) <= 0.0:
        return None
    return Signals(
        dict(zip(columns, predicted, strict=True)), dict(zip(columns, spread, strict=True)), novelty, change, cold
    )
