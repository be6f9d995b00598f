"""When producers run: the policy, its text form and its checks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError

__all__ = ["Policy", "PolicyKind"]

PolicyKind = Literal["full", "every", "async", "lockstep"]

_CHOICES = "'full', 'every:N' or 'async'"


@dataclass(frozen=True)
class Policy:
    """When producers run, and so which cache a frame is answered from.

    - ``full``: no producer; the whole generator answers every frame. The baseline.
    - ``every``: a producer in the foreground on every `period`-th frame, which is answered at age 0; the frames
      between are answered from that cache, at ages 1 to ``period - 1``.
    - ``async``: producers run beside the consumer; a frame is answered from the newest finished cache.
    - ``lockstep``: frame t is answered from the cache of frame max(0, t - `age`), in the foreground: deterministic,
      for offline work and tests.

    Attributes:
        kind: Which of the four.
        period: N of ``every:N``; 1 for the other kinds.
        age: Age in frames that ``lockstep`` holds; 0 for the other kinds.
    """

    kind: PolicyKind
    period: int = 1
    age: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("full", "every", "async", "lockstep"):
            raise InputError(f"unknown policy {self.kind!r}; choose {_CHOICES}")
        if self.period < 1:
            raise InputError(f"policy 'every:{self.period}' has a period below 1; give N >= 1, for example 'every:4'")
        if self.age < 0:
            raise InputError(f"age {self.age} is negative; give 0 or a number of frames that the cache may lag behind")
        if (self.period != 1 and self.kind != "every") or (self.age != 0 and self.kind != "lockstep"):
            raise InputError(f"policy {self.kind!r} takes neither period nor age; leave them out")

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read a policy from its text form.

        Args:
            text: ``"full"``, ``"every:N"`` or ``"async"``.

        Raises:
            InputError: If the text names no policy, or N is no whole number of at least 1.
        """
        name, colon, argument = text.strip().partition(":")
        if name == "every":
            if not (argument.isascii() and argument.isdigit()):
                raise InputError(f"policy {text!r} needs a whole number of frames; write it as in 'every:4'")
            return cls("every", period=int(argument))
        if not colon and name == "full":
            return cls("full")
        if not colon and name == "async":
            return cls("async")
        if name == "sliced":
            raise InputError(f"policy 'sliced' is not available in this version; choose {_CHOICES}")
        if name == "lockstep":
            raise InputError("lockstep is asked for by its age alone; give age=K (--age K) and no policy")
        raise InputError(f"unknown policy {text!r}; choose {_CHOICES}")

    @classmethod
    def lockstep(cls, age: int) -> Policy:
        """The deterministic policy: frame t is answered from the cache of frame max(0, t - `age`)."""
        return cls("lockstep", age=age)

    @classmethod
    def choose(cls, policy: str | Policy | None = None, age: int | None = None) -> Policy:
        """The policy that the options ``policy`` and ``age`` ask for together.

        Args:
            policy: A policy or its text form; None is ``"async"``.
            age: Where given, lockstep at this age; it goes with no other policy than the default.

        Raises:
            InputError: If both ask for something, or either is wrong.
        """
        chosen = policy if isinstance(policy, Policy) else cls.parse("async" if policy is None else policy)
        if age is None:
            return chosen
        if chosen.kind != "async":
            raise InputError(f"policy '{chosen}' and age {age} exclude each other (an age means lockstep); give one")
        return cls.lockstep(age)

    @property
    def foreground(self) -> bool:
        """Whether a producer runs in the consumer's place, one thing at a time, rather than beside it."""
        return self.kind != "async"

    @property
    def live(self) -> bool:
        """Whether the newest input wins: a frame that waits is dropped when a newer one arrives."""
        return self.kind != "lockstep"

    @property
    def uses_cache(self) -> bool:
        """Whether frames are answered from caches, so that producers run at all."""
        return self.kind != "full"

    @property
    def deterministic(self) -> bool:
        """Whether the same frames are answered from the same caches every time, and all is waited for."""
        return self.kind == "lockstep"

    def wanted_cache(self, frame: int, newest: int | None, history: deque[int]) -> int | None:
        """The frame whose cache must be made before `frame` is answered, in the foreground.

        Args:
            frame: What is to be answered.
            newest: The frame of the newest cache; None: there is none.
            history: Frames that arrived, oldest first; those that will not be asked for any more are taken out.

        Returns:
            None where the cache at hand serves.
        """
        if self.kind == "every":
            return frame if newest is None or frame - newest >= self.period else None
        # Lockstep. The very first frame stands in for frames before it; the frame before a gap, for those in the gap.
        while len(history) > 1 and history[1] <= frame - self.age:
            history.popleft()
        return None if newest == history[0] else history[0]

    def prepared_up_to(self, newest: int) -> int | None:
        """The frame up to which caches may be made between two frames, where `newest` is the last that arrived.

        So that the next frame's latency is the consumer's; None: nothing is made between frames.
        """
        return newest + 1 - self.age if self.kind == "lockstep" and self.age > 0 else None

    @property
    def oldest_planned_age(self) -> int | None:
        """The highest age that the policy itself plans for, in frames; None where time decides."""
        if self.kind == "async":
            return None
        return self.age if self.kind == "lockstep" else self.period - 1

    def __str__(self) -> str:
        if self.kind == "every":
            return f"every:{self.period}"
        if self.kind == "lockstep":
            return f"lockstep:{self.age}"
        return self.kind
