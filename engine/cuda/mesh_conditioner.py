"""From a mesh to a generator's inputs, on the GPU: what an app that tracks or animates a mesh puts before a session.

Vertices come from the host; conditions and atlas are drawn where they are read, and never pass the host.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...kernels.array import DeviceArray
from ...kernels.driver import check, load
from ...kernels.rasterizer import MeshRasterizer
from ...kernels.reference.rasterizer import Mesh, SurfaceAtlas
from ..device.pools import DevicePool, OutputPool
from ..errors import InputError
from ..spec import TensorSpec
from .device import CudaDevice

__all__ = ["MeshConditioner"]

# Frames whose inputs may be in use at once before more memory is taken: the one answered, the ones that wait, and those
# that producers work on.
_FRAMES = 6


class MeshConditioner:
    """Draws ``condition`` and ``atlas`` of one mesh after the other on a GPU.

    Args:
        device: The GPU; it must outlive the conditioner.
        mesh: Topology and UV.
        size: Rows and columns of the picture.
        atlas: The surface atlas to place in every frame; None draws the condition alone.
        cull_back: Leave out triangles that face away from the camera.

    Raises:
        InputError: If mesh, size or atlas do not fit together.
        BackendError: If the kernels cannot be compiled.
        DeviceError: If there is no room.
    """

    def __init__(
        self,
        device: CudaDevice,
        mesh: Mesh,
        size: int,
        *,
        atlas: SurfaceAtlas | None = None,
        cull_back: bool = False,
    ) -> None:
        self._device = device
        self._stream = device.stream("warpcache-conditioner", priority="high")
        self._rasterizer = MeshRasterizer(device.context, mesh, size, size, atlas=atlas, cull_back=cull_back)
        self._vertices = TensorSpec("vertices", "float32", (len(mesh.uv), 3))
        specs = [TensorSpec("condition", "float32", (1, 6, size, size))]
        if atlas is not None:
            specs.append(TensorSpec("atlas", "float32", (1, 3, atlas.size, atlas.size)))
        self._staging = OutputPool([self._vertices], allocate=device.allocate_pinned, kept=_FRAMES, ready=_FRAMES)
        self._placed = device.allocate(self._vertices)
        self._pool = DevicePool(specs, allocate=device.allocate, kept=_FRAMES, ready=_FRAMES)
        self._cuda = load()

    def draw(self, vertices_px: NDArray[np.float32]) -> dict[str, DeviceArray]:
        """Draw one frame; returns at once.

        Args:
            vertices_px: float32 [V, 3]: x right and y down in pixels, pixel centres at +0.5, z deeper is larger.
                Copied, so the caller may use it again at once.

        Returns:
            ``condition`` float32 [1, 6, size, size] and, with an atlas, ``atlas`` float32 [1, 3, h, w], as
            `Session.submit` takes them: they carry the stream they are drawn on, and their memory is drawn over only
            when nothing refers to them any more.

        Raises:
            InputError: If the vertices are of another dtype or shape.
            DeviceError: If the GPU refuses, or is closed.
        """
        if not isinstance(vertices_px, np.ndarray) or vertices_px.dtype != np.float32:
            kind = getattr(vertices_px, "dtype", type(vertices_px).__name__)
            raise InputError(f"the vertices are {kind}, expected a NumPy array of float32; convert them first")
        if vertices_px.shape != self._vertices.shape:
            raise InputError(f"the vertices have shape {vertices_px.shape}, the mesh has {self._vertices.shape}")
        stream = self._stream
        stream.require_open()
        self._device.context.make_current()
        staged = self._staging.take_one(self._vertices)
        np.copyto(staged, vertices_px)
        address = staged.__array_interface__["data"][0]
        code = self._cuda.cuMemcpyHtoDAsync(self._placed.pointer, address, self._placed.size_bytes, stream.stream)
        check(code, "copying the vertices")
        drawn = self._pool.take()
        self._rasterizer.render(self._placed, drawn["condition"], stream=stream.handle)
        if "atlas" in drawn:
            self._rasterizer.place_atlas(drawn["atlas"], stream=stream.handle)
        return {
            # The staged vertices are read when the stream gets there, so they are kept as long as what they become.
            name: DeviceArray(
                array.pointer,
                array.shape,
                array.dtype,
                device=array.device,
                owner=(array, staged),
                stream=stream.handle,
            )
            for name, array in drawn.items()
        }

    def synchronize(self) -> None:
        """Block until everything drawn so far is there."""
        self._stream.synchronize()

    def close(self) -> None:
        """Wait for what is being drawn, and give the kernels back; safe to call twice. What was drawn stays."""
        self._stream.close()
        self._rasterizer.close()
