"""A module's ``.onnx`` file -> a TensorRT engine in this process, its inputs and outputs checked before it is built.

Some graphs make a library's builder crash, and the process with it: `tensorrt_builder` runs the same in a process of
its own, and is what to use outside tests.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...kernels.driver import Context
from ..bundle.external_data import GraphNode, graph_nodes
from ..errors import BackendError, BundleError
from ..spec import TensorSpec
from .flavour import Flavour, deferred_interrupt
from .io import IoTensor, check_io, dtype_name, last_said, names_text
from .options import BuildOptions, ShapeProfile

__all__ = ["BuildRequest", "build_engine"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildRequest:
    """One engine to be built.

    Attributes:
        path: The ``.onnx`` file; external data is looked for beside it.
        name: What messages call the module.
        inputs: What the graph must take.
        outputs: What the graph must give.
        targets: The GPUs that the engine is for, as `Flavour.resolve` takes them.
        options: What the builder is told beside the graph.
    """

    path: Path
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    targets: tuple[str, ...]
    options: BuildOptions = field(default_factory=BuildOptions)


def build_engine(request: BuildRequest, *, flavour: Flavour, device: int = 0) -> bytes:
    """Build the engine of one module in this process.

    The same request gives the same bytes with TensorRT-RTX. Ctrl-C ends the build at its next step.

    Args:
        request: What to build.
        flavour: The library.
        device: The number of the GPU that is built on and that ``"current"`` means.

    Raises:
        BackendError: If the library knows no such target, refuses the graph or fails, or the graph's inputs and outputs
            are others than announced.
        DeviceError: If a GPU is needed and there is none.
    """
    if not request.path.is_file():
        raise BackendError(f"module {request.name!r}: there is no file {request.path}; open the bundle again")
    resolved = flavour.resolve(request.targets, device=device)
    started = time.monotonic()
    with _on_gpu(flavour, device), flavour.log.collect() as said, deferred_interrupt() as interrupted:
        engine = _Build(request, flavour, said).run(resolved, interrupted)
    logger.info(
        "built module %r with %s %s for %s: %.1f MB in %.2f s",
        request.name,
        flavour.title,
        flavour.version,
        ", ".join(resolved),
        len(engine) / 1e6,
        time.monotonic() - started,
    )
    return engine


class _Build:
    """One build: the graph is read, held against the specs, and built."""

    def __init__(self, request: BuildRequest, flavour: Flavour, said: Iterable[str]) -> None:
        self._request = request
        self._where = f"module {request.name!r} ({request.path.name})"
        self._flavour = flavour
        self._trt = flavour.module
        self._said = said
        try:
            self._builder = self._trt.Builder(flavour.trt_logger)
        # The bindings answer a library that gives no builder with a TypeError.
        except (TypeError, RuntimeError) as exc:
            raise BackendError(
                f"{flavour.title} gives no builder ({last_said(said, exc)}); `warpcache doctor` says what is here"
            ) from exc
        # The flag is what TensorRT 10 needs for the types to come from the graph alone; later ones do it always.
        flag = 1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self._network = self._builder.create_network(flag)

    def run(self, targets: tuple[str, ...], interrupted: threading.Event) -> bytes:
        # The parser owns weights that the network refers to: it must live until the engine is built.
        parser = self._parse()
        network = self._network
        for kind, specs, found in (
            ("input", self._request.inputs, self._tensors(network.num_inputs, network.get_input)),
            ("output", self._request.outputs, self._tensors(network.num_outputs, network.get_output)),
        ):
            check_io(self._where, kind, specs, found, remedy="compile the bundle again")
        config = self._config(targets, self._request.options)
        self._add_profile(config)
        config.progress_monitor = _monitor(self._trt, interrupted)
        blob = self._builder.build_serialized_network(self._network, config)
        del parser
        if blob is None:
            raise BackendError(
                f"{self._where}: {self._flavour.title} cannot build it: "
                f"{last_said(self._said)}; try the backend 'onnxruntime', or compile the bundle "
                "without the layer that it names"
            )
        return bytes(blob)

    def _parse(self) -> Any:
        parser = self._trt.OnnxParser(self._network, self._flavour.trt_logger)
        # By path, not by content: only so the weights in the file beside it are found.
        if parser.parse_from_file(str(self._request.path)):
            return parser
        refused = f"{self._where} is refused by {self._flavour.title}"
        if parser.num_errors == 0:
            raise BackendError(f"{refused}: {last_said(self._said)}; compile the bundle again")
        first = parser.get_error(0)
        reason = " ".join(first.desc().split()).rstrip(".")
        if parser.num_errors > 1:
            reason += f" (and {parser.num_errors - 1} more)"
        operator = first.node_operator()
        if not operator:
            raise BackendError(f"{refused}: {reason}; compile the bundle again")
        node = _find(self._nodes(), first.node(), first.node_name(), operator)
        place, made = "", ""
        if node is not None:
            place = f" at {node.path}" if node.path else ""
            made = f", which makes {', '.join(repr(output) for output in node.outputs if output)}"
        raise BackendError(
            f"{refused} because of node {first.node_name()!r} ({operator}){place}{made}: {reason}; use the backend "
            "'onnxruntime', or a model without this operator"
        )

    def _nodes(self) -> list[GraphNode]:
        """For messages only: where the file cannot be read either, the parser has said so."""
        try:
            with self._request.path.open("rb") as file:
                return graph_nodes(file)
        except (OSError, BundleError):
            return []

    def _tensors(self, count: int, get: Callable[[int], Any]) -> dict[str, IoTensor]:
        return {
            tensor.name: IoTensor(
                dtype_name(tensor.dtype), tuple(int(extent) for extent in tensor.shape), bool(tensor.is_shape_tensor)
            )
            for tensor in map(get, range(count))
        }

    def _config(self, targets: tuple[str, ...], options: BuildOptions) -> Any:
        trt = self._trt
        config = self._builder.create_builder_config()
        # A library's own further streams would have neither our priority nor our order.
        config.max_aux_streams = 0
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
        if not options.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # TensorRT-RTX takes memory while it runs otherwise, which no stream capture allows.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if self._flavour.ahead_of_time:
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                capability = getattr(trt.ComputeCapability, target.replace("sm_", "SM"))
                if not config.set_compute_capability(capability, index):
                    raise BackendError(
                        f"module {self._request.name!r}: {self._flavour.title} does not build for {target} together "
                        f"with {', '.join(targets)}: {last_said(self._said)}; build for fewer GPUs at a time"
                    )
        return config

    def _add_profile(self, config: Any) -> None:
        """Tell which shapes a dynamic graph is built for; a fixed one needs no profile, and may have none."""
        given = {profile.name: profile for profile in self._request.options.profiles}
        specs = {spec.name: spec for spec in self._request.inputs}
        unknown = given.keys() - specs.keys()
        if unknown:
            raise BackendError(
                f"{self._where}: there are shape profiles for {names_text(unknown)}, but its inputs are "
                f"{names_text(specs)}; name those"
            )
        profile, dynamic = self._builder.create_optimization_profile(), False
        for index in range(self._network.num_inputs):
            tensor = self._network.get_input(index)
            shape = tuple(int(extent) for extent in tensor.shape)
            fixed = specs[tensor.name].shape
            shapes = given.get(tensor.name, ShapeProfile(tensor.name, fixed, fixed, fixed))
            if not _holds(shapes, shape, fixed):
                raise BackendError(
                    f"{self._where}: the shape profile of {tensor.name!r}, {list(shapes.min)} to {list(shapes.max)}, "
                    f"does not fit its shape {list(fixed)}, in the graph {list(shape)}; take in the one, and vary only "
                    "what the other leaves open"
                )
            if -1 in shape:
                dynamic = True
                profile.set_shape(tensor.name, shapes.min, shapes.opt, shapes.max)
        if dynamic and config.add_optimization_profile(profile) < 0:
            raise BackendError(
                f"{self._where}: {self._flavour.title} refuses its shape profile: {last_said(self._said)}; "
                "give other extents"
            )


def _find(nodes: Sequence[GraphNode], index: int, name: str, operator: str) -> GraphNode | None:
    named = [node for node in nodes if node.name == name and node.op_type == operator] if name else []
    if len(named) == 1:
        return named[0]
    if 0 <= index < len(nodes) and nodes[index].op_type == operator:
        return nodes[index]
    return None


def _holds(profile: ShapeProfile, graph: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the profile takes in the shape wanted, and varies no extent that the graph fixes."""
    return len(profile.min) == len(graph) and all(
        low <= extent <= high and (there == -1 or low == high)
        for low, high, there, extent in zip(profile.min, profile.max, graph, wanted, strict=True)
    )


@contextlib.contextmanager
def _on_gpu(flavour: Flavour, device: int) -> Iterator[None]:
    """Make the GPU current that a library measures its kernels on; one that builds ahead of time needs none."""
    if flavour.ahead_of_time:
        yield
        return
    context = Context(device)
    try:
        context.make_current()
        yield
    finally:
        context.close()


def _monitor(trt: Any, interrupted: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None: ...

        def phase_finish(self, phase: str) -> None: ...

        def step_complete(self, phase: str, step: int) -> bool:
            return not interrupted.is_set()

    return Monitor()
