"""TensorRT by name, with engines from the engine cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..bundle.bundle import Bundle
from ..cuda.device import CudaDevice
from ..device.module import Module, ModuleFile, Site
from .engine_cache import EngineCache, default_folder
from .engines import Toolchain, build_engines
from .flavour import CURRENT, Flavour
from .module import TensorRtModule

__all__ = ["TensorRtBackend"]

logger = logging.getLogger(__name__)


class TensorRtBackend:
    """TensorRT in either flavour, with engines from the engine cache.

    Args:
        flavour: Which TensorRT.
        engine_cache: Folder of built engines; None for `default_folder` of the bundle.
        build: Build engines that are missing, when they are prepared; False raises instead.
    """

    def __init__(self, flavour: Flavour, *, engine_cache: Path | None = None, build: bool = True) -> None:
        self.name: str = flavour.name
        self._flavour = flavour
        self._folder = engine_cache
        self._build = build
        self._engines: dict[tuple[str, str], bytes] = {}
        self._runtime_caches: dict[tuple[str, str], Path] = {}

    def prepare(self, bundle: Bundle, modules: Sequence[str], devices: Sequence[CudaDevice]) -> None:
        """Find or build the engines of `modules` for the GPUs of `devices`."""
        cache = EngineCache(default_folder(bundle.path) if self._folder is None else self._folder)
        for architecture, device in {device.architecture: device for device in devices}.items():
            # Full TensorRT builds for the current GPU only, so a second architecture is built with that GPU current.
            device.context.make_current()
            for built in build_engines(
                bundle,
                Toolchain(self._flavour, (CURRENT,), device=device.ordinal),
                cache,
                modules=modules,
                build=self._build,
            ):
                self._engines[architecture, built.module] = built.engine
                self._runtime_caches[architecture, built.module] = cache.folder / (
                    f"{built.digest}-{architecture}.runtime"
                )
                logger.info("engine of %r for %s: %s", built.module, architecture, "found" if built.reused else "built")

    def load(self, module: ModuleFile, site: Site) -> Module:
        """Load one engine; `prepare` has seen to it that it is there."""
        device: CudaDevice = site.stream.device
        key = device.architecture, module.name
        return TensorRtModule(
            self._engines[key],
            name=module.name,
            inputs=module.inputs,
            outputs=module.outputs,
            flavour=self._flavour,
            device=device,
            runtime_cache=self._runtime_caches[key],
        )
