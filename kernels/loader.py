"""Kernels on one GPU: compiled for it (or taken from the cache), loaded, and launched.

A launch is prepared once (`Kernel.prepare`) where its buffers stay the same, as a lane's do: `Launch.launch` is then
little more than one driver call. `Kernel.launch` does both, for arguments that change. Neither waits for the GPU or
takes memory there.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import logging
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from .array import DeviceArray
from .compiler import cached_cubin
from .driver import Context, check, cuda_text, cuda_version, load
from .errors import BackendError, DeviceError

__all__ = ["Argument", "Kernel", "KernelLibrary", "Launch", "LaunchSequence"]

logger = logging.getLogger(__name__)

# Machine code of CUDA 13's compiler is for drivers of CUDA 13 and newer; what else runs on a GPU here is not ours.
_OLDEST_DRIVER = 13_000

Argument = Any
"""A kernel's argument: an array (its address), an int or bool (32 bits), a float (32 bits), a ctypes instance
(structures are handed over by value), or a pair (value, ctypes type)."""


class KernelLibrary:
    """The kernels of one ``.cu`` file, loaded on one GPU.

    Args:
        context: The GPU.
        source: Name of the file beside this module, e.g. ``"image.cu"``.
        defines: Preprocessor macros to compile it with.

    Raises:
        BackendError: If it cannot be compiled for this GPU (see `compiler.compile_cubin`).
        DeviceError: If the driver does not load it.
    """

    def __init__(self, context: Context, source: str, defines: Mapping[str, str | int] | None = None) -> None:
        self.context = context
        self.source = source
        text = (importlib.resources.files(__package__) / source).read_text("utf-8")
        code = cached_cubin(text, context.architecture, name=source, defines=defines or {})
        version = cuda_version()
        if version < _OLDEST_DRIVER:
            raise DeviceError(
                f"the NVIDIA driver speaks CUDA {cuda_text(version)}, and the kernels of {source} "
                "are compiled for CUDA 13; update the driver to 580 or newer"
            )
        # Every kernel has a section of its own in a cubin.
        self._names = {name.decode() for name in re.findall(rb"\0\.text\.(\w+)(?=\0)", code)}
        cuda = load()
        context.make_current()
        self._module: Any = check(cuda.cuModuleLoadData(code), f"loading {source} on {context}")
        self._kernels: dict[str, Kernel] = {}
        self._lock = threading.Lock()
        self._release = weakref.finalize(self, _unload, context, self._module, source)
        # At the end of the process the driver takes everything back itself, and may be gone already.
        self._release.atexit = False

    def function(self, name: str) -> Kernel:
        """The kernel declared ``extern "C" __global__ void name(...)``, ready to be launched.

        Raises:
            DeviceError: If the file has no such kernel, or the library is closed.
        """
        self.require_open()
        if name not in self._names:
            raise DeviceError(
                f"{self.source} has no kernel {name!r}; it has {', '.join(sorted(self._names)) or 'none'}, "
                'declared extern "C" __global__'
            )
        with self._lock:
            kernel = self._kernels.get(name)
            if kernel is None:
                kernel = self._kernels[name] = Kernel(self, name)
        return kernel

    def close(self) -> None:
        """Unload the kernels; safe to call twice.

        What was launched must have ended, and graphs that hold these kernels be closed.
        """
        self._module = None
        self._release()

    def require_open(self) -> None:
        """Raise `DeviceError` where the library is closed."""
        if self._module is None:
            raise DeviceError(f"the kernels of {self.source} on {self.context} are closed; load them again")


class Kernel:
    """One kernel of a library; `KernelLibrary.function` makes it.

    Attributes:
        name: As in the source.
        library: What it belongs to and keeps loaded.
    """

    def __init__(self, library: KernelLibrary, name: str) -> None:
        self.name = name
        self.library = library
        self._cuda = load()
        library.context.make_current()
        self._function: Any = check(
            self._cuda.cuModuleGetFunction(library._module, name.encode()), f"finding kernel {name} in {library.source}"
        )
        self._sizes = self._load()

    def prepare(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Argument],
        *,
        shared_bytes: int = 0,
    ) -> Launch:
        """Everything of a launch but its stream.

        Args:
            grid: Blocks in x, y and z.
            block: Threads of a block in x, y and z.
            args: One per parameter, in order.
            shared_bytes: Dynamic shared memory of a block.

        Raises:
            BackendError: If the arguments do not have the number or the sizes of the kernel's parameters.
        """
        held = [_ctypes_value(arg) for arg in args]
        if self._sizes is not None:
            given = [ctypes.sizeof(arg) for arg in held]
            if given != self._sizes:
                raise BackendError(
                    f"kernel {self.name} takes arguments of {self._sizes} bytes, given were {given}; "
                    f"correct the launch to what {self.library.source} declares"
                )
        return Launch(self, grid, block, held, shared_bytes)

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Argument],
        *,
        stream: int,
        shared_bytes: int = 0,
    ) -> None:
        """`prepare` and launch on the stream with handle `stream`; any thread may, several at a time.

        Raises:
            BackendError: As `prepare`.
            DeviceError: If the driver refuses the launch.
        """
        self.prepare(grid, block, args, shared_bytes=shared_bytes).launch(stream)

    def _load(self) -> list[int] | None:
        """Bring the code to the GPU now, and ask for the sizes of the parameters.

        The driver loads kernels on their first launch otherwise, which may wait for running work and cannot happen
        while a stream is captured. Drivers before CUDA 12.4 have neither call: there the attribute loads it, and the
        arguments go unchecked.
        """
        cuda, function, doing = self._cuda, self._function, f"loading kernel {self.name}"
        try:
            check(cuda.cuFuncLoad(function), doing)
            sizes: list[int] = []
            while True:
                result = cuda.cuFuncGetParamInfo(function, len(sizes))
                if result[0] == cuda.CUresult.CUDA_ERROR_INVALID_VALUE:
                    return sizes
                sizes.append(int(check(result, doing)[1]))
        # cuda-bindings says so of a function that the driver does not have.
        except (RuntimeError, AttributeError):
            registers = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
            check(cuda.cuFuncGetAttribute(registers, function), doing)
            return None


class Launch:
    """A kernel with its grid and arguments, launched again and again; the arguments are kept as they were given.

    What the arguments point to must stay where it is, and is not kept alive by this object.
    """

    __slots__ = ("_cuda", "_doing", "_function", "_held", "_kernel", "_library", "_pointers", "_shape", "_where")

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: list[Any],
        shared_bytes: int,
    ) -> None:
        self._kernel = kernel
        self._library = kernel.library
        self._cuda = kernel._cuda
        self._function = kernel._function
        self._held = args
        self._pointers = (ctypes.c_void_p * max(1, len(args)))(*[ctypes.addressof(arg) for arg in args])
        # An address, rather than values and types: the bindings then pack nothing at the launch.
        self._where = ctypes.addressof(self._pointers)
        self._shape = (*grid, *block, shared_bytes)
        self._doing = f"launching kernel {kernel.name}"

    def launch(self, stream: int) -> None:
        """Put the kernel on the stream with handle `stream`; returns at once.

        Raises:
            DeviceError: If the library is closed, or the driver refuses the launch.
        """
        library = self._library
        if library._module is None:
            library.require_open()
        library.context.make_current()
        check(self._cuda.cuLaunchKernel(self._function, *self._shape, stream, self._where, 0), self._doing)


class LaunchSequence:
    """Launches that follow each other on one stream, as one; keeps alive what they use."""

    __slots__ = ("_keeps", "_launches")

    def __init__(self, *launches: Launch, keeps: object = None) -> None:
        self._launches = launches
        self._keeps = keeps

    def launch(self, stream: int) -> None:
        """Put them on the stream with handle `stream`, in order; see `Launch.launch`."""
        for item in self._launches:
            item.launch(stream)


def _ctypes_value(arg: Argument) -> Any:
    if isinstance(arg, DeviceArray):
        return ctypes.c_void_p(arg.pointer)
    if isinstance(arg, tuple):
        return arg[1](arg[0])
    if isinstance(arg, int):
        return ctypes.c_int(arg)
    return ctypes.c_float(arg) if isinstance(arg, float) else arg


def _unload(context: Context, module: Any, source: str) -> None:
    # Also called when a library is forgotten, where nothing can be raised.
    try:
        with context.briefly_current():
            check(load().cuModuleUnload(module), f"unloading {source}")
    except DeviceError as exc:
        logger.warning("%s", exc)
