"""A bundle and backends that compute nothing, so that what is left is this project's own time.

On a GPU every module issues one asynchronous memset of four bytes: a graph may not be empty. On the CPU a module does
nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warpcache.engine.bundle.bundle import Bundle, Cut, ExitRecord, InputRecord, Manifest
from warpcache.engine.bundle.manifest import module_record
from warpcache.engine.bundle.roles import Role
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.cuda.device import CudaStream
from warpcache.engine.device.stream import Event, Stream
from warpcache.engine.spec import TensorSpec
from warpcache.kernels.driver import check, load

if TYPE_CHECKING:
    from warpcache.engine.device.module import ModuleFile, Site
    from warpcache.kernels.array import DeviceArray

__all__ = ["INPUT", "EmptyCpuModule", "EmptyCudaBackend", "EmptyCudaModule", "write_empty_bundle"]

INPUT = TensorSpec("x", "float32", (1, 3, 16, 16))
_IMAGE = TensorSpec("image", "float32", (1, 3, 16, 16))
_CACHE = TensorSpec("cache.h", "float32", (1, 8, 16, 16))
# A ModelProto of which only ir_version (field 1) is set, to 10: no executor ever sees it.
_NO_GRAPH = b"\x08\x0a"
_MEMSET_BYTES = 4


def write_empty_bundle(folder: Path) -> Bundle:
    """A bundle of three modules and 3x16x16 pictures, whose graphs hold nothing; it is only for the backends here.

    Returns:
        The bundle, ``folder / "empty.warp"``.
    """
    modules = {
        "generator": ((INPUT,), (_IMAGE,)),
        Role.PRODUCER.value: ((INPUT,), (_CACHE,)),
        Role.PLAIN.value: ((_CACHE, INPUT), (_IMAGE,)),
    }
    manifest = Manifest(
        name="empty",
        created={"by": "benchmarks", "at": "2026-01-01T00:00:00Z", "options": {}},
        inputs=(InputRecord(INPUT),),
        outputs=(_IMAGE,),
        image_output="image",
        fps=None,
        cut=Cut(("h",), ({"tensors": ["h"]},)),
        cache=(_CACHE,),
        modules={name: module_record(name, *specs) for name, specs in modules.items()},
        exits=(ExitRecord(Role.WHOLE, ("generator",), 1.0), ExitRecord(Role.PLAIN, (Role.PLAIN,), 0.1)),
        calibration=None,
    )
    return write_bundle(folder / "empty.warp", manifest, {f"{name}.onnx": _NO_GRAPH for name in modules})


class EmptyCpuModule:
    """Does nothing (a `warpcache.engine.device.module.Module`)."""

    capturable = False

    def __init__(self, module: ModuleFile) -> None:
        self.name = module.name
        self.inputs = module.inputs
        self.outputs = module.outputs

    def launch(self, bindings: Mapping[str, Any], stream: Any) -> None:
        """Nothing is issued."""

    def enqueue(self, bindings: Mapping[str, Any], stream: Stream) -> Event:
        """`launch`, and an event after it."""
        return stream.submit(lambda: self.launch(bindings, stream))

    def close(self) -> None:
        """There is nothing to give back."""


class EmptyCudaModule(EmptyCpuModule):
    """Issues one memset."""

    capturable = True

    def __init__(self, module: ModuleFile) -> None:
        super().__init__(module)
        self._written = module.outputs[0].name
        self._cuda = load()

    def launch(self, bindings: Mapping[str, DeviceArray], stream: CudaStream) -> None:
        """Clear the first bytes of the first output."""
        target = bindings[self._written].pointer
        check(self._cuda.cuMemsetD8Async(target, 0, _MEMSET_BYTES, stream.stream), "clearing four bytes")


class EmptyCpuBackend:
    """A `warpcache.engine.device.module.Backend` of modules that do nothing, on the CPU."""

    name = "empty"

    def prepare(self, bundle: Bundle, modules: Sequence[str], devices: Sequence[Any]) -> None:
        """Nothing is to be prepared."""

    def load(self, module: ModuleFile, site: Site) -> EmptyCpuModule:
        """A module of the right inputs and outputs."""
        return EmptyCpuModule(module)


class EmptyCudaBackend(EmptyCpuBackend):
    """The same of modules that issue one memset, on a GPU."""

    def load(self, module: ModuleFile, site: Site) -> EmptyCudaModule:
        """A module of the right inputs and outputs."""
        return EmptyCudaModule(module)
