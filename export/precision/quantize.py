"""Quantise a graph's convolutions and matrix products to int8 or fp8 (E4M3) by Q/DQ pairs, ranges from real frames.

The form is the one that TensorRT takes: symmetric scales and no zero point but 0, weights scaled per output channel and
stored quantised before a DequantizeLinear, biases left in floating point.
`quantize_static` of ONNX Runtime gives the same numbers for int8 (a test holds this to it). It is not used because it
scales fp8 by standard deviations, which loses most of E4M3's range, keeps every calibration frame's activations in
memory at once, and has to run the whole calibration again to leave one layer out, which the search for layers does
dozens of times.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ...engine.errors import ExportError
from ...engine.spec import Array
from ..graph.index import GraphIndex
from ..graph.run import open_session, run_session
from ..graph.surgery import copy_model, give_out
from .casting import elem_types, serving

__all__ = ["METHODS", "Histogram", "QuantType", "RangeCollector", "quantisable", "quantise", "scales"]

QuantType = Literal["int8", "fp8"]

METHODS: Mapping[QuantType, tuple[str, ...]] = {
    "int8": ("minmax", "percentile", "mse"),
    "fp8": ("minmax", "percentile"),
}
"""How a range may be made of a histogram: its end, the 99.99th percentile, or the least mean squared error.

