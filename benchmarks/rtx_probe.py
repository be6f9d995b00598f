"""Whether TensorRT-RTX takes the GPU that is here: asked by its name, and by an engine that is loaded there."""

from __future__ import annotations

import re
import tempfile
from contextlib import closing
from pathlib import Path

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.cuda.device import CudaDevice
from warpcache.engine.errors import BackendError, DeviceError
from warpcache.engine.tensorrt.engine_cache import EngineCache
from warpcache.engine.tensorrt.engines import Toolchain, build_engines
from warpcache.engine.tensorrt.flavour import Flavour
from warpcache.engine.tensorrt.module import TensorRtModule

__all__ = ["probe_rtx"]

_MODULE = Role.PLAIN.value


def probe_rtx(bundle: Bundle, ordinal: int) -> list[str]:
    """What the library says to this GPU, in sentences.

    One engine is built ahead of time, for this GPU where the library knows it, else for the newest that is not newer,
    and loaded here.

    Raises:
        BackendError: If the library builds no engine at all.
        DeviceError: If there is no GPU.
    """
    with closing(CudaDevice(ordinal)) as device:
        here = f"{device.context.name} ({device.architecture})"
        try:
            flavour = Flavour.load("tensorrt-rtx")
        except BackendError as exc:
            return [f"TensorRT-RTX was not probed on {here}: {exc}"]
        known = device.architecture in flavour.targets
        said = "has code for" if known else "names no code for"
        notes = [f"TensorRT-RTX {flavour.version} {said} {here}; it knows {', '.join(flavour.targets)}"]
        target = device.architecture if known else _nearest(device.architecture, flavour.targets)
        with tempfile.TemporaryDirectory() as folder:
            cache = EngineCache(Path(folder))
            (built,) = build_engines(bundle, Toolchain(flavour, (target,)), cache, modules=[_MODULE])
            record = bundle.manifest.modules[_MODULE]
            try:
                with closing(
                    TensorRtModule(
                        built.engine,
                        name=_MODULE,
                        inputs=record.inputs,
                        outputs=record.outputs,
                        flavour=flavour,
                        device=device,
                    )
                ):
                    notes.append(f"an engine built for {target} loads here")
            except (BackendError, DeviceError) as exc:
                notes.append(f"an engine built for {target} does not load here: {' '.join(str(exc).split())}")
    return notes


def _nearest(architecture: str, targets: tuple[str, ...]) -> str:
    """The newest of `targets` that is not newer than `architecture`, else the oldest."""

    def number(name: str) -> int:
        return int(re.sub(r"\D", "", name))

    older = [target for target in targets if number(target) <= number(architecture)]
    return max(older, key=number) if older else min(targets, key=number)
