"""The face: a lofted head with slits for eyes and mouth, and the expressions that move it.

Head space: x to the picture's right, y up, z towards the camera, half a head's height is 1, the chin near y = -1.

The surface is a grid. Its rest state has eyes and mouth closed, as slits of vertices that lie on one another. An
expression slides vertices over the surface z = height(x, y): lids slide over the eyeball, which is part of that
surface, so that they close around it. The mouth's slit is bridged by a bag of further rows: the inside of the lips,
the palate and the tongue.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .chart import Chart, Part, fit, grid_triangles, smoothstep
from .motion import HeadParameters

__all__ = ["EYE_CENTRE", "EYE_HALF_WIDTH", "EYE_RADIUS", "EYE_SLIT_Y", "MOUTH_Y", "Face", "lip_coordinates"]

Floats = NDArray[np.float64]

# Of the eye on the picture's right; the other is its mirror image.
EYE_CENTRE = np.array([0.315, -0.015, 0.425])
EYE_RADIUS = 0.235
EYE_HALF_WIDTH = 0.205
EYE_SLIT_Y = -0.085
_LID_RADIUS = EYE_RADIUS + 0.022
MOUTH_Y = -0.615
_MOUTH_HALF_WIDTH = 0.205
_JAW_HINGE = np.array([0.0, -0.22, 0.0])
_JAW_ANGLE = 0.30

# Rest rows from the forehead (covered by hair) to the chin; the slits of eyes and mouth are among them.
_ROWS = np.array(
    [
        0.74, 0.60, 0.50, 0.43, 0.37, 0.31, 0.25, 0.19, 0.13, 0.07, 0.02, -0.03, EYE_SLIT_Y, -0.125, -0.16, -0.195,
        -0.23, -0.265, -0.30, -0.33, -0.36, -0.39, -0.42, -0.455, -0.495, -0.53, -0.56, -0.59, MOUTH_Y, -0.64, -0.67,
        -0.70, -0.735, -0.775, -0.82, -0.87, -0.92, -0.965,
    ]
)  # fmt: skip
# Below the chin the loft turns back to the neck: height, half width, front, centre, lift of the sides.
_UNDER = ((-1.0, 0.42, 0.44, 0.04, 0.36), (-0.985, 0.37, 0.29, -0.02, 0.41), (-0.93, 0.30, 0.14, -0.10, 0.46))
# Columns of the right half: x at the eyes' height, then angles in degrees round the side.
_COLUMN_X = np.concatenate([[0.0, 0.035, 0.072], np.linspace(0.11, 0.52, 9)])
_COLUMN_ANGLES = np.array([54.0, 62.0, 70.0, 79.0, 90.0, 106.0])
_POWER = 2.35
_LIFT_POWER = 2.6

# Profiles of the loft by height, read by linear interpolation in a dense table.
_PROFILE_Y = np.array([-0.98, -0.93, -0.87, -0.78, -0.68, -0.55, -0.40, -0.20, 0.0, 0.2, 0.4, 0.6, 0.8, 0.95])
_DENSE_Y = np.linspace(_PROFILE_Y[0], _PROFILE_Y[-1], 400)


def _tabulate(values: list[float]) -> Floats:
    """Catmull-Rom curve through values at `_PROFILE_Y`, at `_DENSE_Y`."""
    table = np.array(values, np.float64)
    slope = np.gradient(table, _PROFILE_Y)
    i = np.clip(np.searchsorted(_PROFILE_Y, _DENSE_Y, side="right") - 1, 0, len(table) - 2)
    h = _PROFILE_Y[i + 1] - _PROFILE_Y[i]
    t = (_DENSE_Y - _PROFILE_Y[i]) / h
    t2, t3 = t * t, t * t * t
    return np.asarray(
        (2 * t3 - 3 * t2 + 1) * table[i]
        + (t3 - 2 * t2 + t) * h * slope[i]
        + (3 * t2 - 2 * t3) * table[i + 1]
        + (t3 - t2) * h * slope[i + 1]
    )


def _profile(y: Floats, table: Floats) -> Floats:
    return np.asarray(np.interp(y, _DENSE_Y, table))


# Half width, front, centre, and how far the sides rise.
_PROFILE_W = _tabulate([0.46, 0.51, 0.557, 0.605, 0.645, 0.685, 0.715, 0.735, 0.74, 0.735, 0.715, 0.65, 0.50, 0.30])
_PROFILE_F = _tabulate([0.525, 0.60, 0.635, 0.655, 0.665, 0.672, 0.676, 0.678, 0.69, 0.70, 0.68, 0.60, 0.42, 0.15])
_PROFILE_C = _tabulate([0.12, 0.10, 0.08, 0.06, 0.04, 0.02, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
_PROFILE_LIFT = _tabulate([0.335, 0.315, 0.275, 0.21, 0.14, 0.065, 0.012, 0, 0, 0, 0, 0, 0, 0])

_FACE_RECTANGLE = (0.015, 0.015, 0.635, 0.70)


class Face:
    """The skin of the head from the hairline to under the chin, with lids, lips and the inside of the mouth.

    Args:
        rng: Draws the character's proportions.
        variation: How far they stray from the base face, as a share.

    Attributes:
        charts: The skin with the mouth's inside, then the strips along each lid (upper, lower; right eye, left eye).
    """

    def __init__(self, rng: np.random.Generator, variation: float) -> None:
        self._shape = {name: 1.0 + variation * rng.uniform(-1, 1) for name in ("nose", "lips", "chin", "cheek")}
        self._build_rest()
        self._build_bag()
        self.charts = [self._face_chart(), *self._lash_charts()]

    def vertices(self, p: HeadParameters) -> list[Floats]:
        """Place the vertices of `charts`.

        Args:
            p: Expression; the pose is not applied here.

        Returns:
            One float64 [N, 3] in head space for every chart, in the order of `charts`.
        """
        skin = self._deform(self._rest, self._side, p)
        bag = self._place_bag(skin, p)
        return [np.concatenate([skin, bag]), *self._place_lashes(skin)]

    def height(self, x: Floats, y: Floats) -> Floats:
        """Height z of the face's front over (x, y), lids closed over the eyeballs, float64 like `x`."""
        z = self._plain_height(x, y) + self._features(x, y)
        ex = np.abs(x) - EYE_CENTRE[0]
        lid = EYE_CENTRE[2] + np.sqrt(np.maximum(_LID_RADIUS**2 - ex**2 - (y - EYE_CENTRE[1]) ** 2, 0.0))
        over = smoothstep(0.0, 0.05, _LID_RADIUS - np.hypot(ex, y - EYE_CENTRE[1]))
        # Smooth maximum: the lid rises out of the socket with a soft crease instead of an edge.
        blended = 0.5 * (z + lid + np.sqrt((z - lid) ** 2 + 0.018**2))
        return np.asarray(np.where(over > 0, z + over * (blended - z), z))

    def _features(self, x: Floats, y: Floats) -> Floats:
        s = self._shape
        ax = np.abs(x)

        def bump(cx: float, cy: float, sx: float, sy: float) -> Floats:
            return np.asarray(np.exp(-(((ax - cx) / sx) ** 2) - ((y - cy) / sy) ** 2))

        z = -0.085 * bump(0.30, 0.01, 0.20, 0.17)
        z += 0.035 * bump(0.30, 0.27, 0.26, 0.09)
        z += 0.055 * s["cheek"] * bump(0.38, -0.36, 0.20, 0.17)
        z += 0.035 * bump(0.0, -0.60, 0.24, 0.20)
        z -= 0.010 * bump(0.46, -0.62, 0.13, 0.16)
        z += 0.050 * s["chin"] * bump(0.0, -0.885, 0.15, 0.09)
        z -= 0.030 * bump(0.0, -0.765, 0.17, 0.045)
        # Nose: a bridge that grows to a round tip and is cut off below, with wings.
        ridge = np.interp(-y, _NOSE_Y, _NOSE_H) * s["nose"]
        sigma = np.interp(-y, [-0.15, 0.10, 0.25, 0.40], [0.085, 0.07, 0.082, 0.098])
        z += ridge * np.exp(-((ax / sigma) ** 2))
        z += 0.062 * s["nose"] * bump(0.0, -0.318, 0.082, 0.062)
        z += 0.075 * s["nose"] * bump(0.108, -0.372, 0.046, 0.038)
        # Philtrum, then lips: two rolls that meet at the slit.
        z -= 0.012 * bump(0.0, -0.485, 0.026, 0.05)
        u, width = lip_coordinates(x, y)
        z += s["lips"] * width * _roll(u) * np.where(y >= MOUTH_Y, 0.034, 0.046)
        return z

    def _build_rest(self) -> None:
        angles = np.deg2rad(_COLUMN_ANGLES)
        width_at_eyes = float(_profile(np.array(EYE_CENTRE[1]), _PROFILE_W))
        q_front = _COLUMN_X / width_at_eyes
        q = np.concatenate([q_front, np.sin(angles) ** (2 / _POWER)])
        k = np.concatenate(
            [(1 - q_front**_POWER) ** (1 / _POWER), np.sign(np.cos(angles)) * np.abs(np.cos(angles)) ** (2 / _POWER)]
        )
        q, k = np.concatenate([-q[:0:-1], q]), np.concatenate([k[:0:-1], k])
        self._columns = len(q)
        rows = len(_ROWS)
        y = np.broadcast_to(_ROWS[:, None], (rows, len(q)))
        width, front, centre, lift = (_profile(y, t) for t in (_PROFILE_W, _PROFILE_F, _PROFILE_C, _PROFILE_LIFT))
        x = width * q
        z = centre + (front - centre) * k
        # Features belong to the front; they fade where the surface turns to the side.
        z = z + (self.height(x, y) - self._plain_height(x, y)) * smoothstep(0.02, 0.3, k) * (np.abs(q) < 0.985)
        self._front = np.broadcast_to(smoothstep(0.05, 0.45, k), (rows + len(_UNDER), len(q))).reshape(-1).copy()
        grid = [np.stack([x, y + lift * np.abs(q) ** _LIFT_POWER, z], -1)]
        for uy, uw, uf, uc, ul in _UNDER:
            under = np.stack([uw * q, uy + ul * np.abs(q) ** _LIFT_POWER, uc + (uf - uc) * k], -1)
            grid.append(under[None])
        grid_points = np.concatenate(grid)
        self._rows = len(grid_points)
        self._rest = grid_points.reshape(-1, 3)
        self._q = np.broadcast_to(q, (self._rows, len(q))).reshape(-1)
        index = np.arange(len(self._rest)).reshape(self._rows, self._columns)
        self._index_above, self._index_below = index, index.copy()
        # Vertices of a slit exist twice, above and below it; its end points once.
        self._slits: dict[str, tuple[int, NDArray[np.int64], Floats]] = {}
        middle = self._columns // 2
        inner = middle + int(np.argmin(np.abs(_COLUMN_X - (EYE_CENTRE[0] - EYE_HALF_WIDTH))))
        outer = middle + len(_COLUMN_X) - 1
        eye_row = int(np.argmin(np.abs(_ROWS - EYE_SLIT_Y)))
        mouth_row = int(np.argmin(np.abs(_ROWS - MOUTH_Y)))
        mouth_x = self._rest[index[mouth_row], 0]
        reach = int(np.argmin(np.abs(mouth_x[middle:] - _MOUTH_HALF_WIDTH)))
        self._mouth_half = float(mouth_x[middle + reach])
        spans = {
            "right": (eye_row, np.arange(inner, outer + 1)),
            "left": (eye_row, np.arange(2 * middle - outer, 2 * middle - inner + 1)),
            "mouth": (mouth_row, np.arange(middle - reach, middle + reach + 1)),
        }
        extra = []
        total = len(self._rest)
        for name, (row, columns) in spans.items():
            inside = columns[1:-1].astype(np.int64)
            self._index_below[row, inside] = total + np.arange(len(inside))
            total += len(inside)
            extra.append(index[row, inside])
            x_rest = self._rest[index[row, columns], 0]
            along = x_rest if name == "mouth" else np.linspace(-1.0, 1.0, len(columns))
            self._slits[name] = (row, columns.astype(np.int64), np.asarray(along, np.float64))
        twins = np.concatenate(extra)
        self._side = np.concatenate([np.zeros(len(self._rest)), np.ones(len(twins))])
        # Which side of each slit a grid vertex is on follows from its row.
        self._row_of = np.concatenate([np.repeat(np.arange(self._rows), self._columns), twins // self._columns])
        self._column_of = np.concatenate([np.tile(np.arange(self._columns), self._rows), twins % self._columns])
        self._front = np.concatenate([self._front, self._front[twins]])
        self._q = np.concatenate([self._q, self._q[twins]])
        self._rest = np.concatenate([self._rest, self._rest[twins]])

    def _plain_height(self, x: Floats, y: Floats) -> Floats:
        width, front, centre = (_profile(y, table) for table in (_PROFILE_W, _PROFILE_F, _PROFILE_C))
        q = np.minimum(np.abs(x) / width, 0.985)
        return np.asarray(centre + (front - centre) * (1.0 - q**_POWER) ** (1.0 / _POWER))

    def _deform(self, rest: Floats, side: Floats, p: HeadParameters) -> Floats:
        """Slide, raise and rotate the skin: brows, lids, lips, then the jaw's hinge."""
        x, y = rest[:, 0].copy(), rest[:, 1].copy()
        row, front = self._row_of, self._front
        eye_row, mouth_row = self._slits["right"][0], self._slits["mouth"][0]
        above_eye = (row < eye_row) | ((row == eye_row) & (side == 0))
        xi = (np.abs(x) - EYE_CENTRE[0]) / EYE_HALF_WIDTH
        d = np.abs(y - EYE_SLIT_Y)

        # Lids. The margin opens to an almond that is highest a little inside of the middle.
        squint = 0.28 * max(p.smile, 0.0)
        almond = np.clip(1.0 - xi**2, 0.0, None) ** 0.62
        upper = 0.197 * almond * (1.0 - 0.10 * xi) * (1 - p.blink) * (
            1.0 + 0.10 * p.brow
        ) + 0.10 * p.gaze_y * almond * (1 - p.blink)
        lower = 0.074 * almond * (1.0 + 0.12 * xi) * (1 - p.blink) * (1 - squint) - 0.05 * p.gaze_y * almond * (
            1 - p.blink
        )
        # The slit's ends rise to the outside, which gives the eye its tilt.
        tilt = 0.030 * np.clip(xi, -1.2, 1.2) * np.exp(-((d / 0.12) ** 2)) * (np.abs(xi) < 1.6)
        fall_up = np.clip(1.0 - d / 0.36, 0.0, 1.0) ** 1.25
        fall_down = np.clip(1.0 - d / 0.26, 0.0, 1.0) ** 1.5
        dy = np.where(above_eye, upper * fall_up, -lower * fall_down) + tilt
        # Closed lids meet in an arc that hangs.
        dy -= 0.040 * p.blink * almond * np.clip(1.0 - d / 0.22, 0.0, 1.0)
        # Brows.
        lift = np.exp(-(((y - 0.30) / 0.14) ** 2) - ((np.abs(x) - 0.30) / 0.28) ** 2)
        frown = np.exp(-(((y - 0.28) / 0.12) ** 2) - ((np.abs(x) - 0.12) / 0.14) ** 2)
        dy += np.where(p.brow >= 0, 0.075 * p.brow * lift, 0.05 * p.brow * frown)
        dx = np.where(p.brow < 0, 0.03 * p.brow * frown * np.sign(x), 0.0)

        # Smile: corners out and up, lips stretched, cheeks pushed up.
        corner = np.exp(-(((np.abs(x) - self._mouth_half) / 0.15) ** 2) - ((y - MOUTH_Y) / 0.13) ** 2)
        dx += np.sign(x) * 0.075 * p.smile * corner * smoothstep(0.0, 0.12, np.abs(x))
        dy += 0.085 * p.smile * corner
        dy += -0.012 * p.smile * np.exp(-((x / 0.12) ** 2) - ((y - MOUTH_Y) / 0.12) ** 2)
        cheek = np.exp(-(((np.abs(x) - 0.37) / 0.17) ** 2) - ((y + 0.32) / 0.13) ** 2)
        dy += 0.035 * p.smile * cheek
        # A smile with open lips shows the teeth.
        row_mouth = (row == mouth_row) & (side == 0) | (row < mouth_row)
        lift_lip = 0.040 * max(p.smile, 0.0) * min(3.0 * p.jaw, 1.0)
        dy += row_mouth * lift_lip * np.exp(-((x / 0.16) ** 2) - ((y - MOUTH_Y) / 0.07) ** 2)
        # Rest line of the lips: a soft cupid's bow.
        bow = np.exp(-(((y - MOUTH_Y) / 0.06) ** 2))
        dy += bow * 0.012 * np.exp(-((x / 0.11) ** 2))

        dx, dy = dx * front, dy * front
        moved = (np.abs(dx) + np.abs(dy)) > 1e-9
        z = rest[:, 2].copy()
        if moved.any():
            xm, ym = x[moved], y[moved]
            z[moved] += self.height(xm + dx[moved], ym + dy[moved]) - self.height(xm, ym)
        z += 0.030 * p.smile * cheek * front
        out = np.stack([x + dx, y + dy, z], 1)

        # Jaw: weight 1 below the mouth, 0 above, a half at the corners, fading to the side of the head.
        below_mouth = (row > mouth_row) | ((row == mouth_row) & (side == 1))
        # The square root of a circle: the opening stays round up to the corners.
        c = 1.0 - np.clip(1.0 - (rest[:, 0] / self._mouth_half) ** 2, 0, 1) ** 0.6
        dm = np.abs(rest[:, 1] - MOUTH_Y)
        spread = 0.5 * c * np.exp(-((dm / 0.17) ** 2))
        weight = np.where(below_mouth, 1.0 - spread, spread)
        lateral = smoothstep(0.98, 0.55, np.abs(self._q))
        weight *= lateral + (1.0 - lateral) * 0.15 * smoothstep(-0.50, -0.72, rest[:, 1])
        out = _hinge(out, weight * _JAW_ANGLE * p.jaw)
        # An open mouth narrows a little.
        narrow = 0.10 * p.jaw * np.exp(-(((rest[:, 1] - MOUTH_Y) / 0.2) ** 2) - (rest[:, 0] / 0.26) ** 2) * front
        out[:, 0] *= 1.0 - narrow
        return out

    def _build_bag(self) -> None:
        row, columns, x = self._slits["mouth"]
        self._bag_top = self._index_above[row, columns]
        self._bag_bottom = self._index_below[row, columns]
        self._bag_xi = x / self._mouth_half
        # Rows between the lips' margins: share of the lower jaw, depth behind the lips.
        self._bag_rows = np.array(
            [
                [0.0, 0.03, 0.006],
                [0.02, 0.075, 0.02],
                [0.1, 0.30, 0.10],
                [0.5, 0.42, 0.0],
                [0.86, 0.24, 0.02],
                [0.97, 0.075, -0.02],
                [1.0, 0.03, -0.006],
            ]
        )

    def _place_bag(self, skin: Floats, p: HeadParameters) -> Floats:
        """Inside of the mouth, float64 [rows * (columns - 2), 3]: rows from the upper lip's margin to the lower's."""
        top, bottom = skin[self._bag_top[1:-1]], skin[self._bag_bottom[1:-1]]
        arch = np.sqrt(np.clip(1 - self._bag_xi[1:-1] ** 2, 0, 1))[:, None]
        rows = []
        for share, depth, rise in self._bag_rows:
            point = top + share * (bottom - top)
            rows.append(point + arch * np.array([0.0, rise * (0.4 + p.jaw), -depth]))
        return np.concatenate(rows)

    def _face_chart(self) -> Chart:
        rows, columns = self._rows, self._columns
        u = np.linspace(0, 1, columns)
        v = np.linspace(0, 1, rows)
        uv = np.stack(np.meshgrid(u, v), -1).reshape(-1, 2)[self._row_of * columns + self._column_of]
        # The slits are opened in UV, so that lips and lids are apart and the mouth's inside has room.
        for name, gap, reach in (("right", 0.030, 6.0), ("left", 0.030, 6.0), ("mouth", 0.052, 8.0)):
            row, span, _ = self._slits[name]
            middle, half = (span[0] + span[-1]) / 2, (span[-1] - span[0]) / 2
            taper = np.sqrt(np.clip(1 - ((self._column_of - middle) / half) ** 2, 0, 1))
            distance = np.abs(self._row_of - row)
            lower = (self._row_of > row) | ((self._row_of == row) & (self._side == 1))
            uv[:, 1] += np.where(lower, 1, -1) * gap * taper * np.clip(1 - distance / reach, 0, 1)
        row, span, _ = self._slits["mouth"]
        top, bottom = uv[self._bag_top[1:-1]], uv[self._bag_bottom[1:-1]]
        count = len(self._bag_rows)
        shares = (np.arange(count) + 1) / (count + 1)
        bag_uv = np.concatenate([top + share * (bottom - top) for share in shares])
        inside = len(span) - 2
        bag_index = np.empty((count + 2, len(span)), np.int64)
        bag_index[0], bag_index[-1] = self._bag_top, self._bag_bottom
        bag_index[1:-1, 0], bag_index[1:-1, -1] = self._bag_top[0], self._bag_top[-1]
        bag_index[1:-1, 1:-1] = len(self._rest) + np.arange(count * inside).reshape(count, inside)
        skin_triangles = _grid_triangles_with_slits(self._index_above, self._index_below)
        bag_triangles = grid_triangles(bag_index)
        local = np.concatenate(
            [
                np.column_stack([self._rest[:, :2], np.zeros(len(self._rest))]),
                np.column_stack(
                    [np.tile(self._bag_xi[1:-1], count), np.full(count * inside, MOUTH_Y), np.repeat(shares, inside)]
                ),
            ]
        )
        # The lips' margins belong to both; a hair's breadth to either side tells the painter which.
        local[: len(self._rest), 1] += np.where((self._row_of == row) & (self._side == 1), -1e-4, 0.0)
        triangles = np.concatenate([skin_triangles, bag_triangles]).astype(np.int32)
        return Chart(Part.FACE, fit(np.concatenate([uv, bag_uv]), _FACE_RECTANGLE), triangles, local)

    def _lash_charts(self) -> list[Chart]:
        """Strips along the lids' margins: the dark upper lash line and the lower lid's rim, in the slits' UV gaps."""
        face_uv = self._face_chart().uv
        charts = []
        for name in ("right", "left"):
            row, span, xi = self._slits[name]
            top, bottom = face_uv[self._index_above[row, span]], face_uv[self._index_below[row, span]]
            for near, far, kind in ((0.10, 0.42, 0.0), (0.90, 0.58, 1.0)):
                a, b = top + near * (bottom - top), top + far * (bottom - top)
                n = len(span)
                uv = np.concatenate([a, b])
                order = np.arange(2 * n).reshape(2, n)
                triangles = grid_triangles(order if kind == 0.0 else order[::-1])
                outward = xi if name == "right" else -xi
                local = np.column_stack([np.tile(outward, 2), np.repeat([0.0, 1.0], n), np.full(2 * n, kind)])
                charts.append(Chart(Part.LASHES, uv, triangles, local))
        return charts

    def _place_lashes(self, skin: Floats) -> list[Floats]:
        placed = []
        for name in ("right", "left"):
            row, span, xi = self._slits[name]
            mirror = 1.0 if name == "right" else -1.0
            outward = xi * mirror
            centre = EYE_CENTRE * (mirror, 1.0, 1.0)
            taper = np.sqrt(np.clip(1 - xi**2, 0, 1))[:, None]
            margin = skin[self._index_above[row, span]]
            normal = margin - centre
            normal /= np.linalg.norm(normal, axis=1, keepdims=True)
            length = (0.012 + 0.034 * smoothstep(-0.4, 0.9, outward))[:, None]
            flare = normal * 0.9 + np.array([0.75 * mirror, 0.15, 0.0]) * smoothstep(-0.2, 1.0, outward)[:, None]
            tip = margin + length * flare * (0.1 + 0.9 * taper) + taper * np.array([0.0, -0.006, 0.0])
            root = centre + normal * (EYE_RADIUS + 0.002) + taper * np.array([0.0, -0.010, 0.0])
            placed.append(np.concatenate([tip, root]))
            margin = skin[self._index_below[row, span]]
            normal = margin - centre
            normal /= np.linalg.norm(normal, axis=1, keepdims=True)
            rim = centre + normal * (EYE_RADIUS + 0.001) + taper * np.array([0.0, 0.010, 0.0])
            placed.append(np.concatenate([margin, rim]))
        return placed


_NOSE_Y = np.array([-0.20, -0.05, 0.08, 0.18, 0.26, 0.325, 0.36, 0.395, 0.425, 0.46])
_NOSE_H = np.array([0.0, 0.03, 0.058, 0.095, 0.14, 0.172, 0.155, 0.088, 0.03, 0.0])


def lip_coordinates(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Where rest points lie on the lips: 0 (the slit) to 1 (the border) and beyond; and 1 (middle) to 0 (corner)."""
    width = np.sqrt(np.clip(1.0 - (np.abs(x) / (_MOUTH_HALF_WIDTH + 0.012)) ** 2, 0.0, 1.0))
    cupid = 1.0 - 0.20 * np.exp(-((x / 0.028) ** 2)) + 0.06 * np.exp(-(((np.abs(x) - 0.055) / 0.03) ** 2))
    upper = (y - MOUTH_Y) / (0.066 * width * cupid + 1e-3)
    lower = (MOUTH_Y - y) / (0.088 * width + 1e-3)
    return np.where(y >= MOUTH_Y, upper, lower), width


def _grid_triangles_with_slits(above: NDArray[np.int64], below: NDArray[np.int64]) -> NDArray[np.int32]:
    """Triangles of a grid whose slit vertices are split: a cell's upper corners are `below` its row's slit."""
    return np.concatenate([grid_triangles(np.stack([below[r], above[r + 1]])) for r in range(len(above) - 1)])


def _roll(u: Floats) -> Floats:
    """Cross-section of a lip over 0 (the slit) to 1 (its border): rises at once, is round, falls off softly."""
    u = np.clip(u, 0.0, 1.0)
    return np.asarray((0.55 + 0.45 * np.sin(np.pi * np.clip(u + 0.1, 0, 1))) * (1 - u**2.2) ** 1.2)


def _hinge(points: Floats, angle: Floats) -> Floats:
    """Rotate points [N, 3] about the jaw's axis by angle [N] in radians; positive opens."""
    out = points.copy()
    y, z = points[:, 1] - _JAW_HINGE[1], points[:, 2] - _JAW_HINGE[2]
    cos, sin = np.cos(angle), np.sin(angle)
    out[:, 1] = _JAW_HINGE[1] + y * cos - z * sin
    out[:, 2] = _JAW_HINGE[2] + z * cos + y * sin
    return out
