"""What the parts of a bundle are for: the roles of its modules and the names of its exits.

A module's role is said by its record in the manifest, never by its name. Whoever needs to know what a module is for
asks its role, or the manifest for the module of a role.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["RESERVED_NAMES", "Role", "Route", "role_by_name"]

Route = str
"""An exit's name: ``whole``, ``plain``, ``warp``, ``warp2``, ``branch1``, ... ; what it is for is its role."""


class Role(StrEnum):
    """What a module is for. An exit has the role of its last module."""

    WHOLE = "whole"
    """The whole generator: frame inputs and state in, the answer and the next state out. Exact."""
    PRODUCER = "producer"
    """The deep part: frame inputs and state in, the cache and the next state out. Answers nothing."""
    PLAIN = "plain"
    """The generator's own remaining layers on the cache: exact where the cache is of the frame itself."""
    WARP = "warp"
    """A trained consumer of the cache."""
    BRANCH = "branch"
    """An exit that needs no cache: the generator with fewer channels, or any other network."""
    PREDICTOR = "predictor"
    """Predicts every exit's quality for a frame that has a cache."""
    PREDICTOR_COLD = "predictor_cold"
    """Predicts the quality of the exits that need no cache."""
    PART = "part"
    """A first part that exits share: what it writes is read by later modules of the same exit."""

    @property
    def answers(self) -> bool:
        """Whether an exit may end in it."""
        return self in (Role.WHOLE, Role.PLAIN, Role.WARP, Role.BRANCH)

    @property
    def predicts(self) -> bool:
        """Whether it says how good exits are."""
        return self in (Role.PREDICTOR, Role.PREDICTOR_COLD)

    @property
    def reads_cache(self) -> bool:
        """Whether it may read the cache; the others start from the frame's inputs alone."""
        return self in (Role.PLAIN, Role.WARP, Role.PREDICTOR, Role.PART)

    @property
    def carries_state(self) -> bool:
        """Whether it may read and write the state that a generator hands from frame to frame."""
        return self in (Role.WHOLE, Role.PRODUCER)

    @property
    def single(self) -> bool:
        """Whether a bundle has at most one module of it."""
        return self not in (Role.WARP, Role.BRANCH, Role.PART)


RESERVED_NAMES = frozenset({Role.PRODUCER, Role.PREDICTOR, Role.PREDICTOR_COLD})
"""What no exit may be called: reports list exits and these in one table."""

_BY_NAME = {"generator": Role.WHOLE} | {
    str(role): role for role in (Role.PRODUCER, Role.PLAIN, Role.PREDICTOR, Role.PREDICTOR_COLD)
}


def role_by_name(name: str, *, reads_cache: bool) -> Role:
    """The role of a module as the compiler names it, which is what names meant in bundles of format 1.

    Args:
        name: The module's name.
        reads_cache: Whether it takes a cache tensor, which tells consumers from branches.
    """
    return _BY_NAME.get(name, Role.WARP if reads_cache else Role.BRANCH)
