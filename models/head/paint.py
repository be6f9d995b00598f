"""The head's paint: colour, gloss and baked occlusion of every surface point, drawn into one UV texture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..rasterizer import interpolate, rasterize, vertex_normals
from .chart import Part, smoothstep
from .face import EYE_CENTRE, EYE_HALF_WIDTH, EYE_SLIT_Y, lip_coordinates
from .motion import HeadParameters
from .shape import HeadShape

__all__ = ["Palette", "paint"]

Floats = NDArray[np.float64]
TEXTURE_SIZE = 768
_OCCLUSION_SIZE = 320
# Where the key light comes from in the picture's frame (x right, y up, z to the camera).
KEY_DIRECTION = np.array([-0.52, 0.62, 0.59])


@dataclass(frozen=True)
class Palette:
    """A character's colours, sRGB in 0..1."""

    skin: tuple[float, float, float]
    blush: tuple[float, float, float]
    lips: tuple[float, float, float]
    hair: tuple[float, float, float]
    iris: tuple[float, float, float]
    shirt: tuple[float, float, float]
    trim: tuple[float, float, float]
    freckles: float

    @staticmethod
    def draw(rng: np.random.Generator, seed: int) -> Palette:
        """Colours of a character; seed 0 is fixed."""
        if seed == 0:
            skin, hair, iris, shirt = _SKINS[0], _HAIRS[0], _IRISES[0], _SHIRTS[0]
            freckles = 0.8
        else:
            skin, hair = _SKINS[rng.integers(len(_SKINS))], _HAIRS[rng.integers(len(_HAIRS))]
            iris, shirt = _IRISES[rng.integers(len(_IRISES))], _SHIRTS[rng.integers(len(_SHIRTS))]
            freckles = float(rng.uniform(0, 1))
        return Palette(*skin, hair, iris, *shirt, freckles)


def _rgb(code: int) -> tuple[float, float, float]:
    return ((code >> 16) / 255, (code >> 8 & 255) / 255, (code & 255) / 255)


# Skin, blush, lips.
_SKINS = [
    (_rgb(0xEFBB9A), _rgb(0xE27F66), _rgb(0xCC6A5F)),
    (_rgb(0xF2CDB4), _rgb(0xE9958A), _rgb(0xCE6F6E)),
    (_rgb(0xC8957A), _rgb(0xBE6650), _rgb(0xA9524A)),
    (_rgb(0x86614E), _rgb(0x8A4433), _rgb(0x7E3B36)),
    (_rgb(0xDDAC8A), _rgb(0xD17D62), _rgb(0xB95A52)),
]
_HAIRS = [_rgb(0x8A3B1E), _rgb(0x3A2418), _rgb(0xC9944A), _rgb(0x1E1A1C), _rgb(0x5B3A4E), _rgb(0x2F5D6B)]
_IRISES = [_rgb(0x2FA38C), _rgb(0x4C86C6), _rgb(0x8A5A2B), _rgb(0x6F8F3A), _rgb(0x6A5BB5)]
_SHIRTS = [
    (_rgb(0xE59E2C), _rgb(0xF2ECDD)),
    (_rgb(0x1F5F73), _rgb(0xF2B84B)),
    (_rgb(0xC8503C), _rgb(0xF3E3C8)),
    (_rgb(0x3E4A89), _rgb(0x8FD3C8)),
    (_rgb(0x4F7A4C), _rgb(0xF0D9A0)),
    (_rgb(0x5A3E6B), _rgb(0xF0A6A0)),
]


def to_linear(srgb: object) -> Floats:
    """Display values in 0..1 to linear light (gamma 2.2)."""
    return np.asarray(srgb, np.float64) ** 2.2


