"""Mesh conditions made on the GPU: UV, normal and mask of a frame, the surface's motion, and the surface atlas.

`reference.rasterizer` is the same in NumPy and has the conventions. Triangle and depth of every pixel are the
reference's to the bit: both work in the same order, edges in float64, and nothing depends on the order of threads.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import check_array
from .array import DeviceArray
from .driver import Context, check, load, size_text
from .errors import DeviceError, InputError
from .loader import KernelLibrary, Launch, LaunchSequence
from .reference.rasterizer import Mesh, SurfaceAtlas

__all__ = ["MeshRasterizer", "unpack_keys"]

logger = logging.getLogger(__name__)

_FLOATS = {"float32": "f32", "float16": "f16"}
_EMPTY = 0xFFFFFFFFFFFFFFFF  # of bytes 0xFF
_LARGEST_EXTENT = 1 << 15  # of a picture: its pixels are counted in 32 bits
_LARGEST_MESH = 1 << 24  # triangles or vertices: eight numbers of each are counted in 32 bits
_THREADS = 256
_PREPARE_BLOCKS = 2048
# As in rasterizer.cu: a warp's pixels, and how many such blocks make a triangle large.
_BLOCK_COLUMNS, _BLOCK_ROWS = 8, 4
_LARGE_BLOCKS = 64
_DRAW_WARPS = 4
# Thread blocks that draw the large triangles together: enough warps to fill a GPU of 32 multiprocessors, and still few
# to start where there is no large triangle.
_LARGE_GRID = 512
_SETUP = 8  # numbers a triangle


class MeshRasterizer:
    """Draws one mesh, frame after frame, at one size. All memory is taken here, none per frame.

    Calls return at once and are ordered by the stream they name. They share memory: calls on several streams are
    ordered by the caller, with events.

    Args:
        context: The GPU.
        mesh: Topology and UV; copied.
        height: Rows of the picture.
        width: Columns of the picture.
        cull_back: Leave out triangles that face away from the camera.
        frames: How many frames are held at a time, for motion between them; each takes 8 bytes a pixel, 12 a vertex
            and 64 a triangle. A frame that was not rendered yet is empty.
        atlas: The surface atlas to place, made from the same mesh; None if none is wanted.

    Raises:
        InputError: If mesh, size or atlas do not fit together.
        BackendError: If the kernels cannot be compiled.
        DeviceError: If there is no room.
    """

    def __init__(
        self,
        context: Context,
        mesh: Mesh,
        height: int,
        width: int,
        *,
        cull_back: bool = False,
        frames: int = 1,
        atlas: SurfaceAtlas | None = None,
    ) -> None:
        _check_mesh(mesh)
        for name, extent in (("height", height), ("width", width)):
            if not 1 <= extent <= _LARGEST_EXTENT:
                raise InputError(f"{name} is {extent}, expected 1 to {_LARGEST_EXTENT}")
        if frames < 1:
            raise InputError(f"frames is {frames}, expected 1 or more")
        vertices, triangles = len(mesh.uv), len(mesh.triangles)
        if atlas is not None and len(atlas.corners) and atlas.corners.max() >= vertices:
            raise InputError(
                f"the atlas was made from another mesh: this one has {vertices} vertices; make it from this"
            )
        self.height, self.width, self.frames = height, width, frames
        self.vertex_count, self.triangle_count = vertices, triangles
        self._context = context
        self._cull_back = cull_back
        self._atlas_size = 0 if atlas is None else atlas.size
        incidence, faces = _incidence(mesh.triangles, vertices)
        constants: dict[str, NDArray[Any]] = {
            "triangles": np.ascontiguousarray(mesh.triangles),
            "uv": np.ascontiguousarray(mesh.uv),
            "incidence": incidence,
            "faces": faces,
        }
        if atlas is not None:
            constants["corners"], constants["texel_weights"] = _dense_atlas(atlas)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "normals": ((vertices, 3), "float32"),
            "boxes": ((triangles, 4), "int32"),
            "large": ((1 + triangles,), "int32"),
        }
        for frame in range(frames):
            shapes[f"keys.{frame}"] = ((height, width), "uint64")
            shapes[f"vertices.{frame}"] = ((vertices, 3), "float32")
            shapes[f"setups.{frame}"] = ((triangles, _SETUP), "float64")
        self._library = KernelLibrary(context, "rasterizer.cu")
        names = ["prepare", "draw"]
        names += [f"{what}_{suffix}" for what in ("resolve", "motion", "atlas") for suffix in _FLOATS.values()]
        # All of them now: a kernel that is loaded while a stream is captured breaks the capture.
        self._kernels = {name: self._library.function(f"rasterizer_{name}") for name in names}
        self._memory = _Memory(context, constants, shapes, {f"keys.{frame}": 0xFF for frame in range(frames)})

    def keys(self, frame: int = 0) -> DeviceArray:
        """What is seen at every pixel of a held frame, uint64 [H, W]; `unpack_keys` says what is in it."""
        return self._memory.arrays[f"keys.{self._checked(frame)}"]

    def prepare_render(self, vertices_px: DeviceArray, condition: DeviceArray, *, frame: int = 0) -> LaunchSequence:
        """Everything of a `render` but its stream, to be launched again and again; both arrays must stay.

        Args:
            vertices_px: float32 [V, 3], contiguous: x and y in pixels, and depth. A leading axis of 1 is allowed. What
                is not finite is not drawn.
            condition: float32 or float16 [1, 6, H, W], contiguous; written: u, v, the unit normal's x, y, z, and the
                mask, all 0 where the mesh is not.
            frame: Which of the held frames becomes this one.

        Raises:
            InputError: If an array is on another device, or of another dtype, shape or layout.
        """
        self._check(vertices_px, "vertices_px", (self.vertex_count, 3), ("float32",))
        self._check(condition, "condition", (6, self.height, self.width), tuple(_FLOATS))
        of = self._parts(frame)
        triangles, height, width = self.triangle_count, self.height, self.width
        threads = max(triangles, self.vertex_count, -(-height * width // 4))
        read = vertices_px, *of("triangles", "incidence", "faces")
        made = of("vertices", "normals", "setups", "boxes", "large", "keys")
        prepare = self._launch(
            "prepare",
            min(-(-threads // _THREADS), _PREPARE_BLOCKS),
            (*read, self.vertex_count, triangles, height, width, self._cull_back, *made),
        )
        blocks = -(-width // _BLOCK_COLUMNS) * -(-height // _BLOCK_ROWS)
        small_grid = -(-triangles // _DRAW_WARPS)
        large_grid = 0 if blocks <= _LARGE_BLOCKS else min(-(-blocks // _DRAW_WARPS), _LARGE_GRID)
        drawn = of("vertices", "triangles", "setups", "boxes", "large")
        draw = self._launch(
            "draw",
            small_grid + large_grid,
            (*drawn, triangles, small_grid, width, *of("keys")),
            threads=32 * _DRAW_WARPS,
        )
        seen = of("keys", "setups", "triangles", "uv", "normals")
        resolve = self._launch_over(height * width, "resolve", condition, (*seen, height, width, *of("large")))
        # A grid without blocks is refused by the driver.
        return LaunchSequence(*((prepare, draw, resolve) if triangles else (prepare, resolve)), keeps=self._memory)

    def render(self, vertices_px: DeviceArray, condition: DeviceArray, *, stream: int, frame: int = 0) -> None:
        """Draw a frame, on the stream with handle `stream`; see `prepare_render`."""
        self.prepare_render(vertices_px, condition, frame=frame).launch(stream)

    def prepare_motion(self, motion: DeviceArray, *, frame: int, source: int) -> LaunchSequence:
        """Everything of a `motion` but its stream, to be launched again and again; the array must stay.

        Args:
            motion: float32 or float16 [1, 3, H, W], contiguous; written: for every pixel of `frame` the backward flow
                dx, dy in pixels to where its surface point was in `source`, and 1 where that point was visible there;
                all 0 outside the mesh. float16 saturates at 65504.
            frame: Frame t, one of those held.
            source: Frame s, one of those held.

        Raises:
            InputError: As `prepare_render`, or if no such frame is held.
        """
        self._check(motion, "motion", (3, self.height, self.width), tuple(_FLOATS))
        parts = self._parts(frame)("keys", "setups", "triangles") + self._parts(source)("vertices", "keys")
        launch = self._launch_over(self.height * self.width, "motion", motion, (*parts, self.height, self.width))
        return LaunchSequence(launch, keeps=self._memory)

    def motion(self, motion: DeviceArray, *, stream: int, frame: int, source: int) -> None:
        """Find how the surface moved between two rendered frames, on the stream `stream`; see `prepare_motion`."""
        self.prepare_motion(motion, frame=frame, source=source).launch(stream)

    def prepare_atlas(self, atlas: DeviceArray, *, frame: int = 0) -> LaunchSequence:
        """Everything of a `place_atlas` but its stream, to be launched again and again; the array must stay.

        Args:
            atlas: float32 or float16 [1, 3, h, w], contiguous; written: for every texel of the surface x and y in
                grid_sample coordinates and 1 where its point is visible; all 0 for texels of no surface.
            frame: Which of the held frames.

        Raises:
            InputError: As `prepare_render`, or if the rasteriser was made without an atlas.
        """
        if not self._atlas_size:
            raise InputError("the rasteriser was made without an atlas; give it one: MeshRasterizer(..., atlas=...)")
        self._check(atlas, "atlas", (3, self._atlas_size, self._atlas_size), tuple(_FLOATS))
        parts = self._parts(frame)("vertices", "keys", "corners", "texel_weights")
        texels = self._atlas_size**2
        scale = 2.0 / self.width, 2.0 / self.height
        launch = self._launch_over(texels, "atlas", atlas, (*parts, texels, self.height, self.width, *scale))
        return LaunchSequence(launch, keeps=self._memory)

    def place_atlas(self, atlas: DeviceArray, *, stream: int, frame: int = 0) -> None:
        """Place the surface atlas in a rendered frame, on the stream with handle `stream`; see `prepare_atlas`."""
        self.prepare_atlas(atlas, frame=frame).launch(stream)

    def close(self) -> None:
        """Give memory and kernels back; safe to call twice. What was launched must have ended."""
        self._library.close()
        self._memory.close()

    def _checked(self, frame: int) -> int:
        if not 0 <= frame < self.frames:
            raise InputError(
                f"there is no frame {frame}: the rasteriser holds {self.frames}, counted from 0; "
                "make it with more `frames`"
            )
        return frame

    def _parts(self, frame: int) -> Callable[..., tuple[DeviceArray, ...]]:
        """A function from names to the arrays in memory; those of the held frame are named without its number."""
        suffix, arrays = f".{self._checked(frame)}", self._memory.arrays
        return lambda *names: tuple(arrays[name + suffix if name + suffix in arrays else name] for name in names)

    def _launch(self, name: str, blocks: int, args: tuple[Any, ...], threads: int = _THREADS) -> Launch:
        return self._kernels[name].prepare((blocks, 1, 1), (threads, 1, 1), args)

    def _launch_over(self, count: int, name: str, written: DeviceArray, args: tuple[Any, ...]) -> Launch:
        """A kernel of one thread an element, in the form for the dtype of what it writes, its last argument."""
        return self._launch(f"{name}_{_FLOATS[written.dtype.name]}", -(-count // _THREADS), (*args, written))

    def _check(self, array: DeviceArray, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        check_array(array, name, self._context, dtypes)
        if array.shape not in (shape, (1, *shape)):
            raise InputError(f"{name} has shape {list(array.shape)}, expected {[1, *shape]}")
        if not array.contiguous:
            raise InputError(f"{name} has strides {list(array.strides)}; make it contiguous first")


def unpack_keys(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Take apart what `MeshRasterizer.keys` holds, on the host; for tests and tools.

    Args:
        keys: uint64 [H, W]. A key orders by depth, then by the triangle's number downwards.

    Returns:
        int32 [H, W], the frontmost triangle, and float32 [H, W], its depth; -1 and +inf where there is none.
    """
    empty = keys == np.uint64(_EMPTY)
    number = 0xFFFFFFFF - (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    order = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(order & np.uint32(0x80000000), order & np.uint32(0x7FFFFFFF), ~order)
    depth = np.where(empty, np.float32(np.inf), bits.view(np.float32))
    return np.where(empty, -1, number).astype(np.int32), depth


class _Memory:
    """One block of the GPU's memory, cut into arrays, given back when it is closed or forgotten.

    Args:
        context: The GPU.
        constants: Arrays to fill with what is given, by name.
        shapes: Shape and dtype of other arrays; they start as zeros.
        fill: The byte that some of these start with instead.
    """

    def __init__(
        self,
        context: Context,
        constants: Mapping[str, NDArray[Any]],
        shapes: Mapping[str, tuple[tuple[int, ...], str]],
        fill: Mapping[str, int],
    ) -> None:
        cuda = load()
        context.make_current()
        parts = {name: (array.shape, array.dtype.name) for name, array in constants.items()} | dict(shapes)
        starts, size = {}, 0
        for name, (shape, dtype) in parts.items():
            starts[name] = size
            # To 256 bytes, as memory of its own would be; nothing has no bytes and still an address.
            size += max(1, -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 256)) * 256
        result = cuda.cuMemAlloc(size)
        if result[0] == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = context.memory
            raise DeviceError(
                f"{context} has no room for the rasteriser: {size_text(size)} were asked for, {size_text(free)} of "
                f"{size_text(total)} are free; close other programs, or hold fewer or smaller frames"
            )
        pointer = int(check(result, f"allocating {size_text(size)} for the rasteriser"))
        self._release = weakref.finalize(self, _free, context, pointer)
        # At the end of the process the driver takes everything back itself, and may be gone already.
        self._release.atexit = False
        self.arrays = {
            name: DeviceArray(pointer + starts[name], shape, dtype, device=context.ordinal)
            for name, (shape, dtype) in parts.items()
        }
        check(cuda.cuMemsetD8(pointer, 0, size), f"clearing the rasteriser's memory on {context}")
        for name, value in fill.items():
            array = self.arrays[name]
            check(cuda.cuMemsetD8(array.pointer, value, array.size_bytes), f"clearing {name} on {context}")
        for name, constant in constants.items():
            if constant.size:
                check(
                    cuda.cuMemcpyHtoD(self.arrays[name].pointer, constant.ctypes.data, constant.nbytes),
                    f"copying {name} of the mesh to {context}",
                )
        # Such calls may return before their work has ended, and our streams do not wait for the one that it is on.
        check(cuda.cuStreamSynchronize(0), f"copying the mesh to {context}")

    def close(self) -> None:
        """Give the memory back; safe to call twice."""
        self._release()


