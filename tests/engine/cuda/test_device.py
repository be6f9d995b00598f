"""Memory, streams and events of a GPU: what giving them back leaves alone, on whichever thread and at the very end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest

from warpcache.engine.cuda.device import CudaDevice
from warpcache.engine.cuda.graph import CudaGraph
from warpcache.engine.spec import TensorSpec
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.driver import check, load
from warpcache.kernels.loader import KernelLibrary

SPEC = TensorSpec("s", "float32", (4,))


def made_on(device: CudaDevice, kind: str) -> Any:
    if kind == "graph":
        stream, target = device.stream("captured"), device.allocate(SPEC)
        work = lambda: check(load().cuMemsetD8Async(target.pointer, 0, 4, stream.stream), "clearing")  # noqa: E731
        return CudaGraph.capture(stream, work, name="g")
    if kind == "kernels":
        return KernelLibrary(device.context, "image.cu")
    kinds = {
        "memory": lambda: device.memory(256, "a test"),
        "pinned": lambda: device.allocate_pinned(SPEC),
        "event": device.event,
        "stream": lambda: device.stream("forgotten"),
    }
    return kinds[kind]()


def current() -> int:
    return int(check(load().cuCtxGetCurrent(), "asking"))


@pytest.mark.parametrize("kind", ["memory", "pinned", "event", "stream", "graph", "kernels"])
def test_what_is_forgotten_leaves_the_current_gpu_as_it_is(software_cuda: Any, kind: str) -> None:
    """Python's collector comes between two calls, the first of which has said which GPU the second is for."""
    with CudaDevice(0) as here, CudaDevice(1) as other:
        before = software_cuda.count("modules"), software_cuda.live()
        held = [made_on(other, kind)]
        assert (software_cuda.count("modules"), software_cuda.live()) != before
        here.context.make_current()
        held.clear()
        assert (software_cuda.count("modules"), software_cuda.live()) == before
        assert current() == int(here.context.handle)

        # And a thread that has none has none afterwards.
        held.append(made_on(other, kind))
        seen: list[int] = []

        def forget() -> None:
            held.clear()
            seen.append(current())

        thread = threading.Thread(target=forget)
        thread.start()
        thread.join()
        assert seen == [0]
        assert (software_cuda.count("modules"), software_cuda.live()) == before


def test_at_the_end_of_the_process_nothing_is_given_back(software_cuda: Any) -> None:
    """A producer's thread may still be issuing to its stream then, and executors are taken down later than we."""
    script = f"""
        import atexit, ctypes, weakref

        library = ctypes.CDLL({str(software_cuda.path)!r}, mode=ctypes.RTLD_GLOBAL)
        library.swcuda_count.restype = ctypes.c_longlong
        counts = lambda: [library.swcuda_count(what) for what in (b"device_blocks", b"streams", b"events")]
        # Registered first and so run last: after the one that weakref registers with its first finalizer.
        atexit.register(lambda: print(*counts()))
        from warpcache.engine.cuda.device import CudaDevice
        from warpcache.engine.spec import TensorSpec

        device = CudaDevice(0)
        kept = device.allocate(TensorSpec("s", "float32", (4,))), device.stream("s"), device.event()
        print(*counts())
    """
    run = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    during, after = run.stdout.splitlines()
    assert during.split() == ["1", "1", "2"], run.stdout
    assert after == during


def test_who_takes_an_array_without_naming_a_stream_is_ordered_on_the_default_one(software_cuda: Any) -> None:
    with CudaDevice(0) as device:
        owner, reached = device.stream("owner"), device.event()
        mine = device.allocate(SPEC)
        lent = DeviceArray(mine.pointer, mine.shape, mine.dtype, device=0, owner=mine, stream=owner.handle)

        def reach() -> None:
            check(load().cuEventRecord(reached.handle, 0), "marking the default stream")

        with software_cuda.held(owner):
            check(load().cuMemsetD8Async(mine.pointer, 1, 4, owner.stream), "writing")
            unordered = lent.__dlpack__(stream=-1)
            reach()
            assert reached.wait()  # or it would wait for ever
            ordered = lent.__dlpack__()
            reach()
            assert not reached.done
        assert reached.wait()
        del unordered, ordered


def test_an_array_is_lent_to_the_device_that_it_is_on_by_name(software_cuda: Any) -> None:
    with CudaDevice(0) as device:
        mine = device.allocate(SPEC)
        assert mine.__dlpack__(stream=1, dl_device=(2, 0), max_version=(1, 0)) is not None
        with pytest.raises(BufferError):
            mine.__dlpack__(stream=1, dl_device=(1, 0))
