"""What a user may choose about an engine on a GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError

__all__ = ["CUDA_BACKENDS", "CudaOptions", "parse_device"]

CUDA_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
"""What runs modules on a GPU, by the names that users give."""

_DEVICE = re.compile(r"cuda(?::(\d{1,3}))?")


def parse_device(name: str) -> int | None:
    """The number of a GPU by its name; None for the CPU.

    Args:
        name: ``cpu``, ``cuda:N``, or ``cuda`` for the first.

    Raises:
        InputError: If it is no such name.
    """
    if name == "cpu":
        return None
    match = _DEVICE.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise InputError(f"unknown device {name!r}; choose 'cpu' or 'cuda:N', e.g. 'cuda:0'")
    return int(match.group(1) or 0)


@dataclass(frozen=True)
class CudaOptions:
    """Options of an engine on a GPU.

    Attributes:
        graphs: ``"auto"`` replays CUDA graphs where the backend can be captured, and issues call by call where it
            cannot, which is logged and shows in the session's statistics; ``"on"`` raises there; ``"off"`` never
            captures, and binds arrays that are on the GPU already as they are, without a copy.
        outputs: Where answers lie: ``"host"`` in pinned memory as NumPy arrays, ``"device"`` in the GPU's memory as
            arrays that torch, CuPy and others take by DLPack.
        producer_devices: GPUs that producers run on, e.g. ``("cuda:1",)``; empty for the consumer's. Only under
            ``async``.
        engine_cache: Folder of built TensorRT engines; None for the place that `engine_cache.default_folder` says.
        build: Build TensorRT engines that are missing, when the engine is loaded; False raises `BackendError` instead.
        debug: Check before every replay that the graph's buffers are the ones it was captured with.
    """

    graphs: Literal["auto", "on", "off"] = "auto"
    outputs: Literal["host", "device"] = "host"
    producer_devices: tuple[str, ...] = ()
    engine_cache: Path | None = None
    build: bool = True
    debug: bool = False

    def __post_init__(self) -> None:
        if self.graphs not in ("auto", "on", "off"):
            raise InputError(f"unknown graphs {self.graphs!r}; choose 'auto', 'on' or 'off'")
        if self.outputs not in ("host", "device"):
            raise InputError(f"unknown outputs {self.outputs!r}; choose 'host' or 'device'")
        if isinstance(self.producer_devices, str):
            raise InputError(f"producer_devices is {self.producer_devices!r}; give several names, e.g. ('cuda:1',)")
        for name in self.producer_devices:
            if parse_device(name) is None:
                raise InputError("a producer cannot run on 'cpu' beside a consumer on a GPU; name GPUs, e.g. 'cuda:1'")

    @property
    def producer_ordinals(self) -> tuple[int, ...]:
        """The numbers of `producer_devices`."""
        return tuple(parse_device(name) or 0 for name in self.producer_devices)
