"""The head's shape: all charts joined into one mesh, posed and projected into the picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..rasterizer import Mesh
from .chart import Part
from .face import Face
from .hair import Hair
from .motion import HeadParameters
from .parts import Bust, Ears, Eyes, Teeth

__all__ = ["HeadShape"]

Floats = NDArray[np.float64]

# The head turns about this point, at the top of the spine.
_PIVOT = np.array([0.0, -0.62, -0.12])
_CAMERA_DISTANCE = 6.5
# Head space to picture: half a head's height as a share of the picture, and where y = 0 lies from the top.
_SCALE = 0.293
_CENTRE_Y = 0.487


class HeadShape:
    """The character's geometry.

    Args:
        rng: Draws proportions and hair.
        variation: How far they stray from the base character, 0 to about 0.2.

    Attributes:
        mesh: Topology and UV.
        part: int32 [V], each vertex's `Part`.
        local: float32 [V, 3], coordinates on the part for the painter.
        hair: Slice of the hair's vertices; `hair_shape` are its rows and columns.
    """

    def __init__(self, rng: np.random.Generator, variation: float) -> None:
        self._face, self._hair = Face(rng, variation), Hair(rng, variation)
        self._eyes, self._teeth, self._ears, self._bust = Eyes(), Teeth(), Ears(), Bust()
        pieces = (self._face, self._eyes, self._teeth, self._ears, self._hair, self._bust)
        charts = [chart for piece in pieces for chart in piece.charts]
        offsets = np.cumsum([0] + [len(chart.uv) for chart in charts])
        triangles = np.concatenate([c.triangles + o for c, o in zip(charts, offsets, strict=False)]).astype(np.int32)
        self.mesh = Mesh(triangles, np.concatenate([c.uv for c in charts]).astype(np.float32))
        self.part = np.concatenate([np.full(len(c.uv), c.part, np.int32) for c in charts])
        self.local = np.concatenate([c.local for c in charts]).astype(np.float32)
        at = [c.part for c in charts].index(Part.HAIR)
        self.hair = slice(int(offsets[at]), int(offsets[at + 1]))
        self.hair_shape = self._hair.shape

    def place(self, p: HeadParameters) -> Floats:
        """Vertices of one frame in camera-aligned head space (x right, y up, z to the camera), float64 [V, 3]."""
        turn = _rotation(p.yaw, p.pitch, p.roll)
        shift = np.array([2 * p.tx, 2 * p.ty, 0.0])
        head = (turn, _PIVOT - turn @ _PIVOT + shift)
        # The body follows a little.
        lean = _rotation(0.22 * p.yaw, 0.0, 0.12 * p.roll)
        base = np.array([0.0, -1.6, -0.2])
        body = (lean, base - lean @ base + 0.45 * shift)
        rigid = [
            *self._face.vertices(p),
            *self._eyes.vertices(p),
            self._teeth.points,
            *self._ears.points,
            self._hair.points,
        ]
        moved = [piece @ head[0].T + head[1] for piece in rigid]
        return np.concatenate([*moved, *self._bust.vertices(head, body)])

    def project(self, points: Floats, size: int) -> NDArray[np.float32]:
        """Project `place`'s points into a picture of `size` pixels, float32 [V, 3] as `rasterize` takes them."""
        focus = _CAMERA_DISTANCE / (_CAMERA_DISTANCE - points[:, 2])
        scale = _SCALE * size
        x = size * 0.5 + scale * points[:, 0] * focus
        y = size * _CENTRE_Y - scale * points[:, 1] * focus
        return np.stack([x, y, -scale * points[:, 2]], 1).astype(np.float32)


def _rotation(yaw: float, pitch: float, roll: float) -> Floats:
    """Rotation [3, 3]: pitch, then yaw, then roll, with the signs of `HeadParameters`."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    pitching = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    yawing = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rolling = np.array([[cr, sr, 0], [-sr, cr, 0], [0, 0, 1]])
    return np.asarray(rolling @ yawing @ pitching)
