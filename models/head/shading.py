"""The head's light: per-pixel shading of what a rasterisation found, in the camera's frame."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .chart import Part
from .paint import KEY_DIRECTION

__all__ = ["BACKDROPS", "background", "shade"]

Floats = NDArray[np.float32]


def _unit(x: float, y: float, z: float) -> Floats:
    v = np.array([x, y, z], np.float32)
    return v / np.linalg.norm(v)


# Lights: directions in x right, y up, z to the camera; colours in linear light.
_KEY, _KEY_COLOUR = _unit(*KEY_DIRECTION), np.array([2.55, 2.26, 1.96], np.float32)
_FILL, _FILL_COLOUR = _unit(0.78, 0.10, 0.62), np.array([0.26, 0.33, 0.44], np.float32)
_RIM_RIGHT, _RIM_RIGHT_COLOUR = _unit(0.86, 0.34, -0.38), np.array([0.75, 1.35, 1.75], np.float32)
_RIM_LEFT, _RIM_LEFT_COLOUR = _unit(-0.90, 0.30, -0.42), np.array([1.5, 0.85, 0.55], np.float32)
_SKY, _GROUND = np.array([0.34, 0.38, 0.46], np.float32), np.array([0.24, 0.17, 0.14], np.float32)
_EYE_LINE = _unit(0, 0, 1)
_HALF_KEY = (_KEY + _EYE_LINE) / np.linalg.norm(_KEY + _EYE_LINE)
_HALF_FILL = (_FILL + _EYE_LINE) / np.linalg.norm(_FILL + _EYE_LINE)
_BOUNCE = np.array([0.15, -0.08, -0.16], np.float32)
# The window mirrored in the eye is placed for looks, inside of the iris and clear of the lid.
_CATCH, _CATCH_FILL = _unit(-0.24, 0.25, 0.93), _unit(0.24, -0.22, 0.94)
# How far light wraps round the terminator, by colour: red travels furthest under the skin.
_WRAP = np.zeros((Part.COUNT, 3), np.float32)
_WRAP[[Part.FACE, Part.EAR, Part.NECK, Part.MOUTH]] = (0.46, 0.24, 0.17)
_WRAP[Part.EYE] = _WRAP[Part.TEETH] = 0.45
_WRAP[Part.HAIR] = _WRAP[Part.SHIRT] = 0.15


def shade(part: NDArray[np.int32], normal: Floats, tangent: Floats, texel: Floats) -> Floats:
    """Shade surface points.

    Args:
        part: int32 [N], each point's `Part`.
        normal: float32 [N, 3], unit normals in x right, y up, z to the camera.
        tangent: float32 [N, 3], strand direction of any length (hair only).
        texel: float32 [N, 6], the texture there, see `paint`.

    Returns:
        float32 [N, 3], sRGB in [0, 1].
    """
    albedo, gloss, ambient, lit = texel[:, :3], texel[:, 3:4], texel[:, 4:5], texel[:, 5:6]
    nv = np.clip(normal[:, 2:3], 0.0, 1.0)
    grazing = (1.0 - nv) ** 2
    fresnel = grazing * grazing * (1.0 - nv)

    wrap = _WRAP[part]
    key = np.clip((normal @ _KEY)[:, None] + wrap, 0.0, None) / (1.0 + wrap)
    # Shadow edges bleed red as the terminator does.
    soft = np.sqrt(np.clip(lit, 0, 1)) * (wrap > 0.2) * 0.25 + lit * (1 - 0.25 * (wrap > 0.2))
    fill = np.clip((normal @ _FILL)[:, None] + 0.35, 0.0, None) / 1.35
    up = 0.5 + 0.5 * normal[:, 1:2]
    # Light bounces between skin and comes out redder: of occlusion a, red keeps about a ** 0.85, blue a ** 1.2.
    occlusion = ambient * (1.0 + _BOUNCE * (1.0 - ambient))
    light = key * key * (0.35 + 0.65 / np.maximum(key, 1e-3)) * soft * _KEY_COLOUR
    light += (fill * _FILL_COLOUR + up * _SKY + (1 - up) * _GROUND) * occlusion
    colour = albedo * light / np.float32(np.pi) * 2.0

    rim = np.clip(normal @ _RIM_RIGHT, 0, None)[:, None] * _RIM_RIGHT_COLOUR
    rim = rim + np.clip(normal @ _RIM_LEFT, 0, None)[:, None] * _RIM_LEFT_COLOUR
    dry = np.where(part == Part.HAIR, np.float32(0.05), np.float32(0.16))[:, None]
    colour += rim * grazing * ambient * (dry + 0.6 * albedo)

    # Highlights: a broad sheen and a tight one by the point's gloss.
    nh, nf = np.clip(normal @ _HALF_KEY, 0, 1)[:, None], np.clip(normal @ _HALF_FILL, 0, 1)[:, None]
    surface = (part != Part.HAIR)[:, None]
    broad = _power(nh, 4)
    tight = np.where(gloss > 0.6, _power(broad, 2), broad * _power(nh, 4) * _power(nh, 3))
    sheen = (
        lit * (0.05 * broad + 0.20 * tight) * gloss
        + ambient * 0.03 * gloss * _power(nf, 4) * _power(nf, 3)
        + 0.10 * fresnel * gloss * ambient
    )
    colour += surface * sheen * np.float32(1.0)

    hair = np.flatnonzero(part == Part.HAIR)
    if len(hair):
        colour[hair] += _strand_light(normal[hair], tangent[hair], texel[hair])
    eye = np.flatnonzero(part == Part.EYE)
    if len(eye):
        colour[eye] += _catch_light(normal[eye], ambient[eye])
    return _display(colour)


def _strand_light(normal: Floats, tangent: Floats, texel: Floats) -> Floats:
    """Two shifted highlights across the strands (Kajiya and Kay 1989; the shift after Marschner et al. 2003)."""
    shift = (texel[:, 3:4] - 0.5) * 0.28
    out = np.zeros_like(normal)
    for half, light, colour in (
        (_HALF_KEY, _KEY, _KEY_COLOUR * texel[:, 5:6]),
        (_HALF_FILL, _FILL, 0.15 * _FILL_COLOUR * texel[:, 4:5]),
    ):
        lit = np.clip((normal @ light)[:, None] * 1.3 + 0.10, 0, 1)
        for offset, power, weight, tint in ((-0.10, 120.0, 0.07, 1.0), (0.12, 22.0, 0.48, texel[:, :3])):
            along = tangent + (shift + offset) * normal
            along /= np.linalg.norm(along, axis=1, keepdims=True)
            across = np.sqrt(np.clip(1.0 - (along @ half)[:, None] ** 2, 0.0, 1.0))
            out += lit * colour * weight * tint * across**power
    return np.asarray(out * texel[:, 4:5])


def _catch_light(normal: Floats, ambient: Floats) -> Floats:
    """The key's softbox and a weak second light mirrored in the wet eye."""
    nh, nf = np.clip(normal @ _CATCH, 0, 1)[:, None], np.clip(normal @ _CATCH_FILL, 0, 1)[:, None]
    edge = np.clip((nh - 0.972) / 0.012, 0, 1)
    second = np.clip((nf - 0.985) / 0.012, 0, 1)
    return np.asarray((edge * edge * (3 - 2 * edge) * 1.5 + second * 0.22) * np.clip(ambient * 1.6, 0, 1), np.float32)


