"""What a quality comes to on a device: which exits, which rule, what they cost here, and how answers are audited."""

from __future__ import annotations

import math
import numbers
import os
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.roles import Role
from ..device.placement import Placement
from ..errors import InputError
from ..metrics.images import Lpips, measure
from ..metrics.lpips import LPIPS_VARIABLE
from ..promise.calibration import Calibration, PromiseRecord, Quality, Rule, to_score
from ..schedule.policy import Policy
from ..spec import Array
from .exit_costs import measure_exit_costs
from .router import ExitRoles

__all__ = ["RoutingPlan", "checked_audit_every", "checked_deadline", "checked_quality"]

_KEPT_RULES = 64


class RoutingPlan:
    """A quality that an engine keeps, checked against its bundle before anything is loaded.

    Args:
        bundle: What promises it.
        quality: What every frame is to keep, unless it has a quality of its own.
        deadline_ms: Milliseconds from a frame's arrival that its answer may take; None sets no limit.
        audit_every: Every how many frames an answer is audited; 0 never.
        lpips: Weights of LPIPS, needed for audits in that metric; None looks at WARPCACHE_LPIPS.
        policy: When producers run; under ``full`` there is no cache, so that only exits without one count.
        max_age: The oldest cache to answer from, in frames; None is whatever is calibrated.

    Raises:
        InputError: If the bundle promises nothing, or not this, or audits cannot be measured.
        BundleError: If the promise's record or file is damaged.
    """

    def __init__(
        self,
        bundle: Bundle,
        quality: Quality,
        *,
        deadline_ms: float | None,
        audit_every: int,
        lpips: str | Path | None,
        policy: Policy,
        max_age: int | None,
    ) -> None:
        manifest = bundle.manifest
        calibration = Calibration.read(bundle)
        record = PromiseRecord.of(manifest)
        assert record is not None, "a bundle with a calibration has a promise"
        self.metric = record.metric
        self.deadline_ms = deadline_ms
        self.audit_every = audit_every
        self.max_age = max_age
        self.waits_for_audits = policy.deterministic
        self.rule_for: Callable[[Quality], Rule] = lru_cache(maxsize=_KEPT_RULES)(calibration.rule)
        self.rule = self.rule_for(quality)
        self.has_cache = policy.uses_cache
        self.columns = record.exits if self.has_cache and record.ages else ()
        self.cold_columns = record.cold_exits
        promised = record.exits if self.has_cache else record.cold_exits
        if not promised:
            raise InputError(
                f"policy 'full' makes no cache, and bundle {manifest.name!r} has no exit but the whole generator that "
                "needs none; choose another policy"
            )
        exact = manifest.exits_of(*((Role.PLAIN, Role.WHOLE) if self.has_cache else (Role.WHOLE,)))
        self.exits: tuple[str, ...] = (*promised, *(record.name for record in reversed(exact)))
        self.predictors = tuple(
            role
            for role, columns in ((Role.PREDICTOR, self.columns), (Role.PREDICTOR_COLD, self.cold_columns))
            if columns
        )
        whole = manifest.exact_exit
        assert whole is not None, "a promise is kept against the whole generator"
        consumers = frozenset(name for name in promised if manifest.reads_cache(name))
        self.roles = ExitRoles(whole, manifest.plain_exit if self.has_cache else None, consumers)
        self.costs: dict[str, float] = {}
        self.image = manifest.image_output or ""
        self._bundle = bundle
        self._network: Lpips | None = None
        if audit_every:
            self._prepare_audits(lpips)

    def measure(self, placement: Placement, *, slots: int, turn: threading.Lock) -> None:
        """Time every exit on zeros, in the memory of a session of its own that ends with this call.

        Args:
            placement: Where the exits are loaded.
            slots: Cache slots of a session.
            turn: Held while the consumer's stream is used.

        Raises:
            InputError: If no exit is done by the deadline.
        """
        workspace = placement.workspace(slots)
        try:
            inputs = {
                record.spec.name: workspace.take_input(
                    record.spec, np.zeros(record.spec.shape, record.spec.dtype), finite=False, keep=True
                )
                for record in self._bundle.manifest.inputs
            }

            def run(name: str) -> None:
                lane = workspace.exit(name)
                outputs = lane.take_outputs()
                with turn:
                    lane.enqueue(inputs, 0 if self.has_cache else None, outputs).wait()

            self.costs = measure_exit_costs(run, self.exits, time.perf_counter)
        finally:
            workspace.close()
        cheapest = min(self.costs, key=self.costs.__getitem__)
        if self.deadline_ms is not None and self.deadline_ms < self.costs[cheapest]:
            raise InputError(
                f"deadline_ms is {self.deadline_ms:g}, but the cheapest exit, {cheapest!r}, takes "
                f"{self.costs[cheapest]:.3g} ms on {placement.name}; give a later deadline or a cheaper bundle"
            )

    def score(self, answer: Array, whole: Array) -> float:
        """How far an answer is from the whole generator's, as a score.

        Args:
            answer: The answer's image, float32 [1, C, H, W] in [-1, 1].
            whole: The whole generator's, alike.
        """
        value = measure(answer[0], whole[0], (self.metric,), lpips=self._network)[self.metric]
        return float(to_score(self.metric, value))

    def _prepare_audits(self, lpips: str | Path | None) -> None:
        """See to it that an audit can be measured, before the first frame is answered."""
        if not self.image:
            raise InputError(
                f"bundle {self._bundle.manifest.name!r} names no output that is a picture, so that answers cannot be "
                "audited; give audit_every=0"
            )
        if self.metric == "lpips":
            if lpips is None and not os.environ.get(LPIPS_VARIABLE):
                raise InputError(
                    "audits compare in LPIPS, whose weights are nowhere named; give lpips= (--lpips), set "
                    f"{LPIPS_VARIABLE}, or give audit_every=0 (--audit-every 0)"
                )
            self._network = Lpips.load(lpips)
        spec = next(spec for spec in self._bundle.manifest.outputs if spec.name == self.image)
        # Whatever stands in the way (a package that is missing, a picture that is too small) is said here, not later.
        nothing = np.zeros(spec.shape, np.float32)
        self.score(nothing, nothing)


def checked_quality(quality: object) -> Quality:
    """`quality`, which must be one.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(quality, Quality):
        raise InputError(f"quality is {quality!r}; give a Quality, for example Quality('lpips', 0.1, confidence=0.95)")
    return quality


def checked_deadline(deadline_ms: object) -> float:
    """`deadline_ms` as a number.

    Raises:
        InputError: If it is not one, not finite, or not above 0.
    """
    known = isinstance(deadline_ms, numbers.Real) and not isinstance(deadline_ms, bool)
    if not known or not math.isfinite(value := float(deadline_ms)) or value <= 0:  # type: ignore[arg-type]
        raise InputError(f"deadline_ms is {deadline_ms!r}; give a positive finite number of milliseconds")
    return value


def checked_audit_every(audit_every: object) -> int:
    """`audit_every` as a number of frames.

    Raises:
        InputError: If it is not a whole number of at least 0.
    """
    if not isinstance(audit_every, int) or isinstance(audit_every, bool) or audit_every < 0:
        raise InputError(f"audit_every is {audit_every!r}; give a number of frames, or 0 for no audits")
    return audit_every
