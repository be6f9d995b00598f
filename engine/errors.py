"""The project's exceptions, split by what the caller can do about them.

    WarpcacheError
    ├── InputError        the data or an argument given is wrong: mend it and call again
    ├── BundleError       the bundle on disk is damaged, altered, foreign or of another version
    ├── ExportError       the model cannot be traced, cut or compiled as asked
    ├── BackendError      an executor (ONNX Runtime, TensorRT) is missing, or failed in a module
    │   └── DeviceError   a GPU, its driver or its memory: missing, too old, used up, or failed in a call
    ├── DeadlineError     a frame was not answered in time
    └── ClosedError       the engine or session was used after close()

Every message is one sentence: what was wrong, with which value, and what to do.
"""

from __future__ import annotations

from ..kernels.errors import BackendError, DeviceError, InputError, WarpcacheError

__all__ = [
    "BackendError",
    "BundleError",
    "ClosedError",
    "DeadlineError",
    "DeviceError",
    "ExportError",
    "InputError",
    "WarpcacheError",
]


class BundleError(WarpcacheError):
    """The bundle is damaged, altered, foreign or of an unknown version; nothing of it was executed."""


class ExportError(WarpcacheError):
    """The model cannot be traced, cut or compiled as asked."""


class DeadlineError(WarpcacheError):
    """A frame was not answered in time."""


class ClosedError(WarpcacheError):
    """The engine or session was used after it was closed."""
