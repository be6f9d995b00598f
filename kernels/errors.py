"""The lower half of the project's family of exceptions: what kernels and everything above them may raise.

They live in the lowest layer, so that there is one family; `warpcache.engine.errors` draws it whole.
"""

from __future__ import annotations

__all__ = ["BackendError", "DeviceError", "InputError", "WarpcacheError"]


class WarpcacheError(Exception):
    """Base class of every error this project raises on purpose."""


class InputError(WarpcacheError, ValueError):
    """The data or an argument is wrong: names, dtype, shape, NaN, an empty clip, an unknown policy."""


class BackendError(WarpcacheError):
    """An executor is missing, refused a module, or failed while running one."""


class DeviceError(BackendError):
    """A GPU, its driver or its memory: missing, too old, used up, or failed in a call."""
