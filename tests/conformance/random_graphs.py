"""Random generators: small graphs of what image networks are made of, for Hypothesis to draw and to shrink."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

INPUT_SHAPE = (1, 8, 8, 8)
# 5 fills no block of the executor's blocked layout, 8 fills one on most processors, 16 on all.
_CHANNELS = (5, 8, 16)
_ACTIVATIONS = ("Abs", "Elu", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Softplus", "Tanh")

Shape = tuple[int, ...]
Draw = Callable[..., object]


class Builder:
    """A graph that grows: every value is float32, images are [1, C, H, W]."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.nodes: list[object] = []
        self.tensors: list[TensorProto] = []
        self.images: dict[str, Shape] = {"x": INPUT_SHAPE}
        self._weights = np.random.default_rng(3)

    def image(self, fits: Callable[[Shape], bool] = lambda shape: True) -> str | None:
        """Any image there is that fits; None where none does."""
        names = [name for name, shape in self.images.items() if fits(shape)]
        # From the newest on, so that what Hypothesis shrinks to is a chain.
        return self.draw(st.sampled_from(names[::-1])) if names else None

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weights(self, *shape: int, scale: float = 0.3) -> str:
        return self.constant((self._weights.standard_normal(shape) * scale).astype(np.float32))

    def positive(self, *shape: int) -> str:
        return self.constant(self._weights.uniform(0.5, 1.5, shape).astype(np.float32))

    def node(self, operator: str, inputs: list[str], **attributes: object) -> str:
        """A node whose result blocks do not read again unless it is made an image."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"node_{name}", **attributes))
        return name

    def model(self) -> ModelProto:
        """What was built; every value that nothing reads is an output."""
        read = {name for node in self.nodes for name in node.input}
        made = [node.output[0] for node in self.nodes]
        outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in made if n not in read]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, INPUT_SHAPE)
        graph = helper.make_graph(self.nodes, "random", [x], outputs, self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@st.composite
def models(draw: Draw) -> ModelProto:
    """Graphs of 2 to 9 blocks, each reading any image that is there."""
    builder = Builder(draw)
    for block in draw(st.lists(st.sampled_from(_BLOCKS), min_size=2, max_size=9)):
        block(builder)
    # Blocks that find no image of their size add nothing.
    assume(builder.nodes)
    return builder.model()


def _convolution(b: Builder) -> None:
    x = b.image()
    _, channels, height, width = b.images[x]
    kernel, depthwise = b.draw(st.sampled_from((1, 3))), b.draw(st.booleans())
    out = channels if depthwise else b.draw(st.sampled_from(_CHANNELS))
    inputs = [x, b.weights(out, 1 if depthwise else channels, kernel, kernel)]
    if b.draw(st.booleans()):
        inputs.append(b.weights(out))
    y = b.node("Conv", inputs, pads=[kernel // 2] * 4, group=channels if depthwise else 1)
    b.images[y] = (1, out, height, width)


def _padded_convolution(b: Builder) -> None:
    x = b.image(lambda shape: shape[2] >= 4)
    if x is not None:
        _, channels, height, width = b.images[x]
        mode = b.draw(st.sampled_from(("reflect", "edge", "constant")))
        padded = b.node("Pad", [x, b.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))], mode=mode)
        b.images[b.node("Conv", [padded, b.weights(8, channels, 3, 3)])] = (1, 8, height, width)


def _up(b: Builder) -> None:
    x = b.image(lambda shape: shape[2] <= 4)
    if x is not None:
        _, channels, height, width = b.images[x]
        mode = b.draw(st.sampled_from(("nearest", "linear", "cubic", "transposed")))
        if mode == "transposed":
            channels, weights = 8, b.weights(channels, 8, 4, 4)
            y = b.node("ConvTranspose", [x, weights], strides=[2, 2], pads=[1, 1, 1, 1])
        else:
            y = b.node("Resize", [x, "", b.constant(np.array([1, 1, 2, 2], np.float32))], mode=mode)
        b.images[y] = (1, channels, 2 * height, 2 * width)


def _down(b: Builder) -> None:
    x = b.image(lambda shape: shape[2] >= 8)
    if x is not None:
        _, channels, height, width = b.images[x]
        operator = b.draw(st.sampled_from(("AveragePool", "MaxPool")))
        y = b.node(operator, [x], kernel_shape=[2, 2], strides=[2, 2])
        b.images[y] = (1, channels, height // 2, width // 2)


def _activation(b: Builder) -> None:
    x = b.image()
    kind = b.draw(st.sampled_from((*_ACTIVATIONS, "clip", "silu")))
    if kind == "clip":
        y = b.node("Clip", [x, b.constant(np.float32(0)), b.constant(np.float32(6))])
    elif kind == "silu":
        gate = b.node("Sigmoid", [x])
        b.images[gate] = b.images[x]
        y = b.node("Mul", [x, gate])
    else:
        y = b.node(kind, [x])
    b.images[y] = b.images[x]


def _pair(b: Builder) -> None:
    x = b.image()
    shape = b.images[x]
    y = b.image(lambda other: other == shape)
    b.images[b.node(b.draw(st.sampled_from(("Add", "Sum", "Mul", "Sub", "Max"))), [x, y])] = shape


def _constant_pair(b: Builder) -> None:
    x = b.image()
    other = b.weights(1, b.images[x][1], 1, 1) if b.draw(st.booleans()) else b.constant(np.float32(1.5))
    b.images[b.node(b.draw(st.sampled_from(("Add", "Mul"))), [x, other])] = b.images[x]


def _concat(b: Builder) -> None:
    x = b.image()
    _, channels, *size = b.images[x]
    y = b.image(lambda other: list(other[2:]) == size)
    b.images[b.node("Concat", [x, y], axis=1)] = (1, channels + b.images[y][1], *size)


def _normalisation(b: Builder) -> None:
    x = b.image()
    channels = b.images[x][1]
    if b.draw(st.booleans()):
        y = b.node("InstanceNormalization", [x, b.weights(channels), b.weights(channels)])
    else:
        moments = [b.weights(channels), b.positive(channels)]
        y = b.node("BatchNormalization", [x, b.positive(channels), b.weights(channels), *moments])
    b.images[y] = b.images[x]


def _excitation(b: Builder) -> None:
    x = b.image()
    gate = b.node("Sigmoid", [b.node("GlobalAveragePool", [x])])
    b.images[b.node("Mul", [x, gate])] = b.images[x]


def _transformer(b: Builder) -> None:
    x = b.image()
    _, channels, height, width = b.images[x]
    tokens = b.node("Reshape", [x, b.constant(np.array([1, channels, height * width]))])
    tokens = b.node("Transpose", [tokens], perm=[0, 2, 1])
    mixed = b.node("LayerNormalization", [tokens, b.weights(channels), b.weights(channels)])
    mixed = b.node("MatMul", [mixed, b.weights(channels, channels)])
    mixed = b.node("Add", [mixed, b.weights(channels)])
    if b.draw(st.booleans()):
        mixed = b.node("Gelu", [mixed])
    else:
        scores = b.node("MatMul", [mixed, b.node("Transpose", [mixed], perm=[0, 2, 1])])
        scores = b.node("Mul", [scores, b.constant(np.float32(channels**-0.5))])
        mixed = b.node("MatMul", [b.node("Softmax", [scores], axis=-1), mixed])
    tokens = b.node("Transpose", [b.node("Add", [tokens, mixed])], perm=[0, 2, 1])
    y = b.node("Reshape", [tokens, b.constant(np.array([1, channels, height, width]))])
    b.images[y] = b.images[x]


# What stands here more than once is drawn more often.
_BLOCKS = (
    _convolution,
    _convolution,
    _convolution,
    _activation,
    _activation,
    _pair,
    _pair,
    _constant_pair,
    _normalisation,
    _concat,
    _padded_convolution,
    _down,
    _up,
    _excitation,
    _transformer,
)
