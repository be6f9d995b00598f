"""A synthetic talking head: an animated character with a mesh and a ground-truth picture of every pose.

No data, no assets and no framework: the demo streams it, and the reference generator is trained to draw it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import InputError
from ..rasterizer import Fragments, Mesh, SurfaceAtlas, condition_raster, rasterize, vertex_normals
from .motion import HeadMotion, HeadParameters, natural_motion
from .paint import Palette, paint
from .shading import BACKDROPS, background, shade
from .shape import HeadShape

__all__ = ["HeadMotion", "HeadParameters", "SyntheticHead"]

Floats = NDArray[np.float32]

ATLAS_SIZE = 64
# A step in depth between neighbouring pixels that counts as an edge, as a share of the picture.
_DEPTH_JUMP = 0.018


class SyntheticHead:
    """One character.

    Args:
        seed: Which character; 0 is the demo's.
        size: Rows and columns of its pictures.

    Attributes:
        mesh: Topology and UV, fixed for the character.

    Raises:
        InputError: If `size` is below 32.
    """

    def __init__(self, seed: int = 0, size: int = 256) -> None:
        if size < 32:
            raise InputError(f"a head of {size} pixels is too small to draw; choose a size of 32 or more")
        self.seed, self.size = seed, size
        rng = np.random.default_rng([seed, 0x5EED])
        self.shape = HeadShape(rng, 0.0 if seed == 0 else 0.12)
        self._texture = paint(self.shape, Palette.draw(rng, seed), rng)
        self._background = background(size, 0 if seed == 0 else int(rng.integers(len(BACKDROPS))))
        self._atlas = SurfaceAtlas(self.shape.mesh, ATLAS_SIZE)

    @property
    def mesh(self) -> Mesh:
        """The mesh's topology and UV."""
        return self.shape.mesh

    def motion(self, frames: int, fps: float = 30.0, seed: int | None = None) -> HeadMotion:
        """Make a natural clip.

        Args:
            frames: Length.
            fps: Frames a second.
            seed: Which take; None takes the character's own.

        Returns:
            The parameters of every frame.

        Raises:
            InputError: If `frames` or `fps` is not positive.
        """
        return natural_motion(frames, fps, self.seed if seed is None else seed)

    def vertices(self, parameters: HeadParameters) -> Floats:
        """Vertices of one frame, float32 [V, 3] in pixels (x right, y down) with depth (smaller is nearer)."""
        return self.shape.project(self.shape.place(parameters), self.size)

    def render(self, parameters: HeadParameters) -> Floats:
        """Draw one frame: the ground truth, float32 [3, size, size] in [-1, 1]."""
        vertices = self.vertices(parameters)
        return self._truth(vertices, self._fragments(vertices))

    def inputs(self, motion: HeadMotion) -> dict[str, Floats]:
        """Inputs of a generator for a clip.

        Args:
            motion: T frames.

        Returns:
            ``condition`` float32 [T, 6, size, size] (see `condition_raster`) and ``atlas`` float32 [T, 3, 64, 64]
            (see `SurfaceAtlas`).
        """
        frames = [self._inputs(vertices, self._fragments(vertices)) for vertices in map(self.vertices, motion)]
        return {name: np.stack([frame[name] for frame in frames]) for name in ("condition", "atlas")}

    def frames(self, motion: HeadMotion) -> Iterator[tuple[dict[str, Floats], Floats]]:
        """Yield (inputs of frame t, each with a leading axis of 1; truth [3, size, size]) from one rasterisation."""
        for parameters in motion:
            vertices = self.vertices(parameters)
            fragments = self._fragments(vertices)
            inputs = {name: array[None] for name, array in self._inputs(vertices, fragments).items()}
            yield inputs, self._truth(vertices, fragments)

    def _inputs(self, vertices: Floats, fragments: Fragments) -> dict[str, Floats]:
        return {
            "condition": condition_raster(vertices, self.mesh, self.size, self.size, fragments),
            "atlas": self._atlas.positions(vertices, fragments),
        }

    def _fragments(self, vertices: Floats) -> Fragments:
        """Rasterise what faces the camera; the rest lies behind it, as every part is closed to the camera."""
        triangles = self.mesh.triangles
        a, b, c = (vertices[triangles[:, k], :2] for k in range(3))
        area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])
        front = np.flatnonzero(area < 0).astype(np.int32)
        found = rasterize(vertices, triangles[front], self.size, self.size)
        owner = np.where(found.mask, front[np.maximum(found.triangle, 0)], -1).astype(np.int32)
        return Fragments(owner, found.barycentric, found.depth)

    def _truth(self, vertices: Floats, fragments: Fragments) -> Floats:
        image = self._background.copy()
        mask = fragments.mask
        attributes = self._attributes(vertices)
        image[mask] = self._shade(attributes, fragments.triangle[mask], fragments.barycentric[mask])
        self._soften_edges(image, vertices, attributes, fragments)
        return np.ascontiguousarray(image.transpose(2, 0, 1) * np.float32(2.0) - np.float32(1.0))

    def _soften_edges(self, image: Floats, vertices: Floats, attributes: Floats, fragments: Fragments) -> None:
        """Redraw the pixels of `image` [size, size, 3] at edges from a tent of 3x3 samples, half a pixel apart.

        Only triangles seen at or next to an edge are rasterised again, on the finer lattice.
        """
        size, triangles = self.size, self.mesh.triangles
        owner, mask = fragments.triangle, fragments.mask
        part = np.where(mask, self.shape.part[triangles[np.maximum(owner, 0), 0]], -1)
        depth = np.where(mask, fragments.depth, 0.0)
        edge = np.zeros_like(mask)
        for a, b in (
            ((slice(1, None),), (slice(None, -1),)),
            ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
        ):
            jump = (part[a] != part[b]) | (np.abs(depth[a] - depth[b]) > _DEPTH_JUMP * size)
            edge[a] |= jump
            edge[b] |= jump
        around = np.pad(edge, 1)
        around = around[:-2] | around[1:-1] | around[2:]
        around = (around[:, :-2] | around[:, 1:-1] | around[:, 2:]) & mask
        seen = np.unique(owner[around])
        if len(seen) == 0:
            return
        # Lattice sample (2i + 1, 2j + 1) is the centre of pixel (i, j).
        fine = rasterize(
            vertices * 2 + np.array([0.5, 0.5, 0], np.float32), triangles[seen], 2 * size + 1, 2 * size + 1
        )
        row, column = np.nonzero(edge)
        needed = np.zeros(fine.triangle.shape, np.bool_)
        for i in range(3):
            for j in range(3):
                needed[2 * row + i, 2 * column + j] = True
        colour = np.empty((2 * size + 1, 2 * size + 1, 3), np.float32)
        at_row, at_column = np.nonzero(needed)
        # Where the lattice finds nothing there is backdrop, or a surface too thin for the first pass: keep its colour.
        colour[at_row, at_column] = image[np.minimum(at_row // 2, size - 1), np.minimum(at_column // 2, size - 1)]
        empty = needed & ~fine.mask
        empty_row, empty_column = (np.minimum(index // 2, size - 1) for index in np.nonzero(empty))
        bare = np.pad(~mask, 1)
        bare = bare[:-2] | bare[1:-1] | bare[2:]
        bare = bare[:, :-2] | bare[:, 1:-1] | bare[:, 2:]
        backdrop = self._background[empty_row, empty_column]
        colour[empty] = np.where(bare[empty_row, empty_column, None], backdrop, colour[empty])
        found = needed & fine.mask
        colour[found] = self._shade(attributes, seen[fine.triangle[found]], fine.barycentric[found])
        total = np.zeros((len(row), 3), np.float32)
        for i, down in enumerate((1.0, 2.0, 1.0)):
            for j, across in enumerate((1.0, 2.0, 1.0)):
                total += np.float32(down * across / 16) * colour[2 * row + i, 2 * column + j]
        image[row, column] = total

    def _attributes(self, vertices: Floats) -> Floats:
        """What shading interpolates: uv, normal and strand direction of the vertices, float32 [V, 8]."""
        normals = vertex_normals(vertices, self.mesh.triangles) * np.array([1, -1, -1], np.float32)
        return np.concatenate([self.mesh.uv, normals, self._tangents(vertices)], 1)

    def _shade(self, attributes: Floats, triangle: NDArray[np.int32], weights: Floats) -> Floats:
        """Shade points given by triangle [N] and barycentric weights [N, 3]: float32 [N, 3], sRGB in [0, 1]."""
        corners = self.mesh.triangles[triangle]
        values = np.zeros((len(triangle), attributes.shape[1]), np.float32)
        for corner in range(3):
            taken = attributes.take(corners[:, corner], 0)
            taken *= weights[:, corner, None]
            values += taken
        return shade(self.shape.part[corners[:, 0]], _unit(values[:, 2:5]), values[:, 5:8], self._sample(values[:, :2]))

    def _tangents(self, vertices: Floats) -> Floats:
        """Direction of the hair's strands at its vertices (0 elsewhere), float32 [V, 3], y up, z to the camera."""
        out = np.zeros_like(vertices)
        rows, columns = self.shape.hair_shape
        grid = vertices[self.shape.hair].reshape(rows, columns, 3)
        # The last row is tucked in; its strands go on as those of the row before.
        along = np.asarray(np.gradient(grid, axis=0))
        along[-2:] = along[-3]
        flat = along.reshape(-1, 3) * np.array([1, -1, -1], np.float32)
        out[self.shape.hair] = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
        return out

    def _sample(self, uv: Floats) -> Floats:
        """Read the texture bilinearly at uv [N, 2]: float32 [N, 6]."""
        size = len(self._texture)
        at = np.clip(uv * size - 0.5, 0, size - 1.001)
        low = at.astype(np.int64)
        fraction = (at - low).astype(np.float32)
        flat = self._texture.reshape(size * size, -1)
        first = low[:, 1] * size + low[:, 0]
        fu, fv = fraction[:, :1], fraction[:, 1:]
        out = flat.take(first, 0) * ((1 - fu) * (1 - fv))
        for offset, weight in ((1, fu * (1 - fv)), (size, (1 - fu) * fv), (size + 1, fu * fv)):
            texel = flat.take(first + offset, 0)
            texel *= weight
            out += texel
        return np.asarray(out)


def _unit(vectors: Floats) -> Floats:
    """Vectors [N, 3] at length 1."""
    x, y, z = vectors[:, 0], vectors[:, 1], vectors[:, 2]
    return np.asarray(vectors / np.sqrt(np.maximum(x * x + y * y + z * z, 1e-12))[:, None])
