"""What comes into a session: a frame's inputs, checked and brought to where the device takes them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..spec import TensorSpec
from .parts import SessionParts

__all__ = ["Intake"]


class Intake:
    """Checks inputs by name, dtype, shape and value.

    Args:
        parts: What the engine gave the session.
    """

    def __init__(self, parts: SessionParts) -> None:
        self._specs = parts.specs
        self._required = parts.required
        self._workspace = parts.workspace
        self._validate = parts.validate

    def adopt(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See the caller's inputs as arrays that the device can take, without a copy.

        Raises:
            InputError: If `inputs` has not exactly the inputs that the engine's modules take, or one is no array.
        """
        known = list(self._specs)
        for name in inputs:
            if name not in self._specs:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the bundle takes {_listed(known)}"
                raise InputError(f"unexpected input {name!r}; {hint}")
        missing = [name for name in known if name in self._required and name not in inputs]
        if missing:
            given = _listed(list(inputs)) if inputs else "none"
            raise InputError(f"input {_listed(missing)} is missing; the inputs given are {given}")
        return {name: self._workspace.adopt(self._specs[name], array) for name, array in inputs.items()}

    def take(self, name: str, array: Any, *, keep: bool) -> Any:
        """Check one input of one frame, and make of it what the device takes; `keep` copies it."""
        return self._workspace.take_input(self._specs[name], array, finite=self._validate, keep=keep)

    def spec(self, name: str) -> TensorSpec:
        """The spec of one input."""
        return self._specs[name]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))
