"""A heavy image generator, answered at a shallow network's latency."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout that is not installed, the sibling folders are the subpackages (see setup.py).
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from .engine import (
        BackendError,
        Bundle,
        BundleError,
        ClosedError,
        CudaOptions,
        DeadlineError,
        DeviceError,
        Engine,
        ExportError,
        Frame,
        InputError,
        Policy,
        Quality,
        Session,
        SessionStatistics,
        WarpcacheError,
    )

__version__ = "0.1.0"

__all__ = [
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
    "Policy",
    "Quality",
    "Session",
    "SessionStatistics",
    "WarpcacheError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for on first use: ``warpcache --help`` needs neither NumPy nor the engine."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.engine"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