def _free(context: Context, pointer: int) -> None:
    # Also called when the memory is forgotten, where nothing can be raised.
    try:
        with context.briefly_current():
            check(load().cuMemFree(pointer), "giving back the rasteriser's memory")
    except DeviceError as exc:
        logger.warning("%s", exc)


def _check_mesh(mesh: Mesh) -> None:
    triangles, uv = mesh.triangles, mesh.uv
    for name, array, dtype, columns in (("triangles", triangles, "int32", 3), ("uv", uv, "float32", 2)):
        if array.dtype != np.dtype(dtype) or array.ndim != 2 or array.shape[1] != columns:
            raise InputError(f"{name} is {array.dtype} {list(array.shape)}, expected {dtype} [N, {columns}]")
        if len(array) > _LARGEST_MESH:
            raise InputError(f"{name} has {len(array)} rows; meshes above {_LARGEST_MESH} are not supported")
    if len(uv) == 0:
        raise InputError("the mesh has no vertex; give it at least one")
    if not np.isfinite(uv).all():
        raise InputError("uv holds NaN or Inf; give every vertex a place in [0, 1]")
    if len(triangles) and (triangles.min() < 0 or triangles.max() >= len(uv)):
        wrong = triangles.min() if triangles.min() < 0 else triangles.max()
        raise InputError(f"triangles names vertex {wrong}, and uv has {len(uv)}; give every vertex a UV")


def _incidence(triangles: NDArray[np.int32], vertices: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Which triangles each vertex is a corner of: starts [V + 1] into their numbers [3 M], in the reference's order."""
    corners = triangles.T.reshape(-1)
    order = np.argsort(corners, kind="stable")
    starts = np.zeros(vertices + 1, np.int32)
    starts[1:] = np.cumsum(np.bincount(corners, minlength=vertices))
    return starts, (order % max(1, len(triangles))).astype(np.int32)


def _dense_atlas(atlas: SurfaceAtlas) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Corners and weights [h * w, 3] of every texel, -1 and 0 where there is no surface."""
    corners = np.full((atlas.size**2, 3), -1, np.int32)
    weights = np.zeros((atlas.size**2, 3), np.float32)
    surface = atlas.mask.reshape(-1)
    corners[surface], weights[surface] = atlas.corners, atlas.weights
    return corners, weights
