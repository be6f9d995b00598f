"""The hair: one shell of swept clumps that grows from a crown and ends in tips around the face."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .chart import Part, grid_chart, smoothstep

__all__ = ["Hair"]

Floats = NDArray[np.float64]

# The skull under the hair, an ellipsoid.
_CENTRE = np.array([0.0, 0.22, -0.06])
_RADII = np.array([0.765, 0.765, 0.80])
# Where the hair ends, by azimuth in degrees from the front (positive to the picture's right): height y.
_ENDS = np.array(
    [
        [-180, -0.50], [-138, -0.46], [-120, -0.15], [-108, 0.18], [-94, 0.20], [-84, 0.06], [-74, -0.06], [-64, 0.10],
        [-52, 0.30], [-30, 0.38], [0, 0.46], [25, 0.52], [45, 0.46], [60, 0.18], [72, -0.05], [84, 0.06], [94, 0.20],
        [108, 0.18], [120, -0.15], [138, -0.46], [180, -0.50],
    ]
)  # fmt: skip
_ROWS = 14
_PER_CLUMP = 4
_RECTANGLE = (0.655, 0.015, 0.985, 0.70)


class Hair:
    """Clumps of hair, rigid with the head.

    Args:
        rng: Draws the clumps' widths, lengths and sweep.
        variation: How far the sweep strays, as a share.

    Attributes:
        points: float64 [N, 3] in head space; rows from the crown to the tips.
        charts: The one chart.
    """

    def __init__(self, rng: np.random.Generator, variation: float) -> None:
        clumps = 16
        widths = 1.0 + 0.35 * rng.uniform(-1, 1, clumps)
        edges = -128 + 256 * np.concatenate([[0], np.cumsum(widths)]) / widths.sum()
        azimuth, saw, length = [], [], []
        for i in range(clumps):
            s = np.linspace(-1, 1, _PER_CLUMP, endpoint=False)
            azimuth.append(edges[i] + (edges[i + 1] - edges[i]) * (s + 1) / 2)
            saw.append(s)
            length.append(np.full(_PER_CLUMP, rng.uniform(-1, 1)))
        back = np.linspace(128, 232, 9)
        azimuth.append(back)
        saw.append(np.full(9, -1.0))
        length.append(np.zeros(9))
        self._azimuth = np.concatenate(azimuth)
        self._saw, self._length = np.concatenate(saw), np.concatenate(length)
        self._sweep = np.deg2rad(46.0 * (1 + variation * rng.uniform(-0.5, 0.5)))
        self._crown = np.array([-0.26, 0.95, -0.20])
        self._crown /= np.linalg.norm(self._crown)
        self.points = self._place()
        local = np.stack(
            [
                np.broadcast_to(self._saw, (_ROWS, len(self._azimuth))),
                np.broadcast_to(np.linspace(0, 1, _ROWS)[:, None], (_ROWS, len(self._azimuth))),
                np.broadcast_to(self._azimuth, (_ROWS, len(self._azimuth))),
            ],
            -1,
        ).reshape(-1, 3)
        chart = grid_chart(Part.HAIR, _ROWS, len(self._azimuth), (0.0, 0.0, 1.0, 1.0), local)
        # Laid on its side: the long way round the head runs along v.
        u0, v0, u1, v1 = _RECTANGLE
        chart.uv[:] = np.stack([u0 + (u1 - u0) * chart.uv[:, 1], v0 + (v1 - v0) * chart.uv[:, 0]], 1)
        self.charts = [chart]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows from crown to tips, and columns around the head."""
        return _ROWS, len(self._azimuth)

    def _place(self) -> Floats:
        wrapped = (self._azimuth + 180) % 360 - 180
        angle = np.deg2rad(wrapped)
        end_y = np.interp(wrapped, _ENDS[:, 0], _ENDS[:, 1])
        notch = 0.13 * np.abs(self._saw) ** 1.4
        front = np.exp(-((wrapped / 75) ** 2))
        tip = 1.0 + 0.10 * self._length * (0.4 + front) - notch * (0.55 + 0.6 * front)
        relative = (end_y - _CENTRE[1]) / _RADII[1]
        ring = np.sqrt(np.clip(1 - relative**2, 0.02, None))
        end = np.stack([ring * np.sin(angle), relative, ring * np.cos(angle)], 1)
        end /= np.linalg.norm(end, axis=1, keepdims=True)
        reach = np.arccos(np.clip(end @ self._crown, -1, 1))

        rows = []
        spread = np.linspace(0, 1, _ROWS - 1) ** 0.9
        for i in range(_ROWS):
            t = spread[min(i, _ROWS - 2)]
            along = t * tip
            direction = (
                np.sin((1 - along) * reach)[:, None] * self._crown + np.sin(along * reach)[:, None] * end
            ) / np.sin(reach)[:, None]
            # Strands leave the crown turned and bend into their end: the sweep.
            turn = self._sweep * (0.35 + 0.65 * front) * np.sin(np.pi * min(t, 1.0) ** 0.8) * (1 - 0.4 * t)
            direction = _rotate(direction, self._crown, turn)
            body = 0.085 + 0.075 * np.sin(np.pi * t**0.9)
            quiff = 0.14 * front * np.exp(-(((t - 0.62) / 0.24) ** 2))
            ridge = 0.050 * smoothstep(0.05, 0.5, np.array(t)) * (np.sqrt(np.clip(1 - 0.96 * self._saw**2, 0, 1)) - 0.6)
            lift = 0.022 * self._length * smoothstep(0.2, 0.7, np.array(t))
            thickness = body + quiff + ridge + lift - 0.045 * smoothstep(0.7, 1.0, np.array(t))
            if i == _ROWS - 1:
                # The last row tucks the edge in, so that the shell has a thickness.
                thickness = np.full_like(thickness, 0.005)
            rows.append(_CENTRE + direction * (_RADII + thickness[:, None]))
        return np.concatenate(rows)


def _rotate(vectors: Floats, axis: Floats, angle: Floats) -> Floats:
    """Rodrigues' rotation of vectors [N, 3] about a unit axis by angle [N]."""
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.asarray(vectors * cos + np.cross(axis, vectors) * sin + axis * (vectors @ axis)[:, None] * (1 - cos))
