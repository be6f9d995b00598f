"""Engines for a bundle: which are missing, built together, and stored where the next process finds them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...kernels.driver import Context
from ..bundle.bundle import Bundle
from ..errors import BackendError, InputError, WarpcacheError
from .builder import BuildRequest, build_engines_isolated
from .engine_cache import EngineCache, EngineKey, graph_digest
from .flavour import Flavour
from .options import BuildOptions

__all__ = [
    "BuiltEngine",
    "Progress",
    "Toolchain",
    "build_engines",
    "check_targets",
    "engine_key",
    "precision_of",
    "without_kernels",
]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told what is worked on, how much is done, and of how much."""


_OLDEST = {"bf16": 80, "fp8": 89}
"""The first architecture that has kernels for a type; TensorRT builds nothing for several if one of them has none."""


@dataclass(frozen=True)
class Toolchain:
    """What engines are built with, and for which GPUs.

    Attributes:
        flavour: The TensorRT that builds and will run them.
        targets: GPUs to build for, e.g. ``("sm_86", "sm_89")``; ``("current",)`` for the one that is here.
        options: What the builder is told.
        device: The number of the GPU that ``"current"`` means.
    """

    flavour: Flavour
    targets: Sequence[str]
    options: BuildOptions = field(default_factory=BuildOptions)
    device: int = 0


@dataclass(frozen=True)
class BuiltEngine:
    """One engine of a bundle, ready to be loaded.

    Attributes:
        module: Which of the bundle's modules it is.
        targets: The GPUs that it was asked for.
        engine: The engine itself.
        path: Its file; None where it could not be stored, or where one that is for more GPUs served.
        digest: `EngineKey.digest`, by which it and what belongs to it are found.
        reused: Whether it was there already.
        seconds: How long the building took; that of all of one call where they were built together.
    """

    module: str
    targets: tuple[str, ...]
    engine: bytes = field(repr=False)
    path: Path | None
    digest: str
    reused: bool
    seconds: float

    @property
    def size_bytes(self) -> int:
        """Size of the engine."""
        return len(self.engine)


def precision_of(bundle: Bundle) -> str:
    """What the bundle's graphs were written in: ``fp32`` unless its manifest says otherwise."""
    record = bundle.manifest.created.get("precision")
    name = record.get("precision") if isinstance(record, dict) else None
    return name if isinstance(name, str) and name else "fp32"


def without_kernels(precision: str, targets: Sequence[str]) -> list[str]:
    """Those of `targets` whose GPUs do not compute in `precision`."""
    oldest = _OLDEST.get(precision, 0)
    return [target for target in targets if int(target.removeprefix("sm_")) < oldest]


def check_targets(precision: str, targets: Sequence[str]) -> None:
    """Refuse targets whose GPUs do not compute in `precision`, before any work is done.

    Raises:
        BackendError: If there are any.
    """
    lacking = without_kernels(precision, targets)
    if lacking:
        raise BackendError(
            f"{precision} does not run on {', '.join(lacking)}: it takes sm_{_OLDEST[precision]} or newer; name other "
            "targets, or take the bundle in fp16"
        )


def engine_key(bundle: Bundle, module: str, toolchain: Toolchain) -> EngineKey:
    """What the engine of one module of a bundle is found by.

    Raises:
        BundleError: If the module's file cannot be read as a graph.
        InputError: As `EngineKey`.
    """
    record = bundle.manifest.modules[module]
    flavour = toolchain.flavour
    extra: dict[str, str] = {}
    if not flavour.ahead_of_time:
        # Its kernels were timed on one model of GPU; another of the same architecture may be faster with others.
        context = Context(toolchain.device)
        extra["gpu"] = context.name
        context.close()
    return EngineKey(
        graph=graph_digest(bundle.file(record.file)),
        inputs=record.inputs,
        outputs=record.outputs,
        precision=precision_of(bundle),
        flavour=flavour.name,
        version=flavour.version,
        targets=tuple(toolchain.targets),
        options={**toolchain.options.as_key(), **extra},
    )


def build_engines(
    bundle: Bundle,
    toolchain: Toolchain,
    cache: EngineCache,
    *,
    modules: Sequence[str] | None = None,
    build: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> list[BuiltEngine]:
    """See to it that the engines of a bundle are in the cache, building those that are missing.

    Building runs in a process of its own: a parser or builder that crashes takes nothing along.

    Args:
        bundle: Where the graphs are.
        toolchain: What builds them, and for which GPUs.
        cache: Where engines are kept.
        modules: Which modules; None is all.
        build: False raises where one is missing.
        progress: Told how far it is.

    Raises:
        BackendError: If TensorRT refuses a graph or a target, a target's GPU does not compute in the bundle's
            precision, an engine is missing that was not to be built, or the builder crashed.
    """
    flavour, device = toolchain.flavour, toolchain.device
    resolved = flavour.resolve(tuple(toolchain.targets), device=device)
    check_targets(precision_of(bundle), resolved)
    toolchain = replace(toolchain, targets=resolved)
    names = sorted(bundle.manifest.modules) if modules is None else list(dict.fromkeys(modules))
    keys = {name: engine_key(bundle, name, toolchain) for name in names}
    built: dict[str, BuiltEngine] = {}

    def take_those_there() -> list[str]:
        """Read what the cache holds, and say what it does not."""
        for name, key in keys.items():
            if name not in built and (engine := cache.find(key)) is not None:
                path = cache.folder / key.file_name
                built[name] = BuiltEngine(
                    name, resolved, engine, path if path.exists() else None, key.digest, True, 0.0
                )
        progress("engines", len(built), len(keys))
        return [name for name in keys if name not in built]

    missing = take_those_there()
    if missing and not build:
        raise BackendError(
            f"the cache {str(cache.folder)!r} holds no {flavour.title} {flavour.version} engine of "
            f"{', '.join(map(repr, missing))} for {', '.join(resolved)}; build them with "
            f"`warpcache build {bundle.path} --backend {flavour.name}`"
        )
    if missing:
        with cache.locked():
            # Another process may have built them while we waited for the lock.
            missing = take_those_there()
            started = time.perf_counter()
            requests = [_request(bundle, name, toolchain) for name in missing]

            def rescue(index: int, engine: bytes) -> None:
                _store(cache, keys[missing[index]], engine)

            made = build_engines_isolated(requests, flavour=flavour, device=device, rescue=rescue) if requests else []
            seconds = time.perf_counter() - started
            for name, engine in zip(missing, made, strict=True):
                if isinstance(engine, WarpcacheError):
                    continue
                built[name] = BuiltEngine(
                    name, resolved, engine, _store(cache, keys[name], engine), keys[name].digest, False, seconds
                )
            # Those that were built are kept all the same.
            for engine in made:
                if isinstance(engine, WarpcacheError):
                    raise engine
    progress("engines", len(keys), len(keys))
    return [built[name] for name in keys]


def _store(cache: EngineCache, key: EngineKey, engine: bytes) -> Path | None:
    try:
        return cache.store(key, engine)
    except InputError as exc:
        logger.warning("%s; the engine serves this process only", exc)
        return None


def _request(bundle: Bundle, name: str, toolchain: Toolchain) -> BuildRequest:
    record = bundle.manifest.modules[name]
    return BuildRequest(
        path=bundle.file(record.file),
        name=name,
        inputs=record.inputs,
        outputs=record.outputs,
        targets=tuple(toolchain.targets),
        options=toolchain.options,
    )
