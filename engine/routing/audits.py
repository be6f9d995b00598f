"""One session's audits on the device: what an answer was kept for, the whole generator's run, and the comparison.

Notes to developers. An audit takes three steps on three occasions. With the answer at hand, the reader's thread copies
inputs and picture (`offer`). When it comes back for the next frame, it queues the whole generator in the background
(`begin`), so that queueing is no part of any answer. On the background stream's thread, when the generator has ended,
the two pictures are compared, and the result goes into the log under the session's lock. There is at most one audit at
a time, which is why the workspace has memory for one. Frames that name a confidence of their own have a log of their
own: how many misses are chance differs, and what one promise's misses ask for is not asked of another.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..bundle.roles import Role
from ..device.placement import Workspace
from ..device.stream import Event
from ..errors import BackendError
from ..promise.calibration import Rule
from ..spec import Array
from ..telemetry import Telemetry
from .audit_log import AuditLog
from .plan import RoutingPlan

__all__ = ["Auditing"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Audit:
    """An answer that is going to be compared; the arrays are the workspace's own."""

    frame: int
    group: int
    rule: Rule
    log: AuditLog
    expected: tuple[float, float]
    inputs: dict[str, Any]
    picture: Array


class Auditing:
    """Audits the answers of one session.

    Args:
        plan: How often, and what is compared how.
        workspace: Where the copies lie and the whole generator runs.
        telemetry: The session's counters.
        lock: The session's lock; results are taken in under it.
    """

    def __init__(
        self, plan: RoutingPlan, workspace: Workspace, *, telemetry: Telemetry, lock: threading.Condition
    ) -> None:
        self._plan = plan
        self._workspace = workspace
        self._telemetry = telemetry
        self._lock = lock
        self._logs: dict[float, AuditLog] = {}  # by confidence
        self._kept: _Audit | None = None
        self._ended = threading.Event()  # set while no audit runs
        self._ended.set()
        self._closed = False

    def tightening(self, group: int, rule: Rule) -> float:
        """Spreads to add to the rule's margin at an age; 0 is without a cache."""
        with self._lock:
            return self._log_of(rule).tightening(group)

    def offer(
        self,
        frame: int,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        *,
        group: int,
        rule: Rule,
        expected: tuple[float, float] | None,
    ) -> None:
        """An answer is there: keep what an audit of it needs, where one is due. Runs nothing and waits for nothing.

        Args:
            frame: Its frame.
            inputs: The frame's inputs.
            outputs: The answer.
            group: Age of the cache that the rule went by; 0 without.
            rule: What was promised.
            expected: The score that the predictor expects of the answer, and its spread; None for an exact exit, which
                needs no audit: it is a hit, and the promise is over all frames.
        """
        with self._lock:
            log = self._log_of(rule)
            if self._closed or any(log.in_flight is not None for log in self._logs.values()) or not log.due(frame):
                return
            log.started(frame)
            if expected is None:
                log.finished(frame, group, False)
                self._count(missed=False)
                return
        try:
            kept, picture = self._workspace.keep_for_audit(inputs, outputs[self._plan.image])
        except Exception as exc:
            self._failed(log, frame, exc)
        except BaseException:
            self._forget(log, frame)
            raise
        else:
            self._kept = _Audit(frame, group, rule, log, expected, kept, picture)

    def begin(self) -> None:
        """Queue the audit that is due, if any; the frame's answer is out."""
        audit, self._kept = self._kept, None
        if audit is None:
            return
        self._ended.clear()
        try:
            lane = self._workspace.lane(Role.WHOLE)
            outputs = lane.take_outputs()
            event = lane.enqueue(audit.inputs, None, outputs)
        except Exception as exc:
            self._failed(audit.log, audit.frame, exc)
            self._ended.set()
        except BaseException:
            # An interrupt goes on to the caller, but nobody may wait for this audit for ever.
            self._forget(audit.log, audit.frame)
            self._ended.set()
            raise
        else:
            event.add_done_callback(lambda event: self._compare(audit, outputs, event))

    def wait(self) -> None:
        """Wait for the audit that runs, if any."""
        self._ended.wait()

    def close(self) -> None:
        """Forget what was kept, and let what runs end unheard; safe to call twice and from any thread."""
        with self._lock:
            self._closed = True
            self._kept = None
        self._ended.set()

    def _compare(self, audit: _Audit, outputs: Mapping[str, Array], event: Event) -> None:
        """The whole generator has ended; runs on its stream's thread."""
        log = audit.log
        try:
            if self._closed:
                return
            if event.error is not None:
                raise event.error
            score = self._plan.score(audit.picture, outputs[self._plan.image])
            if not math.isfinite(score):
                raise BackendError(f"the whole generator's answer to frame {audit.frame} is not finite")
            excess = score - audit.rule.quality.score
            predicted, spread = audit.expected
            beyond = audit.rule.beyond(score, predicted, spread)
            with self._lock:
                if self._closed:
                    return
                log.finished(audit.frame, audit.group, excess > 0.0, excess, spread, beyond=beyond)
                warning = log.take_warning()
                self._count(missed=excess > 0.0)
            if warning is not None:
                logger.warning("%s", warning)
        # Nobody waits here who could be told otherwise, and an audit must not cost a frame.
        except BaseException as exc:
            self._failed(log, audit.frame, exc)
        finally:
            self._ended.set()

    def _log_of(self, rule: Rule) -> AuditLog:
        """The log of the rule's confidence; the lock is held."""
        confidence = rule.quality.confidence
        log = self._logs.get(confidence)
        if log is None:
            log = self._logs[confidence] = AuditLog(self._plan.audit_every, confidence)
        return log

    def _count(self, *, missed: bool) -> None:
        logs = self._logs.values()
        self._telemetry.audited(
            missed=missed,
            drifts=sum(log.drifts for log in logs),
            tightening=max(log.tightening() for log in logs),
        )

    def _forget(self, log: AuditLog, frame: int) -> None:
        """An audit ends without a result."""
        with self._lock:
            if not self._closed and log.in_flight == frame:
                log.abandoned(frame)

    def _failed(self, log: AuditLog, frame: int, error: BaseException) -> None:
        if self._closed:
            return
        self._forget(log, frame)
        if self._telemetry.audit_failed() == 1:
            logger.warning(
                "the audit of frame %d failed; frames are answered without it (further failures are counted in the "
                "session's statistics)",
                frame,
                exc_info=error,
            )