fp8 has no least-error range: its steps grow with the value, so that clipping gains nothing but the zeros below the
smallest step.
"""

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_ELEM = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
_PERCENTILE = 0.9999
_BINS = 2048
_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class Histogram:
    """Distribution of a value's magnitudes over many frames, in 2048 bins whose width doubles when it must.

    Attributes:
        counts: int64 [2048]; bin k holds magnitudes from k to k + 1 widths.
        width: Of a bin; 0 while nothing but zeros was seen.
        largest: The largest magnitude.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(_BINS, np.int64)
        self.width = 0.0
        self.largest = 0.0

    def add(self, array: Array) -> None:
        """Count the magnitudes of `array`, any float dtype and shape; what is not finite is left out."""
        values = np.abs(array, dtype=np.float32).ravel()
        values = values[np.isfinite(values)]
        largest = float(values.max(initial=0.0))
        self.largest = max(self.largest, largest)
        if not largest:
            self.counts[0] += values.size
            return
        if not self.width:
            self.width = largest / _BINS
        while largest > self.width * _BINS:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(_BINS // 2, np.int64)])
            self.width *= 2
        # Several times faster than np.histogram. The largest value of all falls on the end of the last bin.
        places = np.minimum((values * np.float32(1 / self.width)).astype(np.int32), _BINS - 1)
        self.counts += np.bincount(places, minlength=_BINS)

    def range(self, method: str, kind: QuantType) -> float:
        """The magnitude that the largest quantised value is to stand for; 1 for a value that is always 0.

        Raises:
            ExportError: If `kind` has no such method.
        """
        if method not in METHODS[kind]:
            raise ExportError(f"{kind} has no range {method!r}; it has {', '.join(METHODS[kind])}")
        if not self.width:
            return 1.0
        if method == "minmax":
            return self.largest
        if method == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            return min(self.largest, float(np.searchsorted(share, _PERCENTILE) + 1) * self.width)
        centres = (np.arange(_BINS) + 0.5) * self.width
        candidates = self.largest * np.linspace(0.1, 1.0, 91)
        steps = candidates[:, None] / _LARGEST[kind]
        restored = np.minimum(np.round(centres / steps), _LARGEST[kind]) * steps
        return float(candidates[np.argmin(((restored - centres) ** 2) @ self.counts)])


@dataclass(frozen=True)
class _Target:
    """One node to quantise: the value and the constant that it multiplies."""

    node: int
    value: str
    weight: str
    axis: int


def quantisable(model: ModelProto) -> tuple[str, ...]:
    """Names of the nodes that multiply a computed float32 value by a float32 constant (`GraphIndex.names`)."""
    index = GraphIndex(model)
    return tuple(index.names[target.node] for target in _targets(index))


class RangeCollector:
    """Counts what goes into a graph's quantisable nodes, over as many runs as it is given.

    Args:
        model: The float32 graph, before any quantisation.

    Attributes:
        histograms: Value name -> distribution.
    """

    def __init__(self, model: ModelProto) -> None:
        index = GraphIndex(model)
        self.histograms = {target.value: Histogram() for target in _targets(index)}
        self._inner = [name for name in self.histograms if name not in index.inputs]
        self._session = open_session(give_out(model, self._inner))

    def add(self, feeds: Mapping[str, Array]) -> None:
        """Run the graph once and count."""
        values = dict(feeds) | (run_session(self._session, feeds, self._inner) if self._inner else {})
        for name, histogram in self.histograms.items():
            histogram.add(values[name])


def scales(histograms: Mapping[str, Histogram], kind: QuantType, method: str) -> dict[str, float]:
    """Scale of every value: what one step (int8), or the number 1 (fp8), stands for."""
    return {name: histogram.range(method, kind) / _LARGEST[kind] for name, histogram in histograms.items()}


def quantise(
    model: ModelProto, kind: QuantType, value_scales: Mapping[str, float], nodes: Collection[str]
) -> ModelProto:
    """Put Q/DQ pairs before the inputs of some nodes, and store their weights quantised.

    Args:
        model: A float32 graph, in normal form.
        kind: What to quantise to.
        value_scales: From `scales`; holds the value of every node in `nodes`.
        nodes: Names from `quantisable`.

    Returns:
        A new model, still float32 outside the pairs (`casting.cast_model` takes it further).
    """
    index = GraphIndex(model)
    targets = {target.node: target for target in _targets(index) if index.names[target.node] in nodes}
    infos = {value.name: value for value in (*model.graph.value_info, *model.graph.input)}
    fresh = copy_model(model)
    nodes_out: list[NodeProto] = []
    pairs: dict[str, str] = {}
    weights: dict[str, str] = {}
    zero = numpy_helper.from_array(np.zeros((), helper.tensor_dtype_to_np_dtype(_ELEM[kind])), f"quantised.{kind}.zero")
    added: list[TensorProto] = [zero] if targets else []
    described: list[ValueInfoProto] = []

    def describe(like: str, name: str, elem: int) -> None:
        if like in infos:
            info = ValueInfoProto()
            info.CopyFrom(infos[like])
            info.name, info.type.tensor_type.elem_type = name, elem
            described.append(info)

    for number, node in enumerate(fresh.graph.node):
        target = targets.get(number)
        if target is not None:
            if target.value not in pairs:
                scale = np.array(value_scales[target.value], np.float32)
                added.append(numpy_helper.from_array(scale, f"{target.value}.scale"))
                quantised, restored = f"{target.value}.{kind}", f"{target.value}.restored"
                inputs = [f"{target.value}.scale", zero.name]
                nodes_out.append(_made("QuantizeLinear", [target.value, *inputs], quantised, node))
                nodes_out.append(_made("DequantizeLinear", [quantised, *inputs], restored, node))
                describe(target.value, quantised, _ELEM[kind])
                describe(target.value, restored, TensorProto.FLOAT)
                pairs[target.value] = restored
            if target.weight not in weights:
                restored = f"{target.weight}.restored"
                tensor = index.initializers[target.weight]
                parts = _quantised_weight(tensor, kind, target.axis)
                added.extend(parts)
                names = [part.name for part in parts]
                nodes_out.append(_made("DequantizeLinear", names, restored, node, axis=target.axis))
                described.append(helper.make_tensor_value_info(restored, TensorProto.FLOAT, list(tensor.dims)))
                weights[target.weight] = restored
            for k, name in enumerate(node.input):
                node.input[k] = pairs[name] if name == target.value else weights.get(name, name) if k == 1 else name
        nodes_out.append(node)
    del fresh.graph.node[:]
    fresh.graph.node.extend(nodes_out)
    read = {name for node in nodes_out for name in node.input} | set(index.outputs)
    read |= {name for number in range(len(index.nodes)) for name in index.reads[number] if number not in targets}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del fresh.graph.initializer[:]
    fresh.graph.initializer.extend([*kept, *added])
    fresh.graph.value_info.extend(described)
    return fresh


def _targets(index: GraphIndex) -> list[_Target]:
    types = elem_types(index.model)
    found = []
    for number, node in enumerate(index.nodes):
        if node.op_type not in _OPERATORS or len(node.input) < 2 or number in index.constant:
            continue
        value, weight = node.input[0], node.input[1]
        tensor = index.initializers.get(weight)
        if tensor is None or len(tensor.dims) < 2 or types.get(value) != TensorProto.FLOAT:
            continue
        if tensor.data_type == TensorProto.FLOAT:
            found.append(_Target(number, value, weight, _channel_axis(node, len(tensor.dims))))
    return found


def _channel_axis(node: NodeProto, rank: int) -> int:
    """The axis of the weight that counts output channels (of a group, for a transposed convolution)."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if transposed else rank - 1


def _quantised_weight(tensor: TensorProto, kind: QuantType, axis: int) -> list[TensorProto]:
    """The weight's quantised values, and their scales, one a channel.

    A zero point is left out: TensorRT takes none but 0, and 0 is the default.
    """
    array = numpy_helper.to_array(tensor).astype(np.float32)
    largest = np.abs(array).max(axis=tuple(k for k in range(array.ndim) if k != axis))
    scale = (np.where(largest > 0, largest, 1.0) / _LARGEST[kind]).astype(np.float32)
    steps = array / scale.reshape([-1 if k == axis else 1 for k in range(array.ndim)])
    if kind == "int8":
        steps = np.clip(np.rint(steps), -127, 127)
    values = steps.astype(helper.tensor_dtype_to_np_dtype(_ELEM[kind]))
    return [
        numpy_helper.from_array(values, f"{tensor.name}.{kind}"),
        numpy_helper.from_array(scale, f"{tensor.name}.scale"),
    ]


def _made(kind: str, inputs: list[str], output: str, like: NodeProto, **attributes: Any) -> NodeProto:
    return serving(like, helper.make_node(kind, inputs, [output], name=f"{kind} {output}", **attributes))
