"""Runtime: bundles, modules, devices, caches, scheduler, sessions. Never imports torch."""

from __future__ import annotations

from .bundle.bundle import Bundle
from .bundle.manifest import Manifest
from .bundle.write import write_bundle
from .cuda.options import CudaOptions
from .engine import Engine
from .errors import (
    BackendError,
    BundleError,
    ClosedError,
    DeadlineError,
    DeviceError,
    ExportError,
    InputError,
    WarpcacheError,
)
from .promise.calibration import Quality
from .schedule.policy import Policy
from .session.frame import Frame
from .session.session import Session
from .spec import Array, TensorSpec
from .telemetry import LatencySummary, SessionStatistics

__all__ = [
    "Array",
    "BackendError",
    "Bundle",
    "BundleError",
    "ClosedError",
    "CudaOptions",
    "DeadlineError",
    "DeviceError",
    "Engine",
    "ExportError",
    "Frame",
    "InputError",
    "LatencySummary",
    "Manifest",
    "Policy",
    "Quality",
    "Session",
    "SessionStatistics",
    "TensorSpec",
    "WarpcacheError",
    "write_bundle",
]
