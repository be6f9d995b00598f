"""The whole way on the GPU: vertices from the host, conditions drawn, a frame answered, a picture in bytes back.

What an app does with a tracked or animated head. `MeshToPicture.answer` is one frame of it; the engine in the middle
is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.cuda.device import CudaDevice
from warpcache.engine.cuda.mesh_conditioner import MeshConditioner
from warpcache.engine.errors import InputError
from warpcache.engine.session.frame import Frame
from warpcache.engine.session.session import Session
from warpcache.engine.spec import TensorSpec
from warpcache.kernels.driver import check, load
from warpcache.kernels.image import ImageKernels
from warpcache.models.head import SyntheticHead
from warpcache.models.rasterizer import SurfaceAtlas

__all__ = ["MeshToPicture"]

_TAKE = 4  # of the head's motion; nothing was trained on it


class MeshToPicture:
    """Vertices in, uint8 [H, W, 3] out, through a session whose engine leaves its answers on the GPU.

    Args:
        device: The engine's GPU.
        bundle: A bundle whose inputs are the conditions of the synthetic head.
        drawn: Frames of motion, used over and over.

    Raises:
        InputError: If the bundle takes other inputs, or gives no picture.
    """

    def __init__(self, device: CudaDevice, bundle: Bundle, drawn: int) -> None:
        specs = {record.spec.name: record.spec for record in bundle.manifest.inputs}
        image = bundle.manifest.image_output
        if image is None or not {"condition"} <= set(specs) <= {"condition", "atlas"}:
            raise InputError(f"{bundle.path.name} is not fed with a mesh's conditions; take a bundle of the head")
        self._image = image
        size = specs["condition"].shape[-1]
        head = SyntheticHead(0, size)
        motion = head.motion(drawn, bundle.manifest.fps or 30.0, seed=_TAKE)
        self.vertices: Sequence[NDArray[np.float32]] = [head.vertices(parameters) for parameters in motion]
        atlas = SurfaceAtlas(head.mesh, specs["atlas"].shape[-1]) if "atlas" in specs else None
        self._conditioner = MeshConditioner(device, head.mesh, size, atlas=atlas, cull_back=True)
        self._device = device
        self._stream = device.stream("picture", priority="high")
        self._done = device.event()
        self._kernels = ImageKernels(device.context)
        spec = TensorSpec("picture", "uint8", (size, size, 3))
        self._pixels = device.allocate(spec)
        self.picture = device.allocate_pinned(spec)
        self.triangles = len(head.mesh.triangles)
        self._cuda = load()

    def answer(self, session: Session, index: int) -> Frame:
        """Answer one frame; its picture is in `picture` when this returns, until the next call."""
        session.submit(self._conditioner.draw(self.vertices[index % len(self.vertices)]))
        frame = next(session.frames())
        self._device.context.make_current()
        self._kernels.store(frame.outputs[self._image], self._pixels, stream=self._stream.handle)
        address = self.picture.__array_interface__["data"][0]
        code = self._cuda.cuMemcpyDtoHAsync(address, self._pixels.pointer, self._pixels.size_bytes, self._stream.stream)
        check(code, "bringing the picture back")
        self._done.record(self._stream)
        self._done.wait()
        return frame

    def close(self) -> None:
        """Give everything back; what was answered must have ended."""
        self._conditioner.close()
        self._stream.close()
        self._kernels.close()
        self._done.close()
