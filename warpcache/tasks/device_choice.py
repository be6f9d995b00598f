"""Where a command runs a bundle and by what, as the user chose it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import click

from .options import checked_device, option

__all__ = ["CPU", "DeviceChoice"]


@dataclass(frozen=True)
class DeviceChoice:
    """A device, what executes there, and how; the engine checks it.

    Attributes:
        device: ``cpu`` or ``cuda:N``.
        backend: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        graphs: Whether CUDA graphs are replayed; None leaves it to the engine.
        producer_devices: GPUs that producers run on; empty for the consumer's.
    """

    device: str = option("--device", "Where to run.", default="cpu", metavar="cpu|cuda:N", callback=checked_device)
    backend: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"] = option(
        "--backend", "What executes the graphs; the TensorRTs on a GPU only.", default="onnxruntime"
    )
    graphs: Literal["auto", "on", "off"] | None = option(
        "--graphs", "Replay CUDA graphs; default on a GPU: auto, where the backend can be captured.", default=None
    )
    producer_devices: tuple[str, ...] = option(
        "--producer-device",
        "Repeatable; a GPU that producers run on under async; default: the consumer's.",
        default=(),
        metavar="cuda:N",
        callback=checked_device,
    )

    def settled(self) -> DeviceChoice:
        """Refuse what is for a GPU on the CPU.

        Not left to the engine: the policies of a benchmark that run first do without producers beside them.

        Raises:
            click.UsageError: If it is given.
        """
        for name, value in (("--graphs", self.graphs), ("--producer-device", self.producer_devices)):
            if self.device == "cpu" and value:
                raise click.UsageError(f"{name} is for a GPU, but the device is the CPU; name one by --device cuda:N")
        return self

    def for_engine(self) -> dict[str, Any]:
        """The keywords of `Engine` that say the same.

        Raises:
            InputError: If an option is wrong.
        """
        from ..engine.cuda.options import CudaOptions, parse_device

        cuda = None
        # What was asked for a GPU is handed on for the CPU too, so that the engine refuses it.
        if parse_device(self.device) is not None or self.graphs is not None or self.producer_devices:
            cuda = CudaOptions(graphs=self.graphs or "auto", producer_devices=self.producer_devices)
        return {"device": self.device, "backend": self.backend, "cuda": cuda}

    def without_producers(self) -> DeviceChoice:
        """The same choice with producers on the consumer's GPU, where a policy has none that run beside it."""
        return replace(self, producer_devices=())

    def facts(self) -> dict[str, Any]:
        """What a record of measurements says of the GPUs and their driver; empty on the CPU.

        Raises:
            DeviceError: If a GPU or the driver is missing.
        """
        from ..engine.cuda.options import parse_device

        ordinals = [parse_device(name) for name in (self.device, *self.producer_devices)]
        found = [ordinal for ordinal in ordinals if ordinal is not None]
        if not found:
            return {}
        from ..engine.cuda.gpu_facts import gpu_facts

        return gpu_facts(found)


CPU = DeviceChoice()
"""Where everything runs unless told otherwise."""
