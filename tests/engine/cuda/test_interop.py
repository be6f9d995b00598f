"""Arrays of torch, CuPy and PyCUDA go into an engine on a GPU and come out of it, without passing the host.

They need the hardware and the library; on the driver in software the protocols themselves are tested in
test_cuda_lane.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warpcache.engine.cuda.device import CudaDevice, CudaStream
from warpcache.engine.cuda.options import CudaOptions
from warpcache.engine.engine import Engine
from warpcache.engine.errors import DeviceError, InputError
from warpcache.engine.spec import Array
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.driver import Context, check, load

X = np.random.default_rng(5).uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)


class Copying:
    """A module that copies: of every bundle the answer is its first input or cache tensor of the answer's size.

    No executor is needed, so that what is tested is the way in and out.
    """

    capturable = True

    def __init__(self, name: str, inputs: Any, outputs: Any) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs

    def launch(self, bindings: Any, stream: CudaStream) -> None:
        for spec in self.outputs:
            source = next((bindings[given.name] for given in self.inputs if given.size_bytes == spec.size_bytes), None)
            target = bindings[spec.name]
            if source is None:
                code = load().cuMemsetD8Async(target.pointer, 0, target.size_bytes, stream.stream)
            else:
                code = load().cuMemcpyAsync(target.pointer, source.pointer, target.size_bytes, stream.stream)
            check(code, "copying")

    def enqueue(self, bindings: Any, stream: CudaStream) -> Any:
        return stream.submit(lambda: self.launch(bindings, stream))

    def close(self) -> None:
        pass


class CopyingBackend:
    name = "copying"

    def prepare(self, *arguments: Any) -> None:
        pass

    def load(self, module: Any, site: Any) -> Copying:
        return Copying(module.name, module.inputs, module.outputs)


@pytest.fixture
def gpu() -> None:
    try:
        context = Context(0)
    except DeviceError as exc:
        pytest.skip(f"no GPU: {exc}")
    name = context.name
    context.close()
    if name.startswith("Software CUDA"):
        pytest.skip("no GPU: this process runs on the driver in software")


def with_torch() -> tuple[Callable[[Array], Any], Callable[[Any], Array]]:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("the installed torch has no CUDA")
    return lambda array: torch.from_numpy(array).cuda(), lambda array: torch.from_dlpack(array).cpu().numpy()


def with_cupy() -> tuple[Callable[[Array], Any], Callable[[Any], Array]]:
    cupy = pytest.importorskip("cupy")
    return cupy.asarray, lambda array: cupy.asnumpy(cupy.from_dlpack(array))


def with_cupy_interface() -> tuple[Callable[[Array], Any], Callable[[Any], Array]]:
    cupy = pytest.importorskip("cupy")
    return cupy.asarray, lambda array: cupy.asnumpy(cupy.asarray(array))


def with_pycuda() -> tuple[Callable[[Array], Any], Callable[[Any], Array]]:
    pytest.importorskip("pycuda")
    driver = pytest.importorskip("pycuda.driver")
    gpuarray = pytest.importorskip("pycuda.gpuarray")
    driver.init()
    context = driver.Device(0).retain_primary_context()
    context.push()

    def back(array: DeviceArray) -> Array:
        host = np.empty(array.shape, array.dtype)
        driver.memcpy_dtoh(host, array.pointer)
        return host

    return gpuarray.to_gpu, back


LIBRARIES = {
    "torch": with_torch,
    "cupy by dlpack": with_cupy,
    "cupy by interface": with_cupy_interface,
    "pycuda": with_pycuda,
}


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["on", "off"])
@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_librarys_arrays_go_in_and_come_out(gpu: None, tiny_bundle: Path, library: str, graphs: Any) -> None:
    to_gpu, to_host = LIBRARIES[library]()
    options = CudaOptions(outputs="device", graphs=graphs, debug=True)
    with Engine(tiny_bundle, policy="full", device="cuda:0", backend=CopyingBackend(), cuda=options) as engine:
        session = engine.session()
        for x in X:
            session.submit({"x": to_gpu(x[None])})
            np.testing.assert_array_equal(to_host(next(session.frames()).outputs["image"]), x[None])
        stream = [to_host(frame.outputs["image"]) for frame in engine.session().render({"x": to_gpu(X)})]
        np.testing.assert_array_equal(np.concatenate(stream), X)


@pytest.mark.gpu
def test_a_torch_array_on_the_cpu_is_refused(gpu: None, tiny_bundle: Path) -> None:
    torch = pytest.importorskip("torch")
    with (
        Engine(tiny_bundle, policy="full", device="cuda:0", backend=CopyingBackend()) as engine,
        pytest.raises(InputError, match="input 'x' is on the CPU"),
    ):
        engine.session().submit({"x": torch.zeros((1, 3, 16, 16))})


def test_the_copying_module_copies(tiny_bundle: Path, software_cuda: Any) -> None:
    """What the tests above stand on, where there is no GPU."""
    with Engine(tiny_bundle, policy="full", device="cuda:0", backend=CopyingBackend()) as engine:
        frames = [np.array(frame.outputs["image"][0]) for frame in engine.session().render({"x": X})]
    np.testing.assert_array_equal(frames, X)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stream": 0}, "input 'x' names stream 0, which is ambiguous; give 1"),
        ({"typestr": "<c8"}, "input 'x' has dtype complex64, expected float32"),
        ({"shape": (3, 16, 16)}, r"input 'x' has shape \(3, 16, 16\), expected \(1, 3, 16, 16\)"),
        ({"data": (0x10, False)}, "input 'x'"),
    ],
)
def test_an_interface_that_says_nonsense_is_refused(
    tiny_bundle: Path, software_cuda: Any, change: dict[str, Any], sentence: str
) -> None:
    class Nonsense:
        def __init__(self, array: DeviceArray) -> None:
            self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **change}
            self.array = array

    with Engine(tiny_bundle, policy="full", device="cuda:0", backend=CopyingBackend()) as engine:
        session = engine.session()
        with CudaDevice(0) as device:
            mine = device.upload(X[:1])
            with pytest.raises(InputError, match=sentence):
                session.submit({"x": Nonsense(mine)})
            session.submit({"x": mine})
            np.testing.assert_array_equal(next(session.frames()).outputs["image"], X[:1])
