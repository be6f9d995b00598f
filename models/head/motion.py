"""How the head moves: its parameters, and natural motion of them from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import InputError

__all__ = ["HeadMotion", "HeadParameters", "natural_motion"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HeadParameters:
    """Pose and expression of one frame.

    Attributes:
        yaw: Turn about the vertical axis in radians; positive moves the nose to the picture's right.
        pitch: Nod in radians; positive looks up.
        roll: Tilt in radians; positive tips the crown to the picture's right.
        tx: Shift to the right, in head heights.
        ty: Shift upwards, in head heights.
        jaw: Opening of the jaw, 0 closed to 1 wide open.
        smile: -0.5 sad to 1 broad smile.
        blink: 0 open to 1 closed.
        gaze_x: Turn of the eyes in radians, positive to the picture's right.
        gaze_y: Turn of the eyes in radians, positive upwards.
        brow: Lift of the brows, -1 frown to 1 raised.
    """

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    tx: float = 0.0
    ty: float = 0.0
    jaw: float = 0.0
    smile: float = 0.0
    blink: float = 0.0
    gaze_x: float = 0.0
    gaze_y: float = 0.0
    brow: float = 0.0


@dataclass(frozen=True)
class HeadMotion:
    """A clip of parameters: one float64 [T] array each, with the names and meaning of `HeadParameters`."""

    yaw: Floats
    pitch: Floats
    roll: Floats
    tx: Floats
    ty: Floats
    jaw: Floats
    smile: Floats
    blink: Floats
    gaze_x: Floats
    gaze_y: Floats
    brow: Floats
    fps: float = 30.0

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, field.name)) for field in fields(HeadParameters)}
        if len(lengths) != 1:
            raise InputError(f"motion has parameters of lengths {sorted(lengths)}; give every one the same length")

    def __len__(self) -> int:
        return len(self.yaw)

    def __getitem__(self, frame: int) -> HeadParameters:
        return HeadParameters(**{f.name: float(getattr(self, f.name)[frame]) for f in fields(HeadParameters)})

    def __iter__(self) -> Iterator[HeadParameters]:
        for frame in range(len(self)):
            yield self[frame]


def natural_motion(frames: int, fps: float, seed: int) -> HeadMotion:
    """Make motion like that of somebody talking to the camera.

    Args:
        frames: Length, at least 1.
        fps: Frames a second; the motion is defined in seconds, so another rate samples the same movement.
        seed: Another seed is another take.

    Returns:
        The clip.

    Raises:
        InputError: If `frames` or `fps` is not positive.
    """
    if frames < 1 or fps <= 0:
        raise InputError(f"motion needs at least 1 frame and a positive rate, got {frames} frames at {fps} fps")
    # A generator for each thing that draws as long as the clip lasts: a longer clip begins as a shorter one does.
    rng, phrases, blinks, saccades = np.random.default_rng([seed, 0x4EAD]).spawn(4)
    time = np.arange(frames) / fps
    drift = {name: _drift(rng, time, slow) for name, slow in _DRIFTS.items()}

    talk = _phrases(phrases, time)
    # Syllables at 3 to 5 Hz: their rate wanders, so the phase is integrated from a rate rather than fixed.
    rate = 3.9 + 0.9 * _drift(rng, time, 1.4)
    phase = 2.0 * np.pi * np.cumsum(rate) / fps + rng.uniform(0, 2 * np.pi)
    syllable = 0.5 - 0.5 * np.cos(phase)
    strength = 0.55 + 0.45 * np.clip(_drift(rng, time, 0.55), -1, 1)
    jaw = talk * np.clip(0.08 + 0.60 * strength * syllable, 0, 1)

    blink = _blinks(blinks, time)
    gaze_x, gaze_y = _saccades(saccades, time)
    yaw = 0.42 * drift["yaw"]
    return HeadMotion(
        yaw=yaw,
        pitch=0.13 * drift["pitch"] + 0.025 * talk * (syllable - 0.5),
        roll=0.10 * drift["roll"] + 0.06 * yaw,
        tx=0.025 * drift["tx"] + 0.05 * yaw,
        ty=0.018 * drift["ty"] + 0.004 * talk * syllable,
        jaw=jaw,
        smile=np.clip(0.52 + 0.45 * drift["smile"] - 0.2 * jaw, -0.15, 1.0),
        blink=blink,
        # The eyes stay on the camera while the head turns, and now and then look elsewhere.
        gaze_x=np.clip(gaze_x - 0.75 * yaw, -0.45, 0.45),
        gaze_y=np.clip(gaze_y - 0.5 * 0.13 * drift["pitch"], -0.3, 0.3),
        brow=np.clip(0.55 * drift["brow"] + 0.3 * talk * strength, -0.8, 1.0),
        fps=fps,
    )


# Seconds of the typical swing of each slow parameter.
_DRIFTS = {"yaw": 3.2, "pitch": 2.3, "roll": 2.9, "tx": 3.4, "ty": 2.6, "smile": 2.8, "brow": 1.5}


def _drift(rng: np.random.Generator, time: Floats, period_s: float) -> Floats:
    """Smooth wandering in about [-1, 1]: five sines around the period, of random phase and falling weight."""
    value = np.zeros_like(time)
    for weight, ratio in ((0.62, 1.0), (0.30, 1.61), (0.14, 2.37), (0.34, 0.57), (0.2, 0.31)):
        value += weight * np.sin(
            2 * np.pi * time * ratio * rng.uniform(0.9, 1.1) / period_s + rng.uniform(0, 2 * np.pi)
        )
    return value / 1.15


def _phrases(rng: np.random.Generator, time: Floats) -> Floats:
    """1 while talking, 0 in pauses, with soft ends."""
    talk = np.zeros_like(time)
    start = rng.uniform(0.0, 0.5)
    while start < time[-1] + 1e-9:
        length = rng.uniform(1.2, 3.4)
        rise = np.clip((time - start) / 0.18, 0, 1)
        fall = np.clip((start + length - time) / 0.28, 0, 1)
        talk = np.maximum(talk, _ease(rise) * _ease(fall))
        start += length + rng.uniform(0.35, 1.1)
    return talk


def _blinks(rng: np.random.Generator, time: Floats) -> Floats:
    """Lids: down in 0.11 s, up in 0.20 s, every 1.6 to 4.5 s."""
    blink = np.zeros_like(time)
    at = rng.uniform(0.6, 1.8)
    while at < time[-1] + 0.4:
        down = np.clip((time - at + 0.11) / 0.11, 0, 1)
        up = np.clip((at + 0.235 - time) / 0.20, 0, 1)
        blink = np.maximum(blink, _ease(down) * _ease(up))
        at += rng.uniform(1.6, 4.5)
    return blink


def _saccades(rng: np.random.Generator, time: Floats) -> tuple[Floats, Floats]:
    """Fixations of 0.5 to 1.8 s with quick moves between them; more than half of them on the camera."""
    x, y = np.zeros_like(time), np.zeros_like(time)
    here = np.zeros(2)
    at = rng.uniform(0.4, 1.0)
    while at < time[-1] + 1e-9:
        there = np.zeros(2) if rng.random() < 0.55 else rng.normal(0, 1, 2) * (0.16, 0.07)
        move = _ease(np.clip((time - at) / 0.09, 0, 1))
        x += (there[0] - here[0]) * move
        y += (there[1] - here[1]) * move
        here = there
        at += rng.uniform(0.5, 1.8)
    return x, y


def _ease(t: Floats) -> Floats:
    return np.asarray(t * t * (3.0 - 2.0 * t))
