"""How memory grows while something is done over and over."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Growth", "resident_bytes", "watch_memory"]

_STATM = Path("/proc/self/statm")
_READINGS = 40


@dataclass(frozen=True)
class Growth:
    """Readings from the end of the warm-up on, evenly spread.

    Attributes:
        frames: After how many frames each was taken; the first is 0.
        device: Bytes in use on the GPU, by everybody.
        host: Bytes of this process in memory.
    """

    frames: tuple[int, ...]
    device: tuple[int, ...]
    host: tuple[int, ...]

    @property
    def device_bytes(self) -> int:
        """What the GPU's memory grew by."""
        return self.device[-1] - self.device[0]

    @property
    def host_bytes(self) -> int:
        """What the process grew by."""
        return self.host[-1] - self.host[0]

    @property
    def host_bytes_a_frame(self) -> float:
        """The process's growth in the second half, a frame: what goes on growing, allocators' steps apart."""
        middle = len(self.frames) // 2
        return (self.host[-1] - self.host[middle]) / (self.frames[-1] - self.frames[middle])

    def to_record(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"frames": list(self.frames), "device_bytes": list(self.device), "host_bytes": list(self.host)}


def watch_memory(
    answer: Callable[[], object], read: Callable[[], tuple[int, int]], *, frames: int, warmup: int
) -> Growth:
    """Answer frames and read memory now and then.

    Args:
        answer: Answers one frame.
        read: Bytes in use on the device and on the host.
        frames: How many are answered while memory is watched.
        warmup: How many before.
    """
    for _ in range(warmup):
        answer()
    readings_wanted = min(_READINGS, max(2, frames // 10))
    marks = sorted({round(frames * k / readings_wanted) for k in range(1, readings_wanted + 1)})
    read()  # once unseen: what reading itself takes for good is no growth
    readings = [(0, *read())]
    done = 0
    for mark in marks:
        for _ in range(mark - done):
            answer()
        done = mark
        readings.append((done, *read()))
    counts, device, host = zip(*readings, strict=True)
    return Growth(counts, device, host)


def resident_bytes() -> int:
    """This process's resident memory, Linux only.

    Raises:
        OSError: If the system does not say it.
    """
    return int(_STATM.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
