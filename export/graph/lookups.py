"""Look-ups of nearest neighbours in a graph: which nodes decide what is found, and so need their digits.

A squared distance is a small difference of large sums. float16 has steps of 1/8 at 200 and bfloat16 of 1, where whole
distances between neighbours are about 1: entries would change places, and weights made of distances with them.
"""

from __future__ import annotations

from .index import GraphIndex

__all__ = ["lookup_nodes"]

# What distances of vectors are made of. Poolings and convolutions, which make the vectors, end the walk back: an error
# of theirs is one of the vector, small beside the distance, and not of a difference.
_DISTANCE_OPS = frozenset(
    "Abs Add Cast Concat Div Einsum Flatten Gemm Identity MatMul Mul Neg Pow ReduceSum ReduceSumSquare Reshape Sqrt "  # noqa: SIM905
    "Squeeze Sub Sum Transpose Unsqueeze Where".split()
)
# From distances to weights, which are small numbers again.
_WEIGHT_OPS = frozenset(
    "Add Cast Div Exp Identity Mul Neg Reshape Softmax Squeeze Sub Transpose Unsqueeze Where".split()  # noqa: SIM905
)
_WEIGHTS = frozenset(["Exp", "Softmax"])


def lookup_nodes(index: GraphIndex) -> frozenset[str]:
    """Names of the nodes that compute what a TopK compares, the TopK itself, and what makes weights of its values."""
    found = {number for number, node in enumerate(index.nodes) if node.op_type == "TopK"}
    back = [index.nodes[number].input[0] for number in found]
    ahead = [index.nodes[number].output[0] for number in found]
    while back:
        number = index.producer.get(back.pop(), -1)
        if number < 0 or number in found or index.nodes[number].op_type not in _DISTANCE_OPS:
            continue
        found.add(number)
        back.extend(index.reads[number])
    while ahead:
        for number in index.consumers.get(ahead.pop(), ()):
            kind = index.nodes[number].op_type
            if number in found or kind not in _WEIGHT_OPS:
                continue
            found.add(number)
            if kind not in _WEIGHTS:
                ahead.extend(index.nodes[number].output)
    return frozenset(index.names[number] for number in found)
