"""A bundle loaded on a device. Frames go through sessions, which own what changes."""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from .backends import choose_backend
from .bundle.bundle import Bundle
from .bundle.manifest import Manifest
from .bundle.roles import Role, Route
from .cpu.placement import CpuPlacement
from .cuda.options import CudaOptions, parse_device
from .device.module import Backend
from .device.placement import Placement, Wanted
from .errors import ClosedError, InputError
from .promise.calibration import Quality, Rule
from .routing.plan import RoutingPlan, checked_audit_every, checked_deadline, checked_quality
from .schedule.events import Answering, OnStale
from .schedule.policy import Policy
from .schedule.scheduler import Scheduler
from .session.clock import Clock
from .session.parts import SessionParts
from .session.session import Session

__all__ = ["Backend", "Engine"]


class Engine:
    """A bundle, ready to answer frames.

    Several sessions may share an engine: their frames take turns, and nothing of one shows in another.

    Args:
        bundle: Path of a bundle's folder, or an open `Bundle`.
        policy: When producers run: ``"full"``, ``"every:N"`` or ``"async"`` (see `Policy`).
        age: Deterministic lockstep: frame t is answered from the cache of frame max(0, t - age). Goes with no policy
            but the default.
        exit: Which exit answers from an aged cache: ``"warp"``, ``"plain"`` or another of the bundle's; None takes
            ``warp`` where the bundle has it. At age 0 ``plain`` answers, which is exact there.
        threads: Cores to use; None uses all that the process may. Under ``async`` they are shared out between
            consumer and producers, else every module uses all of them, one at a time.
        max_age: The oldest cache to answer from, in frames; None sets no limit.
        on_stale: Without a young enough cache, ``"whole"`` lets the whole generator answer, ``"raise"`` raises
            `DeadlineError` for the frame.
        validate: Refuse NaN and Inf in every frame's inputs. Names, dtypes and shapes are always checked.
        producers: Producer streams under ``async``, each with a copy of the producer's weights.
        device: ``"cpu"``, or a GPU: ``"cuda:0"``.
        backend: What executes the graphs: ``"onnxruntime"``, and on a GPU ``"tensorrt"`` or ``"tensorrt-rtx"``. What is
            asked for runs, or an error says why not. Or an object of one's own, a `Backend`.
        cuda: Options of a GPU; goes with such a device only.
        quality: What every frame is to keep: it is answered by the cheapest exit that does, so that no exit is to be
            chosen. None: nothing is promised. `Session.submit` takes another for a single frame.
        deadline_ms: With a quality, milliseconds from a frame's arrival that its answer may take. Where no exit that
            keeps the quality is done by then, a worse one answers, or the frame is dropped (`Frame.degraded`).
        audit_every: With a quality, one frame in so many is answered by the whole generator too, in the background, to
            compare; 0 never.
        lpips: Weights of LPIPS, where audits compare in it; None looks at WARPCACHE_LPIPS.

    Raises:
        InputError: If an option is wrong, two of them exclude each other, or the bundle cannot promise the quality.
        BundleError: If the bundle is damaged or foreign; nothing of it was executed.
        BackendError: If there is no executor, or it refuses a graph.
        DeviceError: If the GPU or its driver is missing, too old, or out of memory.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        policy: str | Policy = "async",
        age: int | None = None,
        exit: Route | None = None,
        threads: int | None = None,
        max_age: int | None = None,
        on_stale: OnStale = "whole",
        validate: bool = True,
        producers: int = 1,
        device: str = "cpu",
        backend: str | Backend = "onnxruntime",
        cuda: CudaOptions | None = None,
        quality: Quality | None = None,
        deadline_ms: float | None = None,
        audit_every: int = 30,
        lpips: str | Path | None = None,
    ) -> None:
        self.policy = Policy.choose(policy, age)
        self._validate = validate
        self._turn = threading.Lock()
        ordinal = parse_device(device)
        options = CudaOptions() if cuda is None else cuda
        if ordinal is None and cuda is not None:
            raise InputError("options for a GPU were given for device 'cpu'; leave them out, or choose e.g. 'cuda:0'")
        if ordinal is not None and threads is not None:
            raise InputError(f"threads are the CPU's, but the device is {device!r}; leave them out")
        producers = max(producers, len(options.producer_ordinals))
        self._producer_count = 1 if self.policy.foreground else producers
        self._closed = False
        self._closing = threading.Lock()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        # Whatever needs neither a device nor a file is checked first.
        self._check_options(producers, max_age)
        _check_promise_options(quality, deadline_ms, audit_every, exit=exit, on_stale=on_stale)
        Scheduler(self.policy, Answering(max_age=max_age, on_stale=on_stale))
        self._bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self._answering = self._choose_answering(exit, max_age, on_stale, routed=quality is not None)
        self._new_scheduler()  # its own checks, before anything is loaded
        self._plan = self._plan_routing(quality, deadline_ms, audit_every, lpips)
        chosen = choose_backend(backend, None if ordinal is None else options) if isinstance(backend, str) else backend
        self._placement = self._place(ordinal, threads, chosen, options)
        planned = self._plan_exits()
        # What a frame has to bring: motion only where a module that is going to run takes it.
        self.required_inputs = self._find_required_inputs(planned)
        with ExitStack() as undo:
            undo.callback(self._placement.close)
            if self._plan is None:
                self._placement.load(Wanted(planned))
            else:
                self._placement.load(Wanted(planned, self._plan.predictors, auditor=self._plan.audit_every > 0))
                self._plan.measure(self._placement, slots=self._new_scheduler().slots, turn=self._turn)
            undo.pop_all()

    @property
    def placement(self) -> str:
        """Where it runs and by what: ``cpu/onnxruntime``, ``cuda:0/tensorrt-rtx``."""
        return self._placement.name

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self._bundle.manifest

    @property
    def exit_costs(self) -> dict[str, float]:
        """What every exit took when the engine was loaded, in milliseconds; empty without a quality."""
        return {} if self._plan is None else dict(self._plan.costs)

    def session(self, *, clock: Clock | None = None) -> Session:
        """Open a session: one client's sequence of frames, with caches of its own.

        Args:
            clock: Where the session takes its time from; None is the machine's monotonic clock.

        Raises:
            ClosedError: If the engine is closed.
        """
        with self._closing:
            self._require_open()
            session = Session(self._session_parts(), clock=clock)
            self._sessions.add(session)
            return session

    def synchronize(self) -> None:
        """Wait until every producer that was started has ended; what they raised is in their sessions' statistics."""
        self._placement.synchronize()

    def close(self) -> None:
        """Close the sessions, wait for the producers that run, and unload the modules. Safe to call twice."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            sessions = list(self._sessions)
        for session in sessions:
            session.close()
        self._placement.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _session_parts(self) -> SessionParts:
        """What one session needs of the engine."""
        scheduler = self._new_scheduler()
        return SessionParts(
            scheduler=scheduler,
            workspace=self._placement.workspace(scheduler.slots),
            specs={record.spec.name: record.spec for record in self.manifest.inputs},
            required=self.required_inputs,
            plan=self._plan,
            turn=self._turn,
            validate=self._validate,
            rule_for=self._rule_for,
            frame_deadline=self._frame_deadline,
        )

    def _new_scheduler(self) -> Scheduler:
        """A scheduler for one session. A producer stream with cores of its own counts as a device."""
        return Scheduler(self.policy, self._answering, devices=self._producer_count)

    def _rule_for(self, quality: Quality) -> Rule:
        """The rule of a single frame's quality; made once, then looked up."""
        if self._plan is None:
            raise InputError(
                "a frame came with a quality, but the engine has none; give Engine a quality to load exits for"
            )
        return self._plan.rule_for(checked_quality(quality))

    def _frame_deadline(self, deadline_ms: float) -> float:
        """A single frame's deadline, checked."""
        if self._plan is None:
            raise InputError("a frame came with a deadline, but the engine has no quality; give Engine a quality too")
        return checked_deadline(deadline_ms)

    # Loading

    def _place(self, ordinal: int | None, threads: int | None, backend: Backend, options: CudaOptions) -> Placement:
        """What the bundle is going to run on; nothing is loaded yet."""
        if ordinal is None:
            return CpuPlacement(
                self._bundle,
                policy=self.policy,
                producers=self._producer_count,
                threads=threads,
                backend=backend,
            )
        # CUDA is imported only where it is asked for.
        from .cuda.placement import CudaPlacement

        return CudaPlacement(
            self._bundle,
            policy=self.policy,
            producers=self._producer_count,
            ordinal=ordinal,
            backend=backend,
            options=options,
            turn=self._turn,
        )

    def _check_options(self, producers: int, max_age: int | None) -> None:
        if producers < 1:
            raise InputError(f"producers is {producers}; give 1 or more")
        planned = self.policy.oldest_planned_age
        if max_age is not None and planned is not None and planned > max_age:
            raise InputError(
                f"policy '{self.policy}' plans for ages up to {planned}, above max_age {max_age}; change one"
            )

    def _choose_answering(
        self, exit_: Route | None, max_age: int | None, on_stale: OnStale, *, routed: bool
    ) -> Answering:
        """Which exits of the bundle answer, checked against the policy."""
        manifest = self.manifest
        whole, plain = manifest.exact_exit, manifest.plain_exit
        stateful = bool(manifest.state)
        if exit_ is None:
            # The costliest consumer is the best one; without any the generator's own remaining layers serve.
            consumers = sorted(manifest.exits_of(Role.WARP), key=lambda record: record.cost_ratio)
            aged = consumers[-1].name if consumers else plain or ""
        else:
            aged = exit_
            if not manifest.reads_cache(aged) and manifest.role_of(aged) is not Role.BRANCH:
                raise InputError(
                    f"exit {aged!r} reads no cache; choose another, or policy='full' for the whole generator"
                )
        if self.policy.uses_cache and (manifest.module_of(Role.PRODUCER) is None or not aged):
            raise InputError(
                f"bundle {manifest.name!r} has no producer and no exit that reads a cache, which policy "
                f"'{self.policy}' needs; choose policy='full'"
            )
        if not self.policy.uses_cache and whole is None:
            raise InputError(
                f"bundle {manifest.name!r} has no exit that is the whole generator, which policy 'full' answers with; "
                "choose another policy"
            )
        if stateful and routed:
            raise InputError(
                f"bundle {manifest.name!r} carries state, and a quality chooses between exits that cannot all follow "
                "it; leave the quality out"
            )
        return Answering(whole, plain, aged, max_age, on_stale, routed, stateful)

    def _plan_exits(self) -> tuple[Route, ...]:
        """The exits that the policy itself uses, and with a quality all that may be chosen."""
        answering = self._answering
        if self._plan is not None:
            return self._plan.exits
        if not self.policy.uses_cache:
            return () if answering.whole is None else (answering.whole,)
        exits = [] if answering.plain is None else [answering.plain]
        if answering.aged not in exits and self.policy.oldest_planned_age != 0:
            exits.append(answering.aged)
        # Asked for by an age limit, so part of the plan; otherwise only a failing producer needs it.
        asked_for = answering.max_age is not None and not self.policy.foreground
        falls_back = answering.on_stale != "raise" and not answering.stateful
        if answering.whole is not None and falls_back and (asked_for or self._placement.loads_ahead):
            exits.append(answering.whole)
        return tuple(exits)

    def _plan_routing(
        self, quality: Quality | None, deadline_ms: float | None, audit_every: int, lpips: str | Path | None
    ) -> RoutingPlan | None:
        if quality is None:
            return None
        return RoutingPlan(
            self._bundle,
            quality,
            deadline_ms=deadline_ms,
            audit_every=audit_every,
            lpips=lpips,
            policy=self.policy,
            max_age=self._answering.max_age,
        )

    def _find_required_inputs(self, planned: tuple[Route, ...]) -> frozenset[str]:
        """The generator's inputs, and motion where a module that is going to run takes it."""
        manifest = self.manifest
        read = [spec for route in planned for spec in manifest.exit_inputs(route)]
        roles = [] if self._plan is None else list(self._plan.predictors)
        if self.policy.uses_cache:
            roles.append(Role.PRODUCER)
        for role in roles:
            if (name := manifest.module_of(role)) is not None:
                read.extend(manifest.modules[name].inputs)
        taken = {spec.name for spec in read}
        return frozenset(
            [spec.name for spec in manifest.generator_inputs]
            + [spec.name for spec in manifest.motion_inputs if spec.name in taken]
        )

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed; open a new one")


def _check_promise_options(
    quality: Quality | None, deadline_ms: float | None, audit_every: int, *, exit: Route | None, on_stale: OnStale
) -> None:
    """Validate what belongs to a quality without touching a device or a file."""
    checked_audit_every(audit_every)
    if deadline_ms is not None:
        checked_deadline(deadline_ms)
    if quality is None:
        if deadline_ms is not None:
            raise InputError(
                f"deadline_ms is {deadline_ms} and there is no quality to weigh against it; give a quality too"
            )
        return
    checked_quality(quality)
    if exit is not None:
        raise InputError(f"exit {exit!r} and quality {quality} exclude each other: the quality chooses; give one")
    if on_stale == "raise":
        raise InputError(
            "on_stale='raise' and a quality exclude each other: without a young cache exits that need none answer; "
            "leave it out"
        )
