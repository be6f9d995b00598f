"""Whether a graph that was traced with one frame keeps frames apart when more are stacked along the leading axis.

The rule: a value *carries frames* when it depends on the graph's inputs. Its traced leading extent must be 1, and with
N frames it becomes N: frame n of every such value depends on frame n of the inputs alone. Whether that is true is
decided operator by operator below, from traced shapes and constants. A Reshape, say, moves elements in row-major order,
so it keeps frames apart whenever the leading extent is 1 on both sides, whatever numbers its target holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .calls import Call

__all__ = ["ELEMENTWISE", "mixes_frames"]

Carries = Sequence[bool]

ELEMENTWISE = frozenset(
    "Abs Add And Cast Ceil Clip Cos Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid "  # noqa: SIM905
    "HardSwish Identity LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu "
    "Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Tan Tanh Where Xor".split()
)
"""Operators that compute every element from those at the same place, with broadcasting."""

_PER_IMAGE = frozenset(
    "AveragePool BatchNormalization Conv ConvTranspose DepthToSpace GlobalAveragePool GlobalMaxPool "  # noqa: SIM905
    "GroupNormalization InstanceNormalization MaxPool SpaceToDepth".split()
)
_ROW_MAJOR = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
_ONE_AXIS = {"Concat": None, "LogSoftmax": -1, "Softmax": -1, "Split": 0, "TopK": -1, "LayerNormalization": -1}


def mixes_frames(call: Call, carries: Carries) -> bool:
    """Whether a node would mix frames, or read them along another axis.

    Args:
        call: The node.
        carries: For every input whether it depends on the graph's inputs; at least one does.
    """
    for shape, carried in zip(call.shapes, carries, strict=True):
        if carried and (not shape or shape[0] != 1):
            return True
    if any(not shape or shape[0] != 1 for shape in call.results):
        return True
    if call.operator in ELEMENTWISE:
        return _broadcast_mixes(call, carries)
    if call.operator in _PER_IMAGE or call.operator in _ROW_MAJOR:
        return any(carries[1:])
    if call.operator.startswith("Reduce"):
        return 0 in call.axes()
    if call.operator in _ONE_AXIS:
        rank = len(call.results[0])
        axis = call.attributes.get("axis", _ONE_AXIS[call.operator]) % rank
        # Of several inputs only Concat may read frames.
        others = any(carries[1:]) and call.operator != "Concat"
        short = any(shape is not None and shape[0] != 1 for shape in call.shapes) and call.operator == "Concat"
        return axis == 0 or others or short
    rule = _RULES.get(call.operator)
    return rule is None or rule(call, carries)


def _broadcast_mixes(call: Call, carries: Carries) -> bool:
    """The frames' axis must be the result's leading one, and nothing else may be there."""
    rank = len(call.results[0])
    for shape, carried in zip(call.shapes, carries, strict=True):
        if shape is None:
            continue
        if carried and len(shape) != rank:
            return True
        if not carried and len(shape) == rank and rank and shape[0] != 1:
            return True
    return False


def _gemm(call: Call, carries: Carries) -> bool:
    bias = call.shape(2) if call.has(2) else ()
    fits = len(bias) < 2 or bias[0] == 1
    return bool(carries[1] or call.attributes.get("transA", 0) or not fits)


def _matmul(call: Call, carries: Carries) -> bool:
    a, b = call.shape(0), call.shape(1)
    rank = len(call.results[0])
    if not carries[1]:
        # Rows of a may be frames only where b is one matrix for all.
        return len(a) != rank or (rank < 3 and len(b) != 2) or (len(b) == rank and rank > 2 and b[0] != 1)
    if not carries[0]:
        return len(b) != rank or rank < 3 or (len(a) == rank and a[0] != 1)
    return rank < 3 or len(a) != rank or len(b) != rank


def _gather(call: Call, carries: Carries) -> bool:
    axis = call.attributes.get("axis", 0) % len(call.shape(0))
    if all(carries):
        return True
    # Indices that carry frames put them where the axis was.
    return bool(axis == 0 if carries[0] else axis != 0)


def _gather_elements(call: Call, carries: Carries) -> bool:
    return bool(call.attributes.get("axis", 0) % len(call.shape(0)) == 0)


def _transpose(call: Call, carries: Carries) -> bool:
    return bool(call.attributes.get("perm", [1])[0] != 0)


def _slice(call: Call, carries: Carries) -> bool:
    axes = call.integers(3) if call.has(3) else list(range(len(call.integers(1))))
    return any(carries[1:]) or 0 in [axis % len(call.shape(0)) for axis in axes]


def _pad(call: Call, carries: Carries) -> bool:
    rank, given = len(call.shape(0)), call.integers(1)
    axes = [axis % rank for axis in call.integers(3)] if call.has(3) else list(range(rank))
    return any(given[k] or given[len(axes) + k] for k, axis in enumerate(axes) if axis == 0)


def _same_rank(call: Call, carries: Carries) -> bool:
    return any(carries[1:]) or len(call.shape(0)) != len(call.results[0])


def _sampled(call: Call, carries: Carries) -> bool:
    return any(shape is not None and shape[0] != 1 for shape in call.shapes)


_RULES: dict[str, Callable[[Call, Carries], bool]] = {
    "Expand": _same_rank,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gemm": _gemm,
    "GridSample": _sampled,
    "MatMul": _matmul,
    "Pad": _pad,
    "Resize": _same_rank,
    "Slice": _slice,
    "Tile": _same_rank,
    "Transpose": _transpose,
}