def _display(linear: Floats) -> Floats:
    """Filmic curve (Hable's shape, fitted rationally by Narkowicz 2015) and display gamma."""
    # The curve is read from a table over the square root of light, which is even to the eye: steps below 1/1000.
    index = np.sqrt(np.clip(linear, 0.0, _CURVE_END)) * np.float32((len(_CURVE) - 1) / np.sqrt(_CURVE_END))
    return np.asarray(_CURVE.take((index + 0.5).astype(np.int32)), np.float32)


def _power(x: Floats, doublings: int) -> Floats:
    """x ** (2 ** doublings), by squaring: many times faster than a general power."""
    for _ in range(doublings):
        x = x * x
    return x


def _curve(count: int) -> Floats:
    x = np.linspace(0.0, np.sqrt(_CURVE_END), count) ** 2 * 0.62
    mapped = (x * (2.51 * x + 0.03)) / (x * (2.43 * x + 0.59) + 0.14)
    return np.asarray(np.clip(mapped, 0.0, 1.0) ** (1 / 2.2), np.float32)


_CURVE_END = 16.0
_CURVE = _curve(16384)


def background(size: int, choice: int) -> Floats:
    """A studio backdrop with a soft pool of light behind the head, float32 [size, size, 3], sRGB in [0, 1]."""
    wall, light = (np.array(colour, np.float32) for colour in BACKDROPS[choice])
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    pool = np.exp(-(((x - 0.46) / 0.45) ** 2) - ((y - 0.42) / 0.50) ** 2)[..., None]
    shaded = wall * (1.12 - 0.40 * y[..., None])
    return np.asarray(shaded + pool * (light - shaded) * 0.85, np.float32)


# Wall and pool of light, sRGB.
BACKDROPS = (
    ((0.10, 0.25, 0.30), (0.56, 0.80, 0.78)),
    ((0.12, 0.26, 0.34), (0.62, 0.80, 0.86)),
    ((0.72, 0.50, 0.42), (1.00, 0.87, 0.74)),
    ((0.20, 0.27, 0.40), (0.66, 0.74, 0.88)),
    ((0.30, 0.24, 0.34), (0.86, 0.74, 0.80)),
)
