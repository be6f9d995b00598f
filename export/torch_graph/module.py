"""A traced ONNX graph run in PyTorch, node by node, so that its initializers can be trained and put back.

The graph was traced with one frame; here it takes N of them, stacked along the leading axis. Where every node keeps
frames apart (`graph_batch`) the graph runs once for all; a graph that does not (weights that depend on the input,
attention over another axis) runs under `torch.vmap`, as if frame by frame.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ...engine.errors import ExportError, InputError
from ...engine.spec import Array
from ..graph.index import GraphIndex
from ..graph.run import run_model
from ..graph.surgery import copy_model, extract
from .batching import mixes_frames
from .calls import Call, Run
from .chains import find_chains
from .operators import OPERATORS, SETTINGS

__all__ = ["GraphModule"]

_TRAINABLE = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """One node, ready to run; `last` are the values that nothing reads afterwards."""

    run: Run
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    last: tuple[str, ...]


class GraphModule(nn.Module):
    """An ONNX graph as a PyTorch module.

    Initializers that are trained are parameters, the others buffers. Works under `torch.autocast`, on any device, and
    in the channels-last layout (`module.to(memory_format=torch.channels_last)` and inputs of it).

    Args:
        model: In normal form (`graph.normalise`), weights included, shapes fixed, traced with one frame.
        train: Names of the float32 initializers to train, or ``"all"``: those of more than one element that say what
            the network computes, not how (no clipping bounds, scales of a Resize, running moments or placeholders).

    Raises:
        InputError: If a name in `train` is no float initializer, or is one that says how a node works.
        ExportError: If the graph has operators that are not supported (all of them are named), options of one that
            PyTorch lacks, or shapes that are not fixed.
    """

    def __init__(self, model: ModelProto, *, train: Collection[str] | Literal["all"] = ()) -> None:
        super().__init__()
        self._model = copy_model(model)
        index = GraphIndex(self._model)
        self._index = index
        self.input_names: tuple[str, ...] = index.inputs
        self.output_names: tuple[str, ...] = index.outputs
        self._shapes = {name: tuple(tensor.dims) for name, tensor in index.initializers.items()}
        self._shapes.update({name: spec.shape for name, spec in index.specs.items()})
        self._trained = _chosen(index, train)
        fixed = self._constants()
        _check_supported(index, fixed)
        self._members: dict[str, str] = {}
        """Value name -> name of the parameter or buffer that holds it; a name of torch's may hold no dot."""
        self._add_members(fixed)
        calls = {i: self._call(i, fixed) for i in range(len(index.nodes)) if index.nodes[i].output[0] not in fixed}
        self._steps = self._compiled(calls, fixed)
        self.mixing_node: str | None = self._find_mixing(calls)
        """Name of a node that keeps the graph from running all frames at once; None where there is none."""
        if self.mixing_node is not None:
            logger.info("node %s mixes frames, so the graph runs under torch.vmap", self.mixing_node)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Initializer name -> parameter, in the graph's order."""
        return {name: self._parameters[self._members[name]] for name in self._trained}  # type: ignore[misc]

    def forward(self, *inputs: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run N frames.

        Args:
            inputs: One tensor an input, in the graph's order, or one mapping of input name -> tensor. An input that was
                traced as [1, ...] takes [N, ...], or [1, ...] for the same in every frame; others (a scalar, a table)
                keep their shape and serve all frames.

        Returns:
            Output name -> tensor: the frames' outputs one after the other along the leading axis (scalars: [N]).

        Raises:
            InputError: If an input is missing or its shape does not fit.
        """
        feeds = self._feeds(inputs)
        frames = max((feeds[name].shape[0] for name in feeds if self._stacked(name)), default=1)
        if frames == 1:
            return self._run(feeds)
        if self.mixing_node is None:
            results = self._run(feeds)
            return {name: self._repeated(name, value, frames) for name, value in results.items()}
        stacked = {name for name, value in feeds.items() if self._stacked(name) and value.shape[0] == frames}
        slices = {name: value.unsqueeze(1) if name in stacked else value for name, value in feeds.items()}
        where = {name: 0 if name in stacked else None for name in feeds}
        results = torch.vmap(self._run, in_dims=(where,))(slices)
        return {name: value.flatten(0, 1) if value.ndim > 1 else value for name, value in results.items()}

    def write_back(self) -> ModelProto:
        """The graph with the trained initializers as they are now; names, nodes and all else as given."""
        model = copy_model(self._model)
        trained = self.trained
        for tensor in model.graph.initializer:
            if tensor.name in trained:
                dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
                array = trained[tensor.name].detach().cpu().contiguous().numpy().astype(dtype)
                tensor.ClearField("float_data")
                tensor.ClearField("double_data")
                tensor.raw_data = array.tobytes()
        return model

    def _constants(self) -> dict[str, Array]:
        """Every value that depends on no input and no trained initializer, computed once."""
        index = self._index
        fixed = {
            name: np.array(numpy_helper.to_array(tensor))
            for name, tensor in index.initializers.items()
            if name not in self._trained
        }
        moving = set(self._trained)
        wanted: list[str] = []
        for i in sorted(index.constant):
            outputs = [name for name in index.nodes[i].output if name]
            if any(name in moving for name in index.reads[i]):
                moving.update(outputs)
            else:
                wanted += outputs
        if wanted:
            fixed.update(run_model(extract(self._model, [], wanted), {}, threads=1))
        return fixed

    def _add_members(self, fixed: Mapping[str, Array]) -> None:
        index = self._index
        read = {name for i, node in enumerate(index.nodes) if node.output[0] not in fixed for name in index.reads[i]}
        read.update(index.outputs)
        for position, name in enumerate(self._trained):
            array = np.array(numpy_helper.to_array(index.initializers[name]))
            member = f"trained_{position}_{name.replace('.', '_')}"
            self.register_parameter(member, nn.Parameter(torch.from_numpy(array)))
            self._members[name] = member
        for position, (name, array) in enumerate(fixed.items()):
            if name in read:
                member = f"fixed_{position}_{name.replace('.', '_')}"
                self.register_buffer(member, torch.from_numpy(np.array(array)), persistent=False)
                self._members[name] = member

    def _call(self, i: int, fixed: Mapping[str, Array]) -> Call:
        index = self._index
        node = index.nodes[i]
        for name in (*node.input, *node.output):
            if name and name not in self._shapes:
                raise ExportError(f"value {name!r} has no fixed shape; fix the shapes of the graph's inputs")

        def read_constant(position: int) -> Array | None:
            return fixed.get(node.input[position])

        return Call(
            operator=node.op_type,
            name=index.names[i],
            attributes={a.name: _attribute(a) for a in node.attribute},
            read_constant=read_constant,
            shapes=tuple(self._shapes[name] if name else None for name in node.input),
            results=tuple(self._shapes[name] for name in node.output if name),
        )

    def _compiled(self, calls: Mapping[int, Call], fixed: Mapping[str, Array]) -> list[_Step]:
        index = self._index
        chains = {node: chain for chain in find_chains(index, calls, fixed) for node in chain.nodes}
        parts: list[tuple[Run, tuple[str, ...], tuple[str, ...]]] = []
        for i, call in calls.items():
            # Also of the nodes in chains: what PyTorch cannot do is refused here.
            run, chain = OPERATORS[call.operator](call), chains.get(i)
            if chain is None:
                parts.append((run, tuple(index.nodes[i].input), tuple(index.nodes[i].output)))
            elif i == chain.nodes[-1]:
                parts.append((chain.run, chain.reads, (chain.makes,)))
        last = {name: position for position, (_, reads, _) in enumerate(parts) for name in reads}
        kept = {"", *index.outputs, *self._members}
        return [
            _Step(run, reads, makes, tuple(n for n in dict.fromkeys(reads) if last[n] == position and n not in kept))
            for position, (run, reads, makes) in enumerate(parts)
        ]

    def _find_mixing(self, calls: Mapping[int, Call]) -> str | None:
        index = self._index
        carrying = set(index.inputs)
        for i, call in calls.items():
            carries = [name in carrying for name in index.nodes[i].input]
            if any(carries):
                shared = [name for name in index.nodes[i].input if name in index.inputs and not self._stacked(name)]
                if shared or mixes_frames(call, carries):
                    return call.name
                carrying.update(index.nodes[i].output)
        return None

    def _stacked(self, name: str) -> bool:
        """Whether an input is given frame by frame: it was traced with leading extent 1."""
        return self._shapes[name][:1] == (1,)

    def _feeds(self, inputs: Sequence[Tensor | Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            given = dict(inputs[0])
        elif len(inputs) == len(self.input_names):
            given = dict(zip(self.input_names, inputs, strict=True))  # type: ignore[arg-type]
        else:
            raise InputError(f"the graph takes {', '.join(self.input_names)}, but {len(inputs)} tensors were given")
        frames = 1
        for name in self.input_names:
            if name not in given:
                raise InputError(f"the graph needs input {name!r}; given are {', '.join(given) or 'none'}")
            shape, traced = tuple(given[name].shape), self._shapes[name]
            stacked = self._stacked(name)
            fits = len(shape) == len(traced) and (shape[1:] == traced[1:] if stacked else shape == traced)
            if not fits or (stacked and shape[0] not in (1, frames) and frames != 1):
                raise InputError(f"input {name!r} has shape {shape}, but the graph was traced with {traced}")
            if stacked:
                frames = max(frames, shape[0])
        return {name: given[name] for name in self.input_names}

    def _run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Tensor | None] = {name: getattr(self, member) for name, member in self._members.items()}
        values.update(feeds)
        values[""] = None
        for step in self._steps:
            result = step.run(*(values[name] for name in step.reads))
            if isinstance(result, Tensor):
                values[step.makes[0]] = result
            else:
                values.update(zip(step.makes, result, strict=False))
            for name in step.last:
                del values[name]
        return {name: value for name in self.output_names if (value := values[name]) is not None}

    def _repeated(self, name: str, value: Tensor, frames: int) -> Tensor:
        """An output of all frames; one that depends on no input was computed once."""
        shape = self._shapes[name]
        if not shape:
            return value.expand(frames)
        return value if value.shape[0] == frames * shape[0] else value.repeat(frames, *[1] * (len(shape) - 1))


def _chosen(index: GraphIndex, train: Collection[str] | Literal["all"]) -> tuple[str, ...]:
    """Names of the initializers to train, in the graph's order."""
    settings = {
        node.input[position]
        for node in index.nodes
        for position in SETTINGS.get(node.op_type, ())
        if position < len(node.input)
    }
    floats = {name for name, tensor in index.initializers.items() if tensor.data_type in _TRAINABLE}
    if train == "all":
        settings |= _placeholders(index)
        elements = {name: int(np.prod(index.initializers[name].dims)) for name in floats}
        return tuple(n for n in index.initializers if n in floats and n not in settings and elements[n] > 1)
    for name in train:
        if name not in floats:
            raise InputError(f"the graph has no float32 initializer {name!r} to train; name one of GraphIndex's")
        if name in settings:
            raise InputError(f"initializer {name!r} says how a node works, so it cannot be trained; leave it out")
    return tuple(name for name in index.initializers if name in set(train))


def _placeholders(index: GraphIndex) -> set[str]:
    """Scales of 1 and biases of 0 that a GroupNorm is exported with, shared by all of them; its own come afterwards."""
    found = set()
    for node in index.nodes:
        maker = index.producer.get(node.input[0]) if node.op_type == "InstanceNormalization" else None
        if maker is not None and index.nodes[maker].op_type == "Reshape":
            for name, value in zip(node.input[1:3], (1, 0), strict=True):
                if name in index.initializers and np.all(numpy_helper.to_array(index.initializers[name]) == value):
                    found.add(name)
    return found


def _check_supported(index: GraphIndex, fixed: Collection[str]) -> None:
    foreign = {
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        for node in index.nodes
        if node.output[0] not in fixed and (node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"))
    }
    if foreign:
        raise ExportError(f"the graph has operators that cannot be trained in PyTorch: {', '.join(sorted(foreign))}")


def _attribute(attribute: AttributeProto) -> object:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
