"""Split a model at a cut into producer and consumer, and prove that nothing changed.

The producer makes the cut's tensors; the plain consumer is the model's own remaining layers. With a cache of the same
frame the two give the whole model's output bit for bit, which `check_exact` holds them to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, helper

from ...engine.bundle.manifest import CACHE_PREFIX
from ...engine.errors import ExportError, InputError
from ...engine.spec import Array, TensorSpec
from ..graph.index import GraphIndex, unused_name
from ..graph.run import open_session, run_session
from ..graph.surgery import extract, rename_values

__all__ = ["SplitModels", "check_exact", "split"]

ORIGIN_KEY = "warpcache.cache."


@dataclass(frozen=True)
class SplitModels:
    """The two halves of a model.

    Attributes:
        producer: Generator inputs (those it needs) -> cache tensors.
        plain: Cache tensors, generator inputs (those it still needs) -> all outputs of the generator.
        cache: The cache tensors, in order; names begin with ``"cache."``.
        origins: Cache tensor name -> name of the value in the whole model.
    """

    producer: ModelProto
    plain: ModelProto
    cache: tuple[TensorSpec, ...]
    origins: Mapping[str, str]


def split(model: ModelProto, names: Sequence[str], *, anchors: Sequence[str] = ()) -> SplitModels:
    """Split `model` at the values `names`.

    Args:
        model: The whole, in normal form (`graph.normalise`).
        names: Names of the values to cache; an enumerated cut's `names`.
        anchors: Those that the consumer passes through a 1x1 max pooling, which keeps ONNX Runtime's kernels the same
            as in the whole (see `fusion`); an enumerated cut's `anchors`.

    Returns:
        Both halves. A cache tensor is named ``cache.<value name>``; the models' metadata maps it back to the value.

    Raises:
        InputError: If a name is no computed value of the model, or no name is given.
        ExportError: If a value's shape is not fixed.
    """
    index = GraphIndex(model)
    if not names:
        raise InputError("the cut names no tensor; name at least one value to split at")
    specs = []
    for name in names:
        if name not in index.producer or index.is_constant(name):
            raise InputError(f"the model computes no value {name!r} from its inputs; name another one to split at")
        if name not in index.specs:
            raise ExportError(f"value {name!r} has no fixed shape, so it cannot be cached; cut at another one")
        specs.append(index.specs[name])
    renames = _cache_names(names, taken={*index.producer, *index.inputs, *index.initializers})
    made = index.closure(names)
    producer = extract(model, [name for name in index.inputs if _reads_input(index, made, name)], list(names))
    producer = rename_values(producer, renames)
    rest = index.closure(index.outputs, stop=names)
    inputs = [name for name in index.inputs if _reads_input(index, rest, name)]
    plain = extract(model, [*names, *inputs], index.outputs, renames=renames)
    for name in anchors:
        _anchor(plain, renames[name])
    origins = {renames[name]: name for name in names}
    for half in (producer, plain):
        for cache, name in origins.items():
            half.metadata_props.add(key=ORIGIN_KEY + cache.removeprefix(CACHE_PREFIX), value=name)
    cache_specs = tuple(TensorSpec(renames[spec.name], spec.dtype, spec.shape) for spec in specs)
    return SplitModels(producer, plain, cache_specs, origins)


def check_exact(model: ModelProto, parts: SplitModels, feeds: Mapping[str, Array]) -> None:
    """Check that consumer(producer(x), x) is the whole model's output, bit for bit.

    All three run with ONNX Runtime's default settings, as a user's engine would.

    Args:
        model: The whole.
        parts: Its halves.
        feeds: One frame's inputs, by name.

    Raises:
        ExportError: If an output differs in shape, dtype or a single bit.
        InputError: If `feeds` lacks an input.
    """
    expected = run_session(open_session(model), feeds)
    cache = run_session(open_session(parts.producer), feeds)
    actual = run_session(open_session(parts.plain), {**feeds, **cache})
    for name, want in expected.items():
        if name not in actual:
            raise ExportError(f"the consumer does not give output {name!r}; the model is split wrongly")
        got = actual[name]
        if got.dtype != want.dtype or got.shape != want.shape:
            raise ExportError(
                f"output {name!r} of the cut model is {got.dtype} {got.shape}, "
                f"but the whole gives {want.dtype} {want.shape}"
            )
        # Bytes, not values: NaN equals itself and -0.0 is not 0.0.
        if got.tobytes() != want.tobytes():
            difference = np.nanmax(np.abs(got.astype(np.float64) - want.astype(np.float64)))
            raise ExportError(
                f"output {name!r} of the cut model differs from the whole by up to {difference:.3g} with a fresh "
                f"cache; the cut {', '.join(parts.origins.values())} lies inside what ONNX Runtime fuses, so choose "
                "a tensor before or after it"
            )


def _reads_input(index: GraphIndex, nodes: frozenset[int], name: str) -> bool:
    return any(reader in nodes for reader in index.consumers.get(name, ()))


def _anchor(plain: ModelProto, cache: str) -> None:
    """Let every reader of a cache tensor [N, C, H, W] read it through a pooling of single elements instead."""
    anchored = f"{cache}.anchored"
    for node in plain.graph.node:
        # Handing an output through needs no kernel, so nothing to keep the same.
        if node.op_type != "Identity":
            for k, name in enumerate(node.input):
                if name == cache:
                    node.input[k] = anchored
    pool = helper.make_node("MaxPool", [cache], [anchored], name=f"node_{anchored}", kernel_shape=[1, 1])
    info = next(value for value in plain.graph.input if value.name == cache)
    entry = plain.graph.value_info.add()
    entry.CopyFrom(info)
    entry.name = anchored
    plain.graph.node.insert(0, pool)


def _cache_names(names: Sequence[str], taken: set[str]) -> dict[str, str]:
    stems = {name: re.sub(r"[^A-Za-z0-9_.-]", "_", name).removeprefix(CACHE_PREFIX) for name in names}
    return {name: unused_name(CACHE_PREFIX + stem, taken) for name, stem in stems.items()}
