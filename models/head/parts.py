"""What the head has besides skin and hair: eyeballs, teeth, ears, neck and shirt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .chart import Chart, Part, fit, grid_chart, grid_triangles, smoothstep
from .face import EYE_CENTRE, EYE_RADIUS
from .motion import HeadParameters

__all__ = ["Bust", "Ears", "Eyes", "Teeth"]

Floats = NDArray[np.float64]


class Eyes:
    """Two eyeballs that turn with the gaze; the cornea bulges. Local coordinates: direction x, y on the ball, side."""

    _RINGS = 8
    _SPOKES = 18
    _REACH = 1.45  # radians from the pupil's axis that the cap covers
    _RECTANGLES = ((0.72, 0.72, 0.845, 0.845), (0.86, 0.72, 0.985, 0.845))

    def __init__(self) -> None:
        theta = np.linspace(0, self._REACH, self._RINGS + 1)[1:]
        phi = np.linspace(0, 2 * np.pi, self._SPOKES, endpoint=False)
        t, f = np.meshgrid(theta, phi, indexing="ij")
        t, f = np.concatenate([[0.0], t.ravel()]), np.concatenate([[0.0], f.ravel()])
        # A flatter, slightly raised cap over the iris.
        bulge = EYE_RADIUS * (1.0 + 0.035 * smoothstep(0.62, 0.30, t))
        self._ball = np.stack([np.sin(t) * np.cos(f), np.sin(t) * np.sin(f), np.cos(t)], 1) * bulge[:, None]
        disc = np.stack([np.cos(f), -np.sin(f)], 1) * (t / self._REACH)[:, None]
        ring = 1 + np.arange(self._RINGS * self._SPOKES).reshape(self._RINGS, self._SPOKES)
        index = np.vstack([np.zeros((1, self._SPOKES), np.int64), ring])
        index = np.hstack([index, index[:, :1]])
        # Rows run outwards and columns counter-clockwise as seen from outside.
        triangles = grid_triangles(index)
        self.charts = []
        for side, rectangle in zip((1.0, -1.0), self._RECTANGLES, strict=True):
            local = np.column_stack([disc * self._REACH, np.full(len(t), side)])
            self.charts.append(Chart(Part.EYE, fit(disc * 0.5 + 0.5, rectangle), triangles, local))

    def vertices(self, p: HeadParameters) -> list[Floats]:
        """Both eyeballs in head space, float64 [N, 3] each."""
        placed = []
        for side in (1.0, -1.0):
            # The eyes' axes diverge a little, as the ball sits turned in a face this round.
            ball = _turn(self._ball, p.gaze_x + 0.045 * side, p.gaze_y)
            placed.append(ball + EYE_CENTRE * (side, 1.0, 1.0))
        return placed


class Teeth:
    """The upper row, a curved strip that is fixed to the skull. Local: along, down, 0."""

    _COLUMNS = 13

    def __init__(self) -> None:
        xi = np.linspace(-1, 1, self._COLUMNS)
        rows = []
        for down, inset in ((0.0, 0.03), (0.55, 0.0), (1.0, 0.02)):
            x = 0.192 * xi
            y = -0.560 - 0.085 * down + 0.012 * xi**2
            z = 0.652 - 0.115 * xi**2 - inset
            rows.append(np.stack([x, y, z], 1))
        self.points = np.concatenate(rows)
        local = np.column_stack(
            [np.tile(xi, 3), np.repeat([0.0, 0.55, 1.0], self._COLUMNS), np.zeros(3 * self._COLUMNS)]
        )
        self.charts = [grid_chart(Part.TEETH, 3, self._COLUMNS, (0.525, 0.945, 0.695, 0.985), local)]


class Ears:
    """Two ears, rigid with the head. Local: radius 0 to 1, angle, side."""

    _RINGS = 6
    _SPOKES = 14
    _RECTANGLES = ((0.725, 0.865, 0.845, 0.985), (0.865, 0.865, 0.985, 0.985))

    def __init__(self) -> None:
        radius = np.linspace(0, 1, self._RINGS + 1)[1:]
        phi = np.linspace(0, 2 * np.pi, self._SPOKES, endpoint=False)
        r, f = np.meshgrid(radius, phi, indexing="ij")
        r, f = np.concatenate([[0.0], r.ravel()]), np.concatenate([[0.0], f.ravel()])
        c, s = np.cos(f), np.sin(f)
        # Outline: tall, wider at the top, with a lobe. c runs back from the head, s runs up.
        wide = (0.125 + 0.030 * s) * np.where(c > 0, 1.0, 0.75)
        tall = np.where(s > 0, 0.20, 0.215)
        back, up = r * wide * c, r * tall * s
        rim = np.exp(-(((r - 0.86) / 0.13) ** 2)) * np.clip(0.45 + 0.75 * c + 0.3 * np.maximum(s, 0), 0, 1)
        bowl = np.exp(-((r / 0.52) ** 2))
        edge = smoothstep(0.90, 1.0, r)
        out = 0.034 * rim - 0.055 * bowl - 0.05 * edge + 0.06 * r * np.clip(c, 0, 1)
        self._points = np.stack([out, up, back], 1)
        ring = 1 + np.arange(self._RINGS * self._SPOKES).reshape(self._RINGS, self._SPOKES)
        index = np.vstack([np.zeros((1, self._SPOKES), np.int64), ring])
        triangles = grid_triangles(np.hstack([index, index[:, :1]]))
        disc = np.stack([r * c, -r * s], 1)
        self.charts, placed = [], []
        for side, rectangle in zip((1.0, -1.0), self._RECTANGLES, strict=True):
            # Seen from outside, back runs right on the picture's left ear and left on the other.
            turned = triangles if side > 0 else np.ascontiguousarray(triangles[:, ::-1])
            local = np.column_stack([r, f, np.full(len(r), side)])
            shown = disc if side > 0 else disc * (-1, 1)
            self.charts.append(Chart(Part.EAR, fit(shown * 0.5 + 0.5, rectangle), turned, local))
            out_x, up_y, back_z = self._points.T
            flare = 0.55  # how far the ear stands off, radians from lying flat
            x = out_x * np.cos(flare) + back_z * np.sin(flare)
            z = -(back_z * np.cos(flare) - out_x * np.sin(flare))
            tipped = up_y * np.cos(0.12) - z * np.sin(0.12)
            placed.append(np.stack([side * (0.775 + x), -0.10 + tipped, -0.10 + z], 1))
        self.points = placed


class Bust:
    """Neck and shirt. The neck's rows go from the head's motion to the body's. Local: angle, row 0 to 1, y."""

    _NECK_ROWS = np.array(
        [
            [-0.62, 0.44, 0.30, -0.20],
            [-0.84, 0.345, 0.285, -0.15],
            [-1.02, 0.315, 0.29, -0.13],
            [-1.18, 0.31, 0.31, -0.13],
            [-1.34, 0.40, 0.37, -0.14],
        ]
    )
    # y, half width, front, y rises to the side: an upright collar, then the slope of the shoulders.
    _SHIRT_ROWS = np.array(
        [
            [-1.235, 0.375, 0.300, 0.04],
            [-1.205, 0.400, 0.335, 0.045],
            [-1.215, 0.440, 0.375, 0.05],
            [-1.27, 0.465, 0.395, 0.05],
            [-1.33, 0.480, 0.400, 0.045],
            [-1.36, 0.62, 0.43, 0.03],
            [-1.41, 0.82, 0.48, 0.0],
            [-1.49, 1.01, 0.52, 0.0],
            [-1.62, 1.15, 0.56, 0.0],
            [-1.85, 1.23, 0.60, 0.0],
            [-2.35, 1.27, 0.62, 0.0],
        ]
    )

    def __init__(self) -> None:
        neck = np.deg2rad(np.linspace(-118, 118, 15))
        shirt = np.deg2rad(np.linspace(-118, 118, 25))
        self._neck_share = np.repeat(np.linspace(1.0, 0.0, len(self._NECK_ROWS)), len(neck))
        self._neck = np.concatenate(
            [
                np.stack([w * np.sin(neck), np.full_like(neck, y), c + d * np.cos(neck)], 1)
                for y, w, d, c in self._NECK_ROWS
            ]
        )
        rows = []
        for y, w, d, rise in self._SHIRT_ROWS:
            k = np.sin(shirt) ** 2
            # The collar dips in front.
            dip = 0.10 * np.exp(-((shirt / 0.6) ** 2)) * np.clip((w - 0.3) / 0.1, 0, 1) * np.clip((0.9 - w) / 0.4, 0, 1)
            rows.append(np.stack([w * np.sin(shirt), y + rise * k - dip, -0.12 + d * np.cos(shirt)], 1))
        self._shirt = np.concatenate(rows)
        self.charts = [
            grid_chart(
                Part.NECK, len(self._NECK_ROWS), len(neck), (0.52, 0.72, 0.70, 0.925), self._local(self._neck, neck)
            ),
            grid_chart(
                Part.SHIRT,
                len(self._SHIRT_ROWS),
                len(shirt),
                (0.015, 0.72, 0.50, 0.985),
                self._local(self._shirt, shirt),
            ),
        ]

    def vertices(self, head: tuple[Floats, Floats], body: tuple[Floats, Floats]) -> list[Floats]:
        """Neck and shirt; `head` and `body` are each a rotation [3, 3] and a translation [3] of head space."""
        share = self._neck_share[:, None]
        neck = share * (self._neck @ head[0].T + head[1]) + (1 - share) * (self._neck @ body[0].T + body[1])
        return [neck, self._shirt @ body[0].T + body[1]]

    @staticmethod
    def _local(points: Floats, angle: Floats) -> Floats:
        rows = len(points) // len(angle)
        return np.column_stack([np.tile(angle, rows), np.repeat(np.linspace(0, 1, rows), len(angle)), points[:, 1]])


def _turn(points: Floats, yaw: float, pitch: float) -> Floats:
    """Rotate points [N, 3] so that +z goes towards (yaw right, pitch up)."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    x, y, z = points.T
    y, z = y * cp + z * sp, z * cp - y * sp
    return np.stack([x * cy + z * sy, y, z * cy - x * sy], 1)
