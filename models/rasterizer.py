"""The mesh rasteriser as models use it: the conditions of a frame, on the CPU.

It lives in `kernels.reference`, beside the kernel that does the same on a GPU (`kernels.rasterizer.MeshRasterizer`).
"""

from ..kernels.reference.rasterizer import (
    Fragments,
    Mesh,
    SurfaceAtlas,
    condition_raster,
    interpolate,
    rasterize,
    surface_motion,
    vertex_normals,
)

__all__ = [
    "Fragments",
    "Mesh",
    "SurfaceAtlas",
    "condition_raster",
    "interpolate",
    "rasterize",
    "surface_motion",
    "vertex_normals",
]