def paint(shape: HeadShape, palette: Palette, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw the texture.

    Args:
        shape: The geometry; its charts fix where things are.
        palette: Colours.
        rng: Draws freckles and strands.

    Returns:
        float32 [S, S, 6]: linear red, green, blue; gloss (for hair: how far a strand shifts the highlight);
        ambient visibility; visibility of the key light. Texels around the charts repeat their border.
    """
    mesh = shape.mesh
    fragments = rasterize(mesh.uv * TEXTURE_SIZE, mesh.triangles, TEXTURE_SIZE, TEXTURE_SIZE)
    local = interpolate(fragments, mesh.triangles, shape.local).astype(np.float64)
    part = np.where(fragments.mask, shape.part[mesh.triangles[np.maximum(fragments.triangle, 0), 0]], -1)
    texture = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE, 6), np.float64)
    texture[..., 4:] = _upsample(_bake_visibility(shape), TEXTURE_SIZE)
    painters = {
        Part.FACE: _face,
        Part.LASHES: _lashes,
        Part.EYE: _eye,
        Part.TEETH: _teeth,
        Part.EAR: _ear,
        Part.HAIR: _hair,
        Part.NECK: _neck,
        Part.SHIRT: _shirt,
    }
    for kind, painter in painters.items():
        where = part == kind
        colour, gloss = painter(local[where], palette, rng)
        texture[where, :3], texture[where, 3] = colour, gloss
    # The bake sees the mouth closed; inside, the paint itself darkens with depth.
    inside = ((part == Part.FACE) & (local[..., 2] > 0)) | (part == Part.TEETH)
    texture[inside, 4:] = (0.85, 0.65)
    # Nothing lights the jaw from below: without this, rim light draws a bright line along it.
    jaw = (part == Part.FACE) & (local[..., 1] < -0.94)
    texture[jaw, 4] *= 1.0 - 0.6 * smoothstep(-0.955, -0.985, local[jaw, 1])
    # Light also reaches the eye through its lids' thin edges and by its own wet surface.
    texture[part == Part.EYE, 4:] = 0.40 + 0.60 * texture[part == Part.EYE, 4:]
    texture[part == Part.LASHES, 4:] = (0.80, 0.70)
    return _extend(texture, fragments.mask, 4).astype(np.float32)


def _mix(base: Floats, colour: Floats, amount: Floats) -> Floats:
    return np.asarray(base + amount[..., None] * (colour - base))


def _skin(count: int, palette: Palette) -> Floats:
    return np.broadcast_to(to_linear(palette.skin), (count, 3)).copy()


def _face(local: Floats, palette: Palette, rng: np.random.Generator) -> tuple[Floats, Floats]:
    x, y, bag = local.T
    ax = np.abs(x)
    colour = _skin(len(x), palette)
    gloss = np.full(len(x), 0.42)
    blush = to_linear(palette.blush)

    def bump(cx: float, cy: float, sx: float, sy: float) -> Floats:
        return np.asarray(np.exp(-(((ax - cx) / sx) ** 2) - ((y - cy) / sy) ** 2))

    colour = _mix(
        colour, blush, np.clip(0.62 * bump(0.42, -0.34, 0.19, 0.12) + 0.45 * bump(0.0, -0.335, 0.11, 0.08), 0, 1)
    )
    colour = _mix(colour, blush, 0.28 * bump(0.0, -0.89, 0.14, 0.09) + 0.22 * bump(0.30, 0.03, 0.22, 0.09))
    colour *= 1.0 + 0.035 * _noise(x * 9, y * 9, rng)[:, None] + 0.02 * _noise(x * 34, y * 34, rng)[:, None]
    # Freckles: over the nose and the cheeks.
    for _ in range(int(90 * palette.freckles)):
        fx, fy = rng.normal(0, 0.27), rng.normal(-0.27, 0.065)
        radius = rng.uniform(0.006, 0.011)
        near = (np.abs(x - fx) < 0.03) & (np.abs(y - fy) < 0.03)
        spot = np.exp(-((((x[near] - fx) ** 2 + (y[near] - fy) ** 2) / radius**2) ** 1.5))
        colour[near] = _mix(colour[near], colour[near] * (0.62, 0.46, 0.38), rng.uniform(0.3, 0.75) * spot)
    # Nostrils.
    nostril = np.exp(-((((ax - 0.052) / 0.034) ** 2 + ((y + 0.408) / 0.016) ** 2) ** 1.4))
    colour = _mix(colour, colour * (0.22, 0.12, 0.10), nostril)
    # Lips.
    lips, rolled = _lip_masks(x, y)
    colour = _mix(colour, to_linear(palette.lips), 0.88 * lips)
    gloss += lips * 0.42 * rolled
    gloss += (
        0.30 * bump(0.0, -0.30, 0.055, 0.075)
        + 0.16 * bump(0.0, -0.05, 0.05, 0.16)
        + 0.12 * bump(0.36, -0.25, 0.16, 0.09)
    )
    # The line between the lips, which the slit itself is too thin to draw.
    seam = smoothstep(0.20, 0.0, lip_coordinates(x, y)[0]) * smoothstep(0.02, 0.25, lip_coordinates(x, y)[1])
    colour = _mix(colour, to_linear(palette.lips) * (0.22, 0.14, 0.14), 0.85 * seam)
    # Lids: a warm shade, and the dark root of the lashes along the upper margin.
    ex, ey = (ax - EYE_CENTRE[0]) / EYE_HALF_WIDTH, y - EYE_SLIT_Y
    lid = np.exp(-((ex / 1.05) ** 4)) * np.exp(-((np.maximum(ey, 0) / 0.16) ** 2)) * (ey > 0)
    colour = _mix(colour, colour * (0.80, 0.60, 0.55), 0.55 * lid)
    line = smoothstep(0.030, 0.012, ey) * (ey > 0) * smoothstep(1.04, 0.96, np.abs(ex))
    colour = _mix(colour, to_linear(palette.hair) * 0.10 + 0.004, line)
    # Brows: an arch that tapers outwards, with strands.
    t = (ax - 0.13) / 0.40
    arch = 0.262 + 0.058 * np.sin(np.pi * 0.80 * np.clip(t, 0, 1.1)) - 0.030 * np.clip(t, 0, 1.2) ** 2
    thick = 0.034 * (1.0 - 0.72 * np.clip(t, 0, 1) ** 1.6) * smoothstep(-0.06, 0.12, t)
    inside = (
        smoothstep(1.15, 0.72, np.abs(y - arch) / np.maximum(thick, 1e-4))
        * smoothstep(-0.04, 0.06, t)
        * smoothstep(1.04, 0.94, t)
    )
    strands = 0.94 + 0.06 * np.sin((ax * 1.0 + (y - arch) * 0.9) * 120 + 3 * _noise(x * 20, y * 20, rng))
    colour = _mix(colour, to_linear(palette.hair) * 0.42, inside * strands)
    gloss *= 1 - 0.7 * inside
    # The inside of the mouth: lip, palate and throat, tongue, lip.
    inner = bag > 0
    rim = np.minimum(bag, 1 - bag)
    mouth = to_linear((0.36, 0.09, 0.10)) * np.ones((len(x), 1))
    tongue = smoothstep(0.52, 0.70, bag) * smoothstep(1.0, 0.5, np.abs(x))
    mouth = _mix(mouth, to_linear((0.80, 0.36, 0.36)), tongue)
    mouth = _mix(mouth, to_linear(palette.lips) * (0.42, 0.30, 0.30), smoothstep(0.26, 0.10, rim))
    colour = np.where(inner[:, None], mouth, colour)
    gloss = np.where(inner, 0.55, gloss)
    return colour, gloss


def _lip_masks(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    u, width = lip_coordinates(x, y)
    return smoothstep(1.02, 0.80, u) * smoothstep(0.0, 0.15, width), np.exp(-(((u - 0.4) / 0.35) ** 2))


def _lashes(local: Floats, palette: Palette, rng: np.random.Generator) -> tuple[Floats, Floats]:
    kind = local[:, 2:]
    outward, across = local[:, 0], local[:, 1]
    rim = np.broadcast_to(to_linear(palette.skin) * (0.95, 0.66, 0.60), (len(local), 3))
    corner = smoothstep(-0.70, -0.95, outward)
    lash = _mix(rim, to_linear(palette.hair) * 0.08 + 0.003, smoothstep(0.80, 0.55, across) * (1 - corner))
    return np.where(kind < 0.5, lash, rim), np.where(kind[:, 0] < 0.5, 0.05, 0.5)


def _eye(local: Floats, palette: Palette, rng: np.random.Generator) -> tuple[Floats, Floats]:
    x, y, _ = local.T
    r, phi = np.hypot(x, y), np.arctan2(y, x)
    iris_r, pupil_r = 0.565, 0.245
    white = to_linear((0.955, 0.945, 0.935))
    colour = _mix(
        np.broadcast_to(white, (len(x), 3)).copy(), to_linear((0.86, 0.62, 0.58)), smoothstep(0.75, 1.35, r) * 0.5
    )
    iris = to_linear(palette.iris)
    fibres = 0.5 + 0.5 * np.sin(phi * 23 + 2.5 * np.sin(phi * 7) + 6 * r)
    fibres = 0.65 * fibres + 0.35 * (0.5 + 0.5 * np.sin(phi * 41 + 1.7 * np.sin(phi * 5 + 1)))
    t = np.clip((r - pupil_r) / (iris_r - pupil_r), 0, 1)
    # Light enters from above and gathers below: the iris glows at the bottom (y runs down on this chart).
    glow = 0.55 + 0.75 * smoothstep(-0.45, 0.50, y)
    body = iris * (0.75 + 0.75 * fibres[:, None] * (1 - t[:, None]) ** 0.4) * glow[:, None]
    body = _mix(body, to_linear((0.92, 0.72, 0.35)), 0.35 * np.exp(-(((t - 0.12) / 0.16) ** 2)) * (0.4 + 0.6 * fibres))
    body = _mix(body, iris * 0.10, smoothstep(0.66, 1.0, t))
    body = _mix(body, np.array([0.004, 0.004, 0.006]), smoothstep(pupil_r + 0.03, pupil_r - 0.01, r))
    colour = _mix(colour, body, smoothstep(iris_r + 0.035, iris_r - 0.025, r))
    return colour, np.full(len(x), 1.0)


def _teeth(local: Floats, palette: Palette, rng: np.random.Generator) -> tuple[Floats, Floats]:
    x, down, _ = local.T
    gap = np.exp(-(((np.mod(x * 4.0 + 0.5, 1.0) - 0.5) / 0.045) ** 2)) * (np.abs(x) > 0.06) + np.exp(
        -((x / 0.012) ** 2)
    )
    colour = np.broadcast_to(to_linear((0.965, 0.95, 0.92)), (len(x), 3)) * (1 - 0.25 * np.clip(gap, 0, 1))[:, None]
    colour = _mix(colour, to_linear((0.80, 0.42, 0.42)), smoothstep(0.30, 0.12, down))
    return colour * (1 - 0.75 * smoothstep(0.5, 1.0, np.abs(x)))[:, None], np.full(len(x), 0.8)


def _ear(local: Floats, palette: Palette, rng: np.random.Generator) -> tuple[Floats, Floats]:
    r = local[:, 0]
    colour = _skin(len(r), palette)
    colour = _mix(colour, to_linear(palette.blush), 0.30 + 0.35 * smoothstep(0.6, 1.0, r))
    colour = _mix(colour, colour * (0.6, 0.38, 0.34), np.exp(-((r / 0.4) ** 2)))
    return colour, np.full(len(r), 0.35)


def _hair(local: Floats, palette: Palette, rng: np.random.Generator) -> tuple[Floats, Floats]:
    saw, t, azimuth = local.T
    strands = 0.6 * _noise(azimuth * 0.55, t * 2.2, rng) + 0.4 * _noise(azimuth * 1.4, t * 3.5, rng)
    base = to_linear(palette.hair)
    colour = base * (0.80 + 0.35 * strands + 0.30 * smoothstep(0.35, 1.0, t))[:, None]
    colour = _mix(colour, base * (1.9, 1.75, 1.5), 0.30 * smoothstep(0.55, 1.0, t))
    # Valleys between the clumps.
    colour *= (1 - 0.62 * np.abs(saw) ** 3 * smoothstep(0.08, 0.35, t))[:, None]
    return colour, 0.5 + 0.5 * strands


def _neck(local: Floats, palette: Palette, rng: np.random.Generator) -> tuple[Floats, Floats]:
    colour = _skin(len(local), palette)
    return _mix(colour, to_linear(palette.blush), np.full(len(local), 0.12)), np.full(len(local), 0.3)


def _shirt(local: Floats, palette: Palette, rng: np.random.Generator) -> tuple[Floats, Floats]:
    angle, row, _ = local.T
    base, trim = to_linear(palette.shirt), to_linear(palette.trim)
    weave = 0.5 * _noise(angle * 60, row * 60, rng) + 0.5 * np.sin(angle * 210) * np.sin(row * 190)
    colour = base * (1 + 0.10 * weave)[:, None]
    collar = smoothstep(0.43, 0.41, row)
    ribs = 0.85 + 0.15 * np.sin(angle * 95)
    colour = _mix(colour, trim * ribs[:, None], collar)
    stitch = np.exp(-(((row - 0.47) / 0.006) ** 2)) * (np.sin(angle * 120) > -0.2)
    return _mix(colour, trim, 0.6 * stitch), np.full(len(local), 0.08)


def _noise(x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    """Value noise in [-1, 1] at points (x, y), one unit between its knots."""
    table = rng.uniform(-1, 1, (64, 64))
    xi, yi = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = smoothstep(0, 1, x - xi), smoothstep(0, 1, y - yi)
    a, b = table[yi % 64, xi % 64], table[yi % 64, (xi + 1) % 64]
    c, d = table[(yi + 1) % 64, xi % 64], table[(yi + 1) % 64, (xi + 1) % 64]
    return np.asarray((a + (b - a) * fx) * (1 - fy) + (c + (d - c) * fx) * fy)


def _bake_visibility(shape: HeadShape) -> Floats:
    """Share of the sky, and of the key light's cone, that every texel sees, float64 [S, S, 2].

    The head at rest is looked at from many directions; a texel is lit from one if it is nearest there.
    """
    size = _OCCLUSION_SIZE
    mesh = shape.mesh
    rest = shape.place(HeadParameters(smile=0.2))
    # Oriented as the picture: y down, z away, so that the mesh's winding and the normals agree.
    points = (rest * (1, -1, -1)).astype(np.float32)
    atlas = rasterize(mesh.uv * size, mesh.triangles, size, size)
    where = atlas.mask
    position = interpolate(atlas, mesh.triangles, points)[where].astype(np.float64)
    normal = interpolate(atlas, mesh.triangles, vertex_normals(points, mesh.triangles))[where].astype(np.float64)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)

    def seen(direction: Floats) -> Floats:
        axis = direction / np.linalg.norm(direction)
        right = np.cross((0.0, 1.0, 0.0), axis)
        right /= np.linalg.norm(right)
        frame = np.stack([right, np.cross(axis, right), -axis])
        # 160 samples across 4.6 units; a bias of 1.2 samples' depth against self-shadowing.
        grid, unit = 160, 160 / 4.6
        view = (points @ frame.T * unit + (grid / 2, grid / 2, 0)).astype(np.float32)
        depth = rasterize(view, mesh.triangles, grid, grid).depth
        at = (position + 0.03 * normal) @ frame.T * unit + (grid / 2, grid / 2, 0)
        u, v = np.clip(at[:, 0] - 0.5, 0, grid - 1.001), np.clip(at[:, 1] - 0.5, 0, grid - 1.001)
        ui, vi = u.astype(np.int64), v.astype(np.int64)
        fu, fv = u - ui, v - vi
        lit = [(depth[vi + j, ui + i] > at[:, 2] - 1.2).astype(np.float64) for j in (0, 1) for i in (0, 1)]
        return np.asarray((lit[0] * (1 - fu) + lit[1] * fu) * (1 - fv) + (lit[2] * (1 - fu) + lit[3] * fu) * fv)

    result = np.ones((size, size, 2))
    # Directions spread over the front of the sphere by the golden angle; the back never lights what is seen.
    index = np.arange(40)
    z = 1.0 - 1.45 * (index + 0.5) / 40
    phi = index * np.pi * (3 - np.sqrt(5))
    total = np.zeros(len(position))
    weight = np.zeros(len(position))
    for direction in np.stack([np.sqrt(1 - z * z) * np.cos(phi), np.sqrt(1 - z * z) * np.sin(phi), -z], 1):
        facing = np.clip(normal @ direction, 0.0, 1.0) + 1e-3
        total += facing * seen(direction)
        weight += facing
    result[where, 0] = total / weight
    key = KEY_DIRECTION * (1, -1, -1)
    lit = np.zeros(len(position))
    offsets = [(0.0, 0.0)] + [(0.26 * np.cos(a), 0.26 * np.sin(a)) for a in np.arange(9) * 2 * np.pi / 9]
    for dx, dy in offsets:
        lit += seen(key + np.array([dx, dy, 0.0]))
    result[where, 1] = lit / len(offsets)
    # The noise of finitely many directions is finer than anything real: smooth within the charts.
    return _smooth(_extend(result, where, 4), 2)


def _smooth(image: Floats, steps: int) -> Floats:
    for _ in range(steps):
        for axis in (0, 1):
            image = 0.5 * image + 0.25 * (np.roll(image, 1, axis) + np.roll(image, -1, axis))
    return image


def _extend(image: Floats, mask: NDArray[np.bool_], steps: int) -> Floats:
    """Repeat the charts' border outwards, so that reading between texels never mixes in the empty."""
    image, mask = image * mask[..., None], mask.astype(np.float64)
    for _ in range(steps):
        total, weight = np.zeros_like(image), np.zeros_like(mask)
        for shift in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            total += np.roll(image, shift, (0, 1))
            weight += np.roll(mask, shift, (0, 1))
        fill = (mask == 0) & (weight > 0)
        image[fill] = total[fill] / weight[fill, None]
        mask = np.maximum(mask, fill)
    return image


def _upsample(image: Floats, size: int) -> Floats:
    """Bilinear enlargement of [S, S, C] to [size, size, C]."""
    at = np.clip((np.arange(size) + 0.5) * len(image) / size - 0.5, 0, len(image) - 1.001)
    i, f = at.astype(np.int64), at - at.astype(np.int64)
    rows = image[i] * (1 - f)[:, None, None] + image[i + 1] * f[:, None, None]
    return np.asarray(rows[:, i] * (1 - f)[None, :, None] + rows[:, i + 1] * f[None, :, None])
